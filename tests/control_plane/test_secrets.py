"""Secrets are shown once, to whom they belong: none is in the database, in the log, in an error or in the audit log."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import func, select

from control_plane.data.tables import idempotency, login_failures, login_states, sessions, setups
from control_plane.services.sweeping import sweep
from tests.control_plane.conftest import SERVICE_TOKEN, Running
from tests.control_plane.people import SAME_ORIGIN, error
from tests.control_plane.processes import served

pytestmark = pytest.mark.anyio
ROOT = "a password of the first admin"
PASSWORD = "correct battery of horses"
WRONG = "this was never the password"
TYPED = "a-password-typed-into-the-wrong-field"


async def use(admin: httpx.AsyncClient, client: httpx.AsyncClient) -> dict[str, str]:
    """Do whatever has to do with a secret; returns them."""
    await admin.post("/api/v1/organisations", json={"name": "team-a"})
    made = await admin.post("/api/v1/users", json={"name": "bob", "email": "bob@example.org"})
    secret = made.json()["setup_url"].partition("token=")[2]
    form = {"password": PASSWORD, "password_confirm": PASSWORD}
    for given in ({**form, "password_confirm": WRONG}, form):
        await client.post(f"/console/setup?token={secret}", data=given)
    for email, password in (("bob@example.org", WRONG), (TYPED, WRONG), ("bob@example.org", PASSWORD)):
        body = {"email": email, "password": password}
        await client.post("/api/v1/session", json=body, headers=SAME_ORIGIN)
    found = {"setup": secret, "cookie": client.cookies["ia_session"]}
    bodies: dict[str, dict[str, Any]] = {
        "management": {"name": "ci", "kind": "management"},
        "service": {"name": "routers", "kind": "service", "scopes": ["ingest"]},
        "key": {"name": "batch", "organisation": "team-a"},
    }
    for kind, body in bodies.items():
        path = "/api/v1/keys" if kind == "key" else "/api/v1/tokens"
        object = (await admin.post(path, json=body, headers={"idempotency-key": f"make-{kind}"})).json()
        found[kind] = str(object.get("token") or object["key"])
        again = await admin.post(f"{path}/{object['id']}/rotate", headers={"idempotency-key": f"rotate-{kind}"})
        found[f"{kind} again"] = str(again.json().get("token") or again.json()["key"])
    return {**found, "password": PASSWORD, "wrong": WRONG, "typed": TYPED}


async def test_no_secret_is_kept_or_logged(tmp_path: Path) -> None:
    """At the lowest level of the log."""
    url = f"sqlite:///{tmp_path}/cp.sqlite3"
    async with served(tmp_path, url, service_token=SERVICE_TOKEN, log_level="debug") as plane:
        first = plane.output.partition("/console/setup?token=")[2].partition('"')[0]
        form = {"name": "root", "email": "root@example.org", "password": ROOT, "password_confirm": ROOT}
        await plane.client.post(f"/console/setup?token={first}", data=form)
        async with httpx.AsyncClient(base_url=plane.url, headers=SAME_ORIGIN, trust_env=False) as admin:
            await admin.post("/api/v1/session", json={"email": "root@example.org", "password": ROOT})
            secrets = await use(admin, plane.client)
            secrets |= {"root": ROOT, "cookie of root": admin.cookies["ia_session"], "setting": SERVICE_TOKEN}
            audit = (await admin.get("/api/v1/audit?limit=200")).text
        lines = plane.output
        files = {path.name: path.read_bytes() for path in files_in(tmp_path)}

    assert len(set(secrets.values())) == len(secrets) == 14
    assert "cp.sqlite3-wal" in files
    assert "session.login_failed" in audit
    assert '"session.login"' in lines
    assert first.encode() not in b"".join(files.values())
    for name, secret in secrets.items():
        assert secret not in audit, name
        assert secret not in lines, name
        for file, content in files.items():
            # Nor without what all of its kind begin with
            assert secret[-37:].encode() not in content, (name, file)


def files_in(folder: Path) -> list[Path]:
    return list(folder.glob("*.sqlite3*"))


async def test_no_secret_is_in_an_error(sqlite_plane: Running) -> None:
    client, secret = sqlite_plane.client, "a-secret-that-is-in-the-wrong-place"
    answers = [
        await client.post("/api/v1/session", json={"email": "x", "password": [secret]}, headers=SAME_ORIGIN),
        await client.post("/api/v1/session", json={"email": "x", "password": secret * 100}, headers=SAME_ORIGIN),
        await client.post("/api/v1/session", json={"email": "x", "passwort": secret}, headers=SAME_ORIGIN),
        await client.get("/api/v1/me", headers={"authorization": f"Bearer {secret}"}),
        await client.get("/api/v1/me", headers={"cookie": f"ia_session={secret}"}),
        await client.get(f"/console/setup?token={secret}"),
        await client.get("/policy", headers={"authorization": f"Bearer {secret}"}),
    ]

    assert [answer.status_code for answer in answers] == [422, 422, 422, 401, 401, 404, 401]
    assert [answer.text for answer in answers if secret in answer.text] == []


async def test_large_bodies_are_refused_before_they_are_read(sqlite_plane: Running) -> None:
    large = b" " * (1024 * 1024 + 1)

    async def chunks() -> AsyncIterator[bytes]:
        yield large

    for path, kind in (
        ("/api/v1/session", "application/json"),
        ("/api/v1/users", "application/json"),
        ("/console/login", "application/x-www-form-urlencoded"),
    ):
        for content in (large, chunks()):
            headers = {**SAME_ORIGIN, "content-type": kind, "idempotency-key": "x", "accept": "application/json"}
            answer = await sqlite_plane.admin.post(path, content=content, headers=headers)

            assert error(answer)[:2] == (413, "request_too_large"), path
            assert answer.headers["cache-control"] == "no-store"


@pytest.mark.parametrize("text", [b"%00", b"%ff", b"%ed%a0%80", b"a=1&" * 600])
async def test_forms_of_odd_bytes_are_refused(plane: Running, text: bytes) -> None:
    url = (await plane.admin.post("/api/v1/users", json={"name": "bob", "email": "bob@example.org"})).json()
    headers = {
        **SAME_ORIGIN,
        "content-type": "application/x-www-form-urlencoded",
        "accept": "application/json",
    }
    content = b"email=" + text + b"&name=" + text + b"&password=" + text + b"&password_confirm=" + text
    paths = ("/console/login", f"/console{url['setup_url'].partition('/console')[2]}")

    answers = [await plane.client.post(path, content=content, headers=headers) for path in paths]

    assert [error(answer)[:2] for answer in answers] == [(400, "bad_request")] * 2


async def test_what_no_longer_holds_is_removed(plane: Running) -> None:
    await use(plane.admin, plane.client)
    await sweep(plane.plane)
    left = await counts(plane)
    plane.clock.advance(8 * 3600)
    await sweep(plane.plane)
    later = await counts(plane)
    plane.clock.advance(16 * 3600)
    await sweep(plane.plane)

    assert left == {"sessions": 1, "setups": 0, "login_failures": 2, "login_states": 0, "idempotency": 6}
    assert later == {"sessions": 0, "setups": 0, "login_failures": 0, "login_states": 0, "idempotency": 6}
    assert set((await counts(plane)).values()) == {0}


async def counts(running: Running) -> dict[str, int]:
    found = {}
    async with running.plane.database.main.read() as connection:
        for table in (sessions, setups, login_failures, login_states, idempotency):
            query = select(func.count()).select_from(table)
            found[table.name] = (await connection.execute(query)).scalar_one()
    return found
