"""T62-T64: requests that two readers could take for different ones. One refusal, and nothing behind it is executed."""

from collections.abc import Iterable

import orjson
import pytest

from tests.fakes import (
    CHAT,
    LAST_CHUNK,
    STREAM,
    Line,
    Received,
    chunk,
    json_response,
    post,
    raw,
    raw_client,
    read_answer,
)
from tests.faults.lab import URL, Lab, refusal_of, talk

pytestmark = pytest.mark.anyio

BODY = orjson.dumps(CHAT)
# What a request with a wrong idea of its own length would let through.
SMUGGLED = b"GET /v1/models HTTP/1.1\r\nhost: router\r\n\r\n" + post(URL, CHAT)


def head(*lines: bytes, version: bytes = b"1.1", host: bytes = b"host: router") -> bytes:
    first = b"POST %s HTTP/%s" % (URL.encode(), version)
    return b"\r\n".join([first, *[host] * bool(host), b"content-type: application/json", *lines]) + b"\r\n\r\n"


def framed_by(*lines: bytes, **more: bytes) -> bytes:
    """A request whose framing is these lines, and a body that suits most of them."""
    return head(*lines, **more) + chunk(BODY) + LAST_CHUNK


def chunked(framed: bytes) -> bytes:
    return head(b"transfer-encoding: chunked") + framed


LENGTH = b"content-length: %d" % len(BODY)
SIZE = b"%x" % len(BODY)
CHUNKED = b"transfer-encoding: chunked"

LENGTHS = [
    framed_by(LENGTH, CHUNKED),
    framed_by(CHUNKED, LENGTH),
    head(LENGTH, LENGTH) + BODY,
    head(LENGTH, b"content-length: 3") + BODY,
    *(
        head(b"content-length: " + value) + BODY
        for value in (b"3, 3", b"+3", b"0x3", b"-1", b"3 ", b"3\t", b"9" * 20, b"9" * 13, b"1_0", b"", b"3;", b"\x0b3")
    ),
]
CODINGS = [
    *(
        framed_by(b"transfer-encoding: " + value)
        for value in (
            b"xchunked",
            b"chunked, identity",
            b"gzip, chunked",
            b"identity",
            b"\x0bchunked",
            b"chunked ",
            b"",
        )
    ),
    framed_by(CHUNKED, CHUNKED),
    framed_by(CHUNKED, b"transfer-encoding: identity"),
    framed_by(CHUNKED, version=b"1.0"),
    framed_by(b"transfer-encoding : chunked"),
    framed_by(b"transfer-encoding\n: chunked"),
    framed_by(b"x: a\r\n transfer-encoding: chunked"),
]
LINES = [
    head(LENGTH, b"x : 1") + BODY,
    head(LENGTH, b"x: a\r\n folded") + BODY,
    head(LENGTH, b"x: a\r\n\tfolded") + BODY,
    head(LENGTH, b"x: a\ny: b") + BODY,
    head(LENGTH, b"x: a\ry: b") + BODY,
    head(LENGTH, b"x: a\x00b") + BODY,
    head(LENGTH, b"x\x00: a") + BODY,
    head(LENGTH, b"x y: a") + BODY,
    head(LENGTH, b"x\xe9: a") + BODY,
    head(LENGTH, b": a") + BODY,
    head(LENGTH, b"x") + BODY,
    head(LENGTH).replace(b"\r\n", b"\n") + BODY,
    head(LENGTH).replace(b" HTTP/1.1", b"") + BODY,
    head(LENGTH).replace(b" HTTP/1.1", b" HTTP/1.1 ") + BODY,
    head(LENGTH).replace(b"POST ", b"POST\t") + BODY,
    head(LENGTH).replace(b"POST ", b"POST  ") + BODY,
    head(LENGTH).replace(b" HTTP/1.1", b"  HTTP/1.1") + BODY,
    head(LENGTH).replace(b" HTTP/1.1", b" RTSP/1.0") + BODY,
    *(before + head(LENGTH) + BODY for before in (b"\n", b"\r", b"\r\r\n", b"\r\n\n")),
    *(head(LENGTH, version=version) + BODY for version in (b"0.9", b"1.2", b"2.0", b"11", b"1.1x")),
]
HOSTS = [
    head(LENGTH, host=b"") + BODY,
    head(LENGTH, b"host: router") + BODY,
    head(LENGTH, b"host: other") + BODY,
    *(
        head(LENGTH, host=b"host: " + value) + BODY
        for value in (b"", b"a b", b"a/v1/x?", b"a/healthz?", b"a@b", b"a,b", b"a\\b", b"\xe9", b"a:b", b"a:1:2")
    ),
]
CHUNKS = [
    chunked(size + b"\r\n" + BODY + b"\r\n" + LAST_CHUNK)
    for size in (b"0x3", b"F" * 17, SIZE + b" ", b" " + SIZE, b"-3", b"", b"g", SIZE + b"\n")
]
CHUNKS += [
    chunked(SIZE + b"\n" + BODY + b"\n0\n\n"),
    chunked(SIZE + b"\r\n" + BODY + b"XX" + LAST_CHUNK),
    chunked(SIZE + b"\r\n" + BODY + LAST_CHUNK),
    chunked(SIZE + b";a\nb\r\n" + BODY + b"\r\n" + LAST_CHUNK),
    chunked(chunk(BODY) + b"0\r\n\n"),
]


CORPORA = {"lengths": LENGTHS, "codings": CODINGS, "lines": LINES, "hosts": HOSTS, "chunks": CHUNKS}
# Each is larger than all the framing of a body may be.
ENDLESS = [
    b"5;" + b"x" * 2**20,
    b'5;a="' + b"x" * 2**20,
    b"0\r\nx: " + b"y" * 2**20,
    b"0\r\n" + b"x: y\r\n" * 2**16,
    (b"1;" + b"x" * 50 + b"\r\nz\r\n") * 2**14,
]


@pytest.mark.parametrize("corpus", CORPORA.values(), ids=CORPORA)
async def test_t62_smuggling_is_refused_and_nothing_behind_it_is_executed(corpus: Iterable[bytes], lab: Lab) -> None:
    served = await lab.router(engine := await lab.engine())

    said = {request: await talk(served, request + SMUGGLED) for request in corpus}

    for request, answer in said.items():
        assert refusal_of(answer) == (400, "bad_request"), request
        assert answer.count(b"HTTP/1.1 ") == 1, request
    assert engine.requests == []
    assert len(served.lines) == len(said)
    assert {line["outcome"] for line in served.lines} <= {"refused", "client_gone"}


async def test_t62_one_byte_at_a_time_is_refused_as_well(lab: Lab) -> None:
    served = await lab.router(engine := await lab.engine())

    for request in (LENGTHS[0], CODINGS[2], HOSTS[1], CHUNKS[0]):
        pieces = (bytes([byte]) for byte in request)
        assert refusal_of(await talk(served, *pieces)) == (400, "bad_request"), request

    assert engine.requests == []


@pytest.mark.parametrize("endless", ENDLESS)
async def test_t62_what_surrounds_a_body_has_a_limit(endless: bytes, lab: Lab) -> None:
    served = await lab.router(engine := await lab.engine())

    assert refusal_of(await talk(served, chunked(b""), endless)) == (400, "bad_request")
    assert refusal_of(await talk(served, chunked(b"") + endless)) == (400, "bad_request")
    assert engine.requests == []


FIRST = [
    head(LENGTH) + BODY,
    chunked(chunk(BODY) + LAST_CHUNK),
    chunked(chunk(BODY[:1]) + chunk(BODY[1:]) + b"0\r\nx: y\r\n\r\n"),
    # What ends a head is content here.
    head(b"content-length: %d" % (len(BODY) + 8)) + b"\r\n\r\n" + BODY + b"\r\n\r\n",
    chunked(chunk(b"\r\n\r\n\r\n") + chunk(BODY) + chunk(b"\r\n\r\n") + LAST_CHUNK),
    head(LENGTH, b"connection: upgrade", b"upgrade: h2c") + BODY,
    head(CHUNKED, b"connection: upgrade", b"upgrade: h2c") + chunk(BODY) + LAST_CHUNK,
]
ODD = [b"\n" + head(LENGTH), head(LENGTH).replace(b"POST ", b"POST  "), head(LENGTH).replace(b" HTTP/1.1", b" ICE/1.0")]


@pytest.mark.parametrize("size", [1, 7, 2**20])
@pytest.mark.parametrize("first", FIRST)
async def test_t62_what_follows_in_the_same_read_is_held_to_the_same(first: bytes, size: int, lab: Lab) -> None:
    served = await lab.router(engine := await lab.engine())

    for odd in ODD:
        data = first + odd + BODY + SMUGGLED
        said = await talk(served, *(data[at : at + size] for at in range(0, len(data), size)))
        # What is wrong is told where no answer is under way that would have to come first.
        statuses = [part[:3] for part in said.split(b"HTTP/1.1 ")[1:]]
        assert statuses in ([b"200"], [b"200", b"400"]), odd
    async with raw_client(served.port) as client:
        data = (first + b"\r\n") * 3
        await client.send(*(data[at : at + size] for at in range(0, len(data), size)))
        assert [(await read_answer(client.reader)).status for _ in range(3)] == [200] * 3

    assert {request.body.strip() for request in engine.requests} == {BODY}
    assert len(engine.requests) == len(ODD) + 3


async def test_t62_behind_a_body_that_could_end_anywhere_nothing_is_taken(lab: Lab) -> None:
    served = await lab.router(engine := await lab.engine())
    many = chunked(chunk(b"\r\n\r\n" * 200) + chunk(BODY) + LAST_CHUNK)

    for behind in (b"", b"\n", SMUGGLED, b"\n" + SMUGGLED):
        said = await talk(served, many + behind)
        assert said.startswith(b"HTTP/1.1 200 ")
        assert said.count(b"HTTP/1.1 ") == said.count(b"connection: close\r\n") == 1

    assert [request.body.strip() for request in engine.requests] == [BODY] * 4


async def test_t62_sound_requests_in_odd_clothes_pass(lab: Lab) -> None:
    served = await lab.router(engine := await lab.engine())
    sound = [
        head(b"Content-Length:\t%d" % len(BODY)) + BODY,
        head(b"content-length: 000%d" % len(BODY)) + BODY,
        framed_by(b"Transfer-Encoding:  Chunked"),
        chunked(b"00" + SIZE + b";a=b;c\r\n" + BODY + b"\r\n000\r\n\r\n"),
        chunked(b"".join(b"1\r\n%c\r\n" % byte for byte in BODY) + LAST_CHUNK),
        head(LENGTH, host=b"Host: [::1]:8000") + BODY,
        head(LENGTH, version=b"1.0", host=b"") + BODY,
    ]

    for request in sound[:-1]:
        async with raw_client(served.port) as client:
            # What follows on the connection is what it says it is.
            await client.send(request + request)
            assert [(await read_answer(client.reader)).status for _ in range(2)] == [200, 200], request
    assert (await talk(served, sound[-1])).startswith(b"HTTP/1.1 200 ")

    assert {request.body for request in engine.requests} == {BODY}
    assert {request.header("content-length") for request in engine.requests} == {str(len(BODY))}
    assert all("transfer-encoding" not in request.names for request in engine.requests)


TRAILERS = (
    b"Authorization: Bearer x\r\nX-Forwarded-For: 1.2.3.4\r\nConnection: Content-Type\r\nopenai-organization: evil\r\n"
)


@pytest.mark.parametrize("body", [CHAT, STREAM])
async def test_t63_trailers_are_no_headers(body: dict[str, object], lab: Lab) -> None:
    served = await lab.router(engine := await lab.engine(), entry={"credentials": "passthrough"})
    data = orjson.dumps(body)
    request = head(CHUNKED, b"trailer: authorization") + chunk(data) + b"0\r\n" + TRAILERS + b"\r\n"

    async with raw_client(served.port) as client:
        await client.send(request, request)
        answers = [await read_answer(client.reader) for _ in range(2)]

    assert [answer.status for answer in answers] == [200, 200]
    for received in engine.requests:
        assert received.names.isdisjoint({"authorization", "x-forwarded-for", "openai-organization", "trailer"})
        assert received.header("connection") is None


async def test_t63_a_trailer_may_end_a_connection_but_costs_no_answer(lab: Lab) -> None:
    served = await lab.router(engine := await lab.engine())

    async with raw_client(served.port) as client:
        await client.send(head(CHUNKED) + chunk(BODY) + b"0\r\nConnection: close\r\n\r\n" + SMUGGLED)
        assert (await read_answer(client.reader)).status == 200
        assert await client.reader.read(-1) == b""

    assert len(engine.requests) == 1


HOP_BY_HOP = [
    b"connection: close, X-Internal, Authorization, X-Request-Id, openai-beta, content-type, content-length, host",
    b"keep-alive: timeout=5",
    b"te: trailers",
    b"upgrade: h2c",
    b"http2-settings: AAEAAEAAAAIAAAAB",
    b"proxy-authorization: Basic eA==",
    b"proxy-connection: keep-alive",
    b"x-internal: 1",
    b"openai-beta: x",
    b"authorization: Bearer theirs",
]


async def test_t64_hop_by_hop_headers_stay_on_their_hop(lab: Lab) -> None:
    served = await lab.router(
        engine := await lab.engine(), entry={"credentials": {"env": "BACKEND_TOKEN"}}, forward_headers={"x-internal"}
    )

    said = await talk(served, post(URL, CHAT, b"\r\n".join(HOP_BY_HOP) + b"\r\nx-request-id: mine\r\n"))

    [received] = engine.requests
    assert said.startswith(b"HTTP/1.1 200 ")
    assert received.names == {"host", "content-type", "content-length", "accept-encoding", "x-request-id"}
    # Naming the router's own headers in Connection does not take them away.
    assert (received.header("x-request-id") or "").startswith("mine-")
    assert received.header("host") == f"127.0.0.1:{engine.port}"
    assert b"\r\nx-request-id: mine\r\n" in said


async def test_t64_the_same_holds_for_what_engines_say(lab: Lab) -> None:
    names = (
        b"connection: X-Internal, x-request-id, content-length\r\nx-internal: 1\r\nkeep-alive: timeout=5\r\n"
        b"upgrade: h2c\r\nproxy-authenticate: Basic\r\ntrailer: x\r\nx-request-id: theirs\r\nx-kept: 1\r\n"
    )

    async def script(request: Received, line: Line) -> None:
        await raw(json_response({}, headers=names))(request, line)

    served = await lab.router(script)

    response = await served.client.post(URL, json=CHAT, headers={"x-request-id": "mine"})

    assert set(response.headers) == {"date", "content-type", "content-length", "x-request-id", "x-kept"}
    assert response.headers["x-request-id"] == "mine"
