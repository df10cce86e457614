"""What every page of the console has: who looks, the navigation, its state in the URL, and how it is rendered.

A page is one handler and one permission. Its templates extend `base.html`; the block `live` is what a script asks for
again every few seconds, by the same URL.
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, NamedTuple
from urllib.parse import quote, urlencode

from jinja2 import Environment
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route

from control_plane import web
from control_plane.errors import Forbidden, Invalid, NotFound, Problem, Refused
from control_plane.http.console import allowances, filters
from control_plane.http.console.forms import HOME, LOGIN, SECRET, Form, form
from control_plane.http.identity import PRINCIPAL, act_of, plane_of, principal_of
from control_plane.http.requests import REQUEST_ID, route_of
from control_plane.plane import Act, Plane
from control_plane.pure.roles import Permission, Principal
from inference_api import __version__

# Groups of the navigation, in their order
OPERATE, USE, MANAGE = "Operate", "Use", "Manage"
# Of a URL: what was done before the redirect to it; not part of the page's state.
DONE = "done"
_LONGEST = 512
# Seconds after the start
_QUIET = 10


@dataclass(frozen=True)
class Page:
    """`permission`: None: whoever is logged in. `group`: of the navigation; None: not there.

    `posts`: what its forms need; `self`: the handler looks at each form; None: it has none.
    """

    path: str
    title: str
    handler: Callable[["Visit"], Awaitable[Response]]
    permission: Permission | None = None
    group: str | None = None
    posts: Permission | Literal["self"] | None = None

    def allows(self, principal: Principal, method: str = "GET") -> bool:
        needed = [self.permission] if method != "POST" or self.posts == "self" else [self.permission, self.posts]
        return all(one is None or not principal.scope(one).empty for one in needed)

    def route(self, pages: "Pages") -> Route:
        async def endpoint(request: Request) -> Response:
            return await pages.answer(self, request)

        methods = ["GET"] if self.posts is None else ["GET", "POST"]
        return Route(self.path, endpoint, methods=methods, name=self.path)


class Pages:
    """All pages of the console, and what their templates are rendered with."""

    def __init__(self, pages: tuple[Page, ...]) -> None:
        self._pages = pages
        self._templates = _templates()
        self._compiling = asyncio.Lock()
        self._compiled = False

    async def ready(self) -> None:
        """Compile the templates, once, in a thread: a second of a CPU, in which routers are answered all the same."""
        if self._compiled:
            return
        async with self._compiling:
            await asyncio.to_thread(web.compile_all, self._templates)
            self._compiled = True

    async def warm(self) -> None:
        """Before the first visitor, and after a start that has other things to do."""
        await asyncio.sleep(_QUIET)
        await self.ready()

    def routes(self) -> list[Route]:
        return [Route("/console", _to_home), *(page.route(self) for page in self._pages)]

    async def answer(self, page: Page, request: Request) -> Response:
        route_of(request.scope)
        principal = await principal_of(request)
        if principal is None:
            return _to_login(request)
        await self.ready()
        visit = Visit(self, page, request, plane_of(request), act_of(request, principal))
        secrets = {name: found[2] for name, value in visit.query.items() if (found := SECRET.search(value))}
        if secrets:
            # A secret that was pasted into a filter: no history and no screenshot has it.
            return RedirectResponse(visit.address(**secrets), 303)
        if not page.allows(principal):
            raise Forbidden(f"The page {page.title!r} needs the permission {page.permission}.")
        if not page.allows(principal, request.method):
            raise Forbidden(f"Forms of the page {page.title!r} need the permission {page.posts}.")
        return await page.handler(visit)

    def navigation(self, principal: Principal) -> dict[str, list[Page]]:
        found: dict[str, list[Page]] = {}
        for page in self._pages:
            if page.group is not None and page.allows(principal):
                found.setdefault(page.group, []).append(page)
        return found

    def render(
        self, template: str, context: Mapping[str, Any], status: int = 200, headers: Mapping[str, str] | None = None
    ) -> Response:
        text = self._templates.get_template(template).render(context)
        own = {"Content-Security-Policy": web.POLICY, "Vary": "HX-Request-Type, Cookie"}
        return Response(text, status, {**own, **(headers or {})}, media_type="text/html")


class Sent(NamedTuple):
    """What became of a form. `answer`: of what it did; `problem`: why it was refused. All None: none was sent."""

    answer: Response | None = None
    form: Form | None = None
    problem: Refused | None = None


class Visit:
    """One request of a page, by somebody who is logged in and may see it."""

    def __init__(self, pages: Pages, page: Page, request: Request, plane: Plane, act: Act) -> None:
        self._pages = pages
        self.page = page
        self.request = request
        self.plane = plane
        self.act = act
        pairs = request.query_params.multi_items()
        # NUL: no database stores it. Of a parameter that is given twice the last counts.
        self.query: Mapping[str, str] = {
            name: value[:_LONGEST] for name, value in pairs if value != "" and "\0" not in value
        }

    @property
    def posting(self) -> bool:
        return self.request.method == "POST"

    @property
    def partial(self) -> bool:
        """Whether a script asks for the block `live` only."""
        return self.request.headers.get("hx-request-type") == "partial"

    async def form(self) -> Form:
        """Raises Refused."""
        return await form(self.request)

    async def sent(self, do: Callable[[Form], Awaitable[Response]]) -> Sent:
        """Do what a form asks for, if one was sent."""
        if not self.posting:
            return Sent()
        form = await self.form()
        try:
            return Sent(await do(form), form)
        except Refused as exc:
            return Sent(None, form, exc)

    def may(self, permission: Permission, organisation: str | None = None, owner: str | None = None) -> bool:
        return self.act.principal.may(permission, organisation, owner)

    def may_somewhere(self, permission: Permission) -> bool:
        return not self.act.principal.scope(permission).empty

    def choice(self, name: str, *choices: str) -> str:
        """A parameter of the URL that is one of these; the first if it is not there. Raises Invalid."""
        given = self.query.get(name, choices[0])
        if given not in choices:
            raise Invalid(Problem(name, f"must be one of {', '.join(choices)}, not {given[:40]!r}"))
        return given

    def path(self, name: str) -> str:
        """A part of the URL's path."""
        found: str = self.request.path_params[name]
        if "\0" in found or len(found) > _LONGEST:
            raise NotFound("object", found.replace("\0", ""))
        return found

    @property
    def here(self) -> str:
        """The path of this page, quoted."""
        return quote(self.request.scope["path"])

    def address(self, /, **changes: Any) -> str:
        """The URL of this page with other parameters; None takes one away. What was done is left out."""
        kept = {name: value for name, value in self.query.items() if name != DONE}
        return url(self.here, **{**kept, **changes})

    def render(
        self, template: str, *, status: int = 200, headers: Mapping[str, str] | None = None, **context: Any
    ) -> Response:
        """The page; only its block `live` if a script asks for that."""
        return self._pages.render(template, {**self._context(), "partial": self.partial, **context}, status, headers)

    def back(self, done: str, /, to: str | None = None, **query: Any) -> Response:
        """To a page, after a change: it says what was done. `done`: a key of its NOTICES."""
        target = to or self.here
        return RedirectResponse(url(target, **query, **{DONE: done}), 303)

    def _context(self) -> dict[str, Any]:
        return {
            "page": self.page,
            "title": self.page.title,
            "navigation": self._pages.navigation(self.act.principal),
            "me": self.act.principal,
            "as_of": self.act.at,
            "now": self.act.at,
            "currency": self.plane.settings.currency,
            "query": self.query,
            "here": self.address,
            "may": self.may,
            "may_somewhere": self.may_somewhere,
            "request_id": self.act.request_id,
            "origin": self.plane.settings.origin,
            "done": self.query.get(DONE, ""),
            "problem": None,
            "live": False,
        }


class Rendering:
    """Refusals as pages: what is wrong, what to do, and the way back."""

    def __init__(self, pages: Pages) -> None:
        self._pages = pages

    def __call__(self, error: Refused, scope: Any) -> Response:
        principal: Principal | None = scope.get(PRINCIPAL)
        headers = dict(error.headers)
        headers.pop("WWW-Authenticate", None)
        context = {
            "page": None,
            "title": _TITLES.get(error.status, "That did not work"),
            "error": error,
            "me": principal,
            "navigation": {} if principal is None else self._pages.navigation(principal),
            "request_id": scope.get(REQUEST_ID, ""),
            "live": False,
            "done": "",
            "problem": None,
        }
        # A part of a page stays as it was: the script says that it is old.
        headers["HX-Reswap"] = "none"
        return self._pages.render("error.html", context, error.status, headers)


_TITLES = {
    400: "That cannot be read",
    403: "You may not see this page",
    404: "There is no such page",
    405: "That is not possible here",
    412: "It has changed meanwhile",
    413: "That is too large",
    422: "That is not right yet",
    429: "Too many attempts",
    503: "The database does not answer",
}


@cache
def _templates() -> Environment:
    """The same for all in a process."""
    return web.environment(filters.FILTERS, static=web.base, version=__version__, url=url, **allowances.FIELDS)


def url(path: str, /, **query: Any) -> str:
    """`path` with these parameters; those that are None or empty are left out."""
    given = {name: value for name, value in query.items() if value is not None and value != ""}
    return f"{path}{'&' if '?' in path else '?'}{urlencode(given, doseq=True)}" if given else path


async def _to_home(request: Request) -> Response:
    route_of(request.scope)
    return RedirectResponse(HOME, 303)


def _to_login(request: Request) -> Response:
    """After the login the page comes, or its first view if a form was sent."""
    path: str = quote(request.scope["path"])
    # Not request.url: it contains the Host header, which may be invalid.
    query: str = request.scope["query_string"].decode("latin-1")
    target = f"{path}?{query}" if query and request.method == "GET" else path
    where = url(LOGIN, next=target)
    if request.headers.get("hx-request"):
        # Of a part: the whole page goes there.
        return Response(status_code=204, headers={"HX-Redirect": where})
    return RedirectResponse(where, 303)
