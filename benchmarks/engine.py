"""A stand-in for vLLM that costs next to nothing: canned answers, and streams paced so that every event travels alone.

It exists beside inference_api.demo.engine, which answers the whole API, because a measurement must be of the router:
this one does almost nothing, and benchmarks/baseline.json holds for its bytes and its pace.

python -m benchmarks.engine --port 9000
"""

import argparse
import asyncio
import json
import random
import time
from collections.abc import Callable
from typing import cast

import uvloop

from benchmarks import wire
from benchmarks.setup import loopback


def response(status: bytes, content_type: bytes, body: bytes) -> bytes:
    head = b"HTTP/1.1 %b\r\ndate: Fri, 21 Nov 2025 02:00:00 GMT\r\nserver: uvicorn\r\n" % status
    return head + b"content-length: %d\r\ncontent-type: %b\r\n\r\n%b" % (len(body), content_type, body)


_JSON = response(b"200 OK", b"application/json", wire.ANSWER)
_EMBEDDINGS = response(b"200 OK", b"application/json", wire.EMBEDDINGS)
_EMBEDDINGS_START = b"post " + wire.EMBEDDINGS_PATH.encode()
# Whoever asks with more than this wants no stream: to search a megabyte for it would cost more than all the rest.
_LONG = 64 * 1024
PAGES = {
    b"/health": response(b"200 OK", b"text/plain", b""),
    b"/v1/models": response(b"200 OK", b"application/json", wire.MODELS),
}
NOT_FOUND = response(b"404 Not Found", b"application/json", b'{"detail":"Not Found"}')
_LENGTH_REQUIRED = response(b"411 Length Required", b"application/json", b'{"detail":"send Content-Length"}')


class EngineProtocol(asyncio.Protocol):
    """One connection: requests are answered in order, a stream before the next request."""

    transport: asyncio.Transport
    write: Callable[[bytes], None]

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.buffer = bytearray()
        self.wanted = 0
        self.left = 0
        self.interval = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.write = self.transport.write

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        if len(self.buffer) >= self.wanted:
            self._answer_all()

    def _answer_all(self) -> None:
        while self.buffer and not self.left:
            end = self.buffer.find(b"\r\n\r\n") + 4
            if end < 4:
                return
            head = bytes(self.buffer[:end]).lower()
            self.wanted = end + _content_length(head)
            if len(self.buffer) < self.wanted:
                return
            body = bytes(self.buffer[end : self.wanted])
            del self.buffer[: self.wanted]
            self.wanted = 0
            self._answer(head, body)

    def _answer(self, head: bytes, body: bytes) -> None:
        if head.startswith(b"get "):
            self.write(PAGES.get(page_of(head), NOT_FOUND))
        elif b"\r\ntransfer-encoding:" in head:
            self.write(_LENGTH_REQUIRED)
            self.transport.close()
        elif head.startswith(_EMBEDDINGS_START):
            self.write(_EMBEDDINGS)
        elif len(body) < _LONG and (b'"stream":true' in body or b'"stream": true' in body):
            call = json.loads(body)
            # One router renames the first on the way.
            self.left = int(call.get("max_tokens") or call["max_completion_tokens"])
            self.interval = call["seed"] / 1000
            self.write(wire.STREAM_HEAD + wire.frame(wire.FIRST_EVENT))
            # Streams that start together must not tick together, or the router would get them in bursts.
            self.loop.call_later(self.interval * random.uniform(0.5, 1.5), self._tick)
        else:
            self.write(_JSON)

    def _tick(self) -> None:
        if self.transport.is_closing():
            return
        # Armed from now, not from the plan: a late tick must not be followed by an early one.
        self.loop.call_later(self.interval, self._tick if self.left > 1 else self._end)
        self.left -= self.left > 1
        self.write(wire.stamped_frame(time.monotonic_ns()))

    def _end(self) -> None:
        self.left = 0
        self.write(wire.STREAM_END)
        self._answer_all()


def page_of(head: bytes) -> bytes:
    """The path of a GET."""
    return head.split(b" ", 2)[1].split(b"?")[0]


def _content_length(head: bytes) -> int:
    at = head.find(b"\r\ncontent-length:")
    return int(head[at + 17 : head.index(b"\r\n", at + 2)]) if at >= 0 else 0


async def serve(port: int, addresses: int) -> None:
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: EngineProtocol(loop), loopback(addresses), port, backlog=4096)
    await server.serve_forever()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--addresses", type=int, default=1, help="how many to listen on, from 127.0.0.1 on")
    options = parser.parse_args()
    uvloop.run(serve(options.port, options.addresses))
