"""Providers: base path, headers, credentials and routes of an entry, and what becomes of their refusals."""

from collections.abc import AsyncIterator, Callable
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import httpx
import orjson
import pytest
import yaml

from inference_api.app import ENTRY, build
from inference_api.commands.connect import connect
from inference_api.models import Outcome
from inference_api.routing.catalogue import parse_catalogue
from inference_api.routing.fleet import Model
from inference_api.settings import Settings
from tests.conftest import Served
from tests.fakes import COMPLETION, FakeEngine, Line, Received, json_response, raw, until
from tests.policies import bearer, entry, policy_of, write
from tests.providers import FOLDER, KEY, PROVIDERS, FakeProvider, Provider, example

pytestmark = pytest.mark.anyio
Start = Callable[..., Any]
BODY = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 9}


@pytest.fixture(params=PROVIDERS, ids=lambda provider: provider.file)
def provider(request: pytest.FixtureRequest) -> Provider:
    found: Provider = request.param
    return found


@pytest.fixture
async def fake(provider: Provider) -> AsyncIterator[FakeProvider]:
    async with FakeProvider(provider) as running:
        yield running


def models_of(provider: Provider, fake: FakeProvider) -> list[dict[str, Any]]:
    models: list[dict[str, Any]] = yaml.safe_load(example(provider.file, fake.url))["models"]
    return models


def tokens_of(models: list[dict[str, Any]], key: str = KEY) -> dict[str, str]:
    return {model["credentials"]["env"]: key for model in models}


async def ask(served: Served, provider: Provider, **more: Any) -> httpx.Response:
    # The client's own credentials go to nobody.
    headers = {"authorization": "Bearer client", "x-api-key": "client", "api-key": "client"}
    body = {"model": provider.model, **BODY, **more}
    return await served.client.post(provider.route, json=body, headers=headers)


def test_each_example_has_its_provider() -> None:
    assert {path.stem for path in FOLDER.glob("*.yaml")} == {provider.file for provider in PROVIDERS}


async def test_an_example_is_answered(provider: Provider, fake: FakeProvider, start_router: Start) -> None:
    models = models_of(provider, fake)
    served: Served = await start_router(models=models, tokens=tokens_of(models), usage="log", health_interval=0.1)

    whole, stream = await ask(served, provider), await ask(served, provider, stream=True)
    unknown = await ask(served, provider, nonsense=1)

    assert (whole.status_code, whole.json()) == (200, provider.answer)
    assert (stream.status_code, stream.headers["content-type"][:17]) == (200, "text/event-stream")
    expected = provider.unknown_field or None
    assert unknown.json() == (provider.answer if expected is None else expected.document)
    assert not any("client" in value for request in fake.requests for _, value in request.headers)
    # Health by traffic only
    assert fake.asked == []


async def test_a_wrong_key_is_not_the_clients(provider: Provider, fake: FakeProvider, start_router: Start) -> None:
    models = models_of(provider, fake)
    served: Served = await start_router(models=models, tokens=tokens_of(models, "sk-wrong"))

    answer = await ask(served, provider)

    if provider.file == "gemini":
        assert (answer.status_code, answer.json()) == (400, provider.wrong_key.document)
        return
    assert answer.status_code == 502
    error = answer.json()["error"]
    assert error == {
        "message": f"The backend of the model '{provider.model}' refused the router's credentials.",
        "type": "server_error",
        "param": None,
        "code": "upstream_auth_failed",
    }
    assert answer.headers["x-should-retry"] == "false"
    assert "sk-wrong" not in answer.text
    assert "retry-after" not in answer.headers


async def test_a_wrong_path_passes(provider: Provider, fake: FakeProvider, start_router: Start) -> None:
    models = [model | {"base_path": "/v1/nowhere"} for model in models_of(provider, fake)]
    served: Served = await start_router(models=models, tokens=tokens_of(models))

    answer = await ask(served, provider)

    assert (answer.status_code, answer.json()) == (404, provider.not_found.document)


async def test_too_many_requests_pass_and_rest(provider: Provider, fake: FakeProvider, start_router: Start) -> None:
    models = models_of(provider, fake)
    served: Served = await start_router(models=models, tokens=tokens_of(models))
    fake.retry_after = 600

    answer = await ask(served, provider)
    backends = (await served.client.get("/backends")).json()

    assert (answer.status_code, answer.json()) == (429, provider.throttled.document)
    assert answer.headers["retry-after"] == "600"
    assert "resting" in str(backends)
    # 30 s at most
    core = served.router.core
    [until_] = core.retry_policy.resting.values()
    [backend] = core.retry_policy.resting
    assert backend.model == provider.model
    assert until_ - core.retry_policy._clock() <= 30


async def test_another_route_is_unknown(provider: Provider, fake: FakeProvider, start_router: Start) -> None:
    models = models_of(provider, fake)
    served: Served = await start_router(models=models, tokens=tokens_of(models))

    answer = await served.client.post("/v1/rerank", json={"model": provider.model, "query": "x", "documents": ["y"]})

    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (404, "unknown_url", "model")
    assert fake.requests == []


async def test_the_example_is_as_the_page_says(start_router: Start) -> None:
    page = (FOLDER.parents[1] / "docs" / "providers.md").read_text()
    text = page.partition("```yaml\n")[2].partition("```")[0]
    fakes = [FakeProvider(one) for name in ("gemini", "anthropic") for one in PROVIDERS if one.file == name]
    async with fakes[0], fakes[1]:
        text = text.replace("https://generativelanguage.googleapis.com", fakes[0].url)
        models = yaml.safe_load(text.replace("https://api.anthropic.com", fakes[1].url))["models"]
        served: Served = await start_router(models=models, tokens=tokens_of(models))

        answers = [await ask(served, fake.provider) for fake in fakes]

    assert [answer.json() for answer in answers] == [fake.provider.answer for fake in fakes]


def test_check_asks_a_provider_at_its_path_with_its_key(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = []

    class Listing(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append((self.path, self.headers["x-api-key"], self.headers["anthropic-version"]))
            body = orjson.dumps({"data": [{"id": "claude"}]})
            self.send_response(200)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments: Any) -> None: ...

    with HTTPServer(("127.0.0.1", 0), Listing) as server:
        Thread(target=server.handle_request).start()
        claude = {
            "name": "claude",
            "engine": "openai",
            "backends": [f"http://127.0.0.1:{server.server_port}"],
            "base_path": "/claude/v1",
            "headers": {"anthropic-version": "1"},
            "credentials": {"env": "BACKEND_KEY", "header": "x-api-key"},
        }
        catalogue = parse_catalogue({"models": [claude]}, ENTRY)
        assert connect(Settings(), catalogue, {"BACKEND_KEY": "secret"}) == 0

    assert asked == [("/claude/v1/models", "secret", "1")]
    assert " ok" in capsys.readouterr().out


def test_a_route_that_does_not_exist_is_warned_of(tmp_path: Path) -> None:
    models = [{"name": "m", "backends": ["http://h"], "routes": ["chat", "realtime", "embeddings"]}]
    path = tmp_path / "catalogue.json"
    path.write_bytes(orjson.dumps({"models": models}))
    router = build(Settings(catalogue=path))

    check = router.features["providers"].check
    assert check is not None
    [warning] = check()

    assert warning.startswith("model 'm': routes: there is no route 'chat'; one of ")


# Entries


def problem(**given: Any) -> str:
    [found] = parse_catalogue({"models": [{"name": "m", **given}]}, ENTRY).problems
    return found


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"headers": {"x-key": "1"}, "credentials": {"env": "BACKEND_X", "header": "x-key"}}, "'x-key' is the header"),
        ({"headers": {"authorization": "1"}}, "'authorization' holds a token"),
        ({"headers": {"host": "x"}}, "'host' frames or routes"),
        ({"headers": {"X-Key": "1"}}, "headers"),
        ({"headers": {"x-key": "a\r\nb"}}, "headers"),
        ({"headers": {"x-key": " a"}}, "headers"),
        ({"base_path": "v1beta"}, "base_path"),
        ({"base_path": "/v1beta/"}, "base_path"),
        ({"base_path": "/a/../b"}, "base_path"),
        ({"routes": []}, "routes"),
        ({"routes": ["chat_completions", "chat_completions"]}, "routes: the same route is listed twice"),
    ],
)
def test_a_wrong_entry_is_refused_alone(given: dict[str, Any], says: str) -> None:
    assert says in problem(**given)

    both = parse_catalogue({"models": [{"name": "m", **given}, {"name": "other"}]}, ENTRY)
    assert list(both) == ["other"]


async def test_a_changed_entry_takes_effect_at_the_next_request(start_engine: Start, start_router: Start) -> None:
    engine: FakeEngine = await start_engine()
    served: Served = await start_router(engine)

    def change(**keys: Any) -> None:
        changed = {"name": "m", "backends": [engine.url], **keys}
        served.router.core.registry.replace_static(parse_catalogue({"models": [changed]}, ENTRY))

    await served.chat()
    change(base_path="/v1beta/openai", headers={"user-agent": "router", "x-title": "one"})
    await served.chat()
    change(base_path="/api", headers={"x-title": "two"})
    await served.chat()
    await served.client.post("/tokenize", json={"model": "m", "prompt": "x"})
    change()
    await served.chat()

    assert [request.target for request in engine.requests] == [
        *("/v1/chat/completions", "/v1beta/openai/chat/completions", "/api/chat/completions"),
        *("/tokenize", "/v1/chat/completions"),
    ]
    assert [request.header("x-title") for request in engine.requests] == [None, "one", "two", "two", None]
    agents = [[value for name, value in request.headers if name == "user-agent"] for request in engine.requests]
    assert agents[1] == ["router"]
    assert all(len(values) == 1 and values != ["router"] for values in (agents[0], *agents[2:]))


async def test_models_at_one_address_have_paths_of_their_own(start_engine: Start, start_router: Start) -> None:
    engine: FakeEngine = await start_engine()
    models = [
        {"name": "a", "backends": [engine.url], "base_path": "/a/v1"},
        {"name": "b", "backends": [engine.url + "/b"]},
        {"name": "c", "backends": [engine.url]},
    ]
    served: Served = await start_router(models=models)

    for name in "abc":
        await served.chat(model=name)

    assert [request.target for request in engine.requests] == [
        *("/a/v1/chat/completions", "/b/v1/chat/completions", "/v1/chat/completions")
    ]


# 401 and 403

REFUSED = raw(json_response({"error": {"message": "no key sk-secret"}}, "401 Unauthorized"))
FORBIDDEN = raw(json_response({"error": {"message": "not for you"}}, "403 Forbidden"))
WITH_TOKEN = {"credentials": {"env": "BACKEND_KEY"}}


@pytest.mark.parametrize("script", [REFUSED, FORBIDDEN])
async def test_without_credentials_they_pass(script: Any, start_engine: Start, start_router: Start) -> None:
    plain: Served = await start_router(await start_engine(script))
    passed: Served = await start_router(await start_engine(script), entry={"credentials": "passthrough"})

    answers = [await served.chat() for served in (plain, passed)]

    assert {answer.status_code for answer in answers} <= {401, 403}
    assert await plain.metric("inference_api_upstream_auth_failures_total") == 0


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("script", [REFUSED, FORBIDDEN])
async def test_they_are_counted_logged_and_shown(
    stream: bool, script: Any, start_engine: Start, start_router: Start
) -> None:
    engine: FakeEngine = await start_engine(script)
    served: Served = await start_router(engine, entry=WITH_TOKEN, tokens={"BACKEND_KEY": "sk-secret"})

    answers = [await served.chat(stream=stream) for _ in range(3)]
    await until(lambda: len(served.lines) == 3)

    assert [answer.status_code for answer in answers] == [502] * 3
    assert {(line["status"], line["outcome"], line["code"], line["attempts"]) for line in served.lines} == {
        (502, "auth_failed", "upstream_auth_failed", 1)
    }
    labels = {"model_name": "m", "backend": engine.url.removeprefix("http://")}
    assert await served.metric("inference_api_upstream_auth_failures_total", **labels) == 3
    assert await served.metric("inference_api_upstream_attempts_total", outcome="auth_failed", **labels) == 3
    assert "sk-secret" not in str(served.lines) + answers[0].text
    [backend] = served.router.core.fleet.models["m"].backends
    assert (backend.in_flight, backend.origin.in_flight, served.router.core.fleet.models["m"].in_flight) == (0, 0, 0)


async def test_with_keys_every_refusal_is_the_routers(start_engine: Start, start_router: Start, tmp_path: Any) -> None:
    policy = write(tmp_path / "policy.json", policy_of(entry()))
    served: Served = await start_router(await start_engine(REFUSED), auth="keys", policy=str(policy))
    served.client.headers.update(bearer())

    assert (await served.chat()).json()["error"]["code"] == "upstream_auth_failed"


def circuits(model: Model) -> list[bool]:
    return [backend.circuit.opened is None and backend.origin.opened is None for backend in model.backends]


async def test_refusals_open_no_circuit_and_repel_traffic(start_engine: Start, start_router: Start) -> None:
    bad, good = await start_engine(REFUSED), await start_engine()
    served: Served = await start_router(bad, good, entry=WITH_TOKEN, tokens={"BACKEND_KEY": "x"})

    statuses = [(await served.chat()).status_code for _ in range(60)]
    model = served.router.core.fleet.models["m"]

    assert set(statuses) == {200, 502}
    assert circuits(model) == [True, True]
    assert not any(backend.compared for backend in model.backends)
    [refusing] = [backend for backend in model.backends if backend.recent]
    assert refusing.extra > 0
    assert refusing.last_error is not None
    assert refusing.last_error[0] is Outcome.AUTH_FAILED


async def test_a_refusal_shows_that_an_address_can_serve(start_engine: Start, start_router: Start) -> None:
    engine: FakeEngine = await start_engine(raw(json_response({}, "503 Service Unavailable")))
    served: Served = await start_router(engine, entry=WITH_TOKEN, tokens={"BACKEND_KEY": "x"}, breaker_cooldown=0.05)
    model = served.router.core.fleet.models["m"]

    async def asked() -> bool:
        await served.chat()
        return circuits(model) == [False]

    while not await asked():
        pass
    engine.script = REFUSED
    while circuits(model) == [False]:
        assert (await served.chat()).status_code in (502, 503)

    assert circuits(model) == [True]


async def test_the_rest_of_a_refusal_is_not_waited_for(start_engine: Start, start_router: Start) -> None:
    async def slow(request: Received, line: Line) -> None:
        await line.send(b"HTTP/1.1 401 Unauthorized\r\ncontent-length: 10\r\n\r\nhalf")
        await line.gone()

    engine: FakeEngine = await start_engine(slow)
    served: Served = await start_router(engine, entry=WITH_TOKEN, tokens={"BACKEND_KEY": "x"})

    # The rest of its body is not waited for.
    assert (await served.chat()).status_code == 502
    await until(lambda: not engine.busy)


# 429 and Retry-After


async def test_a_backend_that_is_throttled_rests_and_the_others_answer(
    start_engine: Start, start_router: Start
) -> None:
    busy = raw(json_response({"error": {}}, "429 Too Many Requests", b"retry-after: 20\r\n"))
    engines = [await start_engine(busy), await start_engine()]
    served: Served = await start_router(*engines)

    statuses = [(await served.chat()).status_code for _ in range(40)]

    assert statuses.count(429) == 1
    assert len(engines[0].requests) == 1


# Health by traffic


async def test_only_providers_are_not_asked(start_engine: Start, start_router: Start) -> None:
    """An own engine with a token, and a provider without one, are checked as before."""
    engines = [await start_engine() for _ in range(3)]
    more: list[dict[str, Any]] = [
        {"engine": "openai", **WITH_TOKEN},
        {"engine": "openai"},
        {"engine": "vllm", **WITH_TOKEN},
    ]
    models = [
        {"name": f"m{number}", "backends": [engine.url], **keys}
        for number, (engine, keys) in enumerate(zip(engines, more, strict=True))
    ]
    await start_router(models=models, tokens={"BACKEND_KEY": "x"}, health_interval=0.1)

    await until(lambda: all(engine.asked.count("/health") > 1 for engine in engines[1:]))

    assert engines[0].asked == []
    assert "/v1/models" in engines[1].asked


async def test_a_provider_that_was_an_engine_is_back(start_engine: Start, start_router: Start) -> None:
    """An address that failed its checks is not out for ever when it is checked no more."""
    engine: FakeEngine = await start_engine()
    engine.page = raw(json_response({}, "500 Internal Server Error"))
    served: Served = await start_router(engine, entry={"engine": "openai"}, health_interval=0.05)
    [origin] = served.router.core.fleet.origins.values()
    await until(lambda: not origin.healthy)

    changed = {"name": "m", "backends": [engine.url], "engine": "openai", **WITH_TOKEN}
    served.router.core.registry.replace_static(parse_catalogue({"models": [changed]}, ENTRY))

    await until(lambda: origin.healthy)
    assert (await served.chat()).json() == COMPLETION
