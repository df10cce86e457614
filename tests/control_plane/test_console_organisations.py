"""The pages of organisations, users and of oneself."""

import logging
import re
from typing import Any

import pytest

from tests.control_plane.conftest import Running
from tests.control_plane.forms import as_user, hidden, opened, sent
from tests.control_plane.people import PASSWORD, changed, log_in, make_organisation, make_user
from tests.control_plane.usage import record, taken

pytestmark = pytest.mark.anyio
LINK = re.compile(r"/console/setup\?token=([\w-]{43})")


@pytest.fixture
async def console(sqlite_plane: Running) -> Running:
    """`client` is logged in as root, an admin of the platform; bob owns team-a, whose admin is amy."""
    for name in ("bob", "amy", "mia", "eve"):
        await make_user(sqlite_plane, name, password=None)
    await make_organisation(sqlite_plane, "team-a", bob="owner", amy="admin", mia="member")
    await make_organisation(sqlite_plane, "team-b", eve="owner")
    await as_user(sqlite_plane, "root", "admin")
    return sqlite_plane


def fields(**changes: Any) -> dict[str, Any]:
    """Of the form of limits and a budget."""
    row = {"limit_unit": "requests", "limit_amount": "", "limit_per": "60", "limit_models": "", "limit_precise": ""}
    budget = {"budget_unit": "", "budget_amount": "", "budget_per": "month", "budget_soft": ""}
    return {"title": "", "models": "", **row, **budget, **changes}


def member(page: str, user: str) -> str:
    """The ETag in the form of a member's role."""
    found = re.search(rf'name="user" value="{user}"><input type="hidden" name="etag" value="([^"]+)"', page)
    assert found, user
    return found[1].replace("&#34;", '"')


async def test_an_organisation_is_made_with_all_that_it_may(console: Running) -> None:
    form = fields(
        name="数据" * 3, title="数据与人工智能 <i>", models="llama-*", limit_amount="600", budget_unit="tokens"
    )
    wrong = await sent(console, "/console/organisations?act=create", **form)
    form |= {"name": "shuju", "budget_amount": "1000000", "budget_per": "day", "budget_soft": "50"}
    made = await sent(console, "/console/organisations?act=create", **form)
    again = await sent(console, "/console/organisations?act=create", **form)
    listed = await opened(console, "/console/organisations")

    assert wrong.status_code == 422
    assert "needs an amount" in wrong.text
    assert 'value="数据与人工智能 &lt;i&gt;"' in wrong.text
    assert (made.status_code, made.headers["location"]) == (303, "/console/organisations/shuju?done=changed")
    assert again.status_code == 409
    assert "never used again" in again.text
    assert "数据与人工智能 &lt;i&gt;" in listed
    read = (await console.admin.get("/api/v1/organisations/shuju")).json()
    assert (read["models"], read["limits"]) == (["llama-*"], [{"requests": 600, "per": 60}])
    assert read["budget"] == {"tokens": 1000000, "per": "day", "soft": 0.5}


async def test_an_owner_changes_title_limits_and_budget_only(console: Running) -> None:
    await changed(console.admin, "PATCH", "/api/v1/organisations/team-a", json={"models": ["llama-*"]})
    await as_user(console, "bob")
    url = "/console/organisations/team-a?act=edit"
    page = await opened(console, url)
    form = fields(do="edit", etag=hidden(page, "etag"), title="Straßenverkehr", models="*", limit_amount="60")
    saved = await sent(console, url, **form)
    stale = await sent(console, url, **{**form, "title": "Anders"})
    others = [
        await sent(console, "/console/organisations/team-a", do=verb, title="x") for verb in ("disable", "end", "no")
    ]
    create = await sent(console, "/console/organisations?act=create", **fields(name="mine"))

    assert 'name="models"' not in page
    assert saved.headers["location"] == "/console/organisations/team-a?done=changed"
    read = (await console.admin.get("/api/v1/organisations/team-a")).json()
    assert (read["title"], read["models"], read["limits"]) == (
        "Straßenverkehr",
        ["llama-*"],
        [{"requests": 60, "per": 60}],
    )
    assert stale.status_code == 412
    assert 'value="Anders"' in stale.text
    assert "Straßenverkehr" in stale.text.partition('class="removed"')[2]
    assert [answer.status_code for answer in (*others, create)] == [403, 403, 400, 403]


async def test_members_get_roles_and_leave(console: Running) -> None:
    url = "/console/organisations/team-a"
    page = await opened(console, url)
    added = await sent(console, f"{url}?act=add", do="add", user="eve", role="viewer")
    twice = await sent(console, f"{url}?act=add", do="add", user="eve", role="owner")
    nobody = await sent(console, f"{url}?act=add", do="add", user="<b>nobody", role="member")
    wrong = await sent(console, url, do="role", user="mia", role="king", etag=member(page, "mia"))
    stale = await sent(console, url, do="role", user="mia", role="viewer", etag='"other"')
    changed_role = await sent(console, url, do="role", user="mia", role="admin", etag=member(page, "mia"))
    dialog = await opened(console, f"{url}?act=remove&user=mia")
    removed = await sent(console, f"{url}?act=remove&user=mia", do="remove", user="mia", etag=hidden(dialog, "etag"))

    assert [answer.status_code for answer in (added, twice, nobody, wrong, stale)] == [303, 409, 404, 422, 412]
    assert 'value="eve"' in twice.text
    assert "is a member already" in twice.text
    assert "<b>nobody" not in nobody.text
    assert changed_role.headers["location"] == f"{url}?done=member"
    assert "Remove mia" in dialog
    assert removed.headers["location"] == f"{url}?done=removed"
    members = (await console.admin.get("/api/v1/organisations/team-a/members")).json()["data"]
    assert {one["user"]: one["role"] for one in members} == {"amy": "admin", "bob": "owner", "eve": "viewer"}


async def test_an_admin_of_an_organisation_changes_no_owner_and_the_last_one_stays(console: Running) -> None:
    url = "/console/organisations/team-a"
    await as_user(console, "amy")
    page = await opened(console, url)
    by_admin = await sent(console, url, do="role", user="mia", role="owner", etag=member(page, "mia"))
    await as_user(console, "bob")
    of_bob = await opened(console, url)
    last = await sent(console, url, do="role", user="bob", role="member", etag=member(of_bob, "bob"))
    await as_user(console, "mia")
    of_mia = await opened(console, url)
    hidden_tab = await console.client.get(f"{url}?tab=members")
    by_member = await sent(console, url, do="add", user="eve", role="viewer")

    assert 'aria-label="Role of bob"' not in page
    assert ">owner</option>" not in page
    assert (by_admin.status_code, last.status_code) == (403, 409)
    assert "last owner" in last.text
    assert "Limits and budget" in of_mia
    assert "Add a member" not in of_mia
    assert (hidden_tab.status_code, by_member.status_code) == (403, 403)


@pytest.mark.parametrize(("verb", "user"), [("add", "amy"), ("role", "mia"), ("remove", "mia")])
async def test_an_owner_of_one_organisation_changes_no_members_of_another(
    console: Running, verb: str, user: str
) -> None:
    """Which bob may see, as a viewer there."""
    api = "/api/v1/organisations/team-b/members"
    for name, role in (("bob", "viewer"), ("mia", "member")):
        await console.admin.put(f"{api}/{name}", json={"role": role}, headers={"if-none-match": "*"})
    etag = (await console.admin.get(f"{api}/mia")).headers["etag"]
    before = (await console.admin.get(api)).json()["data"]
    await as_user(console, "bob")

    answer = await sent(console, "/console/organisations/team-b", do=verb, user=user, role="admin", etag=etag)

    assert answer.status_code == 403
    assert (await console.admin.get(api)).json()["data"] == before
    assert {one["user"]: one["role"] for one in before} == {"bob": "viewer", "eve": "owner", "mia": "member"}


async def test_organisations_of_others_are_not_found(console: Running) -> None:
    await as_user(console, "bob")
    listed = await opened(console, "/console/organisations")
    url = "/console/organisations/team-b"
    sends = [await sent(console, url, do=verb, user="bob", role="owner", etag="x") for verb in ("add", "edit", "end")]

    assert "team-b" not in listed
    assert (await console.client.get(url)).status_code == 404
    assert {answer.status_code for answer in sends} == {404}


async def test_the_end_of_an_organisation_names_what_ends_with_it(console: Running) -> None:
    await console.admin.post("/api/v1/keys", json={"name": "batch", "organisation": "team-a"})
    dialog = await opened(console, "/console/organisations/team-a?act=end")
    disabled = await sent(console, "/console/organisations/team-a", do="disable")
    ended = await sent(console, "/console/organisations/team-a?act=end", do="end")

    assert "1 key is refused" in dialog
    assert "3 members lose a role" in dialog
    assert disabled.headers["location"] == "/console/organisations/team-a?done=disabled"
    assert ended.headers["location"] == "/console/organisations?done=ended"
    assert (await console.admin.get("/api/v1/organisations/team-a")).status_code == 404


async def test_budgets_show_what_is_spent(console: Running) -> None:
    body = {"budget": {"cost": 0.001, "per": "month"}}
    await changed(console.admin, "PATCH", "/api/v1/organisations/team-a", json=body)
    await taken(console, *(record(organisation="team-a") for _ in range(6)))
    page = await opened(console, "/console/organisations/team-a?tab=limits")
    listed = await opened(console, "/console/organisations")

    assert "0.00085 USD of 0.001 USD a month" in page
    assert "2026-12-01 00:00:00" in page
    assert "85 %" in page
    assert "85 %" in listed
    assert "nearly" in listed


async def test_what_is_spent_of_a_budget_is_for_who_sees_usage(console: Running) -> None:
    body = {"budget": {"requests": 8, "per": "month"}}
    await changed(console.admin, "PATCH", "/api/v1/organisations/team-a", json=body)
    await taken(console, *(record(organisation="team-a") for _ in range(6)))

    for user, sees in (("amy", True), ("mia", False)):
        await as_user(console, user)
        for path in ("/console/organisations", "/console/organisations/team-a?tab=limits"):
            assert ("<meter" in await opened(console, path)) is sees, (user, path)


async def test_a_user_is_made_with_a_link_that_is_shown_once(
    console: Running, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    once = hidden(await opened(console, "/console/users?act=create"), "once")
    form = {"once": once, "name": "jü", "email": "juergen@example.org", "title": "Jürgen <Müller>"}
    wrong = await sent(console, "/console/users?act=create", **form)
    form |= {"name": "juergen", "platform_role": "operator", "once": hidden(wrong.text, "once")}
    made = await sent(console, "/console/users?act=create", **form)
    again = await sent(console, "/console/users?act=create", **form)
    other = {**form, "name": "juergen2", "once": "0123456789abcdefg"}
    taken_email = await sent(console, "/console/users?act=create", **other)

    assert wrong.status_code == 422
    assert 'value="Jürgen &lt;Müller&gt;"' in wrong.text
    (secret,) = set(LINK.findall(made.text))
    assert again.headers["location"] == "/console/users/juergen?done=once"
    assert taken_email.status_code == 409
    page = await opened(console, again.headers["location"])
    audit = (await console.admin.get("/api/v1/audit?limit=200")).text
    assert secret not in page + audit + caplog.text + await opened(console, "/console/users")
    assert "Jürgen &lt;Müller&gt;" in page
    assert (await console.client.get(f"/console/setup?token={secret}")).status_code == 200


async def test_a_form_that_was_refused_is_sent_again_at_once(console: Running) -> None:
    form = {"once": "0123456789abcdefg", "name": "juergen", "title": "", "platform_role": ""}
    refused = await sent(console, "/console/users?act=create", **form, email="mia@example.org")
    right = await sent(console, "/console/users?act=create", **form, email="juergen@example.org")

    assert (refused.status_code, right.status_code) == (409, 200)
    assert (await console.admin.get("/api/v1/users/juergen")).json()["email"] == "juergen@example.org"


async def test_forms_of_two_people_are_two_even_if_their_numbers_are_equal(console: Running) -> None:
    form = {"once": "0123456789abcdefg", "title": "", "platform_role": ""}
    first = await sent(console, "/console/users?act=create", **form, name="jo", email="jo@example.org")
    await as_user(console, "sue", "admin")
    second = await sent(console, "/console/users?act=create", **form, name="flo", email="flo@example.org")

    assert (first.status_code, second.status_code) == (200, 200)
    found = [await console.admin.get(f"/api/v1/users/{name}") for name in ("jo", "flo")]
    assert [answer.status_code for answer in found] == [200, 200]


async def test_a_change_of_a_disabled_user_lets_nobody_in(console: Running) -> None:
    await sent(console, "/console/users/mia", do="disable")
    url = "/console/users/mia?act=edit"
    form = {"title": "Mia", "email": "mia@example.org", "platform_role": ""}
    saved = await sent(console, url, do="edit", etag=hidden(await opened(console, url), "etag"), **form)

    assert saved.status_code == 303
    user = (await console.admin.get("/api/v1/users/mia")).json()
    assert (user["title"], user["disabled"]) == ("Mia", True)


async def test_a_user_is_changed_kept_out_and_ended(console: Running) -> None:
    url = "/console/users/mia"
    edit = await opened(console, f"{url}?act=edit")
    form = {"do": "edit", "etag": hidden(edit, "etag"), "title": "Mia", "email": "mia@example.org"}
    saved = await sent(console, f"{url}?act=edit", **form, platform_role="viewer")
    stale = await sent(console, f"{url}?act=edit", **{**form, "title": "Maria"}, platform_role="")
    link = hidden(await opened(console, f"{url}?act=link"), "once")
    linked = await sent(console, f"{url}?act=link", do="link", once=link)
    sessions = await sent(console, f"{url}?act=sessions", do="sessions")
    disabled = await sent(console, url, do="disable")
    shown = await opened(console, disabled.headers["location"])
    dialog = await opened(console, f"{url}?act=end")
    ended = await sent(console, f"{url}?act=end", do="end")

    assert saved.headers["location"] == f"{url}?done=changed"
    assert stale.status_code == 412
    assert 'value="Maria"' in stale.text
    assert len(set(LINK.findall(linked.text))) == 1
    assert sessions.headers["location"] == f"{url}?done=sessions"
    assert ">disabled</span>" in shown
    assert "End mia" in dialog
    assert ended.headers["location"] == "/console/users?done=ended"
    assert (await console.client.get(url)).status_code == 404


async def test_the_last_admin_stays_and_the_page_says_why(console: Running) -> None:
    await sent(console, "/console/users/ana", do="disable")
    answers = [
        await sent(console, "/console/users/root", do="disable"),
        await sent(console, "/console/users/root?act=end", do="end"),
    ]

    assert {answer.status_code for answer in answers} == {409}
    for answer in answers:
        assert "last admin of the platform" in answer.text
        assert "Give another" in answer.text


async def test_people_change_their_own_name_password_and_sessions(
    console: Running, caplog: pytest.LogCaptureFixture
) -> None:
    await make_user(console, "pia")
    for _ in range(3):
        console.client.cookies.clear()
        await log_in(console, "pia")
    caplog.set_level(logging.DEBUG)
    url = "/console/account"
    page = await opened(console, url)
    named = await sent(console, url, do="title", title="Pia <3")
    long_name = await sent(console, url, do="title", title="x" * 300)
    new = "another long enough one"
    form = {"do": "password", "password.current": PASSWORD, "password.new": new, "password.confirm": new}
    unlike = await sent(console, url, **{**form, "password.confirm": "something else"})
    wrong = await sent(console, url, **{**form, "password.current": "not the password"})
    one = re.findall(r'name="id" value="(ses_[^"]+)"', page)[0]
    ended = await sent(console, url, do="session", id=one)
    done = await sent(console, url, **form)
    after = await opened(console, done.headers["location"])
    console.client.cookies.clear()

    assert page.count("this one") == 1
    assert "End all others" in page
    assert named.headers["location"] == f"{url}?done=title"
    assert (long_name.status_code, unlike.status_code, wrong.status_code) == (422, 422, 422)
    assert "is not the same password" in unlike.text
    assert "is not your password" in wrong.text
    assert ended.headers["location"] == f"{url}?done=session"
    assert done.headers["location"] == f"{url}?done=password"
    assert "Pia &lt;3" in after
    assert "End all others" not in after
    for text in (unlike.text, wrong.text, after, caplog.text):
        assert new not in text
        assert PASSWORD not in text
    assert (await log_in(console, "pia", new)).status_code == 200


@pytest.mark.parametrize("fields", [("current",), ("new", "confirm")])
async def test_a_password_of_any_length_costs_no_try(console: Running, fields: tuple[str, ...]) -> None:
    """It is refused before it is compared, so that the right one is accepted still."""
    await make_user(console, "pia")
    await as_user(console, "pia")
    form = {"password.current": "not the password", "password.new": "another one", "password.confirm": "another one"}
    form |= {f"password.{name}": "a long one" * 2000 for name in fields}

    answers = [await sent(console, "/console/account", do="password", **form) for _ in range(6)]
    console.client.cookies.clear()

    assert [answer.status_code for answer in answers] == [422] * 6
    assert (await log_in(console, "pia")).status_code == 200


async def test_nobody_ends_sessions_of_others_there(console: Running) -> None:
    session = (await console.client.get("/api/v1/me/sessions")).json()["data"][0]["id"]
    await as_user(console, "mia")
    answer = await sent(console, "/console/account", do="session", id=session)

    assert answer.status_code == 404
