"""/console/prompts: versions and labels of stored prompts, by forms that work without a script."""

import re
from html import unescape
from typing import Any

import httpx
import pytest

from tests.control_plane.conftest import Running
from tests.control_plane.pages import hidden, links_of, page, part, rows_of, text_of
from tests.control_plane.people import SAME_ORIGIN, begin_session, log_in, make_organisation, make_user

pytestmark = pytest.mark.anyio
API, PAGE = "/api/v1/prompts", "/console/prompts"
MESSAGES = [{"role": "system", "content": "You help with {{product}}.\nBe brief."}]
VARIABLES = {
    "product": {"type": "enum", "values": ["router", "console"], "required": True, "trusted": True},
    "days": {"type": "number", "default": 3},
}
# Rows of the form for VARIABLES
ROW = {
    "variable_name": ["product", "days"],
    "variable_type": ["enum", "number"],
    "variable_required": ["1", ""],
    "variable_trusted": ["1", ""],
    "variable_default": ["", "3"],
    "variable_values": ["router\r\nconsole", ""],
    "variable_max_length": ["", ""],
}


@pytest.fixture
async def console(sqlite_plane: Running) -> Running:
    """With the prompt `support` of team-a, in two versions; `bob` is an admin of team-a."""
    await make_user(sqlite_plane, "bob")
    await make_organisation(sqlite_plane, "team-a", bob="admin")
    admin = sqlite_plane.admin
    await admin.post(API, json={"name": "support", "organisation": "team-a"})
    for more in ("", "\nNever mention <prices>."):
        messages = [{**MESSAGES[0], "content": MESSAGES[0]["content"] + more}]
        body = {"messages": messages, "variables": VARIABLES, "note": "first" if not more else "<b>prices</b>"}
        assert (await admin.post(f"{API}/support/versions", json=body)).status_code == 201
    path = f"{API}/support/labels/production"
    assert (await admin.put(path, json={"version": 1}, headers={"if-none-match": "*"})).status_code == 201
    assert (await log_in(sqlite_plane, "bob")).status_code == 200
    return sqlite_plane


async def send(running: Running, path: str, **form: Any) -> httpx.Response:
    return await running.client.post(path, data=form, headers=SAME_ORIGIN)


async def version(running: Running, number: int) -> dict[str, Any]:
    found: dict[str, Any] = (await running.admin.get(f"{API}/support/versions/{number}")).json()
    return found


async def labels(running: Running) -> dict[str, int]:
    found: dict[str, int] = (await running.admin.get(f"{API}/support")).json()["labels"]
    return found


async def test_the_list_says_which_version_is_used(console: Running) -> None:
    html = await page(console, PAGE)

    assert [row[:4] for row in rows_of(html)] == [["support", "team-a", "production v1", "v2"]]
    assert "by ana" in rows_of(html)[0][4]
    assert "/console/playground?prompt=support&organisation=team-a" in links_of(html)


async def test_the_list_names_who_changed_a_prompt_last(console: Running) -> None:
    def last(html: str) -> str:
        return rows_of(html)[0][4].rpartition(" ")[2]

    console.clock.advance(60)
    await send(console, f"{PAGE}/support?act=label", do="label", label="staging", version="2", etag="")
    by_label = last(await page(console, PAGE))
    console.clock.advance(60)
    await console.admin.post(f"{API}/support/versions", json={"text": "Hello"})

    assert (by_label, last(await page(console, PAGE))) == ("bob", "ana")


async def test_a_prompt_is_made_and_gets_its_first_version(console: Running) -> None:
    form = await page(console, f"{PAGE}?act=create")
    made = await send(console, PAGE, name="summary", organisation="team-a")
    empty = await page(console, f"{PAGE}/summary?done=created")
    added = await send(
        console, f"{PAGE}/summary?act=version", do="version", shape="messages", note="first",
        role=["system", "user"], content=["", "Sum up {{text}}"],
        variable_name=["text", ""], variable_type=["string", "string"], variable_required=["1", ""],
        variable_trusted=["", ""], variable_default=["", ""], variable_values=["", ""], variable_max_length=["10", ""],
    )  # fmt: skip
    stored = (await console.admin.get(f"{API}/summary/versions/1")).json()

    assert '<option value="team-a"' in form
    assert made.headers["location"] == f"{PAGE}/summary?done=created"
    assert 'id="version"' not in empty
    assert f"{PAGE}/summary?act=version" in links_of(empty)
    assert added.headers["location"] == f"{PAGE}/summary?done=version", added.text
    assert stored["messages"] == [{"role": "user", "content": "Sum up {{text}}"}]
    assert stored["variables"] == {"text": {"required": True, "max_length": 10}}
    assert stored["note"] == "first"


@pytest.mark.parametrize(
    ("name", "status", "word"),
    [("support", 409, "is taken by a prompt"), ("no spaces", 422, "pattern"), ("x", 404, "There is no organisation")],
)
async def test_a_prompt_that_cannot_be_made_says_why(console: Running, name: str, status: int, word: str) -> None:
    organisation = "team-b" if name == "x" else "team-a"
    answer = await send(console, f"{PAGE}?act=create", name=name, organisation=organisation)

    assert answer.status_code == status
    assert word in unescape(answer.text)
    assert f'value="{name}"' in answer.text


async def test_a_new_version_begins_with_the_newest(console: Running) -> None:
    form = await page(console, f"{PAGE}/support?act=version")
    before = await version(console, 2)
    same = await send(
        console, f"{PAGE}/support?act=version", do="version", shape="messages",
        role="system", content=before["messages"][0]["content"].replace("\n", "\r\n"), **ROW,
    )  # fmt: skip
    after = await version(console, 3)

    assert unescape(part(form, "content-1")).endswith(f"\n{before['messages'][0]['content']}</textarea>")
    assert same.status_code == 303, same.text
    assert (after["messages"], after["variables"]) == (before["messages"], before["variables"])
    assert await version(console, 2) == before


async def test_rows_are_added_and_what_was_typed_stays(console: Running) -> None:
    path = f"{PAGE}/support?act=version"
    given = {"shape": "messages", "role": "user", "content": "Hello {{other}}", "note": "why <b>", **ROW}

    more = await send(console, path, do="message", **given)
    again = await send(console, path, do="variable", **given)
    wrong = await send(console, path, do="version", **given)

    assert (more.text.count('name="role"'), again.text.count('name="role"')) == (2, 1)
    assert (more.text.count('name="variable_name"'), again.text.count('name="variable_name"')) == (2, 3)
    assert wrong.status_code == 422
    assert "the variable 'other' is used and not declared" in unescape(wrong.text)
    for one in (more, again, wrong):
        assert "built-in" not in one.text
        assert "Hello {{other}}</textarea>" in one.text
        assert "router\nconsole</textarea>" in one.text
        assert 'value="why &lt;b&gt;"' in one.text
    assert (await console.admin.get(f"{API}/support")).json()["latest"] == 2


async def test_two_variables_of_one_name_make_no_version(console: Running) -> None:
    row = {**ROW, "variable_name": ["product", "product"]}
    answer = await send(
        console, f"{PAGE}/support?act=version", do="version", shape="text", text="{{product}}", note="", **row
    )

    assert answer.status_code == 422
    assert (await console.admin.get(f"{API}/support")).json()["latest"] == 2


async def test_pages_of_versions_have_each_of_them_once(console: Running) -> None:
    await console.admin.post(API, json={"name": "many", "organisation": "team-a"})
    for number in range(23):
        await console.admin.post(f"{API}/many/versions", json={"text": f"Hello {number}"})

    first = await page(console, f"{PAGE}/many")
    following = re.findall(r'href="([^"]+)" rel="next"', first)
    second = await page(console, unescape(following[0]))

    shown = [[row[0] for row in rows_of(html)] for html in (first, second)]
    assert shown[0] + shown[1] == [f"v{number}" for number in range(23, 0, -1)]
    assert shown[1]
    assert 'rel="next"' not in second


async def test_what_rows_cannot_show_is_json(console: Running) -> None:
    parts = [{"role": "user", "content": [{"type": "text", "text": "{{q}}"}], "name": "x"}]
    body = {"messages": parts, "variables": {"q": {}}}
    assert (await console.admin.post(f"{API}/support/versions", json=body)).status_code == 201

    form = await page(console, f"{PAGE}/support?act=version")
    document = unescape(part(form, "document")).partition(">\n")[2].removesuffix("</textarea>")
    path = f"{PAGE}/support?act=version"
    wrong = [
        await send(console, path, do="version", shape="json", document=one, note="")
        for one in ("{", "[]", '{"messages": [], "labels": {}}', '{"messages": [{"role": "user"}]}')
    ]
    sent = await send(console, path, do="version", shape="json", document=document, note="")

    assert [one.status_code for one in wrong] == [422] * 4
    assert sent.status_code == 303
    assert (await version(console, 4))["messages"] == parts


async def test_a_label_is_set_moved_and_removed(console: Running) -> None:
    path = f"{PAGE}/support"
    new = await page(console, f"{path}?act=label")
    made = await send(console, path, do="label", label="staging", version="2", etag=hidden(new, "etag"))
    move = await page(console, f"{path}?act=label&label=production")
    moved = await send(console, path, do="label", label="production", version="2", etag=hidden(move, "etag"))
    late = await send(console, path, do="label", label="production", version="1", etag=hidden(move, "etag"))
    twice = await send(console, f"{path}?act=label", do="label", label="staging", version="1", etag="")
    unknown = await send(console, f"{path}?act=label", do="label", label="other", version="9", etag="")
    remove = await page(console, f"{path}?act=remove&label=staging")
    removed = await send(console, path, do="remove", label="staging", etag=hidden(remove, "etag"))

    assert f"{path}?diff=1..2" in links_of(move)
    assert [one.status_code for one in (made, moved, removed)] == [303] * 3
    assert (late.status_code, twice.status_code, unknown.status_code) == (412, 409, 422)
    assert "already, at version 2" in twice.text
    assert "there is no version 9" in unknown.text
    assert await labels(console) == {"production": 2}


@pytest.mark.parametrize("asked", ["act=end", "act=label", "act=label&label=production", "act=remove&label=production"])
async def test_nobody_is_asked_to_do_what_they_may_not(console: Running, asked: str) -> None:
    member = "/api/v1/organisations/team-a/members/mia"
    await make_user(console, "mia", password=None)
    await console.admin.put(member, json={"role": "member"}, headers={"if-none-match": "*"})
    of_bob = await page(console, f"{PAGE}/support?{asked}")
    await begin_session(console, "mia")

    assert "<dialog" in of_bob
    assert "<dialog" not in await page(console, f"{PAGE}/support?{asked}")


async def test_versions_are_compared_by_the_url(console: Running) -> None:
    html = await page(console, f"{PAGE}/support?diff=1..2")
    redirected = await console.client.get(f"{PAGE}/support?from=2&to=1")

    lines = text_of(part(html, "diff"))
    assert "From version 1 to 2" in lines
    assert "1 line added" in lines
    assert "+ Never mention <prices>." in unescape(lines)
    assert "<prices>" not in html
    assert redirected.headers["location"] == f"{PAGE}/support?diff=2..1"
    assert (await console.client.get(f"{PAGE}/support?diff=1..9")).status_code == 404
    assert (await console.client.get(f"{PAGE}/support?diff=x")).status_code == 404
    assert (await console.client.get(f"{PAGE}/support?version=x")).status_code == 404


async def test_the_page_has_the_version_and_code_that_uses_it(console: Running) -> None:
    html = await page(console, f"{PAGE}/support")
    first = await page(console, f"{PAGE}/support?version=1")

    assert "Never mention &lt;prices&gt;." in part(html, "version")
    assert "&lt;b&gt;prices&lt;/b&gt;" in html
    assert "<b>prices</b>" not in html
    assert "Never mention" not in part(first, "version")
    assert '"version": 2' in unescape(part(html, "code-1"))
    assert '"version": "production"' in unescape(part(first, "code-1"))
    assert '"product": "router"' in unescape(part(first, "code-1"))
    assert "days number no 3 65,536 no" in text_of(part(html, "version"))
    assert "/console/playground?prompt=support&version=2&organisation=team-a" in links_of(html)


async def test_a_prompt_is_ended_as_it_was_seen(console: Running) -> None:
    form = await page(console, f"{PAGE}/support?act=end")
    etag = hidden(form, "etag")
    stale = await send(console, f"{PAGE}/support?act=end", do="end", etag='"other"')
    ended = await send(console, f"{PAGE}/support", do="end", etag=etag)

    assert stale.status_code == 412
    assert ended.headers["location"] == f"{PAGE}?done=ended"
    assert (await console.client.get(f"{PAGE}/support")).status_code == 404
    assert rows_of(await page(console, PAGE)) == []


@pytest.mark.parametrize(
    ("role", "may"),
    [("owner", "twde"), ("member", "td"), ("viewer", ""), (None, "none")],
)
async def test_each_role_may_do_its_part(console: Running, role: str | None, may: str) -> None:
    await make_user(console, "eva")
    await make_organisation(console, "team-e", **({} if role is None else {"eva": role}))
    await console.admin.post(API, json={"name": "theirs", "organisation": "team-e"})
    await console.admin.post(f"{API}/theirs/versions", json={"messages": MESSAGES, "variables": VARIABLES})
    await log_in(console, "eva")
    path = f"{PAGE}/theirs"

    if role is None:
        assert (await console.client.get(path)).status_code in (403, 404)
        return
    html = await page(console, path)
    form = {"do": "label", "label": "production", "version": "1", "etag": ""}
    set_ = await send(console, path, **form)
    added = await send(console, path, do="version", shape="text", text="Hello", note="")
    offered = {"t": ">Try</a>" in html, "d": ">New version</a>" in html, "w": ">Set a new label</a>" in html}

    assert {key for key, is_there in offered.items() if is_there} == set(may) & set("tdw")
    assert set_.status_code == (303 if "w" in may else 403)
    assert added.status_code == (303 if "d" in may else 403)
    assert ("act=end" in html) == ("e" in may)
    assert (await console.client.get(f"{PAGE}/support")).status_code == 404
