"""Where the messages of a connection end. Sans-IO.

The parser does not tell where the next message begins, so it never gets bytes of two of them.
"""

from inference_api.errors import BadRequest
from inference_api.server.request_head import EMPTY_LINE, check_size

# Of a chunked body: bytes that are neither content nor the 16 that a chunk may take; Go's server allows as many.
_MAX_OVERHEAD = 16 * 1024
_CHUNK_OVERHEAD = 16


class Framing:
    """Cuts what is read of requests. `in_body`: the head of the request under way is complete."""

    __slots__ = ("_left", "_overhead", "_tail", "head")

    def __init__(self) -> None:
        # What has come of a head, and of the lines before it
        self.head = b""
        # Of a body: what is to come by its Content-Length. Of a chunked one: its last bytes, and what is not content
        self._left, self._tail, self._overhead = 0, b"", 0

    def end_of_piece(self, data: bytes, at: int, in_body: bool) -> int:
        """Where the message may end that goes on, or begins, at `at`: the piece from there has one end at most."""
        if self._left:
            return min(at + self._left, len(data))
        before = (self._tail if in_body else self.head)[-3:]
        if before and (found := (before + data[at : at + 3]).find(EMPTY_LINE)) >= 0:
            return at - len(before) + found + len(EMPTY_LINE)
        end = data.find(EMPTY_LINE, at)
        return len(data) if end < 0 else end + len(EMPTY_LINE)

    def take(self, piece: bytes | memoryview, in_body: bool) -> bool:
        """Before a piece is parsed. True: the end of a body may be in it. Raises HeadersTooLarge."""
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
        """The bytes of the head that is complete now."""
        head, self.head = self.head, b""
        return head

    def begin_body(self, length: int) -> None:
        """`length`: by Content-Length, 0 if there is none."""
        self._left, self._tail, self._overhead = length, b"", 0

    def chunk(self) -> None:
        """A chunk begins."""
        self._overhead -= _CHUNK_OVERHEAD

    def content(self, size: int) -> None:
        """So many bytes were content of the body."""
        if self._overhead:
            self._overhead -= size

    def check_overhead(self) -> None:
        """After a piece was parsed. Raises BadRequest."""
        if self._overhead > _MAX_OVERHEAD:
            raise BadRequest("The body has chunk extensions or trailers that are too large.")
