"""People for tests: users with a password or a management token, and clients that act for them."""

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import httpx
from sqlalchemy import insert

from control_plane.data.tables import memberships, organisations, users
from control_plane.plane import Act
from control_plane.pure.roles import Principal
from control_plane.services import sessions
from tests.control_plane.conftest import NOON, Running, management_token

PASSWORD = "a long enough password"
SAME_ORIGIN = {"sec-fetch-site": "same-origin"}


async def make_user(running: Running, name: str, role: str | None = None, password: str | None = PASSWORD) -> None:
    hashed = None if password is None else await running.plane.passwords.hash(password)
    values = {"name": name, "email": f"{name}@example.org", "platform_role": role, "password_hash": hashed}
    async with running.plane.database.main.write() as connection:
        await connection.execute(insert(users).values(**values, disabled=False, created_at=NOON))


async def make_organisation(running: Running, name: str, **roles: str) -> None:
    """`roles`: of users, who must be there."""
    async with running.plane.database.main.write() as connection:
        await connection.execute(insert(organisations).values(name=name, limits=[], disabled=False, created_at=NOON))
        for user, role in roles.items():
            row = {"organisation": name, "user": user, "role": role, "created_at": NOON}
            await connection.execute(insert(memberships).values(**row))


async def log_in(running: Running, name: str, password: str = PASSWORD, **options: Any) -> httpx.Response:
    options = {"headers": SAME_ORIGIN, **options}
    body = {"email": f"{name}@example.org", "password": password}
    return await running.client.post("/api/v1/session", json=body, **options)


async def begin_session(running: Running, name: str) -> None:
    """The client has a session of this user, and no other: without the work that a password is."""
    act = Act(Principal("user", name), running.clock())
    async with running.plane.database.main.write() as connection:
        begun = await sessions.begin(connection, act, name, None)
    running.client.cookies.clear()
    running.client.cookies.set("ia_session", begun.secret)


@asynccontextmanager
async def acting_as(running: Running, name: str, role: str | None = None) -> AsyncIterator[httpx.AsyncClient]:
    """A client with a management token of a user, who is made if missing."""
    token = await management_token(running.plane.database, name, role)
    headers = {"authorization": f"Bearer {token}"}
    async with httpx.AsyncClient(
        verify=False, base_url=running.url, timeout=60, trust_env=False, headers=headers
    ) as client:
        yield client


async def changed(client: httpx.AsyncClient, method: str, path: str, **options: Any) -> httpx.Response:
    """A change of the present version of an object."""
    found = await client.get(path)
    condition: Mapping[str, str] = {"if-match": found.headers.get("etag", '"none"')}
    return await client.request(method, path, headers={**condition, **options.pop("headers", {})}, **options)


def error(answer: httpx.Response) -> tuple[int, str, str | None]:
    """Status, code and parameter."""
    found = answer.json()["error"]
    return answer.status_code, found["code"], found["param"]
