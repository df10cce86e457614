"""An answer that was relayed, and checked, before: it is sent again as the first client got it."""

from collections.abc import AsyncIterator

import httpx

from inference_api.headers import header_lines
from inference_api.models import RawHeaders

# Bytes written at once: a client that reads slowly holds up the rest, and no more is in its buffer.
PIECE = 64 * 1024


class Replay(httpx.AsyncByteStream):
    """The body of a whole answer, and the headers that every client may get. Immutable: many Replies share one."""

    __slots__ = ("headers", "lines", "pieces", "size")

    def __init__(self, headers: RawHeaders, body: bytes) -> None:
        self.headers = headers
        # As lines of a head, with its length
        self.lines = b"%bcontent-length: %d\r\n" % (header_lines(headers), len(body))
        self.pieces = tuple(body[at : at + PIECE] for at in range(0, len(body), PIECE)) or (b"",)
        self.size = len(body)

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for piece in self.pieces:
            yield piece
