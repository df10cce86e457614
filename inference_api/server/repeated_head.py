"""Request heads that a client repeats byte for byte, except for the digits of the length. Sans-IO."""

import math
import re
from typing import Any

from starlette.types import Scope

from inference_api.server.request_head import EMPTY_LINE

_LENGTH_LINE = re.compile(rb"\r\ncontent-length:[ \t]*+([0-9]{1,12})\r\n", re.IGNORECASE)


class HeadCache:
    """The parsed form of a request head, shared by the requests that repeat it byte for byte."""

    __slots__ = ("head",)

    def __init__(self) -> None:
        # For the application: its own reading of the headers.
        self.head: Any = None


class RepeatedHead(HeadCache):
    """A parsed and accepted request head of this connection: the next one often differs only in its length.

    If all other bytes are equal, so is the result of parsing. Comparing costs a tenth of parsing.
    """

    __slots__ = ("_after", "_before", "_headers", "_length_at", "_scope")

    def __init__(self, before: bytes, after: bytes, scope: Scope) -> None:
        super().__init__()
        self._before = before
        self._after = after
        self._scope = {name: value for name, value in scope.items() if name != "state"}
        self._headers: list[tuple[bytes, bytes]] = scope["headers"]
        self._length_at = [name for name, _ in self._headers].index(b"content-length")

    @classmethod
    def learn(cls, data: bytes, scope: Scope) -> "RepeatedHead | None":
        """Make one from the bytes of one read and their parsed form; None unless they are one whole request."""
        end = data.find(EMPTY_LINE) + 4
        lengths = list(_LENGTH_LINE.finditer(data, 0, end))
        if len(lengths) != 1 or len(data) - end != int(lengths[0][1]):
            return None
        first, last = lengths[0].span(1)
        return cls(data[:first], data[last:end], scope)

    def body_at(self, data: bytes) -> int:
        """Offset of the body if `data` is one whole request with this head, else 0."""
        first = len(self._before)
        last = data.find(b"\r", first, first + 13)
        length = data[first:last]
        if not (data.startswith(self._before) and length.isdigit() and data.startswith(self._after, last)):
            return 0
        at = last + len(self._after)
        return at if len(data) - at == int(length) else 0

    def scope(self, length: int) -> Scope:
        headers = self._headers.copy()
        headers[self._length_at] = (b"content-length", b"%d" % length)
        return {**self._scope, "headers": headers, "state": {}}


class RepeatedHeads:
    """The last head that one connection repeated."""

    __slots__ = ("_learn_at", "_parsed", "newest")

    def __init__(self) -> None:
        self.newest: RepeatedHead | None = None
        # Recorded at the 2nd, 4th, 8th ... parsed head, so that a client with varying heads soon costs nothing.
        self._parsed = 0
        self._learn_at: float = 2

    def parsed(self) -> None:
        """Count a parsed head."""
        self._parsed += 1

    @property
    def due(self) -> bool:
        """Whether to record the head that was parsed last."""
        return self._parsed >= self._learn_at

    def learn(self, data: bytes, scope: Scope | None) -> None:
        """Record a head. `data`: one read, parsed to `scope`; None: not repeatable."""
        self._learn_at *= 2
        if scope is not None:
            self.newest = RepeatedHead.learn(data, scope)

    def close(self) -> None:
        """Forget the head: parse each one from now on."""
        self.newest, self._learn_at = None, math.inf
