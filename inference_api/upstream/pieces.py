"""A slice of a JSON document: its offsets in the body, and the text that completes it to a document."""

_CLOSERS = str.maketrans("[{", "]}")
_OPENERS = {"[": b"[", "{": b'{"":'}
# Placeholders for the values of a container before and after the slice
_BEFORE = {"[": b"0", "{": b'"":0'}
_AFTER = {"[": b",", "{": b',"":'}
_FIRST = {"[": b"", "{": b'"":'}


class Places:
    """The offsets in the body of a text that may have gaps."""

    __slots__ = ("_starts",)

    def __init__(self, starts: list[tuple[int, int]]) -> None:
        # (offset in the text, offset in the body), ascending
        self._starts = starts

    def of(self, index: int) -> int:
        return next((at + index - start for start, at in reversed(self._starts) if index >= start), 0)

    def followed(self, size: int, at: int) -> "Places":
        """The offsets of the first `size` bytes, and of the rest, which is at `at`."""
        return Places([*(place for place in self._starts if place[0] < size), (size, at)])

    def after(self, index: int) -> "Places":
        return Places([(0, self.of(index)), *((start - index, at) for start, at in self._starts if start > index)])


class Piece:
    """A slice of the body, completed to a document by `before` and `after`."""

    __slots__ = ("after", "before", "places", "text")

    def __init__(self, before: bytes, text: bytes, after: bytes, places: Places) -> None:
        self.before = before
        self.text = text
        self.after = after
        self.places = places

    @property
    def document(self) -> bytes:
        return b"%b%b%b" % (self.before, self.text, self.after)

    def body_offset(self, index: int) -> int:
        return self.places.of(min(max(index - len(self.before), 0), len(self.text)))


def prefix(stack: str, base: int, follows: bool) -> bytes:
    """The openers of the containers of `stack` from number `base` on; `follows`: the innermost has earlier values."""
    if not stack:
        return b""
    outer = b"".join([_OPENERS[kind] for kind in stack[base:-1]])
    return outer + stack[-1].encode() + (_BEFORE[stack[-1]] if follows else b"")


def suffix(stack: str, base: int, follows: bool, last: bytes = b"") -> bytes:
    """The closers of the same; `follows`: after a complete value; `last`: a number to insert in any case."""
    if not stack:
        return b""
    value = b""
    if follows or last:
        value = (_AFTER if follows else _FIRST)[stack[-1]] + (last or b"0")
    return value + stack[base:][::-1].translate(_CLOSERS).encode()
