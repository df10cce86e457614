"""For tests of requests that wait: an engine that answers when it is told to, and what the router shows of waiting."""

import asyncio
from pathlib import Path
from typing import Any

import httpx
import orjson

from inference_api.features.queueing.waits import Kind, Waits
from tests.conftest import Served
from tests.fakes import CHAT, COMPLETION, Line, Received, Script, answer, json_response, until
from tests.policies import NewKey, bearer, entry, new_key, write

URL = "/v1/chat/completions"


class Paced:
    """A script that answers each request when the test says so. `who`: the field `user` of each, as they arrived."""

    def __init__(self, then: Script = answer) -> None:
        self._then = then
        self.who: list[str] = []
        self._go: list[asyncio.Event] = []

    async def __call__(self, request: Received, line: Line) -> None:
        go = asyncio.Event()
        self._go.append(go)
        self.who.append(orjson.loads(request.body).get("user", ""))
        gone = asyncio.create_task(line.gone())
        released = asyncio.create_task(go.wait())
        try:
            await asyncio.wait({gone, released}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (gone, released):
                task.cancel()
            await asyncio.gather(gone, released, return_exceptions=True)
        if go.is_set():
            await self._then(request, line)
        else:
            line.close()

    async def arrived(self, requests: int) -> None:
        await until(lambda: len(self.who) >= requests)

    def answer(self, number: int) -> None:
        """Let the answer to this request go out, from 0."""
        self._go[number].set()

    async def answer_all(self, requests: int) -> None:
        """Answer so many, one after the other."""
        for number in range(requests):
            await self.arrived(number + 1)
            self.answer(number)


async def whole(request: Received, line: Line) -> None:
    await line.send(json_response(COMPLETION))


# A key for each name, the same in all tests
_KEYS: dict[str, NewKey] = {}


def callers(tmp_path: Path, **keys: dict[str, Any]) -> dict[str, Any]:
    """The settings of a router with a policy of these keys, by name."""
    document = {"keys": [entry(_key(name), name, **more) for name, more in keys.items()]}
    return {"policy": str(write(tmp_path / "policy.json", document)), "auth": "keys"}


def _key(name: str) -> NewKey:
    if name not in _KEYS:
        _KEYS[name] = new_key()
    return _KEYS[name]


def asking(served: Served, user: str = "", **more: Any) -> "asyncio.Task[httpx.Response]":
    """A request that is on its way."""
    headers = bearer(_key(more.pop("key")).key) if "key" in more else {}
    body = {**CHAT, "user": user, **more}
    return asyncio.create_task(served.client.post(URL, json=body, headers=headers, timeout=30))


def depth(served: Served, kind: Kind = "queue", model: str = "m") -> int:
    """How many requests wait, without a scrape."""
    waits = served.router.core.provided(Waits)
    assert waits is not None
    return waits.depth(model, kind)


async def waiting(served: Served, requests: int, kind: Kind = "queue", model: str = "m") -> None:
    await until(lambda: depth(served, kind, model) == requests)


def error(answer: httpx.Response) -> tuple[int, str, str, str | None]:
    """Status, code, message and Retry-After."""
    found = answer.json()["error"]
    return answer.status_code, found["code"], found["message"], answer.headers.get("retry-after")
