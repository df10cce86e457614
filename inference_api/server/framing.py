"""Finds the ends of messages on a connection. Sans-IO.

The parser does not report where the next message begins, so it never gets bytes of two messages.
"""

from inference_api.errors import BadRequest
from inference_api.server.request_head import EMPTY_LINE, check_size

# Bytes of a chunked body beyond content and 16 per chunk; the limit of Go's server.
_MAX_OVERHEAD = 16 * 1024
_CHUNK_OVERHEAD = 16


class Framing:
    """Splits reads at the ends of requests. `in_body`: the head of the current request is complete."""

    __slots__ = ("_left", "_overhead", "_tail", "head")

    def __init__(self) -> None:
        # The current head so far, and the empty lines before it
        self.head = b""
        # Bytes left by Content-Length. For a chunked body: its last bytes, and the overhead
        self._left, self._tail, self._overhead = 0, b"", 0

    def end_of_piece(self, data: bytes, at: int, in_body: bool) -> int:
        """A possible end of the message at `at`: the piece up to there has at most one end."""
        if self._left:
            return min(at + self._left, len(data))
        before = (self._tail if in_body else self.head)[-3:]
        if before and (found := (before + data[at : at + 3]).find(EMPTY_LINE)) >= 0:
            return at - len(before) + found + len(EMPTY_LINE)
        end = data.find(EMPTY_LINE, at)
        return len(data) if end < 0 else end + len(EMPTY_LINE)

    def take(self, piece: bytes | memoryview, in_body: bool) -> bool:
        """Account for a piece before it is parsed. True: a body may end in it. Raises HeadersTooLarge."""
        if not in_body:
            self.head += piece
            check_size(self.head)
        elif self._left:
            self._left -= len(piece)
        else:
            self._tail = (self._tail + piece[-3:])[-3:]
            self._overhead += len(piece)
            return True
        return False

    def end_of_head(self) -> bytes:
        """The bytes of the completed head."""
        head, self.head = self.head, b""
        return head

    def begin_body(self, length: int) -> None:
        """A body begins. `length`: its Content-Length, 0 without one."""
        self._left, self._tail, self._overhead = length, b"", 0

    def chunk(self) -> None:
        """A chunk begins."""
        self._overhead -= _CHUNK_OVERHEAD

    def content(self, size: int) -> None:
        """Count content bytes of the body."""
        if self._overhead:
            self._overhead -= size

    def check_overhead(self) -> None:
        """Check the limits after a piece was parsed. Raises BadRequest."""
        if self._overhead > _MAX_OVERHEAD:
            raise BadRequest("The body has chunk extensions or trailers that are too large.")
