"""Logins by OpenID, against a real provider, and against one that lies."""

import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import httpx
import pytest
from sqlalchemy import select, update

from control_plane.data.tables import audit, login_states, users
from tests.control_plane.conftest import Clock, Running
from tests.control_plane.people import error, log_in, make_user
from tests.control_plane.provider import CLIENT_ID, LyingProvider, lying_provider, path_of, real_provider
from tests.fakes import ScriptedServer, json_response, raw, until

pytestmark = pytest.mark.anyio
Start = Callable[..., Any]
SECRET = "secret-of-the-client-0123456789"
GROUPS = {"sub": "s-grace", "email": "grace@example.org", "email_verified": True, "groups": ["staff", "ops"]}


@pytest.fixture(scope="module")
def provider_url() -> Iterator[str]:
    users = (
        {
            "sub": "s-ada",
            "email": "ada@example.org",
            "email_verified": True,
            "preferred_username": "ada",
            "name": "Ada",
        },
        GROUPS,
        {"sub": "s-eve", "email": "ana@example.org", "email_verified": True},
        {"sub": "s-mallory", "email": "bob@example.org"},
    )
    with real_provider(*users) as url:
        yield url


@pytest.fixture
async def liar() -> AsyncIterator[LyingProvider]:
    async with lying_provider() as provider:
        yield provider


async def start_at(start: Start, issuer: str, **settings: Any) -> Running:
    given = {"oidc_issuer": issuer, "oidc_client_id": CLIENT_ID, "oidc_client_secret": SECRET, **settings}
    running: Running = await start(Clock(time.time_ns() // 1_000_000), **given)
    return running


async def begin(running: Running, target: str = "") -> str:
    """The URL of the provider that the browser is sent to."""
    answer = await running.client.get(f"/console/oidc/start{target}")
    assert answer.status_code == 303, answer.text
    return answer.headers["location"]


async def come_back(url: str, subject: str) -> str:
    """Log in at the provider; returns where the browser is sent then."""
    async with httpx.AsyncClient(trust_env=False) as browser:
        lying = (await browser.get(url)).headers.get("location")
        answer = await browser.post(url, data={"sub": subject})
        return lying or answer.headers["location"]


async def log_in_at(running: Running, subject: str = "s-1", target: str = "") -> httpx.Response:
    back = await come_back(await begin(running, target), subject)
    return await running.client.get(path_of(back))


async def reasons(running: Running) -> list[str]:
    async with running.plane.database.main.read() as connection:
        query = select(audit.c.after).where(audit.c.action == "session.login_failed").order_by(audit.c.id)
        return [row.after["openid"] for row in await connection.execute(query)]


async def test_a_new_user_logs_in_and_may_do_nothing(start_plane: Start, provider_url: str) -> None:
    running = await start_at(start_plane, provider_url)

    answer = await log_in_at(running, "s-ada", "?next=/console/models")
    me = (await running.client.get("/api/v1/me")).json()
    again = await log_in_at(running, "s-ada")

    assert (answer.status_code, answer.headers["location"]) == (303, "/console/models")
    assert me == {
        "name": "ada",
        "email": "ada@example.org",
        "title": "Ada",
        "platform_role": None,
        "memberships": [],
    }
    assert again.status_code == 303
    async with running.plane.database.main.read() as connection:
        assert len((await connection.execute(select(users).where(users.c.oidc_subject.is_not(None)))).all()) == 1
        assert (await connection.execute(select(login_states))).all() == []


async def test_roles_on_the_platform_come_from_groups(start_sqlite: Start, provider_url: str) -> None:
    running = await start_at(start_sqlite, provider_url, oidc_roles="ops=operator,staff=viewer,root=admin")
    await log_in_at(running, "s-grace")
    first = (await running.client.get("/api/v1/me")).json()["platform_role"]
    async with running.plane.database.main.write() as connection:
        await connection.execute(update(users).where(users.c.name == "grace").values(platform_role="admin"))
    await log_in_at(running, "s-grace")

    assert first == "operator"
    assert (await running.client.get("/api/v1/me")).json()["platform_role"] == "operator"


async def test_nobody_becomes_another_user_by_an_address(start_sqlite: Start, provider_url: str) -> None:
    running = await start_at(start_sqlite, provider_url)
    await make_user(running, "bob")
    found = []
    for subject in ("s-eve", "s-mallory"):
        await log_in_at(running, subject)
        me = (await running.client.get("/api/v1/me")).json()
        found.append((me["name"], me["email"], me["platform_role"]))

    assert found == [("ana-2", None, None), ("bob-2", None, None)]


async def test_who_is_disabled_or_ended_does_not_log_in(start_sqlite: Start, provider_url: str) -> None:
    running = await start_at(start_sqlite, provider_url)
    await log_in_at(running, "s-ada")
    headers, path = {"if-match": "*"}, "/api/v1/users/ada"
    for method in ("PATCH", "DELETE"):
        await running.admin.request(
            method, path, headers=headers, json={"disabled": True} if method == "PATCH" else None
        )

        assert (await log_in_at(running, "s-ada")).status_code == 401
        assert (await running.client.get("/api/v1/me")).status_code == 401


async def test_an_answer_is_good_once_and_for_the_browser_that_began(start_plane: Start, provider_url: str) -> None:
    running = await start_at(start_plane, provider_url)
    back = path_of(await come_back(await begin(running), "s-ada"))
    cookies = dict(running.client.cookies)
    running.client.cookies.clear()
    stolen = await running.client.get(back)
    running.client.cookies.update(cookies)
    used, replayed = await running.client.get(back), await running.client.get(back)
    late = path_of(await come_back(await begin(running), "s-ada"))
    running.clock.advance(600)
    too_late = await running.client.get(late)
    made_up = await running.client.get("/console/oidc/callback?code=x&state=y")

    statuses = [answer.status_code for answer in (stolen, used, replayed, too_late, made_up)]
    assert statuses == [401, 303, 401, 401, 401]
    assert await reasons(running) == ["state"] * 4


async def test_no_connection_is_kept_on_which_a_code_could_be_lost(start_sqlite: Start) -> None:
    async with ScriptedServer() as provider:
        told = {name: f"{provider.url}/{name}" for name in ("authorization_endpoint", "token_endpoint", "jwks_uri")}
        provider.script = raw(json_response({"issuer": provider.url, **told}))
        running = await start_at(start_sqlite, provider.url)
        await begin(running)

        assert provider.connections == 1
        await until(lambda: provider.open == 0)


async def test_two_tabs_log_in_side_by_side(start_sqlite: Start, provider_url: str) -> None:
    running = await start_at(start_sqlite, provider_url)
    urls = [await begin(running), await begin(running)]
    answers = [await running.client.get(path_of(await come_back(url, "s-ada"))) for url in urls]

    assert [answer.status_code for answer in answers] == [303, 303]


async def test_a_login_begins_a_session_anew(start_sqlite: Start, provider_url: str) -> None:
    running = await start_at(start_sqlite, provider_url)
    await make_user(running, "bob")
    await log_in(running, "bob")
    old = running.client.cookies["ia_session"]
    await log_in_at(running, "s-ada")

    assert running.client.cookies["ia_session"] != old
    running.client.cookies.clear()
    answer = await running.client.get("/api/v1/me", headers={"cookie": f"ia_session={old}"})
    assert error(answer)[:2] == (401, "not_authenticated")


async def test_the_provider_can_refuse(start_sqlite: Start, provider_url: str) -> None:
    running = await start_at(start_sqlite, provider_url)
    state = path_of(await begin(running)).partition("state=")[2].partition("&")[0]

    answer = await running.client.get(f"/console/oidc/callback?error=access_denied&state={state}")

    assert answer.status_code == 401
    assert "access_denied" not in answer.text
    assert await reasons(running) == ["refused"]


HOUR = 3600


@pytest.mark.parametrize(
    ("claims", "reason"),
    [
        ({}, None),
        ({"aud": [CLIENT_ID]}, None),
        ({"aud": [CLIENT_ID, "other"], "azp": CLIENT_ID}, None),
        ({"nonce": "another"}, "nonce"),
        ({"nonce": None}, "nonce"),
        ({"aud": "another"}, "claims"),
        ({"aud": [CLIENT_ID, "other"], "azp": "other"}, "claims"),
        ({"aud": [CLIENT_ID, "other"]}, "claims"),
        ({"aud": None}, "claims"),
        ({"iss": "https://other.example"}, "claims"),
        ({"iss": None}, "claims"),
        ({"exp": -HOUR}, "claims"),
        ({"exp": None}, "claims"),
        ({"iat": HOUR}, "claims"),
        ({"sub": None}, "claims"),
        ({"sub": 7}, "claims"),
    ],
)
async def test_a_token_must_be_for_this_login(
    start_sqlite: Start, liar: LyingProvider, claims: dict[str, Any], reason: str | None
) -> None:
    running = await start_at(start_sqlite, liar.url)
    times = ("exp", "iat")
    liar.claims = {
        name: value + int(time.time()) if name in times and value is not None else value
        for name, value in claims.items()
    }

    answer = await log_in_at(running)

    assert answer.status_code == (303 if reason is None else 401)
    assert await reasons(running) == ([] if reason is None else [reason])
    assert (await running.client.get("/api/v1/me")).status_code == (200 if reason is None else 401)


async def test_a_token_must_have_the_providers_signature(start_sqlite: Start, liar: LyingProvider) -> None:
    running = await start_at(start_sqlite, liar.url)
    liar.header = {"alg": "none"}
    none = await log_in_at(running)
    liar.sign_by_what_is_public()
    shared = await log_in_at(running)
    liar.use_another_key()
    unknown = await log_in_at(running)
    liar.header = {"alg": "ES256", "kid": "first"}
    wrong = await log_in_at(running)

    assert [answer.status_code for answer in (none, shared, unknown, wrong)] == [401] * 4
    assert await reasons(running) == ["signature", "signature", "key", "signature"]
    assert liar.asked.count("keys") < 3, "keys are asked for again once in a while, not at each unknown one"


async def test_a_new_key_of_the_provider_is_found(start_sqlite: Start, liar: LyingProvider) -> None:
    running = await start_at(start_sqlite, liar.url)
    liar.published = [{"kty": "new", "kid": "zero"}, {"kty": "oct", "k": "c2VjcmV0", "kid": "oct"}]
    liar.use_another_key()
    liar.published.append(liar.key.as_dict(private=False))

    assert (await log_in_at(running)).status_code == 303


@pytest.mark.parametrize("name", ["token_endpoint", "jwks_uri"])
@pytest.mark.parametrize(
    "url", ["http://169.254.169.254/latest/meta-data/", "http://user@{host}/keys", "file:///etc/passwd", "http://[x"]
)
async def test_no_other_host_is_asked(start_sqlite: Start, liar: LyingProvider, name: str, url: str) -> None:
    running = await start_at(start_sqlite, liar.url)
    liar.described = {name: url.format(host=liar.url.removeprefix("http://"))}

    answer = await log_in_at(running)

    assert answer.status_code == 503
    assert answer.headers["retry-after"] == "5"


@pytest.mark.parametrize("described", [{"issuer": "https://other.example"}, {"token_endpoint": None}])
async def test_a_description_of_another_provider_is_of_no_use(
    start_sqlite: Start, liar: LyingProvider, described: dict[str, Any]
) -> None:
    running = await start_at(start_sqlite, liar.url)
    liar.described = described

    assert (await running.client.get("/console/oidc/start")).status_code == 503


async def test_the_answer_of_another_provider_is_refused(start_sqlite: Start, liar: LyingProvider) -> None:
    running = await start_at(start_sqlite, liar.url)
    back = path_of(await come_back(await begin(running), "s-1"))

    answer = await running.client.get(f"{back}&iss=https://other.example")

    assert answer.status_code == 401
    assert await reasons(running) == ["issuer"]


@pytest.mark.parametrize(
    ("target", "goes"),
    [
        ("/console/keys?tab=1", "/console/keys?tab=1"),
        ("//evil.example", "/console/"),
        ("https://evil.example", "/console/"),
        ("/console\\evil", "/console/"),
        ("/console/%0d%0ax", "/console/%0d%0ax"),
    ],
)
async def test_a_login_ends_in_the_console(start_sqlite: Start, liar: LyingProvider, target: str, goes: str) -> None:
    running = await start_at(start_sqlite, liar.url)
    answer = await running.client.get("/console/oidc/start", params={"next": target})
    back = await come_back(answer.headers["location"], "s-1")

    assert (await running.client.get(path_of(back))).headers["location"] == goes


async def test_the_login_page_offers_it(start_sqlite: Start) -> None:
    running = await start_at(start_sqlite, "http://127.0.0.1:1", password_login="off")

    text = (await running.client.get("/console/login")).text

    assert 'href="/console/oidc/start?' in text
    assert "<form" not in text
    assert (await running.client.get("/console/oidc/start")).status_code == 503
