"""An engine that misbehaves at random: every answer holds the nonce of its request, every execution is written down.

The journal is one file for all engines, appended to in the order of events: `S nonce` a request was executed, `A nonce`
the first byte of its answer went out.
"""

import argparse
import asyncio
import os
import random
import socket
import struct
from typing import cast

import orjson
import uvloop

# Share of each among the requests that go wrong.
FAULTS = {
    "reset_unanswered": 3,
    "reset_in_stream": 3,
    "cut_in_event": 2,
    "silence": 1,
    "garbage": 2,
    "unavailable": 3,
    "no_done": 2,
    "error_event": 2,
    "surplus": 1,
    "slow": 4,
}
_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: %b\r\n"


class Engine(asyncio.Protocol):
    """One connection; one request at a time, as HTTP/1.1 without pipelining has it."""

    def __init__(self, faults: float, journal: int) -> None:
        self._faults = faults
        self._journal = journal
        self._buffer = b""
        self._transport: asyncio.Transport = cast(asyncio.Transport, None)
        self._task: asyncio.Task[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._task is not None:
            self._task.cancel()

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        head, found, rest = self._buffer.partition(b"\r\n\r\n")
        if not found:
            return
        length = 0
        for line in head.lower().split(b"\r\n"):
            if line.startswith(b"content-length:"):
                length = int(line[15:])
        if len(rest) >= length:
            self._buffer = rest[length:]
            if head.startswith(b"POST"):
                self._task = asyncio.get_running_loop().create_task(self._answer(orjson.loads(rest[:length])))
            else:
                self._write(_HEAD % b"application/json" + b"content-length: 2\r\n\r\n{}")

    async def _answer(self, request: dict[str, object]) -> None:
        nonce = str(request["user"])
        stream = bool(request.get("stream"))
        fault = ""
        if random.random() < self._faults:
            fault = random.choices(list(FAULTS), list(FAULTS.values()))[0]
        if fault == "unavailable":
            self._write(b"HTTP/1.1 503 No\r\ncontent-type: application/json\r\ncontent-length: 2\r\n\r\n{}")
            return
        os.write(self._journal, f"S {nonce}\n".encode())
        await asyncio.sleep(random.expovariate(1 / 0.02) if fault != "slow" else 0.7)
        if fault == "reset_unanswered":
            self._reset()
        elif fault == "silence":
            await asyncio.sleep(3600)
        else:
            os.write(self._journal, f"A {nonce}\n".encode())
            if fault == "garbage":
                self._write(b"SSH-2.0-OpenSSH_9.2\r\n")
                self._transport.close()
            elif stream:
                await self._stream(nonce, fault)
            else:
                self._whole(nonce, fault)

    def _whole(self, nonce: str, fault: str) -> None:
        body = orjson.dumps({"nonce": nonce, "filler": "x" * random.randrange(3000), "usage": {"prompt_tokens": 1}})
        head = _HEAD % b"application/json" + b"content-length: %d\r\n\r\n" % len(body)
        if fault in ("reset_in_stream", "cut_in_event"):
            self._write(head + body[:-1])
            self._transport.close()
        else:
            self._write(head + body + (b"HTTP/1.1 200 OK\r\n" if fault == "surplus" else b""))

    async def _stream(self, nonce: str, fault: str) -> None:
        self._write(_HEAD % b"text/event-stream" + b"transfer-encoding: chunked\r\n\r\n")
        count = random.randrange(1, 30)
        breaks_at = random.randrange(count)
        for number in range(count):
            event = (
                b"data: " + orjson.dumps({"nonce": nonce, "n": number, "filler": "y" * random.randrange(200)}) + b"\n\n"
            )
            if number == breaks_at and fault == "reset_in_stream":
                self._reset()
                return
            if number == breaks_at and fault == "cut_in_event":
                self._chunk(event[:20])
                self._transport.close()
                return
            self._chunk(event)
            await asyncio.sleep(0.7 if fault == "slow" and number == breaks_at else random.expovariate(1 / 0.01))
        if fault == "error_event":
            self._chunk(b'data: {"error": {"message": "engine", "code": 500}}\n\n')
        if fault != "no_done":
            self._chunk(b"data: [DONE]\n\n")
        self._write(b"0\r\n\r\n" + (b"data: poison\n\n" if fault == "surplus" else b""))

    def _chunk(self, data: bytes) -> None:
        # In one piece or in two: the router must not mind.
        frame = b"%x\r\n%b\r\n" % (len(data), data)
        at = random.randrange(len(frame)) if random.random() < 0.2 else 0
        if at:
            self._write(frame[:at])
        self._write(frame[at:])

    def _write(self, data: bytes) -> None:
        if not self._transport.is_closing():
            self._transport.write(data)

    def _reset(self) -> None:
        raw = self._transport.get_extra_info("socket")
        if raw is not None and not self._transport.is_closing():
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._transport.abort()


async def serve(port: int, faults: float, journal: str) -> None:
    file = os.open(journal, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    server = await asyncio.get_running_loop().create_server(lambda: Engine(faults, file), "127.0.0.1", port)
    await server.serve_forever()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--faults", type=float, default=0.0)
    parser.add_argument("--journal", required=True)
    options = parser.parse_args()
    uvloop.run(serve(options.port, options.faults, options.journal))
