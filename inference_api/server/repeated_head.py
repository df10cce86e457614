"""Request heads that a client repeats byte for byte, but for the digits of the length. Sans-IO."""

import math
import re
from typing import Any

from starlette.types import Scope

from inference_api.server.request_head import EMPTY_LINE

_LENGTH_LINE = re.compile(rb"\r\ncontent-length:[ \t]*+([0-9]{1,12})\r\n", re.IGNORECASE)


class HeadCache:
    """What is known of a request head; the requests that repeat it byte for byte share one."""

    __slots__ = ("head",)

    def __init__(self) -> None:
        # For the application: what it read from the headers.
        self.head: Any = None


class RepeatedHead(HeadCache):
    """A request head that was parsed, and accepted, on this connection: the next one often differs in its length only.

    Where every other byte is the same, so is all that parsing would say. Comparing costs a tenth of parsing.
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
        """From the bytes of one read and what they were parsed to; None unless they are one whole request."""
        end = data.find(EMPTY_LINE) + 4
        lengths = list(_LENGTH_LINE.finditer(data, 0, end))
        if len(lengths) != 1 or len(data) - end != int(lengths[0][1]):
            return None
        first, last = lengths[0].span(1)
        return cls(data[:first], data[last:end], scope)

    def body_at(self, data: bytes) -> int:
        """Where the body begins if `data` is one whole request with this head, else 0."""
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
    """The newest head of one connection that is worth knowing."""

    __slots__ = ("_learn_at", "_parsed", "newest")

    def __init__(self) -> None:
        self.newest: RepeatedHead | None = None
        # Learnt at the 2nd, 4th, 8th ... head that had to be parsed: a client that varies them costs nothing soon.
        self._parsed = 0
        self._learn_at: float = 2

    def parsed(self) -> None:
        """One more head had to be parsed."""
        self._parsed += 1

    @property
    def due(self) -> bool:
        """The head that was parsed last is one to learn."""
        return self._parsed >= self._learn_at

    def learn(self, data: bytes, scope: Scope | None) -> None:
        """`data`: one read, parsed to `scope`; None: its head may not be repeated."""
        self._learn_at *= 2
        if scope is not None:
            self.newest = RepeatedHead.learn(data, scope)

    def close(self) -> None:
        """From now on each head is parsed."""
        self.newest, self._learn_at = None, math.inf
