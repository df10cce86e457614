"""A control plane on a real port in the test's own event loop, over SQLite files and over a real PostgreSQL."""

import asyncio
import shutil
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import insert

from control_plane.app import Application
from control_plane.connections import Connections
from control_plane.data import schema
from control_plane.data.database import Database, parse_url
from control_plane.data.tables import tokens, users
from control_plane.serving import Server
from control_plane.settings import Settings
from inference_api.policy.keys import MANAGEMENT, new_key
from inference_api.server.server import listen
from tests import prometheus as real
from tests.control_plane import history
from tests.fakes import in_background, until
from tests.postgresql import PostgreSQL, postgresql

SERVICE_TOKEN = "service-token-of-the-tests-0123456789"
# 2026-11-28T12:00:00Z
NOON = 1_795_867_200_000


@pytest.fixture(scope="session")
def server() -> Iterator[PostgreSQL]:
    with postgresql() as server:
        yield server


@pytest.fixture(scope="session")
def template(server: PostgreSQL) -> str:
    """A database with the schema, which each test gets a copy of."""
    name = server.create()
    asyncio.run(schema.migrate(parse_url(server.url(name))))
    return name


@pytest.fixture(scope="session")
def sqlite_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("template")
    asyncio.run(schema.migrate(parse_url(f"sqlite:///{folder}/control-plane.sqlite3")))
    return folder


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """A migrated database of its own for each test, of each kind."""
    if request.param == "sqlite":
        yield sqlite_copy(request, tmp_path)
        return
    server: PostgreSQL = request.getfixturevalue("server")
    name = server.create(request.getfixturevalue("template"))
    yield server.url(name)
    server.drop(name)


@pytest.fixture
def sqlite_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """For what does not depend on the database."""
    return sqlite_copy(request, tmp_path)


def sqlite_copy(request: pytest.FixtureRequest, folder: Path) -> str:
    template: Path = request.getfixturevalue("sqlite_template")
    for file in template.glob("*.sqlite3*"):
        shutil.copy(file, folder)
    return f"sqlite:///{folder}/control-plane.sqlite3"


class Clock:
    """Unix milliseconds that a test sets."""

    def __init__(self, now: int = NOON) -> None:
        self.now = now

    def __call__(self) -> int:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += round(seconds * 1000)


class Running:
    """A control plane. `client`: without credentials; `admin`: with a management token of the platform admin `ana`;
    `router`: with a service token that has every scope."""

    def __init__(
        self, application: Application, server: Server, url: str, clock: Clock, clients: list[httpx.AsyncClient]
    ) -> None:
        self.application = application
        self._server = server
        self.plane = application.plane
        self.url = url
        self.clock = clock
        self.client, self.admin, self.router = clients

    def stop(self) -> None:
        """As SIGTERM does."""
        self._server.should_exit = True


@pytest.fixture
async def start_plane(database_url: str) -> AsyncIterator[Callable[..., Any]]:
    """`await start_plane(key=value)` -> a Running control plane over the test's database; keywords are settings."""
    async with starting(database_url) as start:
        yield start


@pytest.fixture
async def plane(start_plane: Callable[..., Any]) -> Running:
    running: Running = await start_plane()
    return running


@pytest.fixture
async def sqlite_plane(sqlite_url: str) -> AsyncIterator[Running]:
    """For what does not depend on the database."""
    async with starting(sqlite_url) as start:
        yield await start()


@pytest.fixture
async def start_sqlite(sqlite_url: str) -> AsyncIterator[Callable[..., Any]]:
    """As `start_plane`, for what does not depend on the database."""
    async with starting(sqlite_url) as start:
        yield start


class starting:
    """`async with starting(url) as start`: starts control planes over one database, and stops them at the end."""

    def __init__(self, url: str, seeded: bool = True) -> None:
        self._url = url
        # Whether there is a user with a token
        self._seeded = seeded
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Callable[..., Any]:
        await self._stack.__aenter__()
        return self._start

    async def __aexit__(self, *exc: Any) -> None:
        await self._stack.__aexit__(*exc)

    async def _start(self, clock: Clock | None = None, outside: Connections | None = None, **settings: Any) -> Running:
        chosen = Settings(database_url=self._url, **{"service_token": SERVICE_TOKEN, **settings})
        clock = clock or Clock()
        application = Application(chosen, clock, outside)
        listener = listen("127.0.0.1", 0, "PORT")
        server = Server(application)
        task = await self._stack.enter_async_context(in_background(server.serve(sockets=[listener])))
        await until(lambda: server.started or task.done())
        self._stack.callback(listener.close)
        self._stack.callback(setattr, server, "should_exit", True)
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        token = await management_token(application.plane.database, "ana", "admin") if self._seeded else "none"
        clients = [
            await self._stack.enter_async_context(
                httpx.AsyncClient(verify=False, base_url=url, timeout=60, trust_env=False, headers=headers)
            )
            for headers in ({}, {"authorization": f"Bearer {token}"}, {"authorization": f"Bearer {SERVICE_TOKEN}"})
        ]
        return Running(application, server, url, clock, clients)


async def management_token(database: Database, name: str, role: str | None) -> str:
    """A management token of a user who is made if missing, with this role on the platform."""
    made = new_key(prefix=MANAGEMENT)
    async with database.main.write() as connection:
        known = (await connection.execute(users.select().where(users.c.name == name))).first()
        if known is None:
            email = f"{name}@example.org"
            await connection.execute(
                insert(users).values(name=name, email=email, platform_role=role, disabled=False, created_at=NOON)
            )
        await connection.execute(
            insert(tokens).values(
                id=made.id,
                kind="management",
                name="tests",
                digest=made.digest,
                user=name,
                disabled=False,
                created_at=NOON,
            )
        )
    return made.key


@pytest.fixture(scope="session")
def blocks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    promtool, folder = real.binary("promtool"), tmp_path_factory.mktemp("blocks")
    file = folder / "history"
    file.write_text("\n".join(history.history(NOON)))
    command = [promtool, "tsdb", "create-blocks-from", "openmetrics", "--quiet", str(file), str(folder / "data")]
    subprocess.run(command, check=True, capture_output=True)
    return folder / "data"


@pytest.fixture
async def prometheus(blocks: Path, tmp_path: Path) -> AsyncIterator[real.Prometheus]:
    """One that knows what tests.control_plane.history says of the hour before NOON."""
    folder = tmp_path / "prometheus"
    shutil.copytree(blocks, folder / "data")
    async with real.prometheus(folder) as running:
        yield running


@pytest.fixture
async def scraped(prometheus: real.Prometheus, start_sqlite: Callable[..., Any]) -> Running:
    """A control plane that asks it, with the models of that history."""
    running: Running = await start_sqlite(prometheus_url=prometheus.url)
    for entry in history.MODELS:
        answer = await running.admin.put(f"/api/v1/models/{entry['name']}", json=entry, headers={"if-none-match": "*"})
        assert answer.status_code == 201, answer.text
    return running
