"""T65, T66, T68-T72, T79, T80: clients that mean harm. They get an answer that tells them no, and cost nobody else."""

import asyncio
import gzip
import json
import resource
import time
import tracemalloc
from collections.abc import Iterator
from contextlib import AsyncExitStack, suppress

import orjson
import pytest

from tests.fakes import CHAT, LAST_CHUNK, Line, chunk, json_response, post, raw, raw_client, read_answer
from tests.faults.lab import URL, Lab, refusal_of, talk

pytestmark = pytest.mark.anyio

MEGABYTE = 1 << 20


# T65, T66: who and where

SPOOFED = {
    "x-forwarded-for": "1.2.3.4",
    "x-forwarded-proto": "https",
    "x-forwarded-host": "evil",
    "forwarded": "for=1.2.3.4",
    "x-real-ip": "1.2.3.4",
    "x_request_id": "spoofed",
    "x-envoy-original-path": "/sleep",
    "x-envoy-upstream-rq-timeout-ms": "1",
    "x-gateway-destination-endpoint": "10.0.0.1:1",
    "x-original-url": "/sleep",
    "x-http-method-override": "DELETE",
}


async def test_t65_claims_about_the_way_have_no_effect(lab: Lab) -> None:
    served = await lab.router(engine := await lab.engine())
    body = orjson.dumps({**CHAT, "api_base": "http://evil", "base_url": "http://evil", "api_key": "x"})

    response = await served.client.post(
        f"{URL}?api_base=http://evil", content=body, headers={**SPOOFED, "content-type": "application/json"}
    )

    [received] = engine.requests
    assert response.status_code == 200
    assert received.names.isdisjoint(SPOOFED)
    assert received.body == body
    assert received.header("host") == f"127.0.0.1:{engine.port}"
    assert received.target == f"{URL}?api_base=http://evil"
    assert response.headers["x-request-id"] != "spoofed"


ELSEWHERE = [
    *("/v1/../metrics", "/v1/%2e%2e/metrics", "/v1/.%2e/metrics", "/%2e/metrics", f"{URL}\\..\\admin"),
    *("/v1/models/..%2f..%2fadmin", "/v1/models/../../admin", "/v1%2fchat%2fcompletions", "/v1%5cmodels"),
    *("/V1/Chat/Completions", f"{URL};x", f"{URL}%3bx", f"{URL}%00", f"{URL}%0d%0ax:", "/v1/%zz"),
    *("/sleep", "//evil/v1/models", f"/{'x/' * 2000}"),
]
NOWHERE = ["*", "http://evil/v1/models", "http://router@evil/v1/models", "ftp://router/x", "http://evil"]


@pytest.mark.parametrize("method", ["GET", "POST", "OPTIONS", "TRACE", "DELETE"])
async def test_t66_a_path_leads_to_one_of_the_routes_or_nowhere(method: str, lab: Lab) -> None:
    served = await lab.router(engine := await lab.engine())
    answers = {}

    for target in ELSEWHERE + NOWHERE:
        said = await talk(served, post(target, CHAT, b"connection: close\r\n").replace(b"POST", method.encode(), 1))
        answers[target] = refusal_of(said)

    assert {answers[target] for target in ELSEWHERE} == {(404, "unknown_url")}
    assert {answers[target] for target in NOWHERE} == {(400, "bad_request")}
    assert engine.requests == []


async def test_t66_other_methods_reach_nothing(lab: Lab) -> None:
    served = await lab.router(engine := await lab.engine())
    close = b" HTTP/1.1\r\nhost: router\r\nconnection: close\r\n\r\n"

    for method in (b"TRACE", b"PUT", b"PROPFIND", b"OPTIONS"):
        assert refusal_of(await talk(served, method + b" /v1/chat/completions" + close)) == (405, "method_not_allowed")
    for target in (b"engine:8000", b"/v1/chat/completions", b"http://router/"):
        assert refusal_of(await talk(served, b"CONNECT " + target + close)) == (400, "bad_request")

    assert engine.requests == []


# T68: clients that take their time


async def drip(line: Line, data: bytes) -> None:
    with suppress(ConnectionError):
        for i in range(len(data)):
            await line.send(data[i : i + 1])
            await asyncio.sleep(0.25)


# What they send at once, and what they drip.
SLOW = {
    "nothing": (b"", b""),
    "a head": (b"GET / HTTP/1.1\r\n", b"x: 1\r\n" * 90),
    "a body": (post(URL, b"x" * 1000)[:-1000], b"x" * 1000),
}


# Both ends of each are files of this process.
SLOW_CLIENTS = 1000
NEEDED_FILES = 4 * SLOW_CLIENTS


@pytest.fixture
def _many_files() -> Iterator[None]:
    """As many open files as may be: their usual limit is far below what a router is given."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < NEEDED_FILES:
        pytest.skip(f"needs {NEEDED_FILES} open files, and {hard} are allowed")
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.usefixtures("_many_files")
@pytest.mark.parametrize("what", SLOW)
async def test_t68_clients_that_drip_are_given_up_and_the_others_served(what: str, lab: Lab) -> None:
    # Time for all of them to be there at once, and for the first byte of each on a machine that stands still.
    patience = {"header_timeout": 2, "body_timeout": 2}
    served = await lab.router(await lab.engine(), max_in_flight=2 * SLOW_CLIENTS, **patience)
    at_once, dripped = SLOW[what]
    said = []

    async def attack(client: Line) -> None:
        dripping = asyncio.create_task(drip(client, dripped))
        said.append(await client.reader.read(-1))
        dripping.cancel()

    async with AsyncExitStack() as stack:
        attacks = []
        for _ in range(SLOW_CLIENTS):
            client = await stack.enter_async_context(raw_client(served.port))
            await client.send(at_once)
            attacks.append(asyncio.create_task(attack(client)))
        answered = 0
        while not all(task.done() for task in attacks):
            assert (await served.chat()).status_code == 200
            answered += 1
            await asyncio.sleep(0.01)
        await asyncio.gather(*attacks)

    assert answered > 0
    assert len(said) == SLOW_CLIENTS
    assert {refusal_of(answer) if answer else None for answer in said} == {
        None if what == "nothing" else (408, "request_timeout")
    }


# T69, T70: too much


async def test_t69_a_body_that_says_it_is_too_large_is_refused_unread(lab: Lab) -> None:
    served = await lab.router(engine := await lab.engine())
    before = engine.connections

    said = await talk(
        served, b"POST %s HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % (URL.encode(), 33 * MEGABYTE)
    )

    assert refusal_of(said) == (413, "request_too_large")
    assert engine.connections == before


async def test_t69_a_body_without_a_length_is_refused_at_the_limit_and_not_kept(lab: Lab) -> None:
    served = await lab.router(max_body_bytes=MEGABYTE)
    head = b"POST %s HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n"
    piece = chunk(b" " * 2**16)
    tracemalloc.start()

    said = await talk(served, head % URL.encode(), *[piece] * 256)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    assert refusal_of(said) == (413, "request_too_large")
    assert peak < 4 * MEGABYTE


async def test_t69_a_body_of_exactly_the_limit_passes(lab: Lab) -> None:
    served = await lab.router(engine := await lab.engine())
    empty = orjson.dumps({**CHAT, "x": ""})
    body = empty[:-2] + b"y" * (32 * MEGABYTE - len(empty)) + empty[-2:]

    assert (
        await served.client.post(URL, content=body, headers={"content-type": "application/json"})
    ).status_code == 200
    assert len(engine.requests[0].body) == 32 * MEGABYTE


HEADS = {
    "a megabyte": (b"/", b"x: " + b"y" * MEGABYTE, (431, "headers_too_large")),
    "many headers": (b"/", b"x: y\r\n" * 9999 + b"x: y", (431, "headers_too_large")),
    "101 headers": (b"/", b"x: y\r\n" * 99 + b"x: y", (431, "headers_too_large")),
    "a long target": (b"/" + b"x" * 10_000, b"x: y", (414, "uri_too_long")),
    "a long query": (b"/?" + b"x" * 10_000, b"x: y", (414, "uri_too_long")),
    "a very long target": (b"/" + b"x" * 100_000, b"x: y", (431, "headers_too_large")),
}


@pytest.mark.parametrize("what", HEADS)
async def test_t69_a_head_that_is_too_large_is_refused(what: str, lab: Lab) -> None:
    target, lines, refusal = HEADS[what]
    served = await lab.router()

    said = await talk(served, b"GET " + target + b" HTTP/1.1\r\nhost: x\r\n" + lines + b"\r\n\r\n")

    assert refusal_of(said) == refusal


async def test_t69_many_small_chunks_are_cheap(lab: Lab) -> None:
    served = await lab.router(engine := await lab.engine())
    head = b"POST %s HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n"

    async def cost(size: int) -> float:
        """Seconds of CPU, the client's part included."""
        body = orjson.dumps({**CHAT, "x": "y" * size})
        framed = b"".join(b"1\r\n%c\r\n" % byte for byte in body) + LAST_CHUNK
        async with raw_client(served.port) as client:
            began = time.process_time()
            await client.send(head % URL.encode() + framed)
            answer = await read_answer(client.reader)
            spent = time.process_time() - began
        assert answer.status == 200
        assert engine.requests[-1].body == body
        return spent

    # Ten times the chunks for ten times the time; what is quadratic takes a hundred times.
    assert await cost(1_000_000) < 40 * await cost(100_000)


EARLY = {
    "404": ("/nope", 404),
    "413": (URL, 413),
    "405": ("/v1/models", 405),
}


@pytest.mark.parametrize("what", EARLY)
async def test_t70_a_refusal_is_read_while_the_body_is_still_being_sent(what: str, lab: Lab) -> None:
    path, status = EARLY[what]
    served = await lab.router(engine := await lab.engine(), max_body_bytes=MEGABYTE)

    async with raw_client(served.port) as client:
        sending = asyncio.create_task(client.send(post(path, b"x" * 10 * MEGABYTE)))
        answer = await read_answer(client.reader)
        with suppress(ConnectionError):
            await sending
        # And then it ends: what is left of the body is not read as a request. Bytes on their way make the end a reset.
        with suppress(ConnectionError):
            assert await asyncio.wait_for(client.reader.read(-1), 10) == b""

    assert answer.status == status
    assert answer.headers["connection"] == "close"
    assert set(orjson.loads(answer.body)) == {"error", "request_id"}
    assert (await served.chat()).status_code == 200
    assert len(engine.requests) == 1


# T71, T72: bombs

MODEL = b'"model":"m"'
MESSAGES = b'"messages":[]'
BOMBS: dict[str, tuple[bytes, int]] = {
    "deep list": (b'{%b,"messages":%b%b}' % (MODEL, b"[" * 100_000, b"]" * 100_000), 400),
    "deep object": (b'{%b,%b,"x":%b1%b}' % (MODEL, MESSAGES, b'{"a":' * 100_000, b"}" * 100_000), 400),
    "deep and open": (b"[" * 1_000_000, 400),
    "lone surrogate": (b'{"model":"\\ud800",%b}' % MESSAGES, 400),
    "utf-16": ('{"model":"m","messages":[]}'.encode("utf-16"), 400),
    "no utf-8": (b'{"model":"\xff",%b}' % MESSAGES, 400),
    "number of a million digits": (b'{"model":"nope",%b,"x":%b}' % (MESSAGES, b"9" * MEGABYTE), 404),
    "wide": (b'{"model":"nope",%b,"x":[%b1]}' % (MESSAGES, b"[]," * MEGABYTE), 404),
    "wide and wrong": (b'{%b,%b,"x":[%b]}' % (MODEL, MESSAGES, b"[]," * MEGABYTE), 400),
    "one name for ever": (b'{%b,%b,"%b' % (MODEL, MESSAGES, b"x" * MEGABYTE), 400),
    "model is an object": (b'{"model":{},%b}' % MESSAGES, 422),
    "model is long": (b'{"model":"%b",%b}' % (b"x" * MEGABYTE, MESSAGES), 422),
    "model is empty": (b'{"model":"",%b}' % MESSAGES, 422),
    "model has a line break": (b'{"model":"a\\nb\\u0000",%b}' % MESSAGES, 404),
    "stream is odd": (b'{%b,%b,"stream":{}}' % (MODEL, MESSAGES), 422),
    "infinite stream": (b'{%b,%b,"stream":1e309}' % (MODEL, MESSAGES), 422),
    "two models": (b'{"model":"nope",%b,"model":"nope2"}' % MESSAGES, 404),
}


async def test_t71_json_that_is_made_to_hurt_is_refused_and_quickly(lab: Lab) -> None:
    served = await lab.router(engine := await lab.engine())
    answers = {}

    for name, (body, _) in BOMBS.items():
        began = time.process_time()
        async with raw_client(served.port) as client:
            await client.send(post(URL, body))
            answer = await read_answer(client.reader)
        answers[name] = answer.status
        assert set(orjson.loads(answer.body)["error"]) == {"message", "type", "param", "code"}
        assert len(answer.body) < 500
        # The balancing says 50 ms; a machine may be slow and coverage dear, recursion and squares are slower.
        assert time.process_time() - began < 10, name

    assert answers == {name: status for name, (_, status) in BOMBS.items()}
    assert engine.requests == []


@pytest.mark.parametrize(
    "body",
    [
        b'{"model":"nope","model":"alias",%b}' % MESSAGES,
        b'{"model":"nope",%b,"mod\\u0065l":"alias"}' % MESSAGES,
        b'{"model":"nope",%b,"x":{"model":"nope"},"model" : "\\u0061lias","y":NaN}' % MESSAGES,
        b'{%b,"model":"alias","z":"\\"model\\":\\"nope\\""}' % MESSAGES,
        b'{"model":"alias",%b,%b}' % (MESSAGES, b",".join(b'"k%d":1e309' % i for i in range(100_000))),
    ],
)
async def test_t71_the_engine_reads_the_model_that_was_routed(body: bytes, lab: Lab) -> None:
    served = await lab.router(engine := await lab.engine(), entry={"aliases": ["alias"], "served_model_name": "theirs"})

    response = await served.client.post(URL, content=body, headers={"content-type": "application/json"})

    assert response.status_code == 200
    # Python's own reader, as in the engines.
    assert json.loads(engine.requests[0].body)["model"] == "theirs"


@pytest.mark.parametrize("encoding", ["gzip", "br", "deflate", "x-unknown", "identity, gzip"])
async def test_t72_a_compressed_request_is_refused_and_not_inflated(encoding: str, lab: Lab) -> None:
    served = await lab.router(engine := await lab.engine())
    bomb = gzip.compress(b" " * 32 * MEGABYTE)
    tracemalloc.start()

    response = await served.client.post(
        URL, content=bomb, headers={"content-type": "application/json", "content-encoding": encoding}
    )
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    assert (response.status_code, response.json()["error"]["code"]) == (415, "unsupported_media_type")
    assert peak < 2 * MEGABYTE
    assert engine.requests == []


# T79, T80: labels and browsers


async def test_t79_clients_make_no_series(lab: Lab) -> None:
    served = await lab.router()

    async def series() -> int:
        return sum(not line.startswith("#") for line in (await served.client.get("/metrics")).text.splitlines())

    async def strangers(first: int, count: int) -> None:
        requests = []
        for number in range(first, first + count):
            model = f'{number}"}}\n{{le="{number}\\'
            requests.append(post(URL, {**CHAT, "model": model}, b"authorization: Bearer %d\r\n" % number))
            requests.append(post(f"/nowhere/{number}", CHAT))
            requests.append(b"PROPFIND /%d HTTP/1.1\r\nhost: host-%d\r\n\r\n" % (number, number))
        async with raw_client(served.port) as client:
            sending = asyncio.create_task(client.send(*requests))
            for _ in requests:
                assert (await read_answer(client.reader)).status == 404
            await sending

    await strangers(0, 1)
    before = await series()
    await strangers(1, 300)

    assert await series() == before


async def test_t80_no_site_is_allowed_in_by_a_browser(lab: Lab) -> None:
    allowed = b"access-control-allow-origin: *\r\naccess-control-allow-credentials: true\r\n"
    served = await lab.router(raw(json_response({}, headers=allowed)))
    origin = {"origin": "https://evil", "access-control-request-method": "POST"}

    answers = [
        await served.client.options(URL, headers=origin),
        await served.client.post(URL, json=CHAT, headers=origin),
        await served.client.get("/v1/models", headers=origin),
        await served.client.get("/nope", headers=origin),
    ]

    assert [answer.status_code for answer in answers] == [405, 200, 200, 404]
    assert not [name for answer in answers for name in answer.headers if name.startswith("access-control-")]
