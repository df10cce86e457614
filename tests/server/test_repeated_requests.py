"""A head that a connection has seen before is not parsed again: nobody must be able to tell."""

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import orjson
import pytest

from tests.conftest import Served
from tests.fakes import CHAT, COMPLETION, Answer, FakeEngine, Line, json_response, post, raw_client, read_answer, until

pytestmark = pytest.mark.anyio
URL = "/v1/chat/completions"
# An SDK's, and it names no request id: each request is to get one of its own.
SDK = b"accept: application/json\r\nuser-agent: OpenAI/Python 2.1.0\r\nauthorization: Bearer secret\r\n"


def body(text: str = "") -> bytes:
    return orjson.dumps({**CHAT, "user": text})


def request(text: str = "", headers: bytes = SDK) -> bytes:
    return post(URL, body(text), headers)


@asynccontextmanager
async def knowing(served: Served) -> AsyncIterator[Line]:
    """A connection that has learnt the head of `request()`."""
    async with raw_client(served.port) as client:
        for _ in range(3):
            assert (await talk(client, request("known"))).status == 200
        yield client


async def talk(client: Line, *parts: bytes) -> Answer:
    await client.send(*parts)
    return await read_answer(client.reader)


async def test_every_body_arrives_whatever_its_length(served: Served, engine: FakeEngine) -> None:
    texts = ["x" * size for size in (0, 1, 1, 40, 7, 900, 30_000, 2, 0)]

    async with knowing(served) as client:
        engine.requests.clear()
        answers = [await talk(client, request(text)) for text in texts]

    assert [answer.status for answer in answers] == [200] * len(texts)
    assert [received.body for received in engine.requests] == [body(text) for text in texts]
    assert [received.header("content-length") for received in engine.requests] == [str(len(body(t))) for t in texts]
    assert {received.header("user-agent") for received in engine.requests} == {"OpenAI/Python 2.1.0"}
    assert all(received.header("authorization") is None for received in engine.requests)
    assert len({answer.headers["x-request-id"] for answer in answers}) == len(texts)


async def test_a_request_id_of_the_clients_own_is_kept(served: Served) -> None:
    async with raw_client(served.port) as client:
        answers = [await talk(client, request("a", b"x-request-id: mine\r\n")) for _ in range(5)]

    assert {answer.headers["x-request-id"] for answer in answers} == {"mine"}


async def test_another_head_is_another_head(served: Served, engine: FakeEngine) -> None:
    async with knowing(served) as client:
        agent = await talk(client, request("a", SDK.replace(b"2.1.0", b"2.1.1")))
        path = await talk(client, request().replace(b"chat/completions", b"nowhere/at-all"))
        method = await talk(client, request().replace(b"POST ", b"PUT ", 1))
        again = await talk(client, request("b"))

    assert [answer.status for answer in (agent, path, method, again)] == [200, 404, 405, 200]
    assert engine.requests[-2].header("user-agent") == "OpenAI/Python 2.1.1"
    assert engine.requests[-1].header("user-agent") == "OpenAI/Python 2.1.0"


@pytest.mark.parametrize(
    "length", [b"+71", b"-1", b"7 1", b"0x47", b"7_1", b"71, 71", b"", b"\xb2", b"71\r\ncontent-length: 71"]
)
async def test_a_length_that_is_none_is_refused_as_ever(length: bytes, served: Served, engine: FakeEngine) -> None:
    async with knowing(served) as client:
        engine.requests.clear()
        sent = request("known")
        sound = b"content-length: %d" % len(body("known"))
        assert sound in sent
        answer = await talk(client, sent.replace(sound, b"content-length: " + length))
        rest = await client.reader.read(-1)

    assert (answer.status, answer.headers["connection"], rest) == (400, "close", b"")
    assert engine.requests == []


async def test_a_chunked_body_hides_behind_no_known_head(served: Served, engine: FakeEngine) -> None:
    async with knowing(served) as client:
        engine.requests.clear()
        answer = await talk(client, request("known", SDK + b"transfer-encoding: chunked\r\n"))

    assert answer.status == 400
    assert engine.requests == []


async def test_what_is_invalid_is_refused_and_the_connection_goes_on(served: Served) -> None:
    async with knowing(served) as client:
        broken = await talk(client, post(URL, b"{", SDK))
        unknown = await talk(client, post(URL, {**CHAT, "model": "no"}, SDK))
        sound = await talk(client, request("a"))

    assert [answer.status for answer in (broken, unknown, sound)] == [400, 404, 200]


async def test_a_body_over_the_limit_is_refused(
    start_engine: Callable[..., Any], start_router: Callable[..., Any]
) -> None:
    served = await start_router(await start_engine(), max_body_bytes=1000)

    async with knowing(served) as client:
        answer = await talk(client, request("x" * 1000))

    assert (answer.status, answer.headers["connection"]) == (413, "close")


async def test_requests_in_any_pieces_are_answered_in_their_order(served: Served, engine: FakeEngine) -> None:
    rand = random.Random(7)

    async def echo(received: Any, line: Line) -> None:
        await line.send(json_response(COMPLETION | {"user": orjson.loads(received.body)["user"]}))

    engine.script = echo
    async with knowing(served) as client:
        for _ in range(30):
            texts = ["x" * rand.choice([0, 1, 5, 5, 5, 300]) + str(rand.random()) for _ in range(rand.randint(1, 6))]
            data = b"".join(request(text, rand.choice([SDK, SDK, SDK, b"accept: */*\r\n"])) for text in texts)
            cuts = sorted(rand.randrange(len(data)) for _ in range(rand.choice([0, 0, 1, 4])))
            await client.send(*(data[a:b] for a, b in zip([0, *cuts], [*cuts, len(data)], strict=True)))
            answers = [await read_answer(client.reader) for _ in texts]
            assert [orjson.loads(answer.body)["user"] for answer in answers] == texts


@pytest.mark.parametrize(
    "begun", [b"POST /evil HTTP/1.1\r\nX-Ignored: ", b"POST /evil HTTP/1.1\r\n", b"POST /evil", b"P"]
)
async def test_what_a_read_ended_within_is_gone_on_with(begun: bytes, served: Served, engine: FakeEngine) -> None:
    async def answers(client: Line) -> list[int]:
        """Of a request with the beginning of another one behind it, and of what then looks like a known one."""
        first = await talk(client, request("known") + begun)
        await asyncio.sleep(0.05)
        return [first.status, (await talk(client, request("known"))).status]

    async with raw_client(served.port) as client:
        by_parser = await answers(client)
    async with knowing(served) as client:
        engine.requests.clear()
        assert await answers(client) == by_parser

    assert by_parser[1] in (400, 404, 405)
    assert len(engine.requests) == 1


async def test_a_client_that_leaves_is_noticed(served: Served, engine: FakeEngine) -> None:
    gone: list[None] = []

    async def script(received: Any, line: Line) -> None:
        await line.gone()
        gone.append(None)

    async with knowing(served) as client:
        engine.script = script
        await client.send(request("a"))
        await until(lambda: engine.busy)
    await until(lambda: gone)
    await until(lambda: served.lines and served.lines[-1]["outcome"] == "client_gone")
