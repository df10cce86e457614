"""docs/log-schema.json and docs/logs.md say what the log says: real lines of the real command are held to them."""

import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import orjson
import pytest
from jsonschema import Draft202012Validator

from inference_api.http.routes import INFERENCE_ROUTES
from inference_api.models import Outcome
from tests.command import command, log_of, ready
from tests.fakes import (
    CHAT,
    DONE,
    LAST_CHUNK,
    STREAM,
    USAGE,
    Line,
    Received,
    answer,
    event,
    hang,
    json_response,
    post,
    raw,
    raw_client,
    sse,
    until,
)
from tests.policies import EXAMPLE, policy_of, write
from tests.policies import entry as key
from tests.ports import free_port

pytestmark = pytest.mark.anyio
Start = Callable[..., Any]

DOCS = Path(__file__).parents[2] / "docs"
SCHEMA: dict[str, Any] = orjson.loads((DOCS / "log-schema.json").read_bytes())
REQUEST: dict[str, Any] = SCHEMA["$defs"]["request"]
FIELDS: dict[str, Any] = REQUEST["properties"]
VALIDATOR = Draft202012Validator(SCHEMA)
USAGE_LINE: dict[str, Any] = orjson.loads((DOCS / "schemas" / "usage-log.json").read_bytes())
USAGE_RECORD: dict[str, Any] = orjson.loads((DOCS / "schemas" / "usage-record.json").read_bytes())

SCRIPTS = {
    b"reset": sse(event(), then=Line.reset),
    b"cut": sse(event(), then=lambda line: line.send(LAST_CHUNK)),
    b"fail": raw(json_response({"error": {}}, "500 Internal Server Error")),
    b"close": raw(b"", close=True),
    b"hang": hang,
    b"abort": sse(
        event(choices=[{"index": 0, "delta": {}, "finish_reason": "abort"}]),
        DONE,
        then=lambda line: line.send(LAST_CHUNK),
    ),
    b"cached": raw(json_response({"usage": USAGE | {"prompt_tokens_details": {"cached_tokens": 2}}})),
}


async def scripted(request: Received, line: Line) -> None:
    script = next((script for mark, script in SCRIPTS.items() if b'"user":"%b"' % mark in request.body), answer)
    await script(request, line)


def problems(line: dict[str, Any]) -> Iterator[str]:
    """What is wrong with a line, by the part of the schema that it is to follow."""
    kind = "event" if "logger" in line else "request"
    part = VALIDATOR.evolve(schema=SCHEMA | {"oneOf": [{"$ref": f"#/$defs/{kind}"}]})
    for error in part.iter_errors(line):
        yield from (f"{inner.json_path}: {inner.message}" for inner in error.context or [error])


def keyed(request: bytes) -> bytes:
    return request.replace(b"\r\nhost:", b"\r\nx-api-key: %b\r\nhost:" % EXAMPLE.key.encode(), 1)


PROMPT = {
    "name": "p",
    "labels": {"production": 1},
    "versions": [{"version": 1, "messages": [{"role": "user", "content": "hello"}]}],
}

SENT: list[bytes] = [
    *(
        post("/v1/chat/completions", document, b"connection: close\r\n")
        for document in (
            CHAT,
            STREAM,
            STREAM | {"user": "reset"},
            STREAM | {"user": "cut"},
            CHAT | {"user": "fail"},
            CHAT | {"user": "close"},
            CHAT | {"user": "cached"},
            CHAT | {"model": "chat"},
            CHAT | {"model": "down"},
            CHAT | {"model": "sure"},
            CHAT | {"model": "held"},
            {"model": "m", "prompt": {"id": "p"}},
            STREAM | {"user": "abort"},
            CHAT | {"user": "hang"},
            CHAT | {"model": "nope"},
            CHAT | {"model": "lora"},
            CHAT | {"messages": None},
            b"{",
        )
    ),
    b"GET /v1/models HTTP/1.1\r\nhost: x\r\nx-request-id: mine\r\nconnection: close\r\n\r\n",
    b"GET /nowhere HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n",
    b"GET /%s HTTP/1.1\r\nhost: x\r\nx: %s\r\n\r\n" % (b"a" * 9000, b"x" * 10),
    b"rubbish\r\n\r\n",
]


@pytest.mark.parametrize("traced", [False, True])
async def test_every_line_follows_the_schema(tmp_path: Path, start_engine: Start, traced: bool) -> None:
    engine = await start_engine(scripted)
    environ = {"OTEL_EXPORTER_OTLP_ENDPOINT": engine.url, "OTEL_TRACES_SAMPLER": "always_off"} if traced else {}
    settings: dict[str, Any] = {
        "first_byte_timeout": 0.8,
        "log_level": "debug",
        "registry_url": f"http://127.0.0.1:{free_port()}",
        "usage": "log",
        "auth": "keys",
        "policy": write(tmp_path / "policy.json", policy_of(key(organisation="team-a", user="ana"), prompts=[PROMPT])),
    }
    price = {"input": 0.2, "output": 0.6}
    models = [
        {"name": "m", "backends": [engine.url], "price": price, "adapters": ["lora"], "cache": {"ttl": 60}},
        {"name": "down", "fallbacks": ["m"]},
        {"name": "chat", "split": {"variants": {"m": 1, "down": 0}}},
        {"name": "sure", "consensus": {"members": ["m", "twin"]}},
        {"name": "twin", "backends": [engine.url]},
        {"name": "held", "hold": 0.1},
    ]
    settings["catalogue"] = tmp_path / "models.json"
    settings["catalogue"].write_bytes(orjson.dumps({"models": models}))
    async with command(tmp_path, engine, environ=environ, **settings) as router:
        router.client.headers["x-api-key"] = EXAMPLE.key
        await ready(router.client)
        for request in SENT:
            async with raw_client(router.port) as client:
                await client.send(keyed(request))
                await client.reader.read(-1)
        async with raw_client(router.port) as client:
            await client.send(keyed(post("/v1/chat/completions", CHAT | {"user": "hang"})))
            await until(lambda: engine.busy)
        await engine.stop()
        for _ in range(6):
            await router.client.post("/v1/chat/completions", json=CHAT)
        router.tell(signal.SIGTERM)
        code, out, err = await router.stop()

    lines = log_of(out)
    assert (code, err) == (0, "")
    assert [(line, list(problems(line))) for line in lines if not VALIDATOR.is_valid(line)] == []
    requests = [line for line in lines if line["event"] == "request"]
    assert {line["outcome"] for line in requests} == {
        "ok", "reset", "truncated", "aborted", "upstream_5xx", "first_byte_timeout", "refused", "client_gone",
        "no_backend",
    }  # fmt: skip
    told = {name for line in requests for name in line}
    assert told == FIELDS.keys() - (set() if traced else {"trace_id", "span_id"})
    records = [line for line in lines if line["event"] == "usage"]
    assert [line for line in records if not Draft202012Validator(USAGE_LINE).is_valid(line)] == []
    # A vote is billed, and has no access line of its own.
    assert {line["kind"] for line in records} == {"request", "vote"}
    assert [line["id"] for line in records if line["kind"] == "request"] == [
        line["usage_id"] for line in requests if "usage_id" in line
    ]
    assert {line["event"] for line in lines} >= {"serving", "the circuit of a backend is open", "stopped"}


def test_the_schemas_are_schemas() -> None:
    for schema in (SCHEMA, USAGE_LINE, USAGE_RECORD):
        Draft202012Validator.check_schema(schema)


def test_a_usage_line_is_a_usage_record_with_the_beginning_of_a_line() -> None:
    added = {"time": FIELDS["time"], "level": {"const": "info"}, "event": {"const": "usage"}}

    assert USAGE_LINE["properties"].keys() == added.keys() | USAGE_RECORD["properties"].keys()
    assert {name: field for name, field in USAGE_LINE["properties"].items() if name not in added} == USAGE_RECORD[
        "properties"
    ]
    assert USAGE_LINE["required"] == [*added, *USAGE_RECORD["required"]]
    assert USAGE_LINE["additionalProperties"] is USAGE_RECORD["additionalProperties"] is False


LINE = {
    "time": "2026-11-21T15:00:00.123Z", "level": "info", "event": "request", "request_id": "a", "route": "other",
    "model": "unknown", "backend": None, "client": "::1", "status": 404, "outcome": "refused", "attempts": 0,
    "stream": False, "latency_ms": 0.1, "ttft_ms": None, "prompt_tokens": None, "completion_tokens": None, "bytes": 100,
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"time": "2026-11-21 15:00:00"}, "$.time"),
        ({"request_id": "a b"}, "$.request_id"),
        ({"outcome": "fine"}, "$.outcome"),
        ({"status": "404"}, "$.status"),
        ({"bytes": -1}, "$.bytes"),
        ({"backend": 5}, "$.backend"),
        ({"trace_id": "0" * 32}, "'span_id' is a dependency of 'trace_id'"),
        ({"messages": "s3cret"}, "Additional properties are not allowed"),
    ],
)
def test_the_schema_sees_what_is_wrong(change: dict[str, Any], problem: str) -> None:
    assert VALIDATOR.is_valid(LINE)
    assert not VALIDATOR.is_valid(LINE | change)
    assert problem in "\n".join(problems(LINE | change))


@pytest.mark.parametrize("name", REQUEST["required"])
def test_a_line_without_a_field_is_refused(name: str) -> None:
    assert not VALIDATOR.is_valid({key: value for key, value in LINE.items() if key != name})


def test_the_schema_knows_all_routes_and_outcomes() -> None:
    assert FIELDS["outcome"]["enum"] == [outcome.value for outcome in Outcome]
    assert set(FIELDS["route"]["enum"]) == {
        *(route.label for route in INFERENCE_ROUTES),
        *("response", "realtime", "models", "other"),
    }


def test_the_page_tells_the_same_fields_and_outcomes() -> None:
    page = (DOCS / "logs.md").read_text()
    rows = {name: kind for name, kind in re.findall(r"^\| `(\w+)` \| (\w+(?: or null)?) \|", page, re.MULTILINE)}
    outcomes = re.findall(
        r"^\| ((?:`\w+`(?:, )?)+) \| [^|]+ \|$", page.partition("| `outcome` | means |")[2], re.MULTILINE
    )

    assert list(rows) == list(FIELDS)
    assert {name for name, kind in rows.items() if kind.endswith(" or null")} == {
        name for name, field in FIELDS.items() if "null" in str(field.get("type", field.get("oneOf")))
    }
    assert set(re.findall(r"\w+", " ".join(outcomes))) == {outcome.value for outcome in Outcome}
