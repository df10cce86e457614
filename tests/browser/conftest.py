"""The console in Chromium, before the demo: real engines of its kind, routers, a control plane and callers.

A session of its own (`pytest tests/browser`): the driver of the browser keeps an event loop, which other tests cannot
have beside theirs.
"""

import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from playwright.sync_api import Browser, BrowserContext, ConsoleMessage, Locator, Page, Request, expect

from inference_api.demo.full import Full
from inference_api.demo.processes import stop_signals
from inference_api.demo.seed import ADMIN_EMAIL

CHROMIUM = shutil.which("chromium")
PASSWORD = "a long enough password"
# Of everybody the tests need: the role on the platform, and the one in the first organisation of the demo
ROLES: Mapping[str, tuple[str | None, str | None]] = {
    "admin": ("admin", None),
    "operator": ("operator", None),
    "auditor": ("viewer", None),
    "owner": (None, "owner"),
    "manager": (None, "admin"),
    "member": (None, "member"),
    "reader": (None, "viewer"),
}
WIDTHS = (390, 1280, 1920)
# What a browser says of an answer that a test asks for
_EXPECTED = re.compile(r"Failed to load resource: the server responded with a status of 4\d\d")


@pytest.fixture(scope="session")
def browser_type_launch_args() -> dict[str, Any]:
    if CHROMIUM is None:
        pytest.skip("needs Chromium: apt-get install chromium")
    quiet = ("background-networking", "component-update", "sync")
    arguments = ["--no-sandbox", "--disable-gpu", "--no-first-run", *(f"--disable-{name}" for name in quiet)]
    return {"executable_path": CHROMIUM, "args": arguments, "headless": True}


class World:
    """A running demo. `admin`: a client of /api/v1 as an admin of the platform."""

    def __init__(self, demo: Full, admin: httpx.Client) -> None:
        self.demo = demo
        self.admin = admin
        self.organisation = "sued"
        self._cookies: dict[str, list[dict[str, Any]]] = {}
        self._made: set[str] = set()

    @property
    def url(self) -> str:
        return self.demo.console

    def child(self, name: str) -> Any:
        """The first process whose name begins so."""
        return next(child for child in self.demo.children if child.name.startswith(name))

    def cookies(self, role: str) -> list[dict[str, Any]]:
        """Of a session of somebody with this role; the user is made at the first call."""
        if role not in self._cookies:
            self._make(role)
            with httpx.Client(base_url=self.url, trust_env=False, timeout=30) as client:
                body = {"email": f"{role}@example.org", "password": PASSWORD}
                client.post("/api/v1/session", json=body, headers={"origin": self.url}).raise_for_status()
                self._cookies[role] = [
                    {"name": name, "value": value, "url": self.url} for name, value in client.cookies.items()
                ]
        return self._cookies[role]

    def failure(self) -> str:
        """The id of a request that failed, once its record is stored: gpt2 of the demo fails now and then."""
        body = {"model": "gpt2", "max_tokens": 1, "messages": [{"role": "user", "content": "hello"}]}
        headers = {"authorization": f"Bearer {self.demo.keys['notebook'].secret}"}
        with httpx.Client(base_url=self.demo.routers[0], trust_env=False, timeout=30, headers=headers) as client:
            for _ in range(200):
                answer = client.post("/v1/chat/completions", json=body)
                if answer.status_code >= 500:
                    break
            else:
                raise AssertionError("200 requests in a row did not fail")
        found: str = answer.headers["x-request-id"]
        self.until(lambda: self.admin.get("/api/v1/requests", params={"id": found}).json()["data"])
        return found

    def answers(self, url: str) -> bool:
        try:
            return httpx.get(url, trust_env=False).status_code == 200
        except httpx.TransportError:
            return False

    def until(self, condition: Callable[[], object], seconds: float = 60) -> None:
        """Ask again and again; what is waited for comes from other processes."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, "it did not come"
            time.sleep(0.1)

    def _make(self, role: str) -> None:
        platform, own = ROLES[role]
        body = {"name": role, "email": f"{role}@example.org", "platform_role": platform}
        made = self.admin.post("/api/v1/users", json=body)
        made.raise_for_status()
        if own is not None:
            path = f"/api/v1/organisations/{self.organisation}/members/{role}"
            self.admin.put(path, json={"role": own}, headers={"if-none-match": "*"}).raise_for_status()
        form = {**body, "password": PASSWORD, "password_confirm": PASSWORD}
        answer = httpx.post(made.json()["setup_url"], data={name: form[name] or "" for name in form}, trust_env=False)
        assert answer.status_code == 303, answer.text


class _Set(Full):
    """With more settings of its control plane."""

    settings: Mapping[str, str] = {}

    def start(self, name: str, *arguments: str, settings: Mapping[str, str] | None = None) -> None:
        more = self.settings if name == "control plane" else {}
        super().start(name, *arguments, settings={**settings, **more} if settings else None)


@contextmanager
def running(
    directory: Path, rate: float = 2.0, yesterday: bool = True, settings: Mapping[str, str] | None = None
) -> Iterator[World]:
    """A demo of its own, stopped at the end. `settings`: more of its control plane."""
    with ExitStack() as stack:
        stopping = stack.enter_context(stop_signals())
        demo = _Set(directory, stopping)
        demo.settings = settings or {}
        stack.callback(demo.stop)
        demo.begin("127.0.0.1", 0, 200, rate, yesterday)
        admin = stack.enter_context(httpx.Client(base_url=demo.console, trust_env=False, timeout=30))
        body = {"email": ADMIN_EMAIL, "password": (directory / "password").read_text()}
        admin.post("/api/v1/session", json=body, headers={"origin": demo.console}).raise_for_status()
        admin.headers["origin"] = demo.console
        yield World(demo, admin)


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """One demo for all tests that break nothing."""
    with running(tmp_path_factory.mktemp("demo")) as world:
        yield world


class Watched:
    """What a page must not do: log errors, break its policy, fail in its script, ask anybody else."""

    def __init__(self, origin: str) -> None:
        self._origin = origin
        self.problems: list[str] = []
        self.requests: list[Request] = []
        # Whether the control plane may be away
        self.may_fail = False

    def watch(self, page: Page) -> None:
        page.on("console", self._said)
        page.on("pageerror", lambda error: self.problems.append(f"script: {error}"))
        page.on("request", self._asked)

    def _said(self, message: ConsoleMessage) -> None:
        if message.type in ("error", "warning") and not self.may_fail and not _EXPECTED.match(message.text):
            self.problems.append(f"{message.type}: {message.text}")

    def _asked(self, request: Request) -> None:
        self.requests.append(request)
        if not request.url.startswith((f"{self._origin}/", "data:", "about:")):
            self.problems.append(f"request: {request.url}")


Visiting = Callable[..., Page]


class Visitor:
    """`visit(path, role=..., width=..., dark=..., script=...)`: a page of the console, watched until the test ends."""

    def __init__(self, browser: Browser) -> None:
        self._browser = browser
        self.contexts: list[BrowserContext] = []
        self.watched: list[Watched] = []

    def __call__(
        self,
        world: World,
        path: str,
        role: str | None = "admin",
        width: int = 1280,
        dark: bool = False,
        script: bool = True,
    ) -> Page:
        context = self._browser.new_context(
            viewport={"width": width, "height": 900},
            color_scheme="dark" if dark else "light",
            # Colours that change slowly are measured as they end.
            reduced_motion="reduce",
            java_script_enabled=script,
            locale="en-GB",
            timezone_id="Europe/Berlin",
        )
        self.contexts.append(context)
        if role is not None:
            context.add_cookies(world.cookies(role))  # type: ignore[arg-type]
        page = context.new_page()
        watched = Watched(world.url)
        watched.watch(page)
        self.watched.append(watched)
        page.goto(f"{world.url}{path}")
        return page


def all_answered(tab: Page, send: Callable[[], None], patience: float) -> Locator:
    """The answers of the playground once none of them failed: engines of the demo break off some of their streams.

    `send` asks, `patience` is in milliseconds for each time.
    """
    states = tab.locator("#results .lane [data-is=state]")
    for _ in range(10):
        send()
        expect(tab.get_by_role("button", name="Send")).to_be_enabled(timeout=patience)
        if "failed" not in states.all_inner_texts():
            break
    return tab.locator("#results .lane")


@pytest.fixture
def visit(browser: Browser) -> Iterator[Visitor]:
    visitor = Visitor(browser)
    yield visitor
    for context in visitor.contexts:
        context.close()
    assert [problem for watched in visitor.watched for problem in watched.problems] == []


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--pictures", metavar="DIR", help="write the pictures of the documentation there")
