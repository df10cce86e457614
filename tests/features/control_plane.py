"""A control plane that takes usage records, as contract section 5 says, and that misbehaves on order."""

import asyncio
import gzip
from collections import Counter
from collections.abc import Awaitable, Callable
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
        self.models: list[dict[str, Any]] = []

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
            await line.send(json_response({"models": self.models}))
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
