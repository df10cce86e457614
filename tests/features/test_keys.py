"""AUTH=keys: who is let in, what the others are told, and what a caller may see."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anthropic
import openai
import orjson
import pytest

from inference_api.errors import printable
from inference_api.feature import Feature
from inference_api.features.keys import Keys
from inference_api.http.head import RequestHeaders
from inference_api.models import RawHeaders
from inference_api.policy.keys import checksum
from inference_api.policy.reading import read, run
from inference_api.policy.snapshot import KeyCaller
from inference_api.policy.source import Policies
from inference_api.settings import SettingsError
from tests.conftest import Served
from tests.fakes import CHAT, post, raw_client, read_answer, until
from tests.policies import EXAMPLE, PEPPER, bearer, entry, new_key, policy_of, write

pytestmark = pytest.mark.anyio
Start = Callable[..., Any]
URL = "/v1/chat/completions"
NOT_VALID = "The API key is missing or not valid. Send it as 'Authorization: Bearer <key>'."
WHO = "The API key 'batch' (k3v9Qm2XbT7a)"
THEN = "2127-01-31T00:00:00Z"
PAST = "2026-01-31T00:00:00Z"
UNKNOWN = new_key().key


@pytest.fixture
async def serve(tmp_path: Path, start_engine: Start, start_router: Start) -> Callable[..., Any]:
    """`await serve(policy, ...)` -> a router with AUTH=keys and this policy."""

    async def serve(policy: Any, **settings: Any) -> Served:
        path = write(tmp_path / "policy.json", policy)
        served: Served = await start_router(await start_engine(), auth="keys", policy=str(path), **settings)
        return served

    return serve


# Who is known


def known(headers: RawHeaders, *entries: dict[str, Any], peppers: tuple[str, ...] = (), at: float = 0.0) -> str:
    """The name of the key of these headers, or the code of the refusal."""
    policies = Policies("test")
    policies.replace(run(read(policy_of(*(entries or (entry(),))), peppered=bool(peppers))))
    keys = Keys(policies, [pepper.encode() for pepper in peppers], lambda: at)
    try:
        caller = keys.identify(RequestHeaders()(headers))
    except Exception as exc:
        return str(getattr(exc, "code", exc))
    assert isinstance(caller, KeyCaller)
    return caller.name


KEY = EXAMPLE.key.encode()
OTHER = new_key()
_START = f"sk-ia-{OTHER.id}-{EXAMPLE.key[19:62]}"
MIXED = _START + checksum(_START.encode())
CREDENTIALS: dict[str, tuple[list[tuple[bytes, bytes]], str]] = {
    "bearer": ([(b"authorization", b"Bearer " + KEY)], "batch"),
    "any case": ([(b"authorization", b"bEARER " + KEY)], "batch"),
    "more space": ([(b"authorization", b"Bearer   " + KEY)], "batch"),
    "x-api-key": ([(b"x-api-key", KEY)], "batch"),
    "another scheme, x-api-key": ([(b"authorization", b"Basic YTpi"), (b"x-api-key", KEY)], "batch"),
    # Only if there is no Bearer
    "wrong bearer, x-api-key": ([(b"authorization", b"Bearer x"), (b"x-api-key", KEY)], "invalid_api_key"),
    "no token, x-api-key": ([(b"authorization", b"Bearer"), (b"x-api-key", KEY)], "invalid_api_key"),
    "bearer, wrong x-api-key": ([(b"authorization", b"Bearer " + KEY), (b"x-api-key", b"x")], "batch"),
    # A header given twice
    "twice": ([(b"authorization", b"Bearer " + KEY)] * 2, "invalid_api_key"),
    "twice, one empty": ([(b"authorization", b"Bearer " + KEY), (b"authorization", b"")], "invalid_api_key"),
    "x-api-key twice": ([(b"x-api-key", KEY)] * 2, "invalid_api_key"),
    "nothing": ([], "invalid_api_key"),
    "empty": ([(b"authorization", b"")], "invalid_api_key"),
    "no scheme": ([(b"authorization", KEY)], "invalid_api_key"),
    "a query's name": ([(b"api-key", KEY)], "invalid_api_key"),
    # Wrong in form, checksum, or kind
    "cut": ([(b"x-api-key", KEY[:-1])], "invalid_api_key"),
    "longer": ([(b"x-api-key", KEY + b"0")], "invalid_api_key"),
    "checksum": ([(b"x-api-key", KEY[:-1] + b"s")], "invalid_api_key"),
    "unknown": ([(b"x-api-key", OTHER.key.encode())], "invalid_api_key"),
    "management token": ([(b"x-api-key", new_key(prefix="mt-ia-").key.encode())], "invalid_api_key"),
    "not ASCII": ([(b"x-api-key", b"\xff" * 68)], "invalid_api_key"),
    # The id and the secret of two keys, with a checksum that fits
    "mixed": ([(b"x-api-key", MIXED.encode())], "invalid_api_key"),
    "its digest": ([(b"x-api-key", EXAMPLE.digest.encode())], "invalid_api_key"),
    "its id": ([(b"x-api-key", EXAMPLE.id.encode())], "invalid_api_key"),
}


@pytest.mark.parametrize("case", CREDENTIALS)
async def test_where_a_key_is_read_from(case: str) -> None:
    headers, found = CREDENTIALS[case]

    assert known(headers) == found


async def test_a_digest_with_a_pepper_needs_one_of_the_peppers() -> None:
    headers = [(b"x-api-key", KEY)]
    peppered = {**entry(), "digest": EXAMPLE.peppered}

    assert known(headers, peppered, peppers=(PEPPER,)) == "batch"
    assert known(headers, peppered, peppers=("n" * 32, PEPPER)) == "batch"
    assert known(headers, peppered, peppers=("n" * 32,)) == "invalid_api_key"
    # Both kinds beside each other
    both = entry(OTHER, name="plain"), peppered
    assert known(headers, *both, peppers=(PEPPER,)) == "batch"
    assert known([(b"x-api-key", OTHER.key.encode())], *both, peppers=(PEPPER,)) == "plain"


UNTIL = 1798675200.0
TIMES: list[tuple[float, str, str]] = [
    (UNTIL - 1, "batch", "batch"),
    # Both secrets overlap, the old one ends first, then the key.
    (UNTIL, "batch", "api_key_expired"),
    (UNTIL + 86399, "batch", "api_key_expired"),
    (UNTIL + 86400, "api_key_expired", "api_key_expired"),
]


@pytest.mark.parametrize(("at", "new", "old"), TIMES)
async def test_the_clock_decides_at_each_request(at: float, new: str, old: str) -> None:
    rotated = entry(
        OTHER,
        expires="2027-01-01T00:00:00Z",
        previous={"digest": EXAMPLE.digest, "until": "2026-12-31T00:00:00Z"},
    )

    assert known([(b"x-api-key", OTHER.key.encode())], rotated, at=at) == new
    assert known([(b"x-api-key", KEY)], rotated, at=at) == old


# What a client is told

REFUSED: dict[str, tuple[dict[str, str], dict[str, Any], str, str]] = {
    "no key": ({}, {}, "invalid_api_key", NOT_VALID),
    "form": ({"authorization": "Bearer sk-wrong"}, {}, "invalid_api_key", NOT_VALID),
    "unknown": (bearer(UNKNOWN), {}, "invalid_api_key", NOT_VALID),
    "expired": (bearer(), {"expires": PAST}, "api_key_expired", f"{WHO} expired at {PAST}."),
    "disabled": (bearer(), {"disabled": True}, "api_key_disabled", f"{WHO} is disabled."),
    "organisation": (bearer(), {"organisation": "gone"}, "api_key_disabled", f"{WHO} is disabled."),
    "replaced": (
        bearer(),
        {"digest": OTHER.digest, "previous": {"digest": EXAMPLE.digest, "until": PAST}},
        "api_key_expired",
        f"This secret of the API key 'batch' (k3v9Qm2XbT7a) was replaced; it was valid until {PAST}.",
    ),
}
RESULTS = {"invalid_api_key": "invalid", "api_key_expired": "expired", "api_key_disabled": "disabled"}


@pytest.mark.parametrize("case", REFUSED)
async def test_a_401_says_why(case: str, serve: Start) -> None:
    headers, more, code, message = REFUSED[case]
    served: Served = await serve({"organisations": [{"name": "gone", "disabled": True}], "keys": [{**entry(), **more}]})

    for path in (URL, "/v1/models", "/v1/models/m", "/nope", "/"):
        answer = await served.client.request("POST" if path == URL else "GET", path, headers=headers)
        assert (answer.status_code, answer.headers["www-authenticate"]) == (401, 'Bearer realm="inference-api"')
        assert answer.json() == {
            "error": {"message": message, "type": "invalid_request_error", "param": None, "code": code},
            "request_id": answer.headers["x-request-id"],
        }
    await until(lambda: len(served.lines) == 5)
    assert await served.metric("inference_api_auth_total", result=RESULTS[code]) == 5
    assert await served.metric("inference_api_rejected_requests_total", reason="auth") == 5
    assert {line.get("key_id") for line in served.lines} == {None}


@pytest.mark.parametrize(
    "path", ["/health", "/healthz", "/readyz", "/metrics", "/version", "/openapi.json", "/docs", "/backends"]
)
async def test_some_paths_are_open(path: str, serve: Start) -> None:
    served: Served = await serve(policy_of(entry()))

    assert (await served.client.get(path)).status_code == 200
    assert (await served.client.options(URL)).status_code == 405
    assert (await served.client.options("/nope")).status_code == 404


async def test_a_key_is_not_read_from_a_query_or_body(serve: Start) -> None:
    served: Served = await serve(policy_of(entry()))

    for parameter in ("api_key", "api-key", "key", "access_token"):
        answer = await served.client.post(f"{URL}?{parameter}={EXAMPLE.key}", json={**CHAT, parameter: EXAMPLE.key})
        assert answer.status_code == 401


async def test_a_key_comes_before_the_body(serve: Start) -> None:
    served: Served = await serve(policy_of(entry()), max_body_bytes=100)

    for body in (b"{", b'{"model": "x"}', b" " * 1000):
        refused = await served.client.post(URL, content=body, headers={"content-type": "application/json"})
        assert refused.status_code == 401
        sound = {"content-type": "application/json", **bearer()}
        assert (await served.client.post(URL, content=body, headers=sound)).status_code in (400, 413, 422)


# Models

MODELS: list[dict[str, Any]] = [
    {"name": "llama-3-8b", "aliases": ["small", "zephyr"]},
    {"name": "llama-3-70b"},
    {"name": "chat"},
    {"name": "mistral"},
]
ALLOWED: list[tuple[Any, Any, set[str]]] = [
    (None, None, {"llama-3-8b", "llama-3-70b", "chat", "mistral"}),
    (["*"], None, {"llama-3-8b", "llama-3-70b", "chat", "mistral"}),
    ([], None, set()),
    (None, [], set()),
    (["llama-*", "chat"], None, {"llama-3-8b", "llama-3-70b", "chat"}),
    (["*-3-*b"], None, {"llama-3-8b", "llama-3-70b"}),
    (["llama-*"], ["*-8b", "chat"], {"llama-3-8b"}),
    # Patterns are no regular expressions, and match whole names.
    (["lla", "ch.t", "llama"], None, set()),
    # Of the catalogue, not of an alias
    (["small"], None, set()),
]


@pytest.mark.parametrize(("own", "teams", "allowed"), ALLOWED)
async def test_the_models_of_a_key(own: Any, teams: Any, allowed: set[str], serve: Start) -> None:
    policy = {
        "organisations": [{"name": "team-a", "models": teams}],
        "keys": [entry(models=own, organisation="team-a")],
    }
    served: Served = await serve(policy, models=MODELS)

    listed = (await served.client.get("/v1/models", headers=bearer())).json()["data"]
    assert {card["id"] for card in listed} == allowed
    for model in MODELS:
        name = str(model["name"])
        for asked in (name, *model.get("aliases", ())):
            card = await served.client.get(f"/v1/models/{asked}", headers=bearer())
            answer = await served.client.post(URL, json={**CHAT, "model": asked}, headers=bearer())
            assert card.status_code == (200 if name in allowed else 403)
            # None has a backend.
            assert answer.status_code == (503 if name in allowed else 403)


@pytest.mark.parametrize(
    ("models", "name", "status", "message"),
    [
        (["llama-*"], "mistral", 403, "The model 'mistral' does not exist, or this API key may not use it."),
        (["llama-*"], "nope", 403, "The model 'nope' does not exist, or this API key may not use it."),
        (["llama-*"], "llama-nope", 403, "The model 'llama-nope' does not exist, or this API key may not use it."),
        (None, "nope", 404, "The model 'nope' does not exist. Known models: llama-3-8b, llama-3-70b, chat, mistral."),
    ],
)
async def test_a_model_that_is_not_for_the_caller(
    models: Any, name: str, status: int, message: str, serve: Start
) -> None:
    served: Served = await serve(policy_of(entry(models=models)), models=MODELS)

    for answer in (
        await served.client.post(URL, json={**CHAT, "model": name}, headers=bearer()),
        await served.client.get(f"/v1/models/{name}", headers=bearer()),
    ):
        assert answer.status_code == status
        assert answer.json()["error"] == {
            "message": message,
            "type": "invalid_request_error",
            "param": "model",
            "code": "model_not_found",
        }
    await until(lambda: len(served.lines) == 2)
    assert [line["code"] for line in served.lines] == ["model_not_found"] * 2
    assert await served.metric("inference_api_auth_total", result="forbidden" if status == 403 else "ok") == 2
    reason = "forbidden" if status == 403 else "unknown_model"
    assert await served.metric("inference_api_rejected_requests_total", reason=reason) == 2


async def test_an_alias_is_resolved_first(serve: Start, start_engine: Start, start_router: Start) -> None:
    served: Served = await serve(policy_of(entry(models=["m"])), entry={"aliases": ["other"]})

    assert (await served.client.post(URL, json={**CHAT, "model": "other"}, headers=bearer())).status_code == 200


# What reaches the engine, and the log


async def test_a_request_with_a_key_is_the_engines_but_for_the_key(
    tmp_path: Path, start_engine: Start, start_router: Start
) -> None:
    engine = await start_engine()
    team: dict[str, Any] = {"organisation": "team-a", "user": "ana"}
    path = write(tmp_path / "policy.json", policy_of(entry(**team)))
    served: Served = await start_router(engine, auth="keys", policy=str(path))

    for headers in (bearer(), {"x-api-key": EXAMPLE.key}):
        answer = await served.client.post(URL, json=CHAT, headers=headers)
        assert answer.status_code == 200
    await until(lambda: len(served.lines) == 2)

    for request in engine.requests:
        assert not {"authorization", "x-api-key"} & request.names
        assert EXAMPLE.key not in str(request)
    for line in served.lines:
        assert {name: line[name] for name in ("key_id", "organisation", "user")} == {
            "key_id": EXAMPLE.id,
            **team,
        }
    assert await served.metric("inference_api_auth_total", result="ok") == 2


@pytest.mark.parametrize(("given", "sent"), [({"priority": -7}, "-7"), ({}, "0")])
async def test_an_engine_gets_the_priority_of_the_key(
    given: Any, sent: str, tmp_path: Path, start_engine: Start, start_router: Start
) -> None:
    engine = await start_engine()
    path = write(tmp_path / "policy.json", policy_of(entry(**given)))
    served: Served = await start_router(engine, entry={"priority": "caller"}, auth="keys", policy=str(path))

    await served.client.post(URL, json=CHAT, headers={**bearer(), "x-vllm-priority": "-100"})

    assert engine.requests[0].header("x-vllm-priority") == sent


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (EXAMPLE.key, "sk-ia-k3v9Qm2XbT7a-***"),
        (f"/v1/models/{EXAMPLE.key[:40]}", "/v1/models/sk-ia-k3v9Qm2XbT7a-***"),
        (f"Bearer mt{EXAMPLE.key[2:]} y", "Bearer mt-ia-k3v9Qm2XbT7a-*** y"),
    ],
)
async def test_a_key_in_a_wrong_place_is_not_shown(text: str, shown: str) -> None:
    assert printable(text).startswith(shown)
    assert EXAMPLE.key[19:30] not in printable(text)


async def test_fields_that_a_key_does_not_have_are_left_out(serve: Start) -> None:
    served: Served = await serve(policy_of(entry()))
    await served.client.get("/v1/models", headers=bearer())

    [line] = served.lines
    assert line["key_id"] == EXAMPLE.id
    assert not {"organisation", "user"} & line.keys()


async def test_backends_do_not_get_the_keys_of_callers(tmp_path: Path, start_router: Start) -> None:
    path = write(tmp_path / "policy.json", policy_of(entry()))

    with pytest.raises(SettingsError) as caught:
        await start_router(auth="keys", policy=str(path), forward_headers="x-api-key")

    assert str(caught.value) == (
        "INFERENCE_API_FORWARD_HEADERS='x-api-key': INFERENCE_API_AUTH=keys reads keys from x-api-key, and backends "
        "must not get them; remove it"
    )


async def test_an_entry_that_passes_credentials_on_is_refused_alone(
    serve: Start, start_router: Start, caplog: pytest.LogCaptureFixture
) -> None:
    models = [{"name": "passes", "credentials": "passthrough"}, {"name": "m"}]
    reason = (
        "model 'passes': credentials: passthrough would send the callers' keys to its backends; "
        "INFERENCE_API_AUTH=keys refuses that"
    )
    served: Served = await serve(policy_of(entry()), models=models)

    assert list(served.router.core.fleet.models) == ["m"]
    assert reason in caplog.text
    # Without keys it is as before.
    assert list((await start_router(models=models)).router.core.fleet.models) == ["passes", "m"]


async def test_an_entry_of_the_registry_that_passes_credentials_on_is_refused_alone(serve: Start, start: Start) -> None:
    async def models(request: Any, line: Any) -> None:
        entries = [{"name": "passes", "credentials": "passthrough"}, {"name": "listed"}]
        body = orjson.dumps({"models": entries})
        await line.send(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(body) + body)

    registry = await start(models)
    served: Served = await serve(policy_of(entry()), registry_url=registry.url)

    assert list(served.router.core.fleet.models) == ["listed"]


# Changes of the policy


async def test_a_revoked_key_is_refused_on_the_same_connection(serve: Start, tmp_path: Path) -> None:
    served: Served = await serve(policy_of(entry()))
    request = post(URL, CHAT, f"authorization: Bearer {EXAMPLE.key}\r\n".encode())
    policies = served.router.core.provided(Policies)
    assert policies is not None
    seen: list[int] = []
    policies.on_change(lambda policy: seen.append(policy.number))

    async def ask() -> int:
        await client.send(request)
        return (await read_answer(client.reader)).status

    async with raw_client(served.port) as client:
        # The same bytes: the head is not read anew.
        assert [await ask() for _ in range(3)] == [200] * 3
        for policy, status in ((policy_of(), 401), (policy_of(entry()), 200), (policy_of(entry(disabled=True)), 401)):
            write(tmp_path / "policy.json", policy)
            served.router.reload()
            await until(lambda: seen)
            seen.clear()
            assert [await ask() for _ in range(3)] == [status] * 3


async def test_a_key_expires_on_the_same_connection(start_engine: Start, start_router: Start) -> None:
    now = [UNTIL - 1]
    policies = Policies("test")
    policies.replace(run(read(policy_of(entry(expires="2026-12-31T00:00:00Z")), peppered=False)))
    keys = Keys(policies, clock=lambda: now[0])
    served: Served = await start_router(await start_engine(), features=[Feature("keys", identify=keys.identify)])
    request = post(URL, CHAT, f"authorization: Bearer {EXAMPLE.key}\r\n".encode())

    statuses: list[int] = []
    async with raw_client(served.port) as client:
        for at in (UNTIL - 1, UNTIL - 0.001, UNTIL, UNTIL + 1):
            now[0] = at
            await client.send(request)
            statuses.append((await read_answer(client.reader)).status)

    assert statuses == [200, 200, 401, 401]


async def test_requests_of_a_swap_are_all_answered(serve: Start, tmp_path: Path) -> None:
    """Keys that are in both policies never notice."""
    served: Served = await serve(policy_of(entry()))

    async def ask() -> set[int]:
        return {(await served.client.get("/v1/models", headers=bearer())).status_code for _ in range(100)}

    async def swap() -> None:
        for number in range(20):
            write(tmp_path / "policy.json", policy_of(entry(name=f"key-{number}"), *(entry(new_key()) for _ in "ab")))
            served.router.reload()
            await asyncio.sleep(0.01)

    *answers, _ = await asyncio.gather(ask(), ask(), swap())
    assert answers == [{200}, {200}]


# The SDKs


async def test_the_openai_sdk_raises_its_own_exceptions(serve: Start) -> None:
    served: Served = await serve(policy_of(entry(models=["m"])))
    messages: Any = CHAT["messages"]

    async with openai.AsyncOpenAI(base_url=served.url + "/v1", api_key=EXAMPLE.key) as client:
        assert (await client.chat.completions.create(model="m", messages=messages)).choices
        assert [model.id async for model in client.models.list()] == ["m"]
        with pytest.raises(openai.PermissionDeniedError, match="may not use it") as forbidden:
            await client.chat.completions.create(model="x", messages=messages)
    assert (forbidden.value.code, forbidden.value.param) == ("model_not_found", "model")
    async with openai.AsyncOpenAI(base_url=served.url + "/v1", api_key="sk-wrong") as client:
        with pytest.raises(openai.AuthenticationError, match="missing or not valid") as refused:
            await client.chat.completions.create(model="m", messages=messages)
    assert refused.value.code == "invalid_api_key"
    # Not tried again
    assert len(served.lines) == 4


async def test_the_anthropic_sdk_raises_its_own_exceptions(serve: Start) -> None:
    served: Served = await serve(policy_of(entry(models=["m"])))
    asked: Any = {"max_tokens": 5, "messages": CHAT["messages"]}

    ways: list[dict[str, Any]] = [{"api_key": EXAMPLE.key}, {"auth_token": EXAMPLE.key}]
    for credentials in ways:
        async with anthropic.AsyncAnthropic(base_url=served.url, **credentials) as client:
            await client.messages.create(model="m", **asked)
            with pytest.raises(anthropic.PermissionDeniedError, match="may not use it"):
                await client.messages.create(model="x", **asked)
    async with anthropic.AsyncAnthropic(base_url=served.url, api_key="sk-wrong") as client:
        with pytest.raises(anthropic.AuthenticationError, match="missing or not valid"):
            await client.messages.create(model="m", **asked)
    assert len(served.lines) == 5
