"""A control plane that takes usage records and reports, and gives overrides, as the contract says (5 to 7); and that
misbehaves on order.
"""

import asyncio
import gzip
import hashlib
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import Any

import orjson

from tests.fakes import Line, Received, ScriptedServer, json_response

# What a control plane does with a batch instead of storing it and saying so.
Mishap = Callable[["ControlPlane", list[dict[str, Any]], Line], Awaitable[None]]

MAX_RECORDS, MAX_BYTES = 1000, 1024 * 1024


class ControlPlane(ScriptedServer):
    """`stored`: every record by its id; `seen`: how often each was sent; `batches`: sizes of all POSTs.

    `mishap` happens to every batch while it is set; `refuses`: records that are refused one by one.
    """

    def __init__(self, port: int = 0) -> None:
        super().__init__(self._serve, port=port)
        self.stored: dict[str, dict[str, Any]] = {}
        self.seen: Counter[str] = Counter()
        self.batches: list[int] = []
        self.mishap: Mishap | None = None
        self.refuses: Callable[[dict[str, Any]], bool] = lambda record: False
        # None: 503
        self.models: list[dict[str, Any]] | None = []
        # Documents by path, with an ETag and long polls; the polls of each, and how many wait now
        self.documents: dict[str, bytes] = {}
        self.polls: list[Received] = []
        self.waiting: Counter[str] = Counter()
        self.waits = True
        self._changed = asyncio.Event()
        # Reports as they came, and by what they are answered; `etags` are added to those of the documents.
        self.reports: list[dict[str, Any]] = []
        self.reporters: list[Received] = []
        self.report_answer: Callable[[], bytes | None] = lambda: json_response({"etags": self.etags()})
        self.order()

    # Documents

    def order(self, *overrides: dict[str, Any]) -> None:
        """The overrides that hold from now on."""
        self.give("/overrides", {"overrides": list(overrides)})

    def give(self, path: str, document: Any) -> None:
        self.documents[path] = document if isinstance(document, bytes) else orjson.dumps(document)
        self._changed.set()
        self._changed = asyncio.Event()

    def etag(self, path: str) -> str:
        return f'"{hashlib.sha256(self.documents[path]).hexdigest()[:16]}"'

    def etags(self) -> dict[str, str]:
        return {path[1:]: self.etag(path) for path in self.documents}

    async def _give(self, request: Received, line: Line) -> None:
        path = request.target
        self.polls.append(request)
        asked = request.header("if-none-match")
        applied = b""
        if asked == self.etag(path) and self.waits and (request.header("prefer") or "").startswith("wait="):
            applied = b"preference-applied: wait=25\r\n"
            await self._wait(path, line)
        head = f"etag: {self.etag(path)}\r\ncache-control: no-cache\r\n".encode() + applied
        if asked == self.etag(path):
            await line.send(b"HTTP/1.1 304 Not Modified\r\n" + head + b"\r\n")
        else:
            await line.send(json_response(orjson.loads(self.documents[path]), headers=head))

    async def _wait(self, path: str, line: Line) -> None:
        known, gone = self.etag(path), asyncio.create_task(line.gone())
        self.waiting[path] += 1
        try:
            async with asyncio.timeout(25):
                while known == self.etag(path) and not gone.done():
                    changed = asyncio.create_task(self._changed.wait())
                    await asyncio.wait({changed, gone}, return_when=asyncio.FIRST_COMPLETED)
                    changed.cancel()
        except TimeoutError:
            pass
        finally:
            self.waiting[path] -= 1
            gone.cancel()

    async def _take_report(self, request: Received, line: Line) -> None:
        self.reporters.append(request)
        self.reports.append(orjson.loads(request.body))
        answer = self.report_answer()
        if answer is None:
            await line.gone()
        else:
            await line.send(answer)

    # Usage

    def store(self, records: list[dict[str, Any]]) -> dict[str, Any]:
        answer: dict[str, Any] = {"accepted": 0, "duplicates": 0, "refused": []}
        for index, record in enumerate(records):
            if self.refuses(record):
                refusal = {"index": index, "id": record["id"], "code": "clock_skew", "message": "at is 9 days old"}
                answer["refused"].append(refusal)
            elif record["id"] in self.stored:
                answer["duplicates"] += 1
            else:
                self.stored[record["id"]] = record
                answer["accepted"] += 1
        return answer

    async def _serve(self, request: Received, line: Line) -> None:
        if request.method == "GET":
            if request.target in self.documents:
                await self._give(request, line)
            else:
                status = "503 Service Unavailable" if self.models is None else "200 OK"
                await line.send(json_response({"models": self.models}, status))
            return
        if request.method == "PUT" and request.target.startswith("/routers/"):
            await self._take_report(request, line)
            return
        if request.target.startswith("/activations/"):
            await line.send(json_response({}, "404 Not Found"))
            return
        assert request.target == "/usage"
        assert request.header("content-encoding") == "gzip"
        text = gzip.decompress(request.body)
        records: list[dict[str, Any]] = orjson.loads(text)["records"]
        assert len(text) <= MAX_BYTES
        assert 1 <= len(records) <= MAX_RECORDS
        self.batches.append(len(records))
        self.seen.update(record["id"] for record in records)
        if self.mishap is not None:
            await self.mishap(self, records, line)
        else:
            await line.send(json_response(self.store(records)))


_NUMBERS = iter(range(10**9))


def override(backend: str, action: str = "drain", **more: Any) -> dict[str, Any]:
    """An override for the backend with this label, with an id of its own. `expires_in`: seconds."""
    ends = more.pop("expires_in", None)
    return {
        "id": f"ovr_{next(_NUMBERS):026d}",
        "backend": backend,
        "model": None,
        "action": action,
        "reason": "driver",
        "created_by": "ana",
        "created_at": at(0),
        "expires_at": None if ends is None else at(ends),
        **more,
    }


def at(seconds: float) -> str:
    """The time in so many seconds."""
    return datetime.fromtimestamp(time.time() + seconds, UTC).isoformat(timespec="milliseconds")[:-6] + "Z"


def error(status: str, code: str) -> bytes:
    detail = {"message": "x", "type": "server_error", "param": None, "code": code}
    return json_response({"error": detail, "request_id": "x"}, status)


def answers(status: str, code: str) -> Mishap:
    async def mishap(plane: ControlPlane, records: list[dict[str, Any]], line: Line) -> None:
        await line.send(error(status, code))

    return mishap


async def resets(plane: ControlPlane, records: list[dict[str, Any]], line: Line) -> None:
    line.reset()


async def stores_and_dies(plane: ControlPlane, records: list[dict[str, Any]], line: Line) -> None:
    plane.store(records)
    line.reset()


async def hangs(plane: ControlPlane, records: list[dict[str, Any]], line: Line) -> None:
    await line.gone()


async def is_slow(plane: ControlPlane, records: list[dict[str, Any]], line: Line) -> None:
    await asyncio.sleep(0.3)
    await line.send(json_response(plane.store(records)))


def chokes_on(bad: Callable[[dict[str, Any]], bool], status: str, most: int = MAX_RECORDS) -> Mishap:
    """Refuses a batch as a whole for one bad record in it, or for its size."""

    async def mishap(plane: ControlPlane, records: list[dict[str, Any]], line: Line) -> None:
        if len(records) > most or any(map(bad, records)):
            await line.send(error(status, "validation_error"))
        else:
            await line.send(json_response(plane.store(records)))

    return mishap
