"""An answer that is sent again: the same bytes, in one write, or in pieces as the client takes them."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from inference_api.http.routes import INFERENCE_ROUTES
from inference_api.models import CLIENT_GONE, OK, Call, RawHeaders, Reply
from inference_api.relay.relay import Relay
from inference_api.relay.replay import PIECE, Replay
from tests.fakes import event, until

pytestmark = pytest.mark.anyio
CHAT = next(route for route in INFERENCE_ROUTES if route.label == "chat_completions")
HEADERS: RawHeaders = [(b"content-type", b"text/event-stream")]
LARGE = b"".join(event(f"{number}") for number in range(1500))


class Client:
    """An ASGI `send`, and with `room` a Direct, too. It takes `reads` messages, and then one for each `read`."""

    frames: Callable[[bytes], None] | None = None

    def __init__(self, reads: int = 1000, room: bool = True) -> None:
        self.messages: list[Any] = []
        self.whole: list[tuple[int, bytes, bytes]] = []
        self.room = room
        self._reads = asyncio.Semaphore(reads)

    async def __call__(self, message: Any) -> None:
        await self._reads.acquire()
        self.messages.append(message)

    def read(self) -> None:
        self._reads.release()

    def respond(self, status: int, lines: bytes, body: bytes) -> bool:
        if self.room:
            self.whole.append((status, lines, body))
        return self.room

    def push(self, body: bytes, more_body: bool) -> bool:
        raise NotImplementedError

    @property
    def body(self) -> bytes:
        return b"".join(message["body"] for message in self.messages[1:])


def relay_of(replay: Replay, client: Client | None = None, **more: Any) -> Relay:
    reply = Reply(200, replay.headers, replay, attempts=0)
    reply.extra = ((b"age", b"1"), b"x-inference-cache: hit\r\n")
    return Relay(reply, Call(CHAT, "m", True, b"", [], "rid", []), direct=client, **more)


async def turns() -> None:
    """What the event loop could do by now is done."""
    for _ in range(20):
        await asyncio.sleep(0)


@pytest.mark.parametrize("body", [b"", event("a"), LARGE])
async def test_it_is_one_write(body: bytes) -> None:
    replay, client = Replay(HEADERS, body), Client()
    relay = relay_of(replay, client)

    outcome = await relay(client)

    lines = b"content-type: text/event-stream\r\ncontent-length: %d\r\n" % len(body)
    lines += b"x-request-id: rid\r\nage: 1\r\nx-inference-cache: hit\r\n"
    assert client.whole == [(200, lines, body)]
    # No copy: that would be one for each client that does not read.
    assert client.whole[0][2] is body
    assert (outcome, relay.status, relay.size, client.messages) == (OK, 200, len(body), [])
    # Its tokens were counted when an engine made them.
    assert (relay.usage(), relay.streamed_events, relay.first_at > 0) == (None, 0, True)


@pytest.mark.parametrize("body", [b"", event("a"), LARGE])
async def test_without_a_short_cut_it_goes_by_messages(body: bytes) -> None:
    client = Client(room=False)

    relay = relay_of(Replay(HEADERS, body), client)
    outcome = await relay(client)

    headers = dict(client.messages[0]["headers"])
    assert headers[b"content-length"] == b"%d" % len(body)
    assert (headers[b"x-request-id"], headers[b"age"], headers[b"x-inference-cache"]) == (b"rid", b"1", b"hit")
    assert (client.body, client.messages[-1]["more_body"]) == (body, False)
    assert (outcome, relay.size) == (OK, len(body))


async def test_in_pieces_it_waits_for_its_client() -> None:
    """One piece at most is on its way to a client that does not read."""
    client = Client(reads=2, room=False)
    sending = asyncio.create_task(relay_of(Replay(HEADERS, LARGE), client)(client))
    await until(lambda: len(client.messages) == 2)
    await turns()
    assert (len(client.body), client.whole) == (PIECE, [])

    client.read()
    await turns()
    assert len(client.body) == 2 * PIECE

    for _ in range(10):
        client.read()
    assert await sending is OK
    assert client.body == LARGE


async def test_a_client_that_never_reads_is_given_up() -> None:
    client = Client(reads=2, room=False)

    outcome = await relay_of(Replay(HEADERS, LARGE), client, write_stall=0.01)(client)

    assert outcome is CLIENT_GONE


async def test_many_share_one() -> None:
    replay = Replay(HEADERS, LARGE)
    clients = [Client() for _ in range(5)]

    await asyncio.gather(*(relay_of(replay)(client) for client in clients))

    assert {client.body for client in clients} == {LARGE}
