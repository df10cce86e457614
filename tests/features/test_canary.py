"""A key leaves no trace: not in a line, a metric, an error, a span, a file, or a name of an object."""

import gc
import json
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from inference_api.feature import Feature
from inference_api.features.spans import tracing
from inference_api.observe.account import Record
from tests.command import command, ready
from tests.conftest import Served
from tests.fakes import CHAT, STREAM, Line, Received, answer, until
from tests.policies import EXAMPLE, PEPPER, FakeRegistry, entry, new_key, policy_of

pytestmark = pytest.mark.anyio
Start = Callable[..., Any]
URL = "/v1/chat/completions"
BAD = new_key().key
# The whole keys, and their secrets alone
CANARIES = [EXAMPLE.key, EXAMPLE.key[19:62], BAD, BAD[19:62]]


@pytest.fixture
async def registry() -> AsyncIterator[FakeRegistry]:
    keys = entry(organisation="team-a", user="ana", limits=[{"requests": 3, "per": 3600}], models=["m"])
    async with AsyncExitStack() as stack:
        made = FakeRegistry(policy_of({**keys, "digest": EXAMPLE.peppered}, entry(new_key(), name="other")))
        yield await stack.enter_async_context(made)


def found_in(text: object) -> list[str]:
    return [canary for canary in CANARIES if canary in str(text)]


def texts_in(folder: Path) -> list[str]:
    return [path.read_text() for path in folder.rglob("*") if path.is_file() and path.name != "catalogue.json"]


async def everything(ask: Callable[..., Any]) -> list[Any]:
    """Requests that end in every way: served, refused, unknown, limited, broken off; in all places for a key."""
    places: list[dict[str, str]] = [
        headers
        for key in (EXAMPLE.key, BAD, EXAMPLE.key[:-1])
        for headers in ({"authorization": f"Bearer {key}"}, {"x-api-key": key}, {"authorization": key})
    ]
    answers = []
    for headers in places:
        for body in (CHAT, STREAM, {**CHAT, "model": EXAMPLE.key}, {"model": "m"}):
            answers.append(await ask("POST", URL, json=body, headers=headers))
        answers.append(await ask("GET", f"/v1/models/{headers.get('x-api-key', 'm')}", headers=headers))
        answers.append(await ask("GET", f"/nope?key={EXAMPLE.key}", headers=headers))
    return answers


async def fails_at_times(request: Received, line: Line) -> None:
    if b'"stream":true' in request.body.replace(b" ", b""):
        line.reset()
    else:
        await answer(request, line)


async def test_a_key_is_nowhere(
    registry: FakeRegistry,
    tmp_path: Path,
    start_engine: Start,
    start_router: Start,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG)
    exporter = InMemorySpanExporter()
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    records: list[Record] = []
    engine = await start_engine(fails_at_times)
    registry.models = [{"name": "m", "backends": [engine.url]}]
    served: Served = await start_router(
        engine,
        features=[tracing(provider), Feature("seen", record=records.append)],
        auth="keys",
        policy="registry",
        policy_cache=tmp_path / "policy.cache",
        key_pepper=PEPPER,
        registry_url=registry.url,
        registry_refresh=0.05,
    )

    answers = await everything(served.client.request)
    await until((tmp_path / "policy.cache").exists)
    await until(lambda: len(served.lines) == len(answers))

    assert {one.status_code for one in answers} >= {200, 401, 403, 422, 429, 502}
    # The client of this test has a log, too.
    ours = [line for line in caplog.records if not line.name.startswith("http")]
    assert found_in([(line.msg, line.args, line.__dict__) for line in ours]) == []
    assert [found_in(one.text) for one in answers if found_in(one.text)] == []
    assert [found_in(one.headers) for one in answers if found_in(one.headers)] == []
    assert found_in(served.lines) == []
    assert found_in([span.to_json() for span in exporter.get_finished_spans()]) == []
    assert exporter.get_finished_spans()
    assert found_in((await served.client.get("/metrics")).text) == []
    assert found_in((await served.client.get("/backends")).text) == []
    # A Record has the path, where somebody may put a key, and the model that was asked for: not the headers.
    shown = [record._replace(path="", asked=None, fields={}) for record in records]
    assert found_in(shown) == []
    assert [found_in(request) for request in engine.requests if found_in(request.headers)] == []
    assert found_in((tmp_path / "policy.cache").read_bytes()) == []
    objects = [one for one in gc.get_objects() if str(type(one).__module__).startswith("inference_api.policy")]
    assert objects
    assert found_in([repr(one) for one in objects]) == []


async def test_a_key_is_in_no_output_of_the_process(
    registry: FakeRegistry, tmp_path: Path, start_engine: Start
) -> None:
    """The same by the command: what it writes to stdout, stderr, and its spool."""
    spool = tmp_path / "spool"
    settings: dict[str, Any] = {
        "auth": "keys",
        "policy": "registry",
        "policy_cache": tmp_path / "policy.cache",
        "key_pepper": PEPPER,
        "registry_url": registry.url,
        "registry_token": "t0ken-of-the-registry",
        "log_level": "debug",
        "usage": "registry",
        "usage_spool": spool,
    }
    engine = await start_engine(fails_at_times)
    registry.models = [{"name": "m", "backends": [engine.url]}]
    async with command(tmp_path, engine, **settings) as router:
        await ready(router.client, "/readyz")
        # The registry of this test takes no records: they wait on the disk.
        answers = await everything(router.client.request)
        code, out, err = await router.stop(30)

    assert (code, err) == (0, "")
    assert {one.status_code for one in answers} >= {200, 401, 403}
    files = texts_in(tmp_path)
    assert any('"key_id"' in text for text in files if text != out)
    for text in files:
        assert found_in(text) == []
        assert PEPPER not in text
        assert "t0ken-of-the-registry" not in text
    assert json.loads(out.splitlines()[0])
