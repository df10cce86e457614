"""An engine that misbehaves at random: every answer holds the nonce of its request, every execution is written down.

Beside the engines of tests/fakes.py, on whose sockets it stands, because it is killed as a process of its own. The
journal is one file for all engines, appended to in the order of events: `S nonce` a request was executed, `A nonce`
the first byte of its answer went out.
"""

import argparse
import asyncio
import os
import random

import orjson
import uvloop

from tests.fakes import DONE, LAST_CHUNK, SSE_HEAD, FakeEngine, Line, Received, chunk, json_response

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
_ERROR = b'data: {"error": {"message": "engine", "code": 500}}\n\n'


class Engine(FakeEngine):
    """`faults`: the share of requests that go wrong; `journal`: an open file."""

    def __init__(self, port: int, faults: float, journal: int) -> None:
        super().__init__(port=port)
        self._faults = faults
        self._journal = journal

    async def serve(self, request: Received, line: Line) -> None:
        if request.method == "GET":
            await line.send(json_response({}))
            return
        asked = orjson.loads(request.body)
        nonce, stream = str(asked["user"]), bool(asked.get("stream"))
        spoiled = random.random() < self._faults
        fault = random.choices(list(FAULTS), list(FAULTS.values()))[0] if spoiled else ""
        if fault == "unavailable":
            await line.send(json_response({}, "503 No"))
            return
        self._note("S", nonce)
        await asyncio.sleep(random.expovariate(1 / 0.02) if fault != "slow" else 0.7)
        if fault == "reset_unanswered":
            line.reset()
        elif fault == "silence":
            await line.gone()
            line.close()
        elif line.left:
            line.close()
        else:
            self._note("A", nonce)
            if fault == "garbage":
                await line.send(b"SSH-2.0-OpenSSH_9.2\r\n")
                line.close()
            else:
                await (self._stream if stream else self._whole)(line, nonce, fault)

    async def _whole(self, line: Line, nonce: str, fault: str) -> None:
        filler = "x" * random.randrange(3000)
        choices = [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": nonce}}]
        document = {"nonce": nonce, "filler": filler, "choices": choices, "usage": {"prompt_tokens": 1}}
        answer = json_response(document)
        if fault in ("reset_in_stream", "cut_in_event"):
            await line.send(answer[:-1])
            line.close()
        else:
            await line.send(answer + (b"HTTP/1.1 200 OK\r\n" if fault == "surplus" else b""))

    async def _stream(self, line: Line, nonce: str, fault: str) -> None:
        await line.send(SSE_HEAD)
        count = random.randrange(1, 30)
        breaks_at = random.randrange(count)
        for number in range(count):
            filler = "y" * random.randrange(200)
            event = b"data: " + orjson.dumps({"nonce": nonce, "n": number, "filler": filler}) + b"\n\n"
            if number == breaks_at and fault == "reset_in_stream":
                line.reset()
                return
            if number == breaks_at and fault == "cut_in_event":
                await line.send(chunk(event[:20]))
                line.close()
                return
            await _send_chunk(line, event)
            await asyncio.sleep(0.7 if fault == "slow" and number == breaks_at else random.expovariate(1 / 0.01))
        if fault == "error_event":
            await _send_chunk(line, _ERROR)
        if fault != "no_done":
            await _send_chunk(line, DONE)
        await line.send(LAST_CHUNK + (b"data: poison\n\n" if fault == "surplus" else b""))

    def _note(self, kind: str, nonce: str) -> None:
        os.write(self._journal, f"{kind} {nonce}\n".encode())


async def _send_chunk(line: Line, data: bytes) -> None:
    # In one piece or in two: the router must not mind.
    frame = chunk(data)
    at = random.randrange(1, len(frame)) if random.random() < 0.2 else len(frame)
    await line.send(*(part for part in (frame[:at], frame[at:]) if part))


async def serve(port: int, faults: float, journal: str) -> None:
    file = os.open(journal, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    async with Engine(port, faults, file):
        await asyncio.Event().wait()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--faults", type=float, default=0.0)
    parser.add_argument("--journal", required=True)
    options = parser.parse_args()
    uvloop.run(serve(options.port, options.faults, options.journal))
