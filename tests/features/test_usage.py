"""USAGE: each request on an inference route has one usage record, as its schema says, and nothing in it is secret."""

import asyncio
import hashlib
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import orjson
import pytest
from jsonschema import Draft202012Validator

from inference_api.app import GROUPS, build
from inference_api.core import Outside
from inference_api.feature import Feature
from inference_api.features.delivery.records import NOTHING, Try, UsageRecords, details, end_user
from inference_api.http.head import RequestHead
from inference_api.models import Caller, Outcome
from inference_api.observe.account import Record
from inference_api.settings import SettingsError, make_settings
from tests.conftest import Served
from tests.fakes import (
    CHAT,
    COMPLETION,
    DONE,
    LAST_CHUNK,
    SSE_HEAD,
    STREAM,
    USAGE,
    FakeEngine,
    Line,
    Received,
    chunk,
    event,
    hang,
    json_response,
    post,
    raw,
    raw_client,
    sse,
    until,
)
from tests.features.control_plane import ControlPlane
from tests.features.everything import Unauthorized
from tests.features.waiting import Paced, asking, waiting
from tests.ports import free_port
from tests.records import record_of

pytestmark = pytest.mark.anyio
Start = Callable[..., Any]
URL = "/v1/chat/completions"
SCHEMA = orjson.loads((Path(__file__).parents[2] / "docs" / "schemas" / "usage-record.json").read_bytes())
VALIDATOR = Draft202012Validator(SCHEMA)


def of_shared() -> Path:
    """The contract's own copy, where there is one."""
    return Path("/work/shared/schemas/usage-record.json")


@pytest.fixture
async def plane() -> Any:
    async with ControlPlane() as plane:
        yield plane


class Accounted(NamedTuple):
    """A router and its control plane."""

    served: Served
    plane: ControlPlane

    async def records(self, count: int = 1) -> list[dict[str, Any]]:
        """All records, in the order of the requests; each is as the schema says."""
        await until(lambda: len(self.plane.stored) >= count)
        found = sorted(self.plane.stored.values(), key=lambda record: int(record["id"].partition("-")[2]))
        assert len(found) == count
        for record in found:
            VALIDATOR.validate(record)
        return found


@pytest.fixture
async def account(start_router: Start, plane: ControlPlane) -> Start:
    async def account(*engines: FakeEngine, **more: Any) -> Accounted:
        chosen = {"usage": "registry", "registry_url": plane.url, "drain_timeout": 1.0} | more
        served = await start_router(*engines, **chosen)
        return Accounted(served, plane)

    return account


async def shows(served: Served, value: float, name: str, **labels: str) -> None:
    """Wait until a metric has this value."""
    async with asyncio.timeout(10):
        while True:
            if await served.metric(name, **labels) == value:
                return
            await asyncio.sleep(0.02)


# The fields


async def test_a_wait_and_a_refusal_by_the_queue_are_in_the_record(start_engine: Start, account: Start) -> None:
    paced = Paced()
    it = await account(await start_engine(paced), entry={"max_in_flight": 1, "queue": {"timeout": 9, "size": 1}})

    tasks = [asking(it.served)]
    await paced.arrived(1)
    tasks.append(asking(it.served))
    await waiting(it.served, 1)
    refused = await it.served.chat()
    await paced.answer_all(2)
    await asyncio.gather(*tasks)
    records = await it.records(3)

    [first] = [record for record in records if record["status"] == 200 and not record["queued_ms"]]
    [second] = [record for record in records if record["queued_ms"]]
    [third] = [record for record in records if record["status"] == 503]
    assert first["attempts"] == second["attempts"] == 1
    assert second["queued_ms"] <= second["latency_ms"]
    assert (third["code"], third["attempts"], third["backend"]) == (refused.json()["error"]["code"], 0, None)
    assert (third["input_tokens"], third["output_tokens"], third["cost_nanos"]) == (0, 0, 0)


async def test_a_request_that_was_held_in_vain_has_a_record(account: Start) -> None:
    it = await account(entry={"hold": 0.2})

    await it.served.chat()
    [record] = await it.records()

    assert (record["status"], record["code"], record["attempts"]) == (503, "model_loading", 0)
    assert 190 <= record["queued_ms"] <= record["latency_ms"]


@pytest.mark.skipif(not of_shared().exists(), reason="the contract is not here")
def test_the_schema_is_the_contracts() -> None:
    assert orjson.loads(of_shared().read_bytes()) == SCHEMA


async def test_every_field_of_a_json_answer(start_engine: Start, account: Start) -> None:
    details = {"prompt_tokens_details": {"cached_tokens": 2}, "completion_tokens_details": {"reasoning_tokens": 1}}
    engine = await start_engine(raw(json_response(COMPLETION | {"usage": USAGE | details})))
    it = await account(engine, entry={"aliases": ["other"]})

    answer = await it.served.chat(model="other", user="ana@example.com")
    [record] = await it.records()

    core = it.served.router.core
    digest = hashlib.sha256(b"ana@example.com").hexdigest()
    assert record == {
        "id": f"{core.boot}-1",
        "kind": "request",
        "at": record["at"],
        "router": core.instance,
        "request_id": answer.headers["x-request-id"],
        "key_id": None,
        "organisation": None,
        "user": None,
        "end_user": digest[:16],
        "asked_model": "m",
        "model": "m",
        "backend": f"127.0.0.1:{engine.port}",
        "route": "chat_completions",
        "stream": False,
        "status": 200,
        "outcome": "ok",
        "code": None,
        "attempts": 1,
        "fallback": False,
        "variant": None,
        "cache": None,
        "prompt": None,
        "votes": None,
        "input_tokens": 3,
        "cached_input_tokens": 2,
        "output_tokens": 5,
        "reasoning_tokens": 1,
        "usage_source": "reported",
        "latency_ms": record["latency_ms"],
        "ttft_ms": None,
        "queued_ms": 0,
        "bytes": len(answer.content),
        "cost_nanos": None,
    }
    assert re.fullmatch("[0-9a-f]{16}-1", record["id"])
    assert it.served.lines[0]["usage_id"] == record["id"]


async def test_times_are_of_the_request(start_engine: Start, account: Start) -> None:
    async def slow(request: Received, line: Line) -> None:
        await line.send(SSE_HEAD)
        await asyncio.sleep(0.1)
        await line.send(chunk(event()) + chunk(DONE) + LAST_CHUNK)

    it = await account(await start_engine(slow))
    before = time.time() * 1000
    await it.served.chat(stream=True)
    [record] = await it.records()

    assert before - 2 <= record["at"] <= before + 2000
    assert 95 < record["ttft_ms"] <= record["latency_ms"]
    assert record["stream"] is True


async def test_refused_requests_have_a_record_and_pages_have_none(
    start_engine: Start, account: Start, plane: ControlPlane
) -> None:
    engine = await start_engine()
    # Without one a name that is not known may exist.
    plane.models = [{"name": "m", "backends": [{"url": engine.url}]}]
    it = await account(engine, max_body_bytes=1000)
    client = it.served.client
    for path in ("/v1/models", "/metrics", URL, "/nope"):
        await client.get(path)
    await client.post("/nope", json=CHAT)
    await client.post(URL, content=b"{", headers={"content-type": "application/json"})
    await client.post(URL, json={"model": "m"})
    await client.post(URL, json={**CHAT, "model": "secret-name"})
    await client.post(URL, json={**CHAT, "user": "x" * 2000})
    await client.post("/v1/embeddings", json={"model": "m", "input": "x"})
    records = await it.records(5)

    shown = ("route", "status", "outcome", "code", "asked_model", "model", "backend", "attempts")
    backend = records[-1]["backend"]
    assert [tuple(record[name] for name in shown) for record in records] == [
        ("chat_completions", 400, "refused", "invalid_json", "unknown", "unknown", None, 0),
        ("chat_completions", 422, "refused", "validation_error", "unknown", "unknown", None, 0),
        ("chat_completions", 404, "refused", "model_not_found", "unknown", "unknown", None, 0),
        ("chat_completions", 413, "refused", "request_too_large", "unknown", "unknown", None, 0),
        ("embeddings", 200, "ok", None, "m", "m", backend, 1),
    ]
    assert [record["cost_nanos"] for record in records] == [0, 0, 0, 0, None]
    assert {(record["usage_source"], record["input_tokens"], record["output_tokens"]) for record in records[:4]} == {
        ("none", 0, 0)
    }
    assert "secret-name" not in repr(records)


async def test_a_401_has_none(start_engine: Start, account: Start) -> None:
    def identify(head: RequestHead) -> Caller | None:
        if head.authorization is None:
            raise Unauthorized
        return None

    it = await account(await start_engine(), features=[Feature("door", identify=identify)])
    refused = await it.served.chat()
    it.served.client.headers["authorization"] = "Bearer x"
    await it.served.chat()
    [record] = await it.records()

    assert (refused.status_code, record["status"]) == (401, 200)


class Key(NamedTuple):
    """A Caller as `keys` makes it."""

    id: str
    organisation: str | None
    user: str | None

    def may_use(self, model: str) -> bool:
        return True


@pytest.mark.parametrize(
    ("caller", "expected"),
    [
        (Key("k3v9Qm2XbT7a", "team-a", "ana"), ("k3v9Qm2XbT7a", "team-a", "ana")),
        (Key("k3v9Qm2XbT7a", None, None), ("k3v9Qm2XbT7a", None, None)),
        # Of a feature that knows no keys
        (Key("someone", None, None), (None, None, None)),
    ],
)
async def test_the_key_and_its_owner(
    caller: Key, expected: tuple[str | None, ...], start_engine: Start, account: Start
) -> None:
    it = await account(await start_engine(), features=[Feature("door", identify=lambda head: caller)])
    await it.served.chat()
    [record] = await it.records()

    assert (record["key_id"], record["organisation"], record["user"]) == expected


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"user": "a", "safety_identifier": "b"}, b"a"),
        ({"safety_identifier": "b"}, b"b"),
        ({"user": "", "safety_identifier": "b"}, b"b"),
        ({"user": ["a"]}, None),
        ({"user": "\ud800"}, b"\xed\xa0\x80"),
        ({}, None),
    ],
)
def test_the_end_user_is_a_digest(fields: dict[str, Any], name: bytes | None) -> None:
    assert end_user(fields) == ("null" if name is None else f'"{hashlib.sha256(name).hexdigest()[:16]}"')


def test_a_caller_without_an_owner() -> None:
    class Asker:
        id = "k3v9Qm2XbT7a"
        # Not hashable
        __hash__ = None  # type: ignore[assignment]

        def may_use(self, model: str) -> bool:
            return True

    found = made(record_of(caller=Asker()))

    assert (found["key_id"], found["organisation"], found["user"]) == ("k3v9Qm2XbT7a", None, None)


async def test_what_other_features_noted_is_in_the_record(start_engine: Start, account: Start) -> None:
    noted = {
        "fallback": True,
        "variant": "a",
        "cache": "miss",
        "prompt": "support@2",
        "votes": "2/3",
        "queued_ms": 1.5,
        "cost_nanos": 142240,
    }
    feature = Feature("noting", annotate=lambda record, extra: extra.update(noted))
    it = await account(await start_engine(), features=[feature])
    await it.served.chat()
    [record] = await it.records()

    assert {name: record[name] for name in noted} == noted


# The attempts


async def test_the_attempts_of_a_request_that_was_repeated(start_engine: Start, account: Start) -> None:
    engines = [await start_engine(raw(b"", close=True)), await start_engine(raw(json_response({}, "503 Busy")))]
    it = await account(*engines, max_attempts=3)
    await it.served.chat()
    [record] = await it.records()

    assert record["attempts"] == len(record["attempt_details"]) >= 2
    assert record["attempt_details"][-1]["backend"] == record["backend"]
    found = {(tried["outcome"], tried["status"]) for tried in record["attempt_details"]}
    assert found == {("reset", 0), ("upstream_5xx", 503)}
    starts = [tried["start_ms"] for tried in record["attempt_details"]]
    assert starts == sorted(starts)
    last = record["attempt_details"][-1]
    assert last["start_ms"] + last["duration_ms"] <= record["latency_ms"] + 1


async def test_the_attempt_that_went_well_ends_with_the_answer(start_engine: Start, account: Start) -> None:
    async def slow(request: Received, line: Line) -> None:
        await asyncio.sleep(0.05)
        await line.send(json_response(COMPLETION))

    gone = FakeEngine(port=free_port())
    engine = await start_engine(slow)
    it = await account(gone, engine, entry={"balancing": "round_robin"})
    await it.served.chat()
    await it.served.chat()
    records = await it.records(2)

    [repeated] = [record for record in records if record["attempts"] == 2]
    first, second = repeated["attempt_details"]
    assert (first["backend"], first["outcome"], first["status"]) == (f"127.0.0.1:{gone.port}", "connect_failed", 0)
    assert (second["backend"], second["outcome"], second["status"]) == (f"127.0.0.1:{engine.port}", "ok", 200)
    assert second["duration_ms"] > 45
    [plain] = [record for record in records if record["attempts"] == 1]
    assert "attempt_details" not in plain


async def test_an_engines_own_error(start_engine: Start, account: Start) -> None:
    it = await account(await start_engine(raw(json_response({"error": {}}, "400 Bad Request"))))
    await it.served.chat()
    [record] = await it.records()

    assert (record["status"], record["outcome"], record["code"], record["cost_nanos"]) == (400, "upstream_4xx", None, 0)
    [tried] = record["attempt_details"]
    assert (tried["outcome"], tried["status"]) == ("upstream_4xx", 400)


async def test_a_client_that_left_before_the_head(start_engine: Start, account: Start) -> None:
    engine = await start_engine(hang)
    it = await account(engine)
    async with raw_client(it.served.port) as client:
        await client.send(post(URL, STREAM))
        await until(lambda: engine.busy)
    [record] = await it.records()

    assert (record["status"], record["outcome"], record["output_tokens"], record["cost_nanos"]) == (
        499, "client_gone", 0, 0,
    )  # fmt: skip
    assert [tried["outcome"] for tried in record["attempt_details"]] == ["client_gone"]


async def test_a_client_that_left_in_mid_stream_got_a_200(start_engine: Start, account: Start) -> None:
    engine = await start_engine(sse(event(), then=Line.gone))
    it = await account(engine)
    async with raw_client(it.served.port) as client:
        await client.send(post(URL, STREAM))
        await client.reader.readuntil(b"data: ")
    [record] = await it.records()

    assert (record["status"], record["outcome"]) == (200, "client_gone")
    assert (record["attempt_details"][0]["status"], record["attempt_details"][0]["outcome"]) == (200, "client_gone")


def test_only_the_last_attempts_are_listed() -> None:
    tries: list[Try] = [(f"a:{number}", "reset", 0, 1.0 + number, 1.5 + number) for number in range(20)]

    found = details(tries, 0.5)

    assert [tried["backend"] for tried in found] == [f"a:{number}" for number in range(4, 20)]
    assert found[0] | {"backend": ""} == {
        "backend": "", "outcome": "reset", "status": 0, "start_ms": 4500.0, "duration_ms": 500.0,
    }  # fmt: skip


def made(record: Record) -> dict[str, Any]:
    """The usage record of a Record, which is valid."""
    texts: list[str] = []
    records = UsageRecords("0123456789abcdef", "router", texts.append, now=lambda: 1e9, clock=lambda: 10.0)
    extra = dict(record.extra)
    records.annotate(record, extra)
    records.record(record._replace(extra=extra))
    found: dict[str, Any] = orjson.loads(texts[0])
    VALIDATOR.validate(found)
    return found


def test_a_record_of_every_outcome_is_valid() -> None:
    for outcome in Outcome:
        for status in (0, 200, 404, 503):
            record = record_of(outcome=outcome, status=status, attempts=2)
            found = made(record._replace(state={"metered": NOTHING, "usage_failed": [("a:1", "reset", 0, 1.0, 2.0)]}))
            assert [tried["outcome"] for tried in found["attempt_details"]] == ["reset", outcome.value]


def test_text_is_escaped() -> None:
    fallback = record_of(backend='a:8000/"\\', extra={"variant": '"', "fallback": 2})

    found = made(fallback)

    assert (found["backend"], found["variant"], found["fallback"]) == ('a:8000/"\\', '"', True)


def test_a_large_fleet_does_not_fill_the_memory() -> None:
    """The parts of the text that requests share have a bound."""
    records = UsageRecords("0123456789abcdef", "router", lambda text: None)
    for number in range(10_000):
        records.record(record_of(backend=f"a:{number}", extra={"usage_id": "x"}))

    assert len(records._ends) <= 4096


# USAGE=registry


async def test_the_metrics_of_the_delivery(start_engine: Start, account: Start, tmp_path: Path) -> None:
    it = await account(await start_engine(), usage_spool=tmp_path / "spool")
    it.plane.refuses = lambda record: record["stream"]
    await it.served.chat()
    await it.records()
    await it.served.chat(stream=True)

    served = it.served
    await until(lambda: sum(it.plane.batches) == 2)
    await shows(served, 1, "inference_api_usage_dropped_total", reason="refused")
    assert await served.metric("inference_api_usage_records_total", result="delivered") == 1
    text = (await served.client.get("/metrics")).text
    for sample in (
        'inference_api_usage_records_total{result="spooled"} 0',
        *(
            f'inference_api_usage_dropped_total{{reason="{reason}"}} 0'
            for reason in ("queue_full", "spool_full", "spool_error")
        ),
        "inference_api_usage_queue_records 0",
        "inference_api_usage_spool_bytes 0",
    ):
        assert sample in text


def is_spoilt(spool: Path) -> bool:
    """Put a file in the place of the directory, which the router may just have made anew."""
    shutil.rmtree(spool, ignore_errors=True)
    try:
        spool.write_bytes(b"")
    except IsADirectoryError:
        return False
    return True


async def test_requests_do_not_wait_for_a_control_plane_that_is_away(
    start_engine: Start, start_router: Start, tmp_path: Path
) -> None:
    """Nor for a spool that cannot be written: it is no directory any more."""
    (tmp_path / "spool").mkdir()
    served = await start_router(
        await start_engine(),
        usage="registry",
        registry_url=f"http://127.0.0.1:{free_port()}",
        usage_spool=tmp_path / "spool",
        drain_timeout=0.1,
    )
    await until(lambda: is_spoilt(tmp_path / "spool"))

    assert {(await served.chat()).status_code for _ in range(20)} == {200}
    await shows(served, 20, "inference_api_usage_queue_records")


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"usage": "registry"}, r"INFERENCE_API_USAGE='registry': needs .*INFERENCE_API_REGISTRY_URL"),
        (
            {"usage": "registry", "registry_url": "http://x", "usage_spool": "/dev/null"},
            r"INFERENCE_API_USAGE_SPOOL='/dev/null': is not a directory",
        ),
    ],
)
def test_what_is_refused_at_the_start(settings: dict[str, str], error: str, tmp_path: Path) -> None:
    catalogue = tmp_path / "catalogue.json"
    catalogue.write_text('{"models": []}')

    with pytest.raises(SettingsError, match=error):
        build(make_settings({"catalogue": catalogue, **settings}, GROUPS), Outside())
