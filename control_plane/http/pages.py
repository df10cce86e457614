"""The first pages of the console: log in, and choose a password with a one-time URL. They work without a script."""

import base64
import hashlib
from collections.abc import Mapping
from html import escape
from urllib.parse import parse_qsl, urlencode

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route

from control_plane.errors import Invalid, NotFound, Refused
from control_plane.http.cookies import SESSION
from control_plane.http.guard import CrossSite, same_origin
from control_plane.http.identity import anonymous, cookies_of, plane_of, principal_of, set_session
from control_plane.http.requests import route_of
from control_plane.services import accounts, logins, setups
from control_plane.services.setups import Choice

HOME, LOGIN = "/console/", "/console/login"
_STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:24rem;margin:4rem auto;padding:0 1rem}"
    "label{display:block;margin:1rem 0 .25rem}input{box-sizing:border-box;width:100%;padding:.5rem;font:inherit}"
    "button{margin-top:1.5rem;padding:.5rem 1.5rem;font:inherit}.problem{color:#a40000}"
)


def content_policy(style: str) -> str:
    """What a page with this one style sheet, and nothing else, may load: nothing."""
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    return (
        f"default-src 'none'; style-src 'sha256-{digest}'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
    )


_POLICY = content_policy(_STYLE)


async def login(request: Request) -> Response:
    """The form of a login, and the login."""
    route_of(request.scope)
    target = local(request.query_params.get("next"))
    if request.method == "GET":
        if await principal_of(request) is not None:
            return RedirectResponse(target, 303)
        return _login_form(request)
    given, plane = await form(request), plane_of(request)
    try:
        begun = await logins.log_in(
            plane,
            anonymous(request),
            given.get("email", "")[:320],
            given.get("password", ""),
            request.headers.get("user-agent"),
            cookies_of(request).read(request.scope, SESSION),
        )
    except Refused as exc:
        return _login_form(request, given.get("email", ""), exc)
    set_session(request, begun.secret)
    return RedirectResponse(target, 303)


async def logout(request: Request) -> Response:
    route_of(request.scope)
    principal = await principal_of(request)
    if principal is not None and principal.session is not None:
        act = anonymous(request)._replace(principal=principal)
        await accounts.end_session(plane_of(request), act, principal.session)
    set_session(request, None)
    return RedirectResponse(LOGIN, 303)


async def setup(request: Request) -> Response:
    """The form behind a one-time URL, and what becomes of it: a user with a password, who logs in then."""
    route_of(request.scope)
    plane, secret = plane_of(request), request.query_params.get("token", "")
    # The secret is in the URL, and nobody is logged in by it: a program may send the form, another site's page not.
    by_browser = "sec-fetch-site" in request.headers or "origin" in request.headers
    if request.method == "POST" and by_browser and not same_origin(request.headers, plane.settings.origin):
        raise CrossSite(plane.settings.origin)
    try:
        row = await setups.find(plane, secret)
        known = {} if row.user is None else {"name": row.name, "email": row.email}
        if row.user is None and plane.settings.admin_email:
            known = {"email": plane.settings.admin_email}
        if request.method == "GET":
            return _setup_form(secret, known, row.user is None)
        given = await form(request)
        names = ("name", "email", "password", "password_confirm")
        try:
            await setups.finish(plane, anonymous(request), secret, Choice(*(given.get(name, "") for name in names)))
        except Invalid as exc:
            return _setup_form(secret, known if row.user else given, row.user is None, exc)
    except NotFound:
        text = "<p>This link has been used, is too old, or never was one. Ask for another.</p>"
        return page("Not found", text, 404)
    return RedirectResponse(LOGIN, 303)


ROUTES: tuple[Route, ...] = (
    Route(LOGIN, login, methods=["GET", "POST"]),
    Route("/console/logout", logout, methods=["POST"]),
    Route("/console/setup", setup, methods=["GET", "POST"]),
)


async def form(request: Request) -> dict[str, str]:
    """The fields of a form; of one that is given twice the last. Raises Refused."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/x-www-form-urlencoded":
        raise Refused(415, "unsupported_media_type", "Send the form as application/x-www-form-urlencoded.")
    try:
        text = (await request.body()).decode()
        found = dict(parse_qsl(text, keep_blank_values=True, max_num_fields=50, errors="strict"))
    except ValueError:
        found = None
    # NUL: PostgreSQL has no such text, and nobody has such a name.
    if found is None or any("\0" in value for value in found.values()):
        raise Refused(400, "bad_request", "The form cannot be read.")
    return found


def local(target: str | None) -> str:
    """A page of the console to go to; anything else is its first page."""
    if target is None or not target.startswith("/console") or target.startswith("//") or "\\" in target:
        return HOME
    return target if target.isascii() and target.isprintable() else HOME


def page(title: str, body: str, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """`body`: HTML, in which every value is escaped."""
    html = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style></head>'
        f"<body><h1>{escape(title)}</h1>{body}</body></html>"
    )
    return Response(html, status, {"Content-Security-Policy": _POLICY, **(headers or {})}, media_type="text/html")


def _login_form(request: Request, email: str = "", error: Refused | None = None) -> Response:
    settings, target = plane_of(request).settings, local(request.query_params.get("next"))
    query = urlencode({"next": target})
    parts = [_problem(error)]
    if settings.password_login == "on":
        fields = _field("email", "E-mail", email, "email", "username")
        fields += _field("password", "Password", "", "password", "current-password")
        parts.append(f'<form method="post" action="{LOGIN}?{escape(query)}">{fields}<button>Sign in</button></form>')
    if settings.oidc_issuer is not None:
        parts.append(f'<p><a href="/console/oidc/start?{escape(query)}">Sign in with SSO</a></p>')
    return page("Sign in", "".join(parts), error.status if error else 200, error.headers if error else None)


def _setup_form(secret: str, values: Mapping[str, str | None], first: bool, error: Refused | None = None) -> Response:
    name, email = values.get("name") or "", values.get("email") or ""
    fields = _field("name", "Name", name, "text", "username", not first)
    fields += _field("email", "E-mail", email, "email", "email", not first)
    fields += _field("password", "Password, at least 12 characters", "", "password", "new-password")
    fields += _field("password_confirm", "Password again", "", "password", "new-password")
    action = escape(f"/console/setup?{urlencode({'token': secret})}")
    body = f'{_problem(error)}<form method="post" action="{action}">{fields}<button>Save</button></form>'
    title = "First admin" if first else "Choose a password"
    return page(title, body, error.status if error else 200)


def _problem(error: Refused | None) -> str:
    if error is None:
        return ""
    lines = [f"{problem.param}: {problem.message}" for problem in error.errors] or [error.message]
    return "".join(f'<p class="problem" role="alert">{escape(line)}</p>' for line in lines)


def _field(name: str, label: str, value: str, kind: str, complete: str, fixed: bool = False) -> str:
    extra = " readonly" if fixed else " required"
    return (
        f'<label for="{name}">{escape(label)}</label><input id="{name}" name="{name}" type="{kind}" '
        f'value="{escape(value)}" autocomplete="{complete}"{extra}>'
    )
