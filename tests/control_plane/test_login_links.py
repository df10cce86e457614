"""One-time URLs that log a user in: once, for a quarter of an hour, and nobody who may not."""

import asyncio
import re
from html import unescape

import pytest
from sqlalchemy import select, update

from control_plane.data.tables import setups, users
from control_plane.errors import NotFound
from control_plane.plane import Act
from control_plane.pure.roles import SYSTEM, Principal
from control_plane.services import login_links
from control_plane.services import setups as passwords
from control_plane.services.login_links import LIFETIME
from tests.control_plane.conftest import Running
from tests.control_plane.pages import text_of
from tests.control_plane.people import SAME_ORIGIN, changed, log_in, make_user

pytestmark = pytest.mark.anyio


def act(running: Running) -> Act:
    return Act(Principal("user"), running.clock(), "192.0.2.1")


async def link(running: Running, name: str) -> str:
    """The secret of a new one."""
    url = await login_links.make(running.plane, Act(SYSTEM, running.clock()), name)
    assert url.startswith(f"{running.plane.settings.public}/console/login?token=")
    return url.partition("token=")[2]


async def test_a_link_logs_in_once(plane: Running) -> None:
    await make_user(plane, "bob")
    secret = await link(plane, "bob")
    looked = [await login_links.find(plane.plane, secret) for _ in range(2)]
    tries = [login_links.log_in(plane.plane, act(plane), secret, "a browser") for _ in range(3)]
    ended = await asyncio.gather(*tries, return_exceptions=True)
    begun = [one for one in ended if not isinstance(one, BaseException)]
    with pytest.raises(NotFound):
        await login_links.find(plane.plane, secret)
    me = await plane.client.get("/api/v1/me", headers={"cookie": f"ia_session={begun[0].secret}"})
    rows = (await plane.admin.get("/api/v1/audit")).json()["data"]

    assert {guest.name for guest in looked} == {"bob"}
    assert len(begun) == 1
    assert all(isinstance(one, NotFound) for one in ended if one is not begun[0])
    assert me.json()["name"] == "bob"
    # All of one moment, in which ids have no order.
    assert sorted((row["action"], row["actor"]["name"]) for row in rows) == [
        ("login_link.create", None),
        ("login_link.use", "bob"),
        ("session.login", "bob"),
    ]
    assert secret not in repr(rows)


async def test_people_press_the_button_behind_a_link(sqlite_plane: Running) -> None:
    await make_user(sqlite_plane, "bob")
    await make_user(sqlite_plane, "eve")
    await log_in(sqlite_plane, "eve")
    await changed(sqlite_plane.admin, "PATCH", "/api/v1/users/bob", json={"title": "<b>Bob & Söhne"})
    path = f"/console/login?token={await link(sqlite_plane, 'bob')}"
    pages = [await sqlite_plane.client.get(path) for _ in range(2)]
    action = unescape(re.findall(r'action="([^"]+)"', pages[1].text)[0])
    elsewhere = await sqlite_plane.client.post(action, headers={"sec-fetch-site": "cross-site"})
    nowhere = await sqlite_plane.client.post(action)
    pressed = await sqlite_plane.client.post(action, headers=SAME_ORIGIN)
    me = await sqlite_plane.client.get("/api/v1/me")
    again = [await sqlite_plane.client.get(path), await sqlite_plane.client.post(action, headers=SAME_ORIGIN)]

    assert [page.status_code for page in pages] == [200, 200]
    assert "Sign in as <b>Bob & Söhne" in text_of(pages[0].text)
    assert "<b>" not in pages[0].text
    assert pages[0].headers["referrer-policy"] == "no-referrer"
    assert [elsewhere.status_code, nowhere.status_code] == [403, 403]
    assert (pressed.status_code, pressed.headers["location"]) == (303, "/console/")
    assert me.json()["name"] == "bob"
    assert [answer.status_code for answer in again] == [404, 404]
    assert "has been used, is too old" in again[0].text


async def test_a_link_does_not_hold_for_long_and_the_next_one_replaces_it(sqlite_plane: Running) -> None:
    await make_user(sqlite_plane, "bob")
    first, second = await link(sqlite_plane, "bob"), await link(sqlite_plane, "bob")
    assert (await login_links.find(sqlite_plane.plane, second)).name == "bob"
    with pytest.raises(NotFound):
        await login_links.log_in(sqlite_plane.plane, act(sqlite_plane), first, None)
    sqlite_plane.clock.advance(LIFETIME / 1000)
    with pytest.raises(NotFound):
        await login_links.find(sqlite_plane.plane, second)
    with pytest.raises(NotFound):
        await login_links.log_in(sqlite_plane.plane, act(sqlite_plane), second, None)


async def test_a_link_is_nothing_else_and_nothing_else_is_one(sqlite_plane: Running) -> None:
    body = {"name": "bob", "email": "bob@example.org"}
    setup = (await sqlite_plane.admin.post("/api/v1/users", json=body)).json()["setup_url"].partition("token=")[2]
    secret = await link(sqlite_plane, "bob")
    with pytest.raises(NotFound):
        await login_links.log_in(sqlite_plane.plane, act(sqlite_plane), setup, None)
    with pytest.raises(NotFound):
        await passwords.find(sqlite_plane.plane, secret)

    # Neither has ended the other.
    assert (await passwords.find(sqlite_plane.plane, setup)).name == "bob"
    assert (await login_links.find(sqlite_plane.plane, secret)).name == "bob"
    async with sqlite_plane.plane.database.main.read() as connection:
        rows = (await connection.execute(select(setups))).all()
    assert secret not in repr(rows)


async def test_a_disabled_user_has_none(plane: Running) -> None:
    await make_user(plane, "bob")
    secret = await link(plane, "bob")
    await changed(plane.admin, "PATCH", "/api/v1/users/bob", json={"disabled": True})
    with pytest.raises(NotFound):
        await link(plane, "bob")
    await changed(plane.admin, "PATCH", "/api/v1/users/bob", json={"disabled": False})
    with pytest.raises(NotFound):
        await login_links.log_in(plane.plane, act(plane), secret, None)
    with pytest.raises(NotFound):
        await link(plane, "nobody")
    # At the very moment, when the link is still there
    secret = await link(plane, "bob")
    async with plane.plane.database.main.write() as connection:
        await connection.execute(update(users).where(users.c.name == "bob").values(disabled=True))
    with pytest.raises(NotFound):
        await login_links.log_in(plane.plane, act(plane), secret, None)


async def test_a_program_that_looks_at_a_link_does_not_use_it_up(sqlite_plane: Running) -> None:
    await make_user(sqlite_plane, "bob")
    secret = await link(sqlite_plane, "bob")

    looked = await sqlite_plane.client.head("/console/login", params={"token": secret})

    assert (looked.status_code, looked.content) == (200, b"")
    assert "set-cookie" not in looked.headers
    assert (await login_links.find(sqlite_plane.plane, secret)).name == "bob"
