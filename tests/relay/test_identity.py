"""Bytes pass through the whole router as they are, however they are cut on their way."""

import json
import os
from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple

import orjson
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.conftest import Served
from tests.fakes import CHAT, DONE, LAST_CHUNK, SSE_HEAD, STREAM, FakeEngine, chunk, event, json_response, raw, until

pytestmark = pytest.mark.anyio
Start = Callable[..., Any]

JSON = "application/json; charset=utf-8"

# A router lives longer than an example, on purpose.
few = settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
cuts = st.lists(st.integers(min_value=0), max_size=10)
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
events = st.one_of(
    texts.map(event),
    texts.map(lambda text: event(text).replace(b"\n\n", b"\r\n\r\n")),
    st.sampled_from(
        [b": ping\n\n", b"event: x\ndata: 1\ndata: 2\n\n", b'data: {"usage": null}\n\n', b"data: \xff\xfe\n\n"]
    ),
    st.binary(max_size=30).map(lambda data: b"data: " + data + b"\n\n"),
)


class Path(NamedTuple):
    """The two ends of a way through a router."""

    engine: FakeEngine
    served: Served


@pytest.fixture
async def path(start_engine: Start, start_router: Start) -> Path:
    engine = await start_engine()
    return Path(engine, await start_router(engine))


def pieces(data: bytes, at: list[int]) -> list[bytes]:
    places = sorted(cut % (len(data) + 1) for cut in at)
    return [data[start:end] for start, end in pairwise([0, *places, len(data)]) if start < end]


@few
@given(st.lists(events, max_size=8), cuts, cuts)
async def test_a_stream_in_any_chunks_and_any_writes(
    path: Path, parts: list[bytes], ins: list[int], outs: list[int]
) -> None:
    body = b"".join(parts) + DONE
    wire = SSE_HEAD + b"".join(map(chunk, pieces(body, ins))) + LAST_CHUNK
    path.engine.script = raw(*pieces(wire, outs))

    response = await path.served.chat(stream=True)

    assert response.content == body
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"


@few
@given(st.recursive(texts | st.integers(), lambda inner: st.dictionaries(texts, inner, max_size=4)), cuts, cuts)
async def test_a_json_answer_in_any_chunks_and_any_writes(
    path: Path, document: Any, ins: list[int], outs: list[int]
) -> None:
    body = json.dumps({"x": document}, ensure_ascii=False, indent=2).encode()
    head = SSE_HEAD.replace(b"text/event-stream; charset=utf-8", b"application/json")
    path.engine.script = raw(*pieces(head + b"".join(map(chunk, pieces(body, ins))) + LAST_CHUNK, outs))

    response = await path.served.chat()

    assert response.content == body
    assert response.headers["content-length"] == str(len(body))


@few
@given(
    texts,
    st.dictionaries(texts, texts | st.integers(), max_size=4),
    st.sampled_from([" ", "", "\r\n\t"]),
    st.booleans(),
)
async def test_a_request_body(path: Path, text: str, more: dict[str, Any], space: str, plain: bool) -> None:
    document = {**more, **CHAT, "messages": [{"role": "user", "content": text}]}
    dumped = json.dumps(document, ensure_ascii=plain, separators=("," + space, space + ":"))
    body = f"{space}{dumped}{space}".encode()

    await path.served.client.post("/v1/chat/completions", content=body, headers={"content-type": JSON})

    assert path.engine.requests[-1].body == body
    assert path.engine.requests[-1].header("content-type") == JSON


async def test_a_stream_in_chunks_of_one_byte(path: Path) -> None:
    body = b"".join(event(f"wörd{i}") for i in range(10)) + DONE
    path.engine.script = raw(SSE_HEAD, *(chunk(body[i : i + 1]) for i in range(len(body))), LAST_CHUNK)

    assert (await path.served.chat(stream=True)).content == body


@pytest.mark.parametrize("size", [2**21, 2**22])
async def test_a_stream_with_a_very_large_event(size: int, path: Path) -> None:
    body = event("a") + event(os.urandom(size // 2).hex()) + event("b") + DONE
    path.engine.script = raw(
        SSE_HEAD, *(chunk(part) for part in pieces(body, list(range(0, len(body), 60_000)))), LAST_CHUNK
    )

    assert (await path.served.chat(stream=True)).content == body
    await until(lambda: path.served.lines)
    assert path.served.lines[-1]["outcome"] == "ok"


@pytest.mark.parametrize("end", [b"", b"content-length: %d\r\n"])
async def test_a_stream_that_is_framed_in_another_way(end: bytes, path: Path) -> None:
    body = event("a") + event("b") + DONE
    length = end % len(body) if end else end
    head = b"HTTP/1.%d 200 OK\r\ncontent-type: text/event-stream\r\n%s\r\n" % (bool(end), length)
    path.engine.script = raw(head + body[:50], body[50:], close=not end)

    assert (await path.served.chat(stream=True)).content == body
    assert path.served.lines[-1]["outcome"] == "ok"


async def test_a_large_request_body(path: Path) -> None:
    body = orjson.dumps({**STREAM, "image": os.urandom(2**22).hex()})

    await path.served.client.post("/v1/chat/completions", content=body, headers={"content-type": "application/json"})

    assert path.engine.requests[-1].body == body


@few
@given(st.binary(max_size=3000), cuts)
async def test_an_answer_that_is_no_text_at_all(path: Path, body: bytes, outs: list[int]) -> None:
    head = json_response(None).partition(b"content-length")[0].replace(b"application/json", b"audio/mpeg")
    path.engine.script = raw(*pieces(head + b"content-length: %d\r\n\r\n" % len(body) + body, outs))

    response = await path.served.chat()

    assert response.content == body
    assert response.headers["content-type"] == "audio/mpeg"
