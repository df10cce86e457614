"""A response head that is known is not parsed again: nobody must be able to tell."""

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from inference_api.models import RawHeaders
from inference_api.upstream.connection import BackendConnection
from inference_api.upstream.deadlines import Timeout
from inference_api.upstream.repeated_head import RepeatedHead, RepeatedHeads
from inference_api.upstream.response import ResponseStream

DATE = b"date: Sat, 21 Nov 2026 10:00:00 GMT\r\n"
HEAD = b"HTTP/1.1 200 OK\r\n" + DATE + b"server: uvicorn\r\ncontent-length: 2\r\ncontent-type: application/json\r\n\r\n"


def parsed(data: bytes, heads: RepeatedHeads | None = None) -> tuple[ResponseStream, bool]:
    """What a connection makes of one read, and whether it can be used again."""
    loop = asyncio.new_event_loop()
    kept: list[BackendConnection] = []
    try:
        pool: Any = SimpleNamespace(last_read=0.0, heads=heads or RepeatedHeads(), release=kept.append, discard=id)
        connection = BackendConnection(pool, loop)
        transport: Any = SimpleNamespace(write=id, get_write_buffer_size=lambda: 0, abort=lambda: None)
        connection.connection_made(transport)
        stream = connection.exchange(b"", b"", Timeout(), None)
        connection.data_received(data)
        return stream, bool(kept)
    finally:
        loop.close()


def known(data: bytes) -> RepeatedHead:
    head = RepeatedHead.learn(data, parsed(data)[0].headers)
    assert head is not None
    return head


def facts(stream: ResponseStream, reusable: bool) -> tuple[int, RawHeaders, bytes, bool, bool]:
    return stream.status, stream.headers, b"".join(stream.pieces), stream.complete, reusable


def test_another_date_and_another_length_are_read() -> None:
    other = HEAD.replace(b"10:00:00", b"23:59:59").replace(b"length: 2", b"length: 11") + b"hello world"
    read = known(HEAD + b"{}").read(other)

    assert read is not None
    assert read == (parsed(other)[0].headers, b"hello world")


@pytest.mark.parametrize(
    "data",
    [
        HEAD + b"{",
        HEAD + b"{} ",
        HEAD + b"{}HTTP/1.1 200 OK\r\n\r\n",
        HEAD.replace(b"200", b"201") + b"{}",
        HEAD.replace(b"1.1", b"1.0") + b"{}",
        HEAD.replace(b"uvicorn", b"Uvicorn") + b"{}",
        HEAD.replace(b"10:00:00", b"10:00:0") + b"{}",
        HEAD.replace(b"10:00:00", b"10\r\n0:00") + b"{}",
        HEAD.replace(b"length: 2", b"length: +2") + b"{}",
        HEAD.replace(b"length: 2", b"length: ") + b"{}",
        HEAD.replace(b"length: 2", b"length: \xb2") + b"{}",
        HEAD.replace(b"length: 2", b"length: 2\r\ncontent-length: 2") + b"{}",
        b" " + HEAD + b"{}",
        b"",
    ],
)
def test_whatever_else_differs_is_for_the_parser(data: bytes) -> None:
    assert known(HEAD + b"{}").read(data) is None


@pytest.mark.parametrize(
    "head",
    [
        HEAD.replace(b"content-length: 2\r\n", b""),
        HEAD.replace(b"content-length: 2\r\n", b"transfer-encoding: chunked\r\n"),
        HEAD.replace(DATE, DATE + DATE),
        HEAD.replace(b"10:00:00", b"10:00"),
        HEAD.replace(DATE, b"x: " + b"y" * 5000 + b"\r\n"),
        HEAD.replace(b"uvicorn\r\n", b"\r\n"),
    ],
)
def test_what_is_learnt_reads_what_it_was_learnt_from_or_is_not_learnt(head: bytes) -> None:
    data = head + b"{}"
    learnt = RepeatedHead.learn(data, parsed(data)[0].headers)

    assert learnt is None or learnt.read(data) == (parsed(data)[0].headers, b"{}")


def test_heads_are_learnt_at_the_second_answer_and_ever_more_rarely() -> None:
    heads, learnt = RepeatedHeads(), []
    for number in range(1, 40):
        before = heads.newest
        parsed(HEAD.replace(b"uvicorn", b"%d" % number) + b"{}", heads)
        if heads.newest is not before:
            learnt.append(number)

    assert learnt == [2, 4, 8, 16, 32]


NAMES = st.sampled_from([b"server", b"Date", b"date", b"x-a", b"Content-Length", b"Content-Type", b"connection"])
VALUES = st.sampled_from(
    [b"", b"2", b"02", b"close", b"keep-alive", b"Sat, 21 Nov 2026 10:00:00 GMT", b"y" * 29, b"\xe4"]
)


@given(
    st.lists(st.tuples(NAMES, VALUES), max_size=5),
    st.sampled_from([b"{}", b"", b"[1]"]),
    st.integers(0, 200),
    st.sampled_from([b"", b"2", b"\r", b"\n", b"x", b": ", b"\r\n"]),
    st.integers(0, 2),
)
@settings(max_examples=400)
def test_with_and_without_memory_an_answer_is_the_same(
    headers: list[tuple[bytes, bytes]], body: bytes, at: int, put: bytes, drop: int
) -> None:
    """One answer is learnt from, and then another that differs from it a little."""
    lines = b"".join(b"%b: %b\r\n" % pair for pair in [*headers, (b"content-length", b"%d" % len(body))])
    first = b"HTTP/1.1 200 OK\r\n" + lines + b"\r\n" + body
    at %= len(first)
    second = first[:at] + put + first[at + drop :]

    heads = RepeatedHeads()
    for _ in range(2):
        parsed(first, heads)

    assert facts(*parsed(second, heads)) == facts(*parsed(second))
