"""Pages of the login by an OpenID provider: one sends the browser there, the other takes it back."""

import re
import secrets

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route

from control_plane.clients.openid import Provider, ProviderAway
from control_plane.errors import Refused
from control_plane.http.console.forms import local
from control_plane.http.console.login import Login
from control_plane.http.cookies import LOGIN, SESSION
from control_plane.http.identity import SET_COOKIES, anonymous, cookies_of, plane_of, set_session
from control_plane.http.requests import route_of
from control_plane.services import openid

_TITLE = "Not signed in"
_SECRET = re.compile(r"[\w-]{43}", re.ASCII)


def routes(provider: Provider, pages: Login) -> list[Route]:
    async def start(request: Request) -> Response:
        route_of(request.scope)
        # One for all tabs: what each began with is in the database.
        known = cookies_of(request).read(request.scope, LOGIN) or ""
        browser = known if _SECRET.fullmatch(known) else secrets.token_urlsafe(32)
        try:
            url = await openid.begin(plane_of(request), provider, browser, local(request.query_params.get("next")))
        except ProviderAway:
            return _away(pages, request)
        seconds = openid.LIFETIME // 1000
        request.scope[SET_COOKIES].append(cookies_of(request).write(LOGIN, browser, seconds))
        return RedirectResponse(url, 303)

    async def callback(request: Request) -> Response:
        route_of(request.scope)
        query, cookies = request.query_params, cookies_of(request)
        browser, session = (cookies.read(request.scope, name) for name in (LOGIN, SESSION))
        answer = openid.Answer(query.get("state", ""), query.get("code", ""), query.get("error", ""), query.get("iss"))
        agent = request.headers.get("user-agent")
        try:
            begun, target = await openid.finish(
                plane_of(request), anonymous(request), provider, browser or "", answer, agent, session
            )
        except ProviderAway:
            return _away(pages, request)
        except Refused as exc:
            return pages.message(request, _TITLE, "The login did not come about. Sign in again.", exc.status)
        set_session(request, begun.secret)
        return RedirectResponse(target, 303)

    return [Route("/console/oidc/start", start), Route("/console/oidc/callback", callback)]


def _away(pages: Login, request: Request) -> Response:
    text = "The provider of logins does not answer. Try again."
    return pages.message(request, _TITLE, text, 503, {"Retry-After": "5"})
