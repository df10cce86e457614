"""What every feature keeps to: the client gets the engine's bytes, nothing leaks, and each request has one Record."""

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import orjson
import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from inference_api.app import build
from inference_api.feature import Feature
from inference_api.features.keys import Keys
from inference_api.features.prompts import StoredPrompts
from inference_api.features.spans import tracing
from inference_api.http.dispatch import Dispatch
from inference_api.http.turns import Turns
from inference_api.observe.account import Record
from inference_api.policy.reading import read, run
from inference_api.policy.source import Policies
from inference_api.settings import Settings
from tests.conftest import Served, serving
from tests.fakes import (
    CHAT,
    COMPLETION,
    LAST_CHUNK,
    SSE_HEAD,
    STREAM,
    Line,
    Received,
    chunk,
    event,
    hang,
    json_response,
    post,
    raw,
    raw_client,
    read_answer,
    until,
)
from tests.faults.quiescence import quiet
from tests.features.everything import Everything, knows, parts_of
from tests.features.limited import Limited
from tests.policies import EXAMPLE, entry, policy_of
from tests.ports import free_port

pytestmark = pytest.mark.anyio
Start = Callable[..., Any]
URL = "/v1/chat/completions"


class On(NamedTuple):
    """How a feature is turned on."""

    features: Sequence[Feature] = ()
    settings: dict[str, Any] = {}
    # What it wants of a request
    headers: dict[str, str] = {}

    def request(self, request: bytes) -> bytes:
        """The bytes of a request, with these headers."""
        lines = "".join(f"{name}: {value}\r\n" for name, value in self.headers.items())
        return request.replace(b"\r\nhost:", b"\r\n" + lines.encode() + b"host:", 1)


def traced() -> On:
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(InMemorySpanExporter()))
    return On([tracing(provider)])


def keyed() -> On:
    policies = Policies("test")
    policies.replace(run(read(policy_of(entry()), peppered=False)))
    keys = Keys(policies)
    feature = Feature("keys", identify=keys.identify, resolve=keys.resolve, annotate=keys.annotate)
    return On([feature], headers={"x-api-key": EXAMPLE.key})


def prompted() -> On:
    policies = Policies("test")
    version = {"version": 1, "messages": [{"role": "system", "content": "Be brief."}]}
    policies.replace(run(read({"prompts": [{"name": "p", "versions": [version]}]}, peppered=False)))
    prompts = StoredPrompts(policies, Turns(), dict)
    return On([Feature("prompts", fields=("prompt",), send=prompts.send, collect=prompts.collect)])


GENEROUS = [{"requests": 999, "per": 60}, {"tokens": 99_999, "per": 60}, {"streams": 9}]
TURN_ON: dict[str, Callable[[], On]] = {
    "tracing": traced,
    "engine_load": lambda: On(settings={"load_signal_interval": 0.2}),
    "keys": keyed,
    "trusted_proxies": lambda: On(settings={"trusted_proxies": "127.0.0.1"}),
    "limits": lambda: On([Limited(anonymous={"limits": GENEROUS}).limiter.feature()]),
    "cors": lambda: On(settings={"cors_origins": "https://app.example"}, headers={"origin": "https://app.example"}),
    "realtime": lambda: On(settings={"realtime": "on"}),
    "providers": lambda: On(settings={"entry": {"routes": ["chat_completions"], "headers": {"x-title": "a"}}}),
    "cost": lambda: On(settings={"entry": {"price": {"input": 0.2, "output": 0.6}}}),
    "prompts": prompted,
    "cache": lambda: On(settings={"entry": {"cache": {"ttl": 60, "temperature": 2}}}),
    "queue": lambda: On(settings={"entry": {"max_in_flight": 99, "queue": {"timeout": 9, "size": 9}}}),
    "hold": lambda: On(settings={"entry": {"hold": 9}}),
    "fallback": lambda: On(settings={"entry": {"fallbacks": ["x"], "context_fallbacks": ["x"]}}),
    "hedge": lambda: On(settings={"entry": {"hedge": {"after": 60_000}}}),
    "shadow": lambda: On(settings={"entry": {"shadow": {"to": "m2", "sample": 1}}}),
    "usage": lambda: On(settings={"usage": "log"}),
    "adapters": lambda: On(settings={"entry": {"discover": True}, "engine_interval": 0.2}),
    # With a control plane that is away
    "overrides": lambda: On(settings={"registry_url": f"http://127.0.0.1:{free_port()}", "report_interval": 600}),
    "reports": lambda: On(settings={"registry_url": f"http://127.0.0.1:{free_port()}", "report_interval": 0.05}),
    "everything": lambda: On([Everything().feature]),
}


# Features that only a key of the catalogue turns on: always built.
ALWAYS: set[str] = {
    "adapters",
    "cache",
    "consensus",
    "cost",
    "fallback",
    "hedge",
    "hold",
    "metering",
    "providers",
    "queue",
    "race",
    "shadow",
    "split",
    "virtual",
}


@pytest.fixture(params=TURN_ON)
def on(request: pytest.FixtureRequest) -> On:
    """Each feature, turned on by itself."""
    return TURN_ON[request.param]()


async def test_the_bytes_of_an_answer_are_the_engines(on: On, start_engine: Start, start_router: Start) -> None:
    engine = await start_engine()
    served = await start_router(engine, features=on.features, **on.settings)
    served.client.headers.update(on.headers)
    events = [event(f"wörd{number} ") for number in range(20)]
    body = orjson.dumps({**CHAT, "x": "wörd"})

    engine.script = raw(json_response(COMPLETION))
    whole = await served.client.post(URL, content=body, headers={"content-type": "application/json"})
    engine.script = raw(SSE_HEAD, *map(chunk, events), chunk(b"data: [DO"), chunk(b"NE]\n\n") + LAST_CHUNK)
    stream = await served.chat(stream=True)

    assert engine.requests[0].body == body
    assert whole.content == orjson.dumps(COMPLETION)
    assert stream.content == b"".join(events) + b"data: [DONE]\n\n"


async def one_event(request: Received, line: Line) -> None:
    await line.send(SSE_HEAD, chunk(event()))
    await line.gone()


@pytest.mark.parametrize("moment", ["during the body", "before the first byte", "in mid-stream"])
async def test_a_client_that_leaves_leaves_nothing(
    moment: str, on: On, start_engine: Start, start_router: Start
) -> None:
    engine = await start_engine(hang if moment == "before the first byte" else one_event)
    served = await start_router(engine, features=on.features, **on.settings)
    request = on.request(post(URL, STREAM))

    async with quiet(served):
        async with raw_client(served.port) as client:
            if moment == "during the body":
                await client.send(request[:-5])
                await until(lambda: served.router.core.admission.buffered)
            else:
                await client.send(request)
                await until(lambda: engine.busy)
                if moment == "in mid-stream":
                    await client.reader.readuntil(b"data: ")
        await until(lambda: served.lines and not engine.busy)

    [line] = served.lines
    assert (line["outcome"], line["status"]) == ("client_gone", 499)
    assert served.router.core.admission.buffered == 0
    assert await served.metric("inference_api_everything_open") == 0


REQUESTS: dict[str, tuple[int, bytes]] = {
    "whole": (200, post(URL, CHAT)),
    "stream": (200, post(URL, STREAM)),
    "page": (200, b"GET /v1/models HTTP/1.1\r\nhost: x\r\n\r\n"),
    "invalid": (422, post(URL, {"model": "m"})),
    "unknown model": (404, post(URL, {**CHAT, "model": "nope"})),
    "unknown url": (404, post("/nope", CHAT)),
    "too large": (413, post(URL, {**CHAT, "user": "x" * 2000})),
    "not allowed": (405, b"GET /v1/embeddings HTTP/1.1\r\nhost: x\r\n\r\n"),
    "nobody": (401, post(URL, CHAT, b"authorization: Bearer wrong\r\n")),
    "nobody, on a page": (401, b"GET /v1/models HTTP/1.1\r\nhost: x\r\nauthorization: Bearer wrong\r\n\r\n"),
}


async def test_each_request_has_one_record_and_an_id(on: On, start_engine: Start, start_router: Start) -> None:
    records: list[Record] = []
    door = Feature("door", identify=knows, record=records.append)
    served = await start_router(await start_engine(), features=[*on.features, door], max_body_bytes=1000, **on.settings)

    statuses = {case: status for case, (status, _) in REQUESTS.items()}
    if "registry_url" in on.settings:
        # A registry that has not answered yet may know it.
        statuses["unknown model"] = 503
    answers = {}
    for case, (_, request) in REQUESTS.items():
        async with raw_client(served.port) as client:
            await client.send(on.request(request))
            answers[case] = answer = await read_answer(client.reader)
        assert (case, answer.status) == (case, statuses[case])
    await until(lambda: len(served.lines) == len(REQUESTS))

    ids = [answer.headers["x-request-id"] for answer in answers.values()]
    assert [record.request_id for record in records] == [line["request_id"] for line in served.lines] == ids
    assert len(set(ids)) == len(ids)
    assert [record.status for record in records] == [*statuses.values()]
    refused = {case: orjson.loads(answer.body) for case, answer in answers.items() if answer.status >= 400}
    assert all(body["request_id"] in ids and body["error"]["code"] for body in refused.values())


async def test_the_parts_of_a_feature_are_all_met(start_engine: Start, start_router: Start) -> None:
    everything = Everything()
    assert all(parts_of(everything.feature).values())
    served: Served = await start_router(await start_engine(), features=[everything.feature])

    answer = await served.chat()
    pages = [await served.client.get(path) for path in ("/page", "/ops-page")]
    opened = await served.metric("inference_api_everything_open")
    served.router.close()

    assert answer.headers["x-everything"] == "1"
    assert [page.text for page in pages] == ["a page"] * 2
    assert opened == 0
    # Those that are no page, no metric, and no more than once.
    assert everything.seen == {
        *("layer", "identify", "resolve", "send", "ask", "attempt", "tap", "annotate", "record"),
        *("task", "close"),
    }


async def test_the_operators_pages_are_not_for_clients(start_router: Start) -> None:
    served: Served = await start_router(features=[Everything().feature], ops_port=9090)

    assert [(await served.client.get(path)).status_code for path in ("/page", "/ops-page")] == [200, 404]


async def test_a_task_of_a_feature_ends_with_the_router(tmp_path: Path) -> None:
    ended: list[bool] = []

    async def task() -> None:
        try:
            await asyncio.get_running_loop().create_future()
        finally:
            ended.append(True)

    catalogue = tmp_path / "catalogue.json"
    catalogue.write_text('{"models": []}')
    settings = Settings(catalogue=catalogue)
    router = build(settings, features=[Feature("busy", tasks=(task,))])
    async with serving(router, settings):
        assert ended == []

    assert ended == [True]


async def test_what_is_off_is_not_built(start_router: Start) -> None:
    served: Served = await start_router()
    accounts: Any = served.router.app

    assert served.router.features.keys() == ALWAYS
    assert isinstance(accounts.app, Dispatch)


async def test_a_feature_without_a_layer_adds_none(start_router: Start) -> None:
    served: Served = await start_router(load_signal_interval=0.2)
    accounts: Any = served.router.app

    assert served.router.features.keys() == {"engine_load", *ALWAYS}
    assert isinstance(accounts.app, Dispatch)
