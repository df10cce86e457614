"""The first pages of the console: they work without a script, and nothing that people type becomes a part of them."""

import re
from html import unescape

import httpx
import pytest

from tests.control_plane.conftest import Running
from tests.control_plane.people import PASSWORD, SAME_ORIGIN, make_user

pytestmark = pytest.mark.anyio
LOGIN = "/console/login"


async def send(running: Running, email: str, password: str, path: str = LOGIN, **headers: str) -> httpx.Response:
    form = {"email": email, "password": password}
    return await running.client.post(path, data=form, headers=headers or SAME_ORIGIN)


async def test_people_log_in_and_out(sqlite_plane: Running) -> None:
    await make_user(sqlite_plane, "bob")
    form = await sqlite_plane.client.get(f"{LOGIN}?next=/console/keys%3Ftab=1")
    action = re.search(r'action="([^"]+)"', form.text)
    assert action is not None
    login = await send(sqlite_plane, "bob@example.org", PASSWORD, action[1])
    me = await sqlite_plane.client.get("/api/v1/me")
    again = await sqlite_plane.client.get(LOGIN)
    logout = await sqlite_plane.client.post("/console/logout", headers=SAME_ORIGIN)

    assert (login.status_code, login.headers["location"]) == (303, "/console/keys?tab=1")
    assert me.json()["name"] == "bob"
    assert (again.status_code, again.headers["location"]) == (303, "/console/")
    assert (logout.status_code, logout.headers["location"]) == (303, LOGIN)
    assert (await sqlite_plane.client.get("/api/v1/me")).status_code == 401


async def test_a_page_runs_nothing_and_is_in_no_frame(sqlite_plane: Running) -> None:
    answer = await sqlite_plane.client.get(LOGIN)

    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "frame-ancestors 'none'" in policy
    assert "unsafe" not in policy
    assert "script-src 'self';" in policy
    assert "style-src 'self';" in policy
    assert re.findall(r"<script(?![^>]* src=)|<style| style=| on\w+=", answer.text) == []
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    assert answer.headers["cache-control"] == "no-store"
    assert answer.headers["referrer-policy"] == "no-referrer"


async def test_what_is_wrong_is_said_on_the_page(sqlite_plane: Running) -> None:
    await make_user(sqlite_plane, "bob")
    odd = '"><b>bob'
    wrong = [await send(sqlite_plane, odd, "wrong") for _ in range(5)]
    throttled = await send(sqlite_plane, "bob@example.org", PASSWORD)

    assert {answer.status_code for answer in wrong} == {401}
    assert "E-mail or password is wrong." in wrong[0].text
    assert odd not in wrong[0].text
    assert f'value="{odd}"' in unescape(wrong[0].text)
    assert (throttled.status_code, throttled.headers["retry-after"]) == (429, "1")
    assert "Try again in 1 s." in throttled.text
    assert "set-cookie" not in throttled.headers


def refused(answer: httpx.Response) -> tuple[int, str]:
    """The status and code of a page that says why."""
    code = re.search(r'<p class="muted">\d+ <code>(\w+)</code>', answer.text)
    assert code is not None
    assert answer.headers["content-type"].startswith("text/html")
    return answer.status_code, code[1]


@pytest.mark.parametrize("headers", [{"origin": "https://evil.example"}, {"sec-fetch-site": "same-site"}, {"x": "y"}])
async def test_another_site_logs_nobody_in_or_out(sqlite_plane: Running, headers: dict[str, str]) -> None:
    await make_user(sqlite_plane, "bob")

    assert refused(await send(sqlite_plane, "bob@example.org", PASSWORD, **headers)) == (403, "csrf")
    await send(sqlite_plane, "bob@example.org", PASSWORD)
    assert refused(await sqlite_plane.client.post("/console/logout", headers=headers)) == (403, "csrf")
    assert (await sqlite_plane.client.get("/api/v1/me")).status_code == 200


@pytest.mark.parametrize(
    "target", ["//evil.example", "https://evil.example/console", "/\\evil.example", "/console\\..", "/consolé", "keys"]
)
async def test_a_login_leads_nowhere_else(sqlite_plane: Running, target: str) -> None:
    await make_user(sqlite_plane, "bob")
    path = str(httpx.URL(LOGIN, params={"next": target}))

    answer = await send(sqlite_plane, "bob@example.org", PASSWORD, path)

    assert answer.headers["location"] == "/console/"


async def test_a_form_must_be_one(sqlite_plane: Running) -> None:
    answer = await sqlite_plane.client.post(LOGIN, json={"email": "x", "password": "y"}, headers=SAME_ORIGIN)

    assert refused(answer) == (415, "unsupported_media_type")
