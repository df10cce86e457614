"""The two forms of a toy engine's answer: a JSON document and a stream of events."""

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractContextManager
from typing import Any

import orjson
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send


class JSON(Response):
    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return orjson.dumps(content)


class EventStream(StreamingResponse):
    """Generation goes on, and counts as running, exactly as long as somebody reads it."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[bytes], counted: Callable[[], AbstractContextManager[None]]) -> None:
        super().__init__(events)
        self._counted = counted

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._counted():
            await super().__call__(scope, receive, send)
