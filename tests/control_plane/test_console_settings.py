"""The pages of the audit log and of settings."""

import re
from collections.abc import Callable
from typing import Any

import orjson
import pytest

from control_plane.pure.reports import following
from tests.control_plane.conftest import Running
from tests.control_plane.forms import as_user, hidden, opened, sent
from tests.control_plane.pages import rows_of
from tests.control_plane.people import changed, make_organisation, make_user
from tests.control_plane.usage import record, taken

pytestmark = pytest.mark.anyio
ROW = {"limit_unit": "requests", "limit_per": "60", "limit_models": "", "limit_precise": ""}


@pytest.fixture
async def console(sqlite_plane: Running) -> Running:
    """`client` is logged in as root, an admin of the platform; bob owns team-a, of which mia is a member."""
    for name in ("bob", "mia"):
        await make_user(sqlite_plane, name, password=None)
    await make_organisation(sqlite_plane, "team-a", bob="owner", mia="member")
    await make_organisation(sqlite_plane, "team-b")
    await as_user(sqlite_plane, "root", "admin")
    return sqlite_plane


def rows(page: str) -> list[str]:
    return re.findall(r'<tr id="(aud_[0-9A-Z]+)"', page)


async def test_the_audit_log_is_filtered_paged_and_exported(console: Running) -> None:
    key = (await console.admin.post("/api/v1/keys", json={"name": "<i>a", "organisation": "team-a"})).json()
    await changed(console.admin, "PATCH", f"/api/v1/keys/{key['id']}", json={"name": "b", "limits": [{"streams": 2}]})
    await console.admin.post("/api/v1/keys", json={"name": "other", "organisation": "team-b"})
    page = await opened(console, "/console/audit")
    of_key = await opened(console, f"/console/audit?object=key:{key['id']}")
    narrowed = "actor=ana&action=key.update&start=2026-11-28T12:00&end=2026-11-28T12:01"
    narrow = await opened(console, f"/console/audit?{narrowed}")
    early = await opened(console, "/console/audit?end=2026-11-28T11:59")
    wrong = [await console.client.get(f"/console/audit?{query}") for query in ("start=yesterday", "object=x")]
    export = re.findall(r'href="(/api/v1/audit\?[^"]+)"', narrow)[0].replace("&amp;", "&")
    lines = (await console.client.get(export)).text.splitlines()

    assert len(rows(page)) == len((await console.admin.get("/api/v1/audit")).json()["data"])
    assert (len(rows(of_key)), len(rows(narrow)), len(rows(early))) == (2, 1, 0)
    assert "No change matches" in early
    assert '<span class="removed">-   &#34;name&#34;: &#34;&lt;i&gt;a&#34;' in narrow
    assert '<span class="added">+   &#34;name&#34;: &#34;b&#34;' in narrow
    assert [one.status_code for one in wrong] == [422, 422]
    assert [rows(one.text) for one in wrong] == [[], []]
    assert "must be type:id" in wrong[1].text
    assert [orjson.loads(line)["id"] for line in lines] == rows(narrow)


async def test_people_see_what_was_done_in_their_organisations_and_by_them(console: Running) -> None:
    for name in ("team-a", "team-b"):
        await console.admin.post("/api/v1/keys", json={"name": f"of {name}", "organisation": name})
    await as_user(console, "bob")
    of_bob = await opened(console, "/console/audit")
    await as_user(console, "mia")
    of_mia = await opened(console, "/console/audit")

    assert "of team-a" in of_bob
    assert "of team-b" not in of_bob
    assert "Export" in of_bob
    assert "of team-a" not in of_mia
    assert "Export" not in of_mia


async def test_limits_of_the_platform_are_made_changed_and_deleted(console: Running) -> None:
    base = "/console/settings?kind=limit"
    form = {"do": "create", "kind": "limit", "scope": "user", "name": "", **ROW}
    wrong = await sent(console, f"{base}&act=create", **form, limit_amount="no")
    empty = await sent(console, f"{base}&act=create", **form, limit_amount="")
    unknown = await sent(console, f"{base}&act=create", **{**form, "scope": "key", "name": "<b>"}, limit_amount="9")
    made = await sent(console, f"{base}&act=create", **form, limit_amount="120")
    (limit,) = (await console.admin.get("/api/v1/limits")).json()["data"]
    edit = f"{base}&act=edit&id={limit['id']}"
    etag = hidden(await opened(console, edit), "etag")
    change = {**form, "do": "edit", "id": limit["id"], "name": "mia", "limit_amount": "7"}
    saved = await sent(console, edit, **change, etag=etag)
    stale = await sent(console, edit, **change, etag=etag)
    page = await opened(console, "/console/settings")
    delete = f"{base}&act=delete&id={limit['id']}"
    dialog = await opened(console, delete)
    deleted = await sent(console, delete, do="delete", kind="limit", id=limit["id"])

    assert {answer.status_code for answer in (wrong, empty, unknown)} <= {404, 422}
    assert 'value="no"' in wrong.text
    assert "&lt;b&gt;" in unknown.text
    assert made.headers["location"] == "/console/settings?done=made"
    assert saved.headers["location"] == "/console/settings?done=changed"
    assert stale.status_code == 412
    assert "It is now 7 requests a minute" in stale.text
    assert "7 requests a minute" in page
    assert "the user <b>mia</b>" in page
    assert "7 requests a minute" in dialog.partition("<dialog")[2]
    assert deleted.headers["location"] == "/console/settings?done=deleted"
    assert (await console.admin.get("/api/v1/limits")).json()["data"] == []


async def test_budgets_of_the_platform_show_what_is_spent(console: Running) -> None:
    form = {"do": "create", "kind": "budget", "scope": "all", "name": "", "budget_unit": "cost"}
    form |= {"budget_per": "month", "budget_soft": "", "budget_amount": "2.5"}
    made = await sent(console, "/console/settings?act=create&kind=budget", **form)
    twice = await sent(console, "/console/settings?act=create&kind=budget", **form)
    nothing = await sent(console, "/console/settings?act=create&kind=budget", **{**form, "budget_unit": ""})
    console.clock.advance(4)
    await taken(console, record(cost_nanos=1_500_000_000))
    page = await opened(console, "/console/settings")

    assert [answer.status_code for answer in (made, twice, nothing)] == [303, 409, 422]
    assert "2.50 USD a month" in page
    assert ">1.50 USD<" in page


async def test_settings_are_changed_while_it_runs(console: Running) -> None:
    url = "/console/settings?tab=running&act=set&key=usage.record_days"
    page = await opened(console, url)
    form = {"do": "set", "key": "usage.record_days", "etag": hidden(page, "etag")}
    wrong = await sent(console, url, **form, value="many")
    saved = await sent(console, url, **form, value="30")
    stale = await sent(console, url, **form, value="31")
    shown = await opened(console, "/console/settings?tab=running")
    reset = await sent(
        console, url, do="reset", key="usage.record_days", etag=hidden(await opened(console, url), "etag")
    )
    limits = "/console/settings?tab=running&act=set&key=anonymous.limits"
    etag = hidden(await opened(console, limits), "etag")
    anonymous = await sent(console, limits, do="set", key="anonymous.limits", etag=etag, **ROW, limit_amount="5")
    unknown = await sent(console, url, do="set", key="no.such", value="1", etag="x")

    assert [answer.status_code for answer in (wrong, saved, stale, reset, anonymous, unknown)] == [
        422,
        303,
        412,
        303,
        303,
        404,
    ]
    assert "30 days" in shown
    values = {one["key"]: one for one in (await console.admin.get("/api/v1/settings")).json()["data"]}
    assert values["anonymous.limits"]["value"] == [{"requests": 5, "per": 60}]
    assert values["usage.record_days"]["source"] == "default"


async def test_what_the_environment_sets_is_named_and_stays(start_sqlite: object) -> None:
    running: Running = await start_sqlite(usage_days=9, oidc_issuer=None)  # type: ignore[operator]
    await as_user(running, "root", "admin")
    page = await opened(running, "/console/settings?tab=running")
    dialog = await opened(running, "/console/settings?tab=running&act=set&key=usage.record_days")
    refused = await sent(
        running, "/console/settings?tab=running", do="set", key="usage.record_days", value="3", etag="x"
    )
    process = await opened(running, "/console/settings?tab=process")

    assert "CONTROL_PLANE_USAGE_DAYS" in page
    assert "<dialog" not in dialog
    assert refused.status_code in (412, 422)
    assert "CONTROL_PLANE_OIDC_ISSUER" in process
    assert running.plane.settings.service_token is not None
    assert running.plane.settings.service_token.get_secret_value() not in process


async def test_secrets_of_the_process_are_not_shown_but_whether_there_is_one(start_sqlite: Callable[..., Any]) -> None:
    secrets = {
        "key_pepper": "a-pepper-of-the-tests-0123456789abcdef,an-older-pepper-0123456789abcdef",
        "service_token": "a-service-token-of-the-tests-0123456789",
        "oidc_client_secret": "a-client-secret-of-the-tests-0123456789",
    }
    provider = {"oidc_issuer": "http://127.0.0.1:9/", "oidc_client_id": "console"}
    with_them: Running = await start_sqlite(**secrets, **provider)
    without: Running = await start_sqlite(oidc_issuer=None)
    url, rows = "/console/settings?tab=process", []
    for name, running in (("root", with_them), ("max", without)):
        await as_user(running, name, "admin")
        html = await opened(running, url)
        rows.append(next(row for row in rows_of(html) if "CONTROL_PLANE_KEY_PEPPER" in row))
        assert [secret for secret in ",".join(secrets.values()).split(",") if secret in html] == []

    assert rows[0] != rows[1]


async def test_a_setting_is_not_reset_by_who_has_not_seen_it(console: Running) -> None:
    url = "/console/settings?tab=running&act=set&key=usage.record_days"
    form = {"key": "usage.record_days", "etag": hidden(await opened(console, url), "etag")}
    await sent(console, url, do="set", **form, value="30")

    stale = await sent(console, url, do="reset", **form)

    assert stale.status_code == 412
    assert (await console.admin.get("/api/v1/settings/usage.record_days")).json()["value"] == 30


async def test_settings_are_for_admins_of_the_platform(console: Running) -> None:
    await as_user(console, "bob")

    assert (await console.client.get("/console/settings")).status_code == 403
    assert (await sent(console, "/console/settings", do="create", kind="limit")).status_code == 403


def test_no_router_follows_a_policy_that_is_none() -> None:
    """Nobody reports: nothing is known, which is not the same as done."""
    assert following("policy", '"e"', []) == (0, 0, (), ())
