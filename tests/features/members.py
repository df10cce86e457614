"""Entries of models on fake engines, and what those answer, for tests of models that stand for others."""

from typing import Any

from tests.fakes import (
    COMPLETION,
    DONE,
    LAST_CHUNK,
    SSE_HEAD,
    FakeEngine,
    Line,
    Received,
    chunk,
    event,
    json_response,
    raw,
)

OK = raw(json_response(COMPLETION))
EVENTS = event("x") + DONE
STREAMED = raw(SSE_HEAD, chunk(event("x")), chunk(DONE) + LAST_CHUNK)
BUSY = raw(json_response({"error": {"message": "no"}}, "503 Service Unavailable"))


def real(name: str, *engines: FakeEngine | str, **more: Any) -> dict[str, Any]:
    """The entry of a model with these backends."""
    return {"name": name, "backends": [getattr(engine, "url", engine) for engine in engines], **more}


async def reset(request: Received, line: Line) -> None:
    """Die before the first byte."""
    line.reset()


async def cut(request: Received, line: Line) -> None:
    """Die after the first event."""
    await line.send(SSE_HEAD, chunk(event("x")))
    line.close()
