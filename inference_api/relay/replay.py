"""An answer that was relayed, and checked, before: it is sent again as the first client got it."""

from collections.abc import AsyncIterator

import httpx

from inference_api.headers import header_lines
from inference_api.models import RawHeaders

# Bytes of a message, where the body goes by messages
PIECE = 64 * 1024


class Replay(httpx.AsyncByteStream):
    """The body of a whole answer, and the headers that every client may get. Immutable: many Replies share one.

    It has one copy: a client that reads slowly holds a reference to it, until it has read, or WRITE_STALL_TIMEOUT has
    passed.
    """

    __slots__ = ("body", "headers", "lines")

    def __init__(self, headers: RawHeaders, body: bytes) -> None:
        self.headers = headers
        # As lines of a head, with its length
        self.lines = b"%bcontent-length: %d\r\n" % (header_lines(headers), len(body))
        self.body = body

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for at in range(0, len(self.body), PIECE):
            yield self.body[at : at + PIECE]
