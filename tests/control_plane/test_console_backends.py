"""/console/backends: the worst first, what is ordered of them, and orders that are refused."""

import re
from html import unescape
from typing import Any

import httpx
import pytest

from tests.control_plane.conftest import NOON, Running
from tests.control_plane.pages import page, rows_of, text_of
from tests.control_plane.people import SAME_ORIGIN
from tests.control_plane.test_console_overview import as_admin
from tests.control_plane.test_fleet import backend, report, reports
from tests.control_plane.test_overview import catalogue, of

pytestmark = pytest.mark.anyio
BACKENDS = "/console/backends"


async def send(running: Running, path: str = BACKENDS, **form: str) -> httpx.Response:
    return await running.client.post(path, data=form, headers=SAME_ORIGIN)


async def seen(running: Running, *rows: dict[str, Any], overrides: tuple[str, ...] = ()) -> None:
    await reports(running, a=report(*rows, overrides=overrides), b=report(*rows))


async def test_the_worst_is_first_and_figures_are_those_of_the_api(sqlite_plane: Running) -> None:
    await as_admin(sqlite_plane)
    open_one = backend("10.0.0.9:1", "open", "z", retry_at=NOON + 42_000, in_flight=3)
    await seen(
        sqlite_plane,
        backend("10.0.0.1:1", model="a", waiting=4, kv_usage=0.31),
        backend("10.0.0.2:1", "draining", "b"),
        open_one,
    )

    html = await page(sqlite_plane, BACKENDS)
    listed = {one["backend"]: one for one in (await sqlite_plane.admin.get("/api/v1/backends")).json()["data"]}

    rows = {row[0]: row for row in rows_of(html)}
    assert list(rows) == ["10.0.0.2:1", "10.0.0.9:1", "10.0.0.1:1"]
    assert "circuit open on 2 of 2, tried again in 42 s" in rows["10.0.0.9:1"][3]
    assert rows["10.0.0.9:1"][4] == "6" == str(listed["10.0.0.9:1"]["in_flight"])
    assert rows["10.0.0.1:1"][4:7] == ["2", "4", "31 %"]
    assert (listed["10.0.0.1:1"]["waiting"], listed["10.0.0.1:1"]["kv_usage"]) == (4, 0.31)
    bad = await page(sqlite_plane, f"{BACKENDS}?show=bad")
    assert [row[0] for row in rows_of(bad)] == ["10.0.0.2:1", "10.0.0.9:1"]
    assert [row[0] for row in rows_of(await page(sqlite_plane, f"{BACKENDS}?model=a"))] == ["10.0.0.1:1"]


async def test_pages_follow_each_other(sqlite_plane: Running) -> None:
    await as_admin(sqlite_plane)
    labels = [f"10.0.{n}.1:1" for n in range(120)]
    await seen(sqlite_plane, *(backend(label, "ready" if n % 3 else "open", "m") for n, label in enumerate(labels)))

    path, found = BACKENDS, list[str]()
    while path:
        html = await page(sqlite_plane, path)
        found += [row[0] for row in rows_of(html)]
        following = re.search(r'href="([^"]+)" rel="next"', html)
        path = unescape(following[1]) if following else ""

    assert len(found) == 120
    assert set(found) == set(labels)


async def test_an_order_says_who_why_and_which_routers_obey(sqlite_plane: Running) -> None:
    await as_admin(sqlite_plane)
    rows = backend("10.0.0.1:1", model="m"), backend("10.0.0.2:1", model="m")
    await seen(sqlite_plane, *rows)
    dialog = await page(sqlite_plane, f"{BACKENDS}?act=drain&backend=10.0.0.1:1&of=m")
    made = await send(sqlite_plane, action="drain", backend="10.0.0.1:1", reason='a "driver"', expires_in="3600")
    id = (await sqlite_plane.admin.get("/api/v1/overrides")).json()["data"][0]["id"]
    await seen(sqlite_plane, *rows, overrides=(id,))
    html = await page(sqlite_plane, BACKENDS)
    ended = await send(sqlite_plane, end=id)
    again = await send(sqlite_plane, end=id)

    assert "<dialog open" in dialog
    assert (made.status_code, made.headers["location"]) == (303, f"{BACKENDS}?done=drain")
    why = next(row for row in rows_of(html) if row[0] == "10.0.0.1:1")[3]
    assert why.startswith('drain by bob: “a "driver"”')
    assert "1 of 2 routers have it" in why
    assert "not yet b" in text_of(html)
    assert (ended.headers["location"], again.headers["location"]) == (
        f"{BACKENDS}?done=ended",
        f"{BACKENDS}?done=ended",
    )
    assert (await sqlite_plane.admin.get("/api/v1/overrides?active=true")).json()["data"] == []


async def test_the_last_backend_goes_only_when_that_is_meant(sqlite_plane: Running) -> None:
    await catalogue(sqlite_plane, m=of("10.0.0.1"))
    await as_admin(sqlite_plane)
    await seen(sqlite_plane, backend("10.0.0.1:8000", model="m"))
    path = f"{BACKENDS}?act=out&backend=10.0.0.1:8000&of=m"
    form = {"action": "out", "backend": "10.0.0.1:8000", "model": "m", "reason": "it <b>harms</b>"}

    refused = await send(sqlite_plane, path, **form)
    forced = await send(sqlite_plane, path, **form, force="1")

    assert refused.status_code == 409
    assert re.search(r'<input type="checkbox" name="force"', refused.text)
    assert "it &lt;b&gt;harms&lt;/b&gt;" in refused.text
    assert forced.status_code == 303


async def test_an_order_needs_a_reason(sqlite_plane: Running) -> None:
    await as_admin(sqlite_plane)
    await seen(sqlite_plane, backend("10.0.0.1:1", model="m"), backend("10.0.0.2:1", model="m"))

    answer = await send(sqlite_plane, f"{BACKENDS}?act=drain&backend=10.0.0.1:1", action="drain", backend="10.0.0.1:1")

    assert answer.status_code == 422
    assert "say why" in answer.text
    assert "<dialog open" in answer.text
    assert (await sqlite_plane.admin.get("/api/v1/overrides")).json()["data"] == []


async def test_a_viewer_sees_and_changes_nothing(sqlite_plane: Running) -> None:
    await as_admin(sqlite_plane, "viewer")
    await seen(sqlite_plane, backend("10.0.0.1:1", model="m"), backend("10.0.0.2:1", model="m"))

    html = await page(sqlite_plane, BACKENDS)
    sent = await send(sqlite_plane, action="drain", backend="10.0.0.1:1", reason="x")

    assert "Drain" not in html
    assert sent.status_code == 403
    assert (await sqlite_plane.admin.get("/api/v1/overrides")).json()["data"] == []
