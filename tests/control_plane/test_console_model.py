"""The page of a model: who sees what, its entry with its version, prices, history, deletion, and one request."""

import json
import re
from collections.abc import Callable
from typing import Any
from urllib.parse import quote

import httpx
import pytest
from sqlalchemy import insert

from control_plane.data.tables import models as models_table
from control_plane.data.tables import organisations
from tests.control_plane.conftest import NOON, Running
from tests.control_plane.pages import figures_of, hidden, links_of, page, rows_of, states_of, text_of
from tests.control_plane.people import SAME_ORIGIN, log_in, make_organisation, make_user
from tests.control_plane.test_console_overview import as_admin, in_step
from tests.control_plane.test_fleet import backend, report, reports
from tests.control_plane.test_overview import catalogue, loads, of
from tests.control_plane.usage import record, taken
from tests.ports import free_port

pytestmark = pytest.mark.anyio
M = "/console/models/m"
NAMES = ["Qwen/Qwen2.5-Coder:32B@awq", "a/b/c", "x" * 128]


async def send(plane: Running, path: str, **form: str) -> httpx.Response:
    return await plane.client.post(path, data=form, headers=SAME_ORIGIN)


async def entry_of(plane: Running, name: str = "m") -> dict[str, Any]:
    found: dict[str, Any] = (await plane.admin.get(f"/api/v1/models/{name}")).json()
    return found


async def test_backends_are_as_on_their_page(sqlite_plane: Running) -> None:
    plane = sqlite_plane
    await catalogue(plane, m=of("10.0.0.1", "10.0.0.2", fallbacks=["n"]), n=of("10.0.0.3"))
    error = {"outcome": "connect_failed", "request_id": "4bf9-12", "at": NOON - 5_000}
    await in_step(
        plane,
        backend("10.0.0.1:8000", "open", since=NOON - 60_000, retry_at=NOON + 9_000, last_error=error),
        backend("10.0.0.2:8000", kv_usage=0.31, waiting=2),
        backend("10.0.0.3:8000", model="n"),
    )
    await as_admin(plane)

    html = await page(plane, M)

    rows = rows_of(html)
    there = rows_of(await page(plane, "/console/backends?model=m"))
    assert [row[:1] + row[1:] for row in rows] == [row[:1] + row[2:] for row in there]
    assert rows[1][3:6] == ["1", "2", "31 %"]
    assert states_of(html) == [("bad", "open"), ("ok", "ready")]
    assert "/console/backends?model=m&act=drain&backend=10.0.0.2%3A8000&of=m" in links_of(html)
    assert figures_of(html)["Ready"] == "1 / 2 since 11:59:00"
    assert "/console/models/n" in links_of(html)


async def test_an_unknown_name_is_404_and_an_alias_leads_to_its_model(sqlite_plane: Running) -> None:
    await catalogue(sqlite_plane, m=of("10.0.0.1", aliases=["also"]))
    await as_admin(sqlite_plane)

    alias = await sqlite_plane.client.get("/console/models/also?tab=entry")

    assert (alias.status_code, alias.headers["location"]) == (303, "/console/models/m?tab=entry")
    for path in ("/console/models/none", "/console/models/%E9%80%9A", f"{M}?tab=none", "/console/models/" + "y" * 600):
        await page(sqlite_plane, path, 404)


@pytest.mark.parametrize("name", NAMES)
async def test_names_are_as_people_give_them(sqlite_plane: Running, name: str) -> None:
    plane = sqlite_plane
    await as_admin(plane)
    form = {"name": name, "backends": "http://10.0.0.1:8000\nhttp://10.0.0.2:8000", "aliases": "a b"}
    checked = await send(plane, "/console/new-model", do="check", **form)
    assert name not in (await plane.admin.get("/api/v1/models")).text

    saved = await send(plane, "/console/new-model", do="save", **form)

    assert checked.status_code == 200
    assert 'value="save"' in checked.text
    assert saved.headers["location"] == f"/console/models/{quote(name)}?done=created"
    html = await page(plane, saved.headers["location"])
    assert "The model is stored." in html
    assert f">{name}</h1>" in html
    listed = await page(plane, "/console/models")
    assert f"/console/models/{quote(name)}" in links_of(listed)
    for tab in ("metrics", "prices", "entry", "history", "tests"):
        await page(plane, f"/console/models/{quote(name)}?tab={tab}")
    stored = await entry_of(plane, quote(name))
    assert stored["backends"] == [{"url": "http://10.0.0.1:8000"}, {"url": "http://10.0.0.2:8000"}]
    assert stored["aliases"] == ["a", "b"]


GOOD = {"name": "m", "backends": "http://10.0.0.1:8000"}
WRONG = {
    "chinese": ({"name": "通义千问"}, "name", "no spaces; letters, digits"),
    "long": ({"name": "x" * 129}, "name", "at most 128"),
    "no-backend": ({"backends": " "}, "backends", "give the URL of one at least"),
    "bad-url": ({"backends": "10.0.0.1:8000"}, "backends", "backends.0.url"),
    "alias": ({"aliases": "ok ä"}, "aliases", "aliases.1"),
    "half-a-price": ({"input": "0.2"}, "output", "a price has this, too"),
    "no-number": ({"input": "x"}, "input", "must be a number"),
}


@pytest.mark.parametrize("case", WRONG)
async def test_what_is_wrong_with_a_new_model_is_said_at_its_field(sqlite_plane: Running, case: str) -> None:
    changes, field, words = WRONG[case]
    await as_admin(sqlite_plane)

    answer = await send(sqlite_plane, "/console/new-model", do="save", **{**GOOD, **changes})

    assert answer.status_code == 422
    at_field = answer.text.partition(f'id="{field}-wrong"')[2].partition("</p>")[0]
    assert words in text_of("<p " + at_field)
    assert (await sqlite_plane.admin.get("/api/v1/models")).json()["data"] == []


async def test_a_new_model_takes_no_name_that_is_there(sqlite_plane: Running) -> None:
    await catalogue(sqlite_plane, m=of("10.0.0.1", aliases=["also"]))
    before = await entry_of(sqlite_plane)
    await as_admin(sqlite_plane)

    same = await send(sqlite_plane, "/console/new-model", do="save", **GOOD)
    alias = await send(sqlite_plane, "/console/new-model", do="save", **{**GOOD, "name": "also"})
    json_way = await send(sqlite_plane, "/console/new-model?way=json", do="check", entry=json.dumps(before))

    assert [answer.status_code for answer in (same, alias, json_way)] == [409] * 3
    assert "exists already" in same.text
    assert "is taken by the model" in alias.text
    assert await entry_of(sqlite_plane) == before


async def test_an_entry_is_checked_then_stored(sqlite_plane: Running) -> None:
    plane = sqlite_plane
    await catalogue(plane, m=of("10.0.0.1"))
    await as_admin(plane)
    shown = await page(plane, f"{M}?tab=entry")
    text = json.dumps({**await entry_of(plane), "owner": "Süd"}, ensure_ascii=False)

    checked = await send(plane, f"{M}?tab=entry", do="check", entry=text, etag=hidden(shown, "etag"))
    before = await entry_of(plane)
    saved = await send(plane, f"{M}?tab=entry", do="save", entry=text, etag=hidden(checked, "etag"))

    assert checked.status_code == 200
    assert '<span class="added">+   &#34;owner&#34;: &#34;Süd&#34;</span>' in checked.text
    assert "This changes: 2 lines added, 1 removed" in checked.text
    assert 'value="save"' in checked.text
    assert 'value="save"' not in shown
    assert "owner" not in before
    assert (saved.status_code, saved.headers["location"]) == (303, f"{M}?tab=entry&done=saved")
    assert (await entry_of(plane))["owner"] == "Süd"


async def test_an_entry_that_somebody_changed_meanwhile_is_kept_as_typed(sqlite_plane: Running) -> None:
    plane = sqlite_plane
    await catalogue(plane, m=of("10.0.0.1"))
    await as_admin(plane)
    etag = hidden(await page(plane, f"{M}?tab=entry"), "etag")
    mine = json.dumps({**await entry_of(plane), "owner": "mine"})
    await catalogue(plane, m=of("10.0.0.9", owner="theirs"))

    refused = await send(plane, f"{M}?tab=entry", do="save", entry=mine, etag=etag)
    theirs = await entry_of(plane)
    again = await send(plane, f"{M}?tab=entry", do="save", entry=mine, etag=hidden(refused, "etag"))

    assert refused.status_code == 412
    assert "meanwhile" in refused.text
    assert "mine" in text_of(refused.text.partition("<textarea")[2].partition("</textarea>")[0])
    assert '<span class="removed">-   &#34;owner&#34;: &#34;theirs&#34;' in refused.text
    assert theirs["owner"] == "theirs"
    assert again.status_code == 303
    assert (await entry_of(plane))["owner"] == "mine"


BROKEN = {
    "unknown": ('{"name": "m", "ownr": "x", "backends": []}', "unknown key 'ownr'; did you mean 'owner'?"),
    "several": ('{"name": "m", "ownr": "x", "max_in_flight": 0}', "max_in_flight"),
    "renamed": ('{"name": "n"}', "A model keeps its name"),
    "json": ('{"name": "m",}', "is not JSON"),
    "list": ("[]", "must be an object"),
    "twice": ('{"name": "m", "name": "m"}', "the key 'name' is given twice"),
    "nan": ('{"name": "m", "max_in_flight": NaN}', "NaN is no number of JSON"),
    "deep": ("[" * 100_000, "nesting beyond"),
}


@pytest.mark.parametrize("case", BROKEN)
async def test_what_is_wrong_with_an_entry_is_said_and_nothing_lost(sqlite_plane: Running, case: str) -> None:
    text, words = BROKEN[case]
    await catalogue(sqlite_plane, m=of("10.0.0.1"))
    await as_admin(sqlite_plane)
    etag = hidden(await page(sqlite_plane, f"{M}?tab=entry"), "etag")

    answer = await send(sqlite_plane, f"{M}?tab=entry", do="save", entry=text, etag=etag)

    assert answer.status_code == 422
    assert words in text_of(answer.text)
    assert text_of(text[:200]) in text_of(answer.text.partition("<textarea")[2].partition("</textarea>")[0])


async def test_an_entry_that_is_not_served_can_be_mended(sqlite_plane: Running) -> None:
    plane = sqlite_plane
    async with plane.plane.change("models") as connection:
        row = {"name": "m", "entry": '{"name": "m", "gone": 1}', "updated_at": NOON}
        await connection.execute(insert(models_table).values(**row))
    await as_admin(plane)

    html = await page(plane, M)
    mended = await send(plane, M, do="save", entry='{"name": "m"}', etag=hidden(html, "etag"))

    assert "unknown key 'gone'" in text_of(html)
    assert mended.status_code == 303
    assert (await entry_of(plane))["name"] == "m"


async def test_prices_are_added_with_their_time(sqlite_plane: Running) -> None:
    plane = sqlite_plane
    await catalogue(plane, m=of("10.0.0.1", price={"input": 0.2, "output": 0.6}))
    await as_admin(plane)

    later = await send(plane, f"{M}?tab=prices", do="price", input="1", output="2.5", valid_from="2026-12-01T00:00:00Z")
    now = await send(plane, f"{M}?tab=prices", do="price", input="0.3", output="0.9", request="0.01", cached_input="0")
    wrong = await send(plane, f"{M}?tab=prices", do="price", input="-1", output="2", valid_from="soon")
    rows = rows_of(await page(plane, f"{M}?tab=prices"))

    assert [later.status_code, now.status_code, wrong.status_code] == [303, 303, 422]
    assert [row[:6] for row in rows] == [
        ["2026-12-01 00:00:00", "will hold", "1.00", "as input", "2.50", "0.00"],
        ["2026-11-28 12:00:00", "holds now", "0.30", "0.00", "0.90", "0.01"],
        ["2026-11-28 12:00:00", "was replaced", "0.20", "as input", "0.60", "0.00"],
    ]
    assert 'id="input-wrong"' in wrong.text
    assert 'id="valid_from-wrong"' in wrong.text
    assert (await entry_of(plane))["price"]["input"] == 0.3


async def test_history_has_each_change_with_its_difference(sqlite_plane: Running) -> None:
    plane = sqlite_plane
    await catalogue(plane, m=of("10.0.0.1"), other=of("10.0.0.2"))
    for number in range(20):
        await catalogue(plane, m=of("10.0.0.1", owner=f"team-{number}"))
    await as_admin(plane)

    html = await page(plane, f"{M}?tab=history")
    rest = await page(plane, next(link for link in links_of(html) if "after=" in link))

    assert html.count("model.update") == 20
    assert "team-19" in html
    assert '<span class="removed">-   &#34;owner&#34;: &#34;team-18&#34;' in html
    assert (rest.count("model.create"), rest.count("model.update")) == (1, 0)


async def test_a_deletion_names_the_model_its_use_and_who_needs_it(sqlite_plane: Running) -> None:
    plane = sqlite_plane
    await catalogue(plane, m=of("10.0.0.1"), n=of("10.0.0.2"), v={"split": {"variants": {"m": 1, "n": 1}}})
    await taken(plane, record(model="m"), record(model="m", at=NOON - 1))
    await as_admin(plane)
    dialog = await page(plane, f"{M}?act=delete")
    asked = "<dialog" + dialog.partition("<dialog")[2].partition("</dialog>")[0]

    refused = await send(plane, M, do="delete", etag=hidden(dialog, "etag"))
    await plane.admin.delete("/models/v")
    stale = await send(plane, M, do="delete", etag='"0"')
    deleted = await send(plane, M, do="delete", etag=hidden(dialog, "etag"))

    text, links = text_of(asked), links_of(asked)
    assert re.search(r"\bDelete m\b", text)
    assert re.search(r"\b2 requests\b", text)
    assert {"/console/requests?model=m&range=24h", "/console/models/v"} <= set(links)
    assert (refused.status_code, stale.status_code) == (409, 412)
    assert "'v'" in text_of(refused.text)
    assert (deleted.status_code, deleted.headers["location"]) == (303, "/console/models?done=deleted")
    await page(plane, M, 404)


async def test_metrics_are_those_of_this_model_with_live_figures(sqlite_plane: Running) -> None:
    plane = sqlite_plane
    await catalogue(plane, m=of("10.0.0.1"), n=of("10.0.0.2"), v={"split": {"variants": {"m": 1, "n": 1}}})
    await taken(plane, record(model="m", asked_model="v"), record(model="m", asked_model="m"), record(model="n"))
    await in_step(plane, backend("10.0.0.1:8000"))
    await reports(plane, r1=report(backend("10.0.0.1:8000"), models=loads("m")))
    await as_admin(plane)

    whole = await page(plane, f"{M}?tab=metrics")
    virtual = await page(plane, "/console/models/v?tab=metrics&range=15m")
    none = await page(plane, "/console/models/n?tab=metrics&range=6h")

    assert figures_of(whole)["Requests now"].endswith("2 in 1 h")
    assert whole.count("<figure") == 3
    assert rows_of(whole) == [["r1", "2", "1", "10", "0"]]
    assert figures_of(virtual)["Requests now"].endswith("1 in 15 min")
    assert figures_of(none)["Requests now"].endswith("1 in 6 h")


TABS_OF = {
    "admin": ["Backends", "Engine", "Logs", "Tests", "Metrics", "Prices", "Entry", "History"],
    "operator": ["Backends", "Engine", "Logs", "Tests", "Metrics", "Entry", "History"],
    "viewer": ["Backends", "Engine", "Tests", "Metrics", "Entry", "History"],
    None: ["Metrics", "Entry", "History"],
}


@pytest.mark.parametrize("role", TABS_OF)
async def test_each_role_has_its_tabs_and_buttons(sqlite_plane: Running, role: str | None) -> None:
    plane = sqlite_plane
    await catalogue(plane, m=of("10.0.0.1", aliases=["also"]), hidden=of("10.0.0.2"))
    await in_step(plane, backend("10.0.0.1:8000", "open"))
    await make_user(plane, "bob", role)
    if role is None:
        await make_organisation(plane, "team-a", bob="owner")
        async with plane.plane.database.main.write() as connection:
            await connection.execute(organisations.update().values(models=["m"]))
    await log_in(plane, "bob")

    html = await page(plane, M)
    pages = [await plane.client.get(f"{M}?tab={name.lower()}") for name in TABS_OF["admin"]]
    forms = {
        do: (await send(plane, M, do=do, entry="{}", etag="", input="1", output="1")).status_code
        for do in ("check", "delete", "price", "test", "start", "deploy")
    }

    tabs = html.partition('aria-label="Parts of this page"')[2].partition("</nav>")[0]
    assert text_of("<x " + tabs).split() == TABS_OF[role]
    assert [one.status_code for one in pages] == [200 if t in TABS_OF[role] else 403 for t in TABS_OF["admin"]]
    writes, admin, operates = role in ("admin", "operator"), role == "admin", role in ("admin", "operator")
    assert {do: status != 403 for do, status in forms.items()} == {
        "check": writes, "delete": writes, "price": admin, "test": operates, "start": operates, "deploy": operates,
    }  # fmt: skip
    if role is None:
        assert "10.0.0." not in html + "".join(one.text for one in pages)
        await page(plane, "/console/models/hidden", 404)
    await page(plane, "/console/new-model", 200 if writes else 403)


async def test_without_a_router_tests_say_what_to_set(sqlite_plane: Running) -> None:
    await catalogue(sqlite_plane, m=of("10.0.0.1"))
    await as_admin(sqlite_plane)

    html = await page(sqlite_plane, f"{M}?tab=tests")

    assert "CONTROL_PLANE_ROUTER_URL=" in html
    assert "through the router" not in html
    assert (await send(sqlite_plane, f"{M}?tab=tests", do="test")).status_code == 503


async def test_a_test_shows_its_steps_and_those_before_it(
    start_sqlite: Callable[..., Any], start_engine: Callable[..., Any], start_router: Callable[..., Any]
) -> None:
    engine = await start_engine()
    served = {
        "m": {"backends": [{"url": engine.url}]},
        "gone": {"backends": [{"url": f"http://127.0.0.1:{free_port()}"}]},
    }
    router = await start_router(models=[{"name": name, **entry} for name, entry in served.items()])
    plane: Running = await start_sqlite(router_url=router.url)
    await catalogue(plane, **served)
    await as_admin(plane)

    good = await send(plane, f"{M}?tab=tests", do="test", kind="chat")
    direct = await send(plane, f"{M}?tab=tests", do="test", backend=engine.url)
    other = await send(plane, f"{M}?tab=tests", do="test", backend="http://10.0.0.9:8000")
    await send(plane, "/console/models/gone?tab=tests", do="test")
    html, bad = await page(plane, f"{M}?tab=tests"), await page(plane, "/console/models/gone?tab=tests")

    assert [one.status_code for one in (good, direct, other)] == [303, 303, 422]
    assert html.count('<details class="body"') == 2
    assert [row[:2] for row in rows_of(html)] == [
        ["Health", "ok"],
        ["Listed in /v1/models", "ok"],
        ["One request", "ok"],
    ]
    assert rows_of(bad)[-1][:2] == ["One request", "failed"]
    assert "50" in rows_of(bad)[-1][2]
    assert "sk-ia-" not in html + bad


async def test_a_router_that_is_away_is_said_without_its_address(start_sqlite: Callable[..., Any]) -> None:
    plane: Running = await start_sqlite(router_url=f"http://127.0.0.1:{free_port()}")
    await catalogue(plane, m=of("10.0.0.1"))
    await as_admin(plane)

    await send(plane, f"{M}?tab=tests", do="test")
    html = await page(plane, f"{M}?tab=tests")

    assert [row[1] for row in rows_of(html)] == ["skipped", "failed", "skipped"]
    assert "the router does not answer (ConnectError)" in html
    assert plane.plane.settings.router_url is not None
    assert plane.plane.settings.router_url not in html
