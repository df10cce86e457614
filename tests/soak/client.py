"""Clients that check every byte they get, and leave when they feel like it."""

import asyncio
import random
import socket
import struct
import uuid
from collections import Counter
from contextlib import suppress

import orjson

# No answer may take longer than the router's own limits allow, by far.
_TIMEOUT = 30.0
_HEAD = (
    b"POST /v1/chat/completions HTTP/1.1\r\nhost: soak\r\nuser-agent: soak\r\n"
    b"content-type: application/json\r\ncontent-length: %d\r\n\r\n"
)


# The models of the catalogue that stand for others, or have features. Of some a request may be executed many times.
ONCE = ("m", "split", "queued")
OFTEN = ("fallback", "race", "consensus", "hedged", "shadowed", "cached")
# The beginning of the nonces of those
MANY_TIMES = "often-"


class Violation(Exception):
    """The router broke its word."""


class Broken(Exception):
    """The connection ended before the answer did: allowed, and to be told from a complete answer."""


class Users:
    """So many at once, so many requests a second together. `ended` counts how requests ended, `violations` say why.

    `many`: the share of requests for other models than `m`.
    """

    def __init__(self, port: int, users: int, rate: float, leaving: float, many: float) -> None:
        self._many = many
        self._port = port
        self._users = users
        self._pause = users / rate
        self._leaving = leaving
        self.ended: Counter[str] = Counter()
        self.violations: list[str] = []
        self.late = 0

    async def run(self, seconds: float) -> None:
        end = asyncio.get_running_loop().time() + seconds
        async with asyncio.TaskGroup() as group:
            for _ in range(self._users):
                group.create_task(self._user(end))

    async def _user(self, end: float) -> None:
        loop = asyncio.get_running_loop()
        connection: Connection | None = None
        while (now := loop.time()) < end:
            if connection is None:
                connection = await Connection.open(self._port)
            outcome = await self._ask(connection)
            self.ended[outcome] += 1
            if outcome not in ("ok", "error_answer", "error_event_passed"):
                connection.close()
                connection = None
            await asyncio.sleep(max(0.0, random.expovariate(1 / self._pause) - (loop.time() - now)))
        if connection is not None:
            connection.close()

    async def _ask(self, connection: "Connection") -> str:
        model = random.choice(ONCE + OFTEN) if random.random() < self._many else "m"
        stream = random.random() < 0.6 and model != "consensus"
        nonce = MANY_TIMES * (model in OFTEN) + uuid.uuid4().hex
        if model == "cached":
            # Few, so that there are hits.
            nonce = f"{MANY_TIMES}{random.randrange(30)}"
        filler = "z" * (0 if model == "cached" else random.choice([0, 10, 300, 20_000]))
        asked = {"model": model, "messages": [filler], "user": nonce, "stream": stream, "temperature": 0}
        body = orjson.dumps(asked)
        try:
            connection.writer.write(_HEAD % len(body) + body)
            if random.random() < self._leaving:
                await connection.leave()
                return "left"
            async with asyncio.timeout(_TIMEOUT):
                return await connection.answer(nonce)
        except Violation as violation:
            self.violations.append(f"{violation} ({model}, nonce {nonce}, {'stream' if stream else 'json'})")
            return "violation"
        except TimeoutError:
            self.violations.append(f"no end within {_TIMEOUT:.0f} s (nonce {nonce})")
            return "violation"
        except (Broken, ConnectionError, asyncio.IncompleteReadError):
            return "cut"


class Connection:
    """One keep-alive connection to the router."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    @classmethod
    async def open(cls, port: int) -> "Connection":
        return cls(*await asyncio.open_connection("127.0.0.1", port))

    def close(self) -> None:
        self.writer.close()

    async def leave(self) -> None:
        """Hang up at some moment, politely or not."""
        with suppress(TimeoutError, asyncio.IncompleteReadError, ConnectionError):
            async with asyncio.timeout(random.choice([0, 0.005, 0.03, 0.1, 0.3])):
                await self.reader.readexactly(1 << 30)
        raw = self.writer.get_extra_info("socket")
        if random.random() < 0.5 and raw is not None:
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.writer.transport.abort()

    async def answer(self, nonce: str) -> str:
        head = await self.reader.readuntil(b"\r\n\r\n")
        status = int(head[9:12])
        lines = head.lower().split(b"\r\n")
        if b"transfer-encoding: chunked" in lines:
            return await self._events(nonce, status)
        length = next((int(line[15:]) for line in lines if line.startswith(b"content-length:")), None)
        if length is None:
            raise Violation(f"an answer without framing: {head!r}")
        body = await self.reader.readexactly(length)
        if status == 200 and any(line.startswith(b"content-type: text/event-stream") for line in lines):
            # From the cache, which knows the length.
            return _complete(body, nonce)
        return _whole(status, body, nonce)

    async def _events(self, nonce: str, status: int) -> str:
        if status != 200:
            raise Violation(f"a stream with the status {status}")
        text = b""
        try:
            while size := int((await self.reader.readuntil(b"\r\n"))[:-2], 16):
                text += (await self.reader.readexactly(size + 2))[:-2]
            await self.reader.readexactly(2)
        except (asyncio.IncompleteReadError, ConnectionError):
            _check_events(text, nonce)
            if b"[DONE]" in text:
                raise Violation("a stream that was cut after its [DONE]") from None
            raise Broken from None
        return _complete(text, nonce)


def _complete(text: bytes, nonce: str) -> str:
    """How a stream that ended cleanly ended."""
    _check_events(text, nonce)
    if not text.endswith(b"data: [DONE]\n\n"):
        # The one clean end without [DONE] there may be: an engine's error event was the last.
        if b'"error"' in text:
            return "error_event_passed"
        raise Violation("a stream that ended cleanly without [DONE]")
    return "error_event_passed" if b'"error"' in text else "ok"


def _check_events(text: bytes, nonce: str) -> None:
    number = 0
    *events, _ = text.split(b"\n\n")
    for event in events:
        if b'"error"' in event or event == b"data: [DONE]":
            continue
        if not event.startswith(b"data: "):
            raise Violation(f"an event that nobody sent: {event[:80]!r}")
        document = orjson.loads(event[6:])
        if document["nonce"] != nonce:
            raise Violation(f"cross-talk: an event of {document['nonce']}")
        if document["n"] != number:
            raise Violation(f"event {number} is missing or doubled")
        number += 1


def _whole(status: int, body: bytes, nonce: str) -> str:
    try:
        document = orjson.loads(body)
    except orjson.JSONDecodeError:
        raise Violation(f"a body that is not JSON, with the status {status}: {body[:80]!r}") from None
    if status == 200:
        if document["nonce"] != nonce:
            raise Violation(f"cross-talk: the answer of {document['nonce']}")
        return "ok"
    if document == {}:
        return "error_answer"  # the engine's own 503
    if set(document) != {"error", "request_id"} or set(document["error"]) != {"message", "type", "param", "code"}:
        raise Violation(f"an error of another form: {body[:200]!r}")
    return "error_answer"
