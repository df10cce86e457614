"""The page of keys and tokens: made with a secret that is shown once, changed, rotated, found, and ended."""

import asyncio
import html
import logging
import os
import re
import sys
import time
from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import insert

from control_plane.data.tables import keys
from control_plane.services import reports as reported
from tests.control_plane.conftest import NOON, SERVICE_TOKEN, Clock, Running
from tests.control_plane.forms import as_user, hidden, opened, sent
from tests.control_plane.people import SAME_ORIGIN, make_organisation, make_user
from tests.control_plane.test_fleet import report, reports
from tests.control_plane.test_together import eventually
from tests.control_plane.usage import record, taken

pytestmark = pytest.mark.anyio
SECRET = re.compile(r"(?:sk|mt|st)-ia-[0-9A-Za-z]{12}-[0-9A-Za-z]{49}")
EMPTY_ROW = {"limit_unit": "requests", "limit_amount": "", "limit_per": "60", "limit_models": "", "limit_precise": ""}


@pytest.fixture
async def console(sqlite_plane: Running) -> Running:
    """`client` is logged in as bob, the owner of team-a; of team-b he knows nothing."""
    for name in ("bob", "mia", "eve"):
        await make_user(sqlite_plane, name, password=None)
    await make_organisation(sqlite_plane, "team-a", bob="owner", mia="member")
    await make_organisation(sqlite_plane, "team-b", eve="owner")
    await as_user(sqlite_plane, "bob")
    return sqlite_plane


def new_key(page: str, **changes: Any) -> dict[str, Any]:
    """What a browser sends of the form of a new key."""
    row = {name: [value] * 3 for name, value in EMPTY_ROW.items()}
    budget = {"budget_unit": "", "budget_amount": "", "budget_per": "month", "budget_soft": ""}
    once = "" if "do" in changes else hidden(page, "once")
    fields = {"do": "create", "once": once, "name": "batch", "organisation": "team-a", "user": ""}
    return {**fields, "models": "", "expires": "", **row, **budget, **changes}


async def made(running: Running, **body: Any) -> dict[str, Any]:
    answer = await running.admin.post("/api/v1/keys", json={"name": "batch", "organisation": "team-a", **body})
    assert answer.status_code == 201, answer.text
    found: dict[str, Any] = answer.json()
    return found


async def test_a_key_is_made_and_its_secret_shown_once(console: Running, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    page = await opened(console, "/console/keys?act=create")
    fields = new_key(
        page,
        name="chat <b>Straße 钥匙",
        models="llama-* chat",
        limit_amount=["60", "", "4"],
        limit_unit=["requests", "tokens", "streams"],
        limit_models=["llama-*", "", ""],
        budget_unit="cost",
        budget_amount="12.5",
        budget_soft="75",
        expires="2027-01-31",
        priority="-2",
        weight="2.5",
    )
    shown = await sent(console, "/console/keys?act=create", **fields)

    assert (shown.status_code, shown.headers["cache-control"]) == (200, "no-store")
    (secret,) = set(SECRET.findall(shown.text))
    id = secret[6:18]
    assert "chat &lt;b&gt;Straße 钥匙" in shown.text
    assert "<b>Straße" not in shown.text
    read = (await console.admin.get(f"/api/v1/keys/{id}")).json()
    assert {name: read[name] for name in ("name", "models", "limits", "budget", "expires", "priority", "weight")} == {
        "name": "chat <b>Straße 钥匙",
        "models": ["llama-*", "chat"],
        "limits": [{"requests": 60, "per": 60, "models": ["llama-*"]}, {"streams": 4}],
        "budget": {"cost": 12.5, "per": "month", "soft": 0.75},
        "expires": "2027-01-31T00:00:00Z",
        "priority": -2,
        "weight": 2.5,
    }
    assert read["created_by"] == "bob"
    # Nowhere else: neither the page of the key, nor the list, nor the audit log, nor the log.
    others = [await opened(console, path) for path in ("/console/keys", f"/console/keys/{id}")]
    others += [(await console.admin.get("/api/v1/audit?limit=200")).text, caplog.text]
    assert [text for text in others if secret[-20:] in text] == []
    assert '"key.create"' in others[2]
    assert "60 requests a minute for llama-*" in others[1]
    assert "4 streams at once" in others[1]


async def test_a_form_that_is_sent_again_makes_no_second_key(console: Running) -> None:
    """As a reload of the page with the secret does."""
    page = await opened(console, "/console/keys?act=create")
    fields = new_key(page)
    first = await sent(console, "/console/keys?act=create", **fields)
    again = await sent(console, "/console/keys?act=create", **fields)

    id = SECRET.findall(first.text)[0][6:18]
    assert (again.status_code, again.headers["location"]) == (303, f"/console/keys/{id}?done=once")
    assert "nothing was made a second time" in await opened(console, again.headers["location"])
    assert len((await console.admin.get("/api/v1/keys")).json()["data"]) == 1


async def test_code_has_the_public_address_of_routers_and_a_model_of_the_key(console: Running) -> None:
    for name in ("alpha", "llama-3-8b"):
        await console.admin.put(f"/models/{name}", json={"name": name, "backends": ["http://10.9.8.7:8000"]})
    key = await made(console, models=["llama-*"])
    unknown = await opened(console, f"/console/keys/{key['id']}")

    assert "https://ROUTER/v1/chat/completions" in unknown
    assert "An admin of the platform knows it" in unknown
    assert "&#34;llama-3-8b&#34;" in unknown
    assert "alpha" not in unknown
    assert "10.9.8.7" not in unknown


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"name": ""}, "at least 1 character"),
    ({"models": "llama 3/<script>"}, "models.1"),
    ({"limit_amount": ["many", "", ""]}, "must be a whole number, not &#39;many&#39;"),
    ({"limit_amount": ["60", ""]}, "cannot be read"),
    ({"budget_unit": "tokens", "budget_amount": ""}, "needs an amount"),
    ({"budget_unit": "cost", "budget_amount": "-1"}, "greater than 0"),
    ({"expires": "soon"}, "must be a time in UTC"),
    ({"weight": "heavy", "priority": "0"}, "must be a number"),
]


async def test_wrong_values_are_named_and_kept(console: Running) -> None:
    page = await opened(console, "/console/keys?act=create")
    for change, said in WRONG:
        page = await refused_and_kept(console, page, change, said)


async def refused_and_kept(console: Running, page: str, change: dict[str, Any], said: str) -> str:
    fields = new_key(page, **{"name": "kept as typed", "user": "mia", "budget_amount": "77", **change})
    answer = await sent(console, "/console/keys?act=create", **fields)

    assert answer.status_code == 422
    assert said in answer.text
    form = answer.text.partition("<dialog")[2]
    assert 'value="mia"' in form
    for value in (value for values in change.values() for value in ([values] if isinstance(values, str) else values)):
        assert html.escape(value) in form
    # It can be sent again, once it is right.
    fields |= new_key(answer.text, name="right") | {"priority": "0", "weight": "1"}
    assert (await sent(console, "/console/keys?act=create", **fields)).status_code == 200
    return await opened(console, "/console/keys?act=create")


@pytest.mark.parametrize("name", ["limit_amount", "limit_per"])
async def test_a_number_of_thousands_of_digits_is_none(console: Running, name: str) -> None:
    await as_user(console, "pia", "admin")
    limit = {"limit_unit": "requests", "limit_amount": "5", "limit_per": "60", "limit_models": "", "limit_precise": ""}
    given = {"do": "create", "name": "batch", "once": "x" * 20, **limit, name: "9" * 5000}

    answer = await console.client.post("/console/keys?act=create", data=given, headers=SAME_ORIGIN)

    assert answer.status_code == 422
    assert "must be a whole number" in answer.text


async def test_people_see_and_make_keys_of_their_own_organisations_only(console: Running) -> None:
    other, own = await made(console, organisation="team-b"), await made(console, user="mia")
    listed = await opened(console, "/console/keys")
    foreign = await console.client.get(f"/console/keys/{other['id']}")
    page = await opened(console, "/console/keys?act=create")
    into = await sent(console, "/console/keys?act=create", **new_key(page, organisation="team-b"))
    changes = [
        await sent(console, f"/console/keys/{other['id']}", do=verb, once="0123456789abcdef", overlap="0")
        for verb in ("disable", "end", "rotate")
    ]
    await as_user(console, "mia")
    of_mia = await opened(console, "/console/keys")
    for_bob = await sent(
        console, "/console/keys?act=create", **new_key(await opened(console, "/console/keys?act=create"), user="bob")
    )
    ranked = await sent(
        console,
        "/console/keys?act=create",
        **new_key(await opened(console, "/console/keys?act=create"), priority="-5", weight="1"),
    )

    assert own["id"] in listed
    assert other["id"] not in listed
    assert {answer.status_code for answer in (foreign, into, *changes)} == {404}
    assert own["id"] in of_mia
    assert (for_bob.status_code, ranked.status_code) == (403, 403)
    assert (await console.admin.get(f"/api/v1/keys/{other['id']}")).json()["state"] == "ok"


async def test_a_viewer_of_the_platform_sees_ids_only(console: Running) -> None:
    key = await made(console, name="nobody's business")
    await as_user(console, "vic", "viewer")
    listed, page = await opened(console, "/console/keys"), await opened(console, f"/console/keys/{key['id']}")
    ended = await sent(console, f"/console/keys/{key['id']}", do="end")

    assert key["id"] in listed
    assert key["id"] in page
    assert "business" not in listed + page
    assert ended.status_code == 403
    assert "business" not in ended.text
    # Nor by asking for a part of it, nor where keys are suggested or counted
    asked = await opened(console, "/console/keys?name=business")
    await taken(console, record(key_id=key["id"], key_name=None))
    others = [await opened(console, path) for path in ("/console/requests", "/console/usage?group_by=key")]
    assert key["id"] not in asked
    assert key["id"] in others[0]
    assert key["id"] in others[1]
    assert "business" not in others[1] + others[0].partition("<table")[0]


async def test_filters_and_pages_are_in_the_url(console: Running) -> None:
    made_keys = [{"name": f"key {number:02}", "user": "mia" if number % 2 else None} for number in range(52)]
    async with console.plane.database.main.write() as connection:
        rows: list[dict[str, Any]] = [
            {**one, "id": f"{place:012}", "digest": f"{place}", "organisation": "team-a", "limits": []}
            for place, one in enumerate(made_keys)
        ]
        await connection.execute(insert(keys).values([{**row, "created_at": NOON} for row in rows]))
    first = await opened(console, "/console/keys")
    after = re.findall(r'href="(/console/keys\?after=[^"]+)" rel="next"', first)
    second = await opened(console, html.unescape(after[0]))
    mias = await opened(console, "/console/keys?user=mia&organisation=team-a&state=ok")
    found = await sent(console, "/console/keys?user=mia", do="find", find="Y 1")

    assert [text.count('<tr id="key-') for text in (first, second, mias)] == [50, 2, 26]
    assert found.headers["location"] == "/console/keys?user=mia&name=Y+1"
    assert (await opened(console, found.headers["location"])).count('<tr id="key-') == 5
    assert "No key matches" in await opened(console, "/console/keys?state=expired")
    assert (await console.client.get("/console/keys?state=<x>")).status_code == 422
    assert (await console.client.get("/console/keys?after=x")).status_code == 422


async def test_a_change_needs_the_key_as_it_was_seen(console: Running) -> None:
    key = await made(
        console, limits=[{"tokens": 9, "per": 10, "precise": True}], budget={"tokens": 5, "per": "day"}, models=[]
    )
    url = f"/console/keys/{key['id']}?act=edit"
    page = await opened(console, url)
    form = new_key(page, name="renamed", do="edit", etag=hidden(page, "etag"))
    form |= {"limit_amount": ["9"], "limit_unit": ["tokens"], "limit_per": ["10"], "limit_models": [""]}
    form |= {"limit_precise": ["1"], "budget_unit": "requests", "budget_amount": "7", "budget_per": "week"}
    await console.admin.patch(
        f"/api/v1/keys/{key['id']}",
        json={"user": "mia"},
        headers={"if-match": (await console.admin.get(f"/api/v1/keys/{key['id']}")).headers["etag"]},
    )
    refused = await sent(console, url, **form, no_models="1")
    saved = await sent(console, url, **{**form, "etag": hidden(refused.text, "etag")}, no_models="1")

    assert refused.status_code == 412
    dialog = refused.text.partition("<dialog")[2]
    assert "Somebody has changed" in dialog
    assert 'value="renamed"' in dialog
    assert "Save all the same" in dialog
    # What that would undo
    assert '<span class="removed">-   &#34;user&#34;: &#34;mia&#34;' in dialog
    assert saved.headers["location"] == f"/console/keys/{key['id']}?done=changed"
    now = (await console.admin.get(f"/api/v1/keys/{key['id']}")).json()
    assert (now["name"], now["user"], now["models"]) == ("renamed", None, [])
    assert now["limits"] == [{"tokens": 9, "per": 10, "precise": True}]
    assert now["budget"] == {"requests": 7, "per": "week"}


async def test_an_empty_field_of_models_does_not_open_all_of_them(console: Running) -> None:
    """Of a key that may use none."""
    key = await made(console, models=[])
    page = await opened(console, f"/console/keys/{key['id']}?act=edit")

    assert re.search(r'name="no_models" value="1" checked', page)


async def test_a_time_of_a_day_stays_where_its_day_does(console: Running) -> None:
    key = await made(console, expires="2027-01-31T12:34:56Z")
    page = await opened(console, f"/console/keys/{key['id']}?act=edit")
    form = new_key(page, name="b", do="edit", etag=hidden(page, "etag"), expires="2027-01-31")
    await sent(console, f"/console/keys/{key['id']}?act=edit", **form)

    assert (await console.admin.get(f"/api/v1/keys/{key['id']}")).json()["expires"] == "2027-01-31T12:34:56Z"


async def test_who_makes_own_keys_only_is_offered_the_own_organisation(console: Running) -> None:
    await as_user(console, "mia")
    form = (await opened(console, "/console/keys?act=create")).partition("<dialog")[2]

    assert 'value="team-a"' in form
    assert 'value="team-b"' not in form


@pytest.mark.parametrize("act", ["edit", "rotate", "end"])
async def test_nothing_is_asked_of_a_key_that_has_ended(console: Running, act: str) -> None:
    key = await made(console)
    url = f"/console/keys/{key['id']}"
    before = await opened(console, f"{url}?act={act}")
    await sent(console, url, do="end")

    assert "<dialog" in before
    assert "<dialog" not in await opened(console, f"{url}?act={act}")


async def test_a_key_is_rotated_with_an_overlap(console: Running, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    key = await made(console)
    url = f"/console/keys/{key['id']}?act=rotate"
    form = {"do": "rotate", "once": hidden(await opened(console, url), "once"), "overlap": "3600"}
    shown = await sent(console, url, **form)
    again = await sent(console, url, **form)
    wrong = await sent(console, url, do="rotate", once="0123456789abcdef0", overlap="99999999")

    (secret,) = set(SECRET.findall(shown.text))
    assert secret != key["key"]
    assert secret[6:18] == key["id"]
    assert "accepted until" in shown.text
    assert again.headers["location"] == f"/console/keys/{key['id']}?done=once"
    assert wrong.status_code == 422
    assert secret[-20:] not in caplog.text + wrong.text
    read = (await console.admin.get(f"/api/v1/keys/{key['id']}")).json()
    assert read["previous_until"] == "2026-11-28T13:00:00Z"


async def test_a_key_is_disabled_and_enabled(console: Running) -> None:
    key = await made(console)
    disabled = await sent(console, f"/console/keys/{key['id']}", do="disable")
    page = await opened(console, disabled.headers["location"])
    await sent(console, f"/console/keys/{key['id']}", do="enable")

    assert ">disabled</span>" in page
    assert "<button>Enable</button>" in page
    assert (await console.admin.get(f"/api/v1/keys/{key['id']}")).json()["state"] == "ok"


async def test_a_leaked_key_is_found_by_its_secret_and_ended(
    console: Running, caplog: pytest.LogCaptureFixture
) -> None:
    """The secret itself is in no URL, no log and no page."""
    key = await made(console, name="leaked")
    rows = [record(key_id=key["id"], organisation="team-a", at=NOON - 3_000 - n * 1_000_000) for n in range(5)]
    await taken(console, *rows)
    caplog.set_level(logging.DEBUG)
    found = await sent(console, "/console/keys", do="find", find=f" Authorization: Bearer {key['key']} ")
    dialog = await opened(console, found.headers["location"])
    ended = await sent(console, found.headers["location"], do="end", reason="leaked in a log")
    stale = report(etags={"models": None, "policy": '"old"', "overrides": None, "spend": None})
    await reports(console, r1=stale, r2=report())
    waiting = await opened(console, ended.headers["location"])
    etag = reported.etags(console.plane)["policy"]
    await reports(console, r1=report(etags={"models": None, "policy": etag, "overrides": None, "spend": None}))
    page = await opened(console, ended.headers["location"])

    assert found.headers["location"] == f"/console/keys/{key['id']}?act=end"
    assert "4 requests" in dialog.partition("<dialog")[2]
    assert "5 requests" in dialog.partition("<dialog")[2]
    assert (ended.status_code, ended.headers["location"]) == (303, f"/console/keys/{key['id']}?done=ended")
    assert "0 of 2 refuse it" in waiting
    assert "1 of 2 refuse it" in page
    assert ">ended</span>" in page
    assert "leaked in a log" in page
    assert re.search(r"<dt>Requests</dt><dd>(<a [^>]+>)?5", page)
    assert key["key"][-20:] not in "".join((caplog.text, found.text, dialog, page))


async def test_what_looks_like_a_secret_is_in_no_url(console: Running) -> None:
    key = await made(console)
    by_id = await sent(console, "/console/keys", do="find", find=key["id"])
    cut = await sent(console, "/console/keys", do="find", find=key["key"][:30])
    unknown = await sent(console, "/console/keys", do="find", find="sk-ia-000000000000-" + "x" * 49)
    token = await sent(console, "/console/keys", do="find", find="st-ia-000000000000-" + "x" * 49)
    broken = await sent(console, "/console/keys", do="find", find="sk-ia-" + "x" * 40)
    pasted = await console.client.get("/console/keys", params={"organisation": key["key"]})

    assert by_id.headers["location"] == f"/console/keys/{key['id']}"
    assert cut.headers["location"] == f"/console/keys/{key['id']}?act=end"
    assert unknown.status_code == 404
    assert "xxx" not in unknown.text
    assert token.headers["location"] == "/console/keys?tab=tokens&act=end&id=000000000000"
    assert broken.headers["location"] == "/console/keys"
    assert (pasted.status_code, pasted.headers["location"]) == (303, f"/console/keys?organisation={key['id']}")


async def test_figures_are_those_of_the_api(console: Running) -> None:
    key = await made(console, budget={"cost": 0.001, "per": "month"})
    rows = [record(key_id=key["id"], organisation="team-a", at=NOON - 60_000 * n) for n in range(1, 4)]
    rows += [record(key_id=key["id"], organisation="team-a", status=502, outcome="connect_error", cost_nanos=None)]
    await taken(console, *rows)
    page = await opened(console, "/console/keys")
    query = "start=2026-11-27T12:00:00Z&end=2026-11-28T12:00:00Z&bucket=1h"
    totals = (await console.admin.get(f"/api/v1/usage?{query}&key={key['id']}")).json()["totals"]

    row = page.partition(f'id="key-{key["id"]}"')[2].partition("</tr>")[0]
    requests, cost = re.findall(r'<td class="num"[^>]*><div>(?:<a [^>]+>)?([^<]+)', row)
    assert (int(requests), totals["requests"], totals["errors"]) == (4, 4, 1)
    assert "1 error<" in row
    assert cost == "0.00043 USD"
    assert totals["cost_nanos"] == 426_720
    assert "43 %" in row
    assert "+ 1 unpriced" in row
    assert f"/console/requests?key={key['id']}" in row


async def test_tokens_are_made_changed_rotated_and_ended(console: Running, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    base = "/console/keys?tab=tokens"
    once = hidden(await opened(console, f"{base}&act=create"), "once")
    form = {"do": "create", "once": once, "name": "ci <i>", "organisation": "team-a", "role": "member", "expires": ""}
    shown = await sent(console, f"{base}&act=create", **form)
    again = await sent(console, f"{base}&act=create", **form)
    (secret,) = set(SECRET.findall(shown.text))
    id = secret[6:18]
    listed = await opened(console, again.headers["location"])
    edit = hidden(await opened(console, f"{base}&act=edit&id={id}"), "etag")
    change = {"do": "edit", "id": id, "name": "ci 2", "organisation": "team-a", "role": "viewer", "expires": ""}
    changed = await sent(console, f"{base}&act=edit&id={id}", **change, etag=edit)
    stale = await sent(console, f"{base}&act=edit&id={id}", **change, etag=edit)
    disabled = await sent(console, base, do="disable", id=id)
    rotating = hidden(await opened(console, f"{base}&act=rotate&id={id}"), "once")
    rotated = await sent(console, f"{base}&act=rotate&id={id}", do="rotate", id=id, once=rotating, overlap="0")
    ended = await sent(console, f"{base}&act=end&id={id}", do="end", id=id)

    assert secret.startswith("mt-ia-")
    assert again.headers["location"] == f"{base}&done=once"
    assert "ci &lt;i&gt;" in listed
    assert "nothing was made a second time" in listed
    assert changed.headers["location"] == f"{base}&done=changed"
    assert stale.status_code == 412
    assert 'value="ci 2"' in stale.text
    assert disabled.headers["location"] == f"{base}&done=disabled"
    (second,) = set(SECRET.findall(rotated.text))
    assert second != secret
    assert ended.headers["location"] == f"{base}&done=ended"
    audit = (await console.admin.get("/api/v1/audit?limit=200")).text
    assert audit.count(id) >= 5
    for one in (secret, second):
        assert one[-20:] not in caplog.text + audit + listed


async def test_a_change_of_a_token_keeps_it_disabled_and_undoes_no_other(console: Running) -> None:
    answer = await console.client.post("/api/v1/tokens", json={"name": "ci"}, headers=SAME_ORIGIN)
    id = answer.json()["id"]
    await sent(console, "/console/keys?tab=tokens", do="disable", id=id)
    url = f"/console/keys?tab=tokens&act=edit&id={id}"
    form = {"do": "edit", "id": id, "etag": hidden(await opened(console, url), "etag"), "expires": ""}

    saved = await sent(console, url, **form, name="ci 2")
    stale = await sent(console, url, **form, name="ci 3")

    assert (saved.status_code, stale.status_code) == (303, 412)
    token = (await console.client.get(f"/api/v1/tokens/{id}")).json()
    assert (token["name"], token["disabled"]) == ("ci 2", True)


async def test_service_tokens_are_for_admins_of_the_platform(console: Running) -> None:
    base = "/console/keys?tab=tokens&act=create"
    page = await opened(console, base)
    form = {"do": "create", "name": "r", "kind": "service", "scopes": ["report", "ingest"], "expires": ""}
    refused = await sent(console, base, **form, once=hidden(page, "once"))
    await as_user(console, "root", "admin")
    admins = await opened(console, base)
    mixed = await sent(console, base, **form, role="viewer", once=hidden(admins, "once"))
    taken = await sent(console, base, **form, once=hidden(mixed.text, "once"))

    assert 'value="service"' not in page
    assert 'value="service"' in admins
    assert (refused.status_code, mixed.status_code, taken.status_code) == (403, 422, 200)
    assert re.search(r'value="report" checked', mixed.text)
    (secret,) = set(SECRET.findall(taken.text))
    assert secret.startswith("st-ia-")


async def test_tokens_of_others_are_not_found(console: Running) -> None:
    ana = (await console.admin.get("/api/v1/tokens")).json()["data"][0]["id"]
    base = "/console/keys?tab=tokens"

    assert ana not in await opened(console, base)
    assert (await console.client.get(f"{base}&act=end&id={ana}")).status_code == 404
    for verb in ("end", "disable", "rotate"):
        answer = await sent(console, base, do=verb, id=ana, once="0123456789abcdef", overlap="0")
        assert answer.status_code == 404


async def test_who_sees_no_keys_has_the_own_tokens_still(console: Running) -> None:
    await as_user(console, "olga", "operator")
    page = await opened(console, "/console/keys")
    forbidden = await console.client.get("/console/keys?tab=keys")

    assert "You have no token" in page
    assert forbidden.status_code == 403


@pytest.mark.parametrize("path", ["/console/keys", "/console/keys?tab=tokens", "/console/keys/{id}"])
async def test_a_form_of_nothing_changes_nothing(console: Running, path: str) -> None:
    key = await made(console)
    answer = await sent(console, path.format(id=key["id"]), do="other", id=key["id"], name="x")

    assert 400 <= answer.status_code < 500


async def test_code_works_as_printed_until_the_key_has_ended(
    start_sqlite: Callable[..., Any], start_engine: Callable[..., Any], start_router: Callable[..., Any]
) -> None:
    """A leaked key: real routers refuse it, and the page of the key says so."""
    clock = Clock(time.time_ns() // 1_000_000)
    registry: Running = await start_sqlite(clock)
    engine = await start_engine()
    made_model = await registry.admin.put("/models/m", json={"name": "m", "backends": [engine.url]})
    router = await start_router(
        models=[], registry_url=registry.url, registry_token=SERVICE_TOKEN, registry_refresh=0.5, policy="registry",
        auth="keys", report_interval=0.5,
    )  # fmt: skip
    plane: Running = await start_sqlite(clock, router_public_url=router.url)
    await as_user(plane, "root", "admin")
    page = await opened(plane, "/console/keys?act=create")
    shown = await sent(plane, "/console/keys?act=create", **new_key(page, organisation=""))
    blocks = re.findall(r'<pre id="(?:copy|code)-[^>]*>(.*?)</pre>', shown.text, re.DOTALL)
    export, curl, python, _ = map(html.unescape, blocks)

    async def accepted() -> bool:
        return '"choices"' in await ran("bash", "-c", f"{export}\n{curl}")

    await eventually(accepted)
    key = SECRET.findall(shown.text)[0]
    by_sdk = await ran(sys.executable, "-c", python, INFERENCE_API_KEY=key)
    await sent(plane, f"/console/keys/{key[6:18]}?act=end", do="end")

    async def refused() -> bool:
        clock.now = time.time_ns() // 1_000_000
        answer = await ran("bash", "-c", f"{export}\n{curl}")
        return "invalid_api_key" in answer and "1 of 1 refuse it" in await opened(plane, f"/console/keys/{key[6:18]}")

    assert made_model.status_code == 201
    assert by_sdk.strip()
    await eventually(refused)


async def ran(*command: str, **environment: str) -> str:
    """What a command prints."""
    process = await asyncio.create_subprocess_exec(
        *command, stdout=asyncio.subprocess.PIPE, env={**os.environ, **environment, "NO_PROXY": "*"}
    )
    try:
        async with asyncio.timeout(30):
            output, _ = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    return output.decode()
