"""One small request through the router, step by step: what an operator tries before looking any further."""

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any, Literal, NamedTuple

import orjson

from control_plane.clients.router import AT_ONCE, Answer, Router, RouterAway, TooManyAnswers
from control_plane.errors import Refused
from control_plane.http.console.shell import Visit
from control_plane.pure import figures
from control_plane.pure.fleet import ModelStanding
from control_plane.services import lending, playground

# Seconds for the whole of it, tokens that are asked for, bytes of the answer that are read
SECONDS, _TOKENS, _MOST = 60.0, 16, 256 * 1024
_PROMPT = "Say hello."


class Step(NamedTuple):
    """`took`: milliseconds. `request_id`: of the request that it was."""

    name: str
    verdict: Literal["ok", "failed", "degraded"]
    words: str
    took: float | None = None
    request_id: str | None = None


async def tried(visit: Visit, router: Router, standing: ModelStanding) -> list[Step]:
    """The steps up to the first that failed."""
    found = [_backends(standing)]
    try:
        async with asyncio.timeout(SECONDS):
            async for step in _asked(visit, router, standing.name):
                found.append(step)
    except TimeoutError:
        found.append(Step("Answer", "failed", f"It has not ended in {SECONDS:.0f} s, and was given up."))
    return found


def _backends(standing: ModelStanding) -> Step:
    verdict: Literal["ok", "failed", "degraded"] = "ok" if standing.state == "ok" else "degraded"
    return Step("Backends, as routers report them", verdict, standing.sentence)


async def _asked(visit: Visit, router: Router, model: str) -> AsyncIterator[Step]:
    began = time.monotonic()
    try:
        borrower = playground.borrower(visit.act, None)
        loan = await lending.lend(visit.plane, visit.act, borrower)
    except Refused as exc:
        yield Step("Key", "failed", exc.message)
        return
    yield Step("Key", "ok", "A key of the playground, which is counted as all others.", _since(began))
    body = {
        "model": model,
        "stream": True,
        "max_tokens": _TOKENS,
        "messages": [{"role": "user", "content": _PROMPT}],
    }
    began = time.monotonic()
    try:
        with router.turn(visit.act.principal.user or ""):
            async with router.ask(loan.key, orjson.dumps(body)) as answer:
                async for step in _answered(answer, began):
                    yield step
                if answer.status == 401:
                    lending.forget(visit.plane, visit.act, borrower)
    except TooManyAnswers:
        yield Step("Router", "failed", f"You have {AT_ONCE} answers at once already: wait for one of them.")
    except RouterAway as exc:
        words = str(exc)
        yield Step("Router", "failed", f"{words[0].upper()}{words[1:]}. ROUTER_URL names it.", _since(began))


async def _answered(answer: Answer, began: float) -> AsyncIterator[Step]:
    id = answer.headers.get("x-request-id")
    if answer.status != 200:
        words = f"{answer.status}: {_message(await _read(answer))}"
        yield Step("Router", "failed", words, _since(began), id)
        return
    by = answer.headers.get("x-inference-model")
    words = f"200{f', by the model {by}' if by else ''}"
    yield Step("Router", "ok", words, _since(began), id)
    first: float | None = None
    text, size, rest = "", 0, b""
    async for chunk in answer.body:
        if first is None:
            first = _since(began)
        size += len(chunk)
        *lines, rest = (rest + chunk).split(b"\n")
        text += "".join(_content(line) for line in lines)
        if size > _MOST:
            break
    if first is None:
        yield Step("First byte", "failed", "The answer ended without a byte.", _since(began))
        return
    yield Step("First byte", "ok", "of the stream", first)
    if not text:
        yield Step("Answer", "degraded", "It ended without a word: the model may not be one that chats.", _since(began))
        return
    yield Step("Answer", "ok", f"“{text[:200]}”", _since(began))


async def _read(answer: Answer) -> bytes:
    found = b""
    async for chunk in answer.body:
        found += chunk
        if len(found) > _MOST:
            break
    return found


def _message(content: bytes) -> str:
    try:
        error: Any = orjson.loads(content)["error"]
        return f"{error['code']}: {error['message']}"[:500]
    except (orjson.JSONDecodeError, KeyError, TypeError):
        return f"{figures.bytes(len(content))} that are no error of the router"


def _content(line: bytes) -> str:
    """The words of one event."""
    if not line.startswith(b"data:") or line.strip() == b"data: [DONE]":
        return ""
    try:
        delta = orjson.loads(line[5:])["choices"][0]["delta"]
        return str(delta.get("content") or delta.get("reasoning_content") or "")
    except (orjson.JSONDecodeError, KeyError, IndexError, TypeError, AttributeError):
        return ""


def _since(began: float) -> float:
    return (time.monotonic() - began) * 1000
