"""The frame of the console: who sees which page, what a page may load, and what a script asks for again."""

import gzip
import hashlib
import re
import tomllib
from pathlib import Path

import httpx
import pytest

from control_plane import web
from control_plane.app import CONSOLE
from control_plane.http.console.shell import Page
from control_plane.pure.outcomes import OUTCOMES
from control_plane.pure.roles import Principal
from control_plane.web.manual import FILES, address, manuals
from inference_api.policy.keys import new_key
from tests.control_plane.conftest import Running
from tests.control_plane.people import SAME_ORIGIN, log_in, make_organisation, make_user

pytestmark = pytest.mark.anyio
TEMPLATES = sorted((Path(web.__file__).parent / "templates").rglob("*.html"))
# Of every page without a part of the path, and not in it
PLAIN = [page for page in CONSOLE if "{" not in page.path]


def test_the_vendored_script_is_the_published_one() -> None:
    asset = web.assets()["htmx-4.0.1.min.js"]

    assert hashlib.sha256(asset.body).hexdigest() == web.HTMX
    assert "htmx.LICENSE" in web.assets()


def test_static_files_are_small() -> None:
    assert sum(len(asset.compressed) for asset in web.assets().values()) < 120_000


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda path: path.name)
def test_templates_run_and_load_nothing_of_their_own(template: Path) -> None:
    """The policy forbids it in a browser; here it is seen before."""
    found = re.findall(
        r"""<style|\sstyle=|\son[a-z]+=|<script(?![^>]*\ssrc=)|hx-on|js:|https?://""", template.read_text()
    )

    assert found == []


async def test_a_static_file_is_kept_for_ever(sqlite_plane: Running) -> None:
    login = await sqlite_plane.client.get("/console/login")
    names = re.findall(r'(?:src|href)="(/console/static/[^"]+)"', login.text)
    answers = [await sqlite_plane.client.get(name) for name in names]
    plain = await sqlite_plane.client.get(names[0], headers={"accept-encoding": "identity"})
    other = await sqlite_plane.client.get(names[0].replace(web.base(), "/console/static/0123456789abcdef"))

    assert len(names) >= 4
    assert {answer.status_code for answer in answers} == {200}
    assert {answer.headers["cache-control"] for answer in answers} == {"public, max-age=31536000, immutable"}
    assert {answer.headers["content-encoding"] for answer in answers} == {"gzip"}
    assert "content-encoding" not in plain.headers
    assert gzip.decompress(web.assets()[names[0].rpartition("/")[2]].compressed) == plain.content
    assert (other.status_code, other.headers["cache-control"]) == (404, "no-store")


@pytest.mark.parametrize("page", PLAIN, ids=lambda page: page.path)
async def test_a_page_asks_for_a_login_and_comes_back(sqlite_plane: Running, page: Page) -> None:
    target = f"{page.path}?organisation=a%26b"
    whole = await sqlite_plane.client.get(target)
    part = await sqlite_plane.client.get(target, headers={"hx-request": "true", "hx-request-type": "partial"})

    login = str(httpx.URL("/console/login", params={"next": target}))
    assert (whole.status_code, httpx.URL(whole.headers["location"])) == (303, httpx.URL(login))
    assert (part.status_code, httpx.URL(part.headers["hx-redirect"])) == (204, httpx.URL(login))


ROLES = {
    "platform-admin": Principal("user", "u", "admin"),
    "operator": Principal("user", "u", "operator"),
    "platform-viewer": Principal("user", "u", "viewer"),
    "owner": Principal("user", "u", None, {"team-a": "owner"}),
    "member": Principal("user", "u", None, {"team-a": "member"}),
    "viewer": Principal("user", "u", None, {"team-a": "viewer"}),
    "nobody": Principal("user", "u", None, {}),
}


@pytest.mark.parametrize("role", ROLES)
async def test_each_role_gets_its_pages_and_no_other(sqlite_plane: Running, role: str) -> None:
    """Those of the navigation answer; the others say what is missing, and to whom."""
    principal = ROLES[role]
    await make_user(sqlite_plane, "bob", principal.platform_role)
    for organisation, own in principal.roles.items():
        await make_organisation(sqlite_plane, organisation, bob=own)
    await log_in(sqlite_plane, "bob")

    for page in PLAIN:
        answer = await sqlite_plane.client.get(page.path)
        allowed = page.allows(principal)
        assert answer.status_code == (200 if allowed else 403), (page.path, answer.text[:2000])
        assert "default-src 'none'" in answer.headers["content-security-policy"]
        assert answer.headers["cache-control"] == "no-store"
        linked = re.findall(r'<li><a href="([^"]+)"', answer.text)
        assert linked == [one.path for one in CONSOLE if one.group is not None and one.allows(principal)]
        if not allowed:
            assert "bob" in answer.text


@pytest.mark.parametrize("role", ROLES)
async def test_each_role_sends_its_forms_and_no_other(sqlite_plane: Running, role: str) -> None:
    """Whatever is in them: what a form does is looked at later, and only for those who may send one."""
    principal = ROLES[role]
    await make_user(sqlite_plane, "bob", principal.platform_role)
    for organisation, own in principal.roles.items():
        await make_organisation(sqlite_plane, organisation, bob=own)
    await log_in(sqlite_plane, "bob")

    for page in (page for page in CONSOLE if page.posts not in (None, "self")):
        path = page.path.replace("{", "").replace("}", "")
        answer = await sqlite_plane.client.post(path, data={"do": "nothing"}, headers=SAME_ORIGIN)
        assert (answer.status_code == 403) is not page.allows(principal, "POST"), (page.path, answer.status_code)


def test_pages_whose_handlers_look_at_each_form_are_known() -> None:
    """Tokens and the account are everybody's own; forms of a model need several permissions."""
    assert {page.path for page in CONSOLE if page.posts == "self"} == {
        "/console/account",
        "/console/keys",
        "/console/models/{name:path}",
        "/console/{rest:path}",
    }


@pytest.mark.parametrize("page", PLAIN, ids=lambda page: page.path)
async def test_a_part_is_the_page_without_its_frame(sqlite_plane: Running, page: Page) -> None:
    await make_user(sqlite_plane, "bob", "admin")
    await log_in(sqlite_plane, "bob")

    whole = await sqlite_plane.client.get(page.path)
    part = await sqlite_plane.client.get(page.path, headers={"hx-request": "true", "hx-request-type": "partial"})

    assert "<html" in whole.text
    assert "<html" not in part.text
    assert "<h1" not in part.text


@pytest.mark.parametrize("page", [page for page in PLAIN if page.posts], ids=lambda page: page.path)
async def test_another_site_sends_no_form(sqlite_plane: Running, page: Page) -> None:
    await make_user(sqlite_plane, "bob", "admin")
    await log_in(sqlite_plane, "bob")

    answer = await sqlite_plane.client.post(page.path, data={"x": "y"}, headers={"sec-fetch-site": "cross-site"})

    assert answer.status_code == 403
    assert "csrf" in answer.text


@pytest.mark.parametrize("page", PLAIN, ids=lambda page: page.path)
async def test_any_name_of_a_parameter_is_harmless(sqlite_plane: Running, page: Page) -> None:
    await make_user(sqlite_plane, "bob", "admin")
    await log_in(sqlite_plane, "bob")

    answer = await sqlite_plane.client.get(page.path, params=dict.fromkeys(("path", "self", "to", "done", "here"), "x"))

    assert answer.status_code == 200


async def test_a_login_is_asked_for_whatever_the_host_is(sqlite_plane: Running) -> None:
    answer = await sqlite_plane.client.get("/console/keys?state=ok", headers={"host": "["})

    assert (answer.status_code, answer.headers["location"]) == (
        303,
        "/console/login?next=%2Fconsole%2Fkeys%3Fstate%3Dok",
    )


@pytest.mark.parametrize("seconds", ["\N{SUPERSCRIPT TWO}", "-5", "1h", "9" * 5000])
async def test_an_order_ends_when_somebody_says_or_is_not_given(sqlite_plane: Running, seconds: str) -> None:
    """Not for ever, of a time that cannot be read."""
    await make_user(sqlite_plane, "bob", "admin")
    await log_in(sqlite_plane, "bob")
    form = {"backend": "10.0.0.12:8000", "action": "drain", "reason": "driver", "expires_in": seconds, "force": "1"}

    answer = await sqlite_plane.client.post("/console/backends", data=form, headers=SAME_ORIGIN)

    assert answer.status_code == 422
    assert (await sqlite_plane.admin.get("/api/v1/overrides")).json()["data"] == []


@pytest.mark.parametrize("page", PLAIN, ids=lambda page: page.path)
async def test_a_secret_that_is_pasted_into_a_filter_leaves_the_url(sqlite_plane: Running, page: Page) -> None:
    await make_user(sqlite_plane, "bob", "admin")
    await log_in(sqlite_plane, "bob")
    secret = new_key().key

    answer = await sqlite_plane.client.get(page.path, params={"key": f" {secret}", "model": "m"})

    assert answer.status_code == 303
    assert httpx.URL(answer.headers["location"]).params == httpx.QueryParams({"key": secret[6:18], "model": "m"})
    assert secret[-20:] not in answer.headers["location"]


async def test_an_unknown_page_is_one_that_helps(sqlite_plane: Running) -> None:
    anonymous = await sqlite_plane.client.get("/console/nowhere")
    await make_user(sqlite_plane, "bob", "admin")
    await log_in(sqlite_plane, "bob")
    known = await sqlite_plane.client.get("/console/nowhere<b>")
    sent = await sqlite_plane.client.post("/console/nowhere", data={"a": "b"}, headers=SAME_ORIGIN)

    assert anonymous.status_code == 303
    assert (await sqlite_plane.client.get("/console")).headers["location"] == "/console/"
    assert (known.status_code, sent.status_code) == (404, 404)
    assert 'href="/console/"' in known.text
    assert "nowhere<b>" not in known.text
    assert "nowhere&lt;b&gt;" in known.text


async def test_a_refusal_is_noted_whatever_its_path_is(plane: Running) -> None:
    await make_user(plane, "bob")
    await log_in(plane, "bob")

    answer = await plane.client.get("/console/users/a%00b%FF")
    rows = (await plane.admin.get("/api/v1/audit?action=user.denied")).json()["data"]

    assert answer.status_code == 403
    assert [(row["actor"]["name"], row["object"]["id"]) for row in rows] == [("bob", "a\ufffdb\ufffd")]


async def test_help_has_every_section_that_failed_requests_point_to(sqlite_plane: Running) -> None:
    await make_user(sqlite_plane, "bob")
    await log_in(sqlite_plane, "bob")
    places = {one.runbook for one in OUTCOMES.values() if one.runbook}

    for place in places:
        where = address(place)
        answer = await sqlite_plane.client.get(where)
        assert answer.status_code == 200
        anchor = where.partition("#")[2]
        assert not anchor or f'id="{anchor}"' in answer.text, where
    unknown = await sqlite_plane.client.get("/console/help/nothing")

    assert len(places) > 5
    assert unknown.status_code == 404


def test_a_wheel_has_the_manual() -> None:
    project = tomllib.loads((TEMPLATES[0].parents[3] / "pyproject.toml").read_text())
    copied = project["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"]

    assert copied == {file: f"control_plane/web/help/{name}.md" for name, file in FILES.items()}


def test_links_of_the_manual_lead_to_what_is_there() -> None:
    for name, one in manuals().items():
        for link in re.findall(r'href="([^"]*)"', one.html):
            page, _, anchor = link.partition("#")
            if page.startswith("https://"):
                continue
            target = manuals()[page.rpartition("/")[2] or name]
            assert not anchor or f'id="{anchor}"' in target.html, link
