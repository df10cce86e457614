"""Bodies other than event streams: buffered until complete, and checked."""

from collections.abc import AsyncIterator
from typing import Any

import httpx
import orjson

from inference_api.errors import RouterError, UpstreamProtocolError
from inference_api.models import Outcome, Reply
from inference_api.relay.dialects import ends_in_abort, is_aborted, is_json
from inference_api.relay.usage import find_usage
from inference_api.upstream.response import ResponseStream

# Up to this size a JSON answer is parsed (2 us per KiB); of a larger one only the ends are checked.
_PARSED = 1 << 16


async def hold(stream: httpx.AsyncByteStream, limit: int) -> tuple[bytes, AsyncIterator[bytes] | ResponseStream | None]:
    """The whole body and None; or the beginning of a large one, and the iterator of its rest."""
    if isinstance(stream, ResponseStream):
        body, complete = await stream.collect(limit)
        return body, None if complete else stream
    chunks, size = [], 0
    rest = aiter(stream)
    async for chunk in rest:
        chunks.append(chunk)
        size += len(chunk)
        if size > limit:
            return b"".join(chunks), rest
    return b"".join(chunks), None


async def first_bytes(reply: Reply, wanted: int = 0) -> bytes:
    """More than `wanted` bytes of the body, or all of it, without consuming them.

    Raises httpx.TransportError if the body breaks off.
    """
    if not isinstance(reply.stream, ResponseStream | Readable):
        reply.stream = Readable(reply.stream)
    return await reply.stream.peek(wanted)


class Readable(httpx.AsyncByteStream):
    """The body of another transport, with `peek`."""

    def __init__(self, stream: httpx.AsyncByteStream) -> None:
        self._stream = stream
        self._rest = aiter(stream)
        self._first = b""

    async def peek(self, wanted: int = 0) -> bytes:
        while len(self._first) <= wanted and (more := await anext(self._rest, None)) is not None:
            self._first += more
        return self._first

    async def __aiter__(self) -> AsyncIterator[bytes]:
        if self._first:
            yield self._first
        async for chunk in self._rest:
            yield chunk

    async def aclose(self) -> None:
        await self._stream.aclose()


def read_answer(body: bytes) -> tuple[dict[str, Any] | None, bool]:
    """The usage of a JSON answer, and whether it was aborted. Raises UpstreamProtocolError if it is not JSON."""
    found, aborted = None, False
    if len(body) > _PARSED:
        if not is_json(body, whole=False):
            raise _no_json()
        found, aborted = find_usage(body), ends_in_abort(body)
    else:
        try:
            document = orjson.loads(body)
        except orjson.JSONDecodeError:
            if not is_json(body, whole=True):
                raise _no_json() from None
            found, aborted = find_usage(body), ends_in_abort(body)
        else:
            found = document.get("usage") if isinstance(document, dict) else None
            try:
                (choice,) = document["choices"]
                aborted = choice["finish_reason"] == "abort"
            except (KeyError, TypeError, ValueError):
                aborted = is_aborted(document)
    return found if isinstance(found, dict) else None, aborted


def _no_json() -> RouterError:
    text = "The model's backend gave an answer that is not JSON."
    return UpstreamProtocolError(text, Outcome.PROTOCOL_ERROR)
