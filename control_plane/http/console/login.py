"""Log in, log out, and choose a password with a one-time URL. Without a script, as every page."""

from collections.abc import Mapping
from typing import Any

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route

from control_plane.errors import Invalid, NotFound, Refused
from control_plane.http.console.forms import HOME, LOGIN, form, local
from control_plane.http.console.shell import Pages, url
from control_plane.http.cookies import SESSION
from control_plane.http.guard import CrossSite, same_origin
from control_plane.http.identity import anonymous, cookies_of, plane_of, principal_of, set_session
from control_plane.http.requests import REQUEST_ID, route_of
from control_plane.services import accounts, login_links, logins, setups
from control_plane.services.setups import Choice


class Login:
    """The pages that need no login."""

    def __init__(self, pages: Pages) -> None:
        self._pages = pages

    def routes(self) -> list[Route]:
        return [
            Route(LOGIN, self.login, methods=["GET", "POST"]),
            Route("/console/logout", self.logout, methods=["POST"]),
            Route("/console/setup", self.setup, methods=["GET", "POST"]),
        ]

    async def login(self, request: Request) -> Response:
        """The form of a login, and the login: by password, or by a one-time URL."""
        route_of(request.scope)
        await self._pages.ready()
        if "token" in request.query_params:
            return await self._by_link(request, request.query_params["token"])
        target = local(request.query_params.get("next"))
        if request.method != "POST":
            if await principal_of(request) is not None:
                return RedirectResponse(target, 303)
            return self._login_form(request)
        given, plane = await form(request), plane_of(request)
        email = given.text("email")[:320]
        try:
            begun = await logins.log_in(
                plane,
                anonymous(request),
                email,
                given.values.get("password", ""),
                request.headers.get("user-agent"),
                cookies_of(request).read(request.scope, SESSION),
            )
        except Refused as exc:
            return self._login_form(request, email, exc)
        set_session(request, begun.secret)
        return RedirectResponse(target, 303)

    async def _by_link(self, request: Request, secret: str) -> Response:
        """GET and HEAD leave the URL as it is: programs that look at links before people do must not use them up."""
        plane = plane_of(request)
        try:
            if request.method != "POST":
                guest = await login_links.find(plane, secret)
                action = url(LOGIN, token=secret)
                return self._render(request, "login_link.html", "Sign in", action=action, guest=guest)
            agent, replaced = request.headers.get("user-agent"), cookies_of(request).read(request.scope, SESSION)
            begun = await login_links.log_in(plane, anonymous(request), secret, agent, replaced)
        except NotFound:
            return self.gone(request)
        set_session(request, begun.secret)
        return RedirectResponse(HOME, 303)

    async def logout(self, request: Request) -> Response:
        route_of(request.scope)
        principal = await principal_of(request)
        if principal is not None and principal.session is not None:
            act = anonymous(request)._replace(principal=principal)
            await accounts.end_session(plane_of(request), act, principal.session)
        set_session(request, None)
        return RedirectResponse(LOGIN, 303)

    async def setup(self, request: Request) -> Response:
        """The form behind a one-time URL, and what becomes of it: a user with a password, who logs in then."""
        route_of(request.scope)
        plane, secret = plane_of(request), request.query_params.get("token", "")
        refuse_other_sites(request)
        try:
            row = await setups.find(plane, secret)
            known = {} if row.user is None else {"name": row.name, "email": row.email}
            if row.user is None and plane.settings.admin_email:
                known = {"email": plane.settings.admin_email}
            if request.method != "POST":
                return self._setup_form(request, secret, known, row.user is None)
            given = (await form(request)).values
            names = ("name", "email", "password", "password_confirm")
            try:
                await setups.finish(plane, anonymous(request), secret, Choice(*(given.get(name, "") for name in names)))
            except Invalid as exc:
                return self._setup_form(request, secret, known if row.user else given, row.user is None, exc)
        except NotFound:
            return self.gone(request)
        return RedirectResponse(LOGIN, 303)

    def gone(self, request: Request) -> Response:
        """Of a one-time URL that leads nowhere."""
        text = "This link has been used, is too old, or never was one. Ask for another."
        return self.message(request, "Not found", text, 404)

    def message(
        self, request: Request, title: str, text: str, status: int, headers: Mapping[str, str] | None = None
    ) -> Response:
        """A page that says one thing, with the way to the login."""
        return self._render(request, "message.html", title, status, headers, text=text)

    def _login_form(self, request: Request, email: str = "", error: Refused | None = None) -> Response:
        settings = plane_of(request).settings
        query = {"next": local(request.query_params.get("next"))}
        return self._render(
            request,
            "login.html",
            "Sign in",
            error.status if error else 200,
            error.headers if error else None,
            action=url(LOGIN, **query),
            sso=None if settings.oidc_issuer is None else url("/console/oidc/start", **query),
            by_password=settings.password_login == "on",
            email=email,
            problem=error,
        )

    def _setup_form(
        self,
        request: Request,
        secret: str,
        values: Mapping[str, str | None],
        first: bool,
        error: Refused | None = None,
    ) -> Response:
        return self._render(
            request,
            "setup.html",
            "First admin" if first else "Choose a password",
            error.status if error else 200,
            action=url("/console/setup", token=secret),
            values={name: values.get(name) or "" for name in ("name", "email")},
            first=first,
            problem=error,
        )

    def _render(
        self,
        request: Request,
        template: str,
        title: str,
        status: int = 200,
        headers: Mapping[str, str] | None = None,
        **context: Any,
    ) -> Response:
        known = {"title": title, "request_id": request.scope[REQUEST_ID], **context}
        return self._pages.render(template, known, status, headers)


def refuse_other_sites(request: Request) -> None:
    """Of forms behind a one-time URL: nobody is logged in, so a program may send one, another site's page not.

    Raises CrossSite.
    """
    origin = plane_of(request).settings.origin
    by_browser = "sec-fetch-site" in request.headers or "origin" in request.headers
    if request.method == "POST" and by_browser and not same_origin(request.headers, origin):
        raise CrossSite(origin)
