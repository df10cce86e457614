"""What was generated for one request, and its two forms: one document, or paced events."""

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AbstractContextManager
from itertools import zip_longest
from typing import Any, NamedTuple, Protocol

import orjson
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from inference_api.demo.model import Generation
from inference_api.demo.requests import Generate

Event = dict[str, Any]


class Work(NamedTuple):
    """A checked request and the answers to it; `id` has no prefix, `created` is in seconds."""

    asked: Generate
    id: str
    created: int
    model: str
    prompt_tokens: int
    generations: list[Generation]

    @property
    def steps(self) -> list[tuple[str | None, ...]]:
        """All choices advance together, one token each, as in a batch."""
        return list(zip_longest(*(generation.tokens for generation in self.generations)))

    @property
    def completion_tokens(self) -> int:
        return sum(len(generation.tokens) for generation in self.generations)

    @property
    def usage(self) -> dict[str, int]:
        return usage(self.prompt_tokens, self.completion_tokens)


class API(Protocol):
    """How one route lays out what was generated. Events with a `type` are sent with it as their name."""

    end: bytes

    def __init__(self, work: Work) -> None: ...
    def document(self) -> dict[str, Any] | str: ...
    def opening(self) -> Iterator[Event]: ...
    def token(self, index: int, position: int, token: str) -> Iterator[Event]: ...
    def closing(self) -> Iterator[Event]: ...


def usage(prompt_tokens: int, completion_tokens: int = 0) -> dict[str, int]:
    total = prompt_tokens + completion_tokens
    return {"prompt_tokens": prompt_tokens, "total_tokens": total, "completion_tokens": completion_tokens}


async def stream(api: API, work: Work, tick: Callable[[], Awaitable[None]]) -> AsyncIterator[bytes]:
    """The events of an answer; `tick` waits for the time of one token."""
    for event in api.opening():
        yield _framed(event)
    for position, step in enumerate(work.steps):
        await tick()
        for index, token in enumerate(step):
            if token is not None:
                yield b"".join(map(_framed, api.token(index, position, token)))
    for event in api.closing():
        yield _framed(event)
    if api.end:
        yield api.end


def _framed(event: Event) -> bytes:
    name = f"event: {event['type']}\n".encode() if "type" in event else b""
    return name + b"data: " + orjson.dumps(event) + b"\n\n"


class JSON(Response):
    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return orjson.dumps(content)


class EventStream(StreamingResponse):
    """Generation goes on, and counts as running, exactly as long as somebody reads it."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[bytes], counted: AbstractContextManager[None]) -> None:
        super().__init__(events)
        self._counted = counted

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._counted:
            await super().__call__(scope, receive, send)
