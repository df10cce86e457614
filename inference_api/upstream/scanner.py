"""Reads the top level of a large JSON document in slices, each validated by a real parser. Sans-IO.

Parsing a whole document costs up to sixty times its size and blocks the event loop. The scan cuts a slice at a bracket
or comma outside of strings, completes it on both sides to a document, parses it and drops it: this validates the slice
and yields its top-level members. The only state from earlier slices is which containers are open. Between two slices
the caller may do other work.

    scan = Scan(body, {"model"})
    for _ in scan.slices(): ...            # raises NotJSON
    scan.members["model"].value

A document is valid if Python's `json.loads`, which engines use, accepts it: a byte order mark, NaN, lone surrogates,
numbers of any size; the last of a repeated key counts. Nesting ends at MAX_DEPTH.
"""

from codecs import BOM_UTF8
from collections.abc import Callable, Collection, Iterator
from typing import Any

from inference_api.upstream.json_text import (
    DIGITS,
    SPACE,
    NotJSON,
    collapse,
    end_of_string,
    find_member,
    find_only_string,
    find_string,
    judge,
    last_cut,
    mask,
    safe_end,
)
from inference_api.upstream.pieces import Piece, Places, prefix, suffix

# Levels; about the limit of Python's own parser. More crash some engines.
MAX_DEPTH = 10_000
# Bytes that are parsed within five milliseconds, whatever their content
SLICE = 32 * 1024
# Bytes kept of a longer string: 1024 characters in the longest spelling, two \uXXXX each
KEPT = 12 * 1024
# Bytes kept of a longer container, beyond the slice that it begins in
OPENING = 64 * 1024
# A run of digits is as valid without its end.
_KEPT_DIGITS = 400
# Finding one member in one slice
_FINE, _FINE_KEPT = 4 * 1024, 1024

_SPACES = (b" ", b"\t", b"\n", b"\r")


class Member:
    """A member of the top level."""

    __slots__ = ("_more", "_name", "_piece", "_value", "size", "whole")

    def __init__(self, name: str, value: Any, piece: Piece) -> None:
        self._name = name
        self._value = value
        self._piece = piece
        self._more = [piece.after]
        # Bytes after the piece in which it begins
        self.size = 0
        # False: only its beginning is kept.
        self.whole = True

    def grow(self, text: bytes, after: bytes) -> None:
        """`after` completes the document that ends with `text`, the next slice."""
        self._more[-1:] = [text, after]
        self.size += len(text)

    @property
    def value(self) -> Any:
        """The value, with long strings cut, and only the beginning of a container that is not complete."""
        if self.size:
            try:
                self._value = judge(b"".join([self._piece.before, self._piece.text, *self._more]))[self._name]
            except RecursionError:
                self.whole = False
            self.size = 0
        return self._value

    def string_span(self) -> tuple[int, int] | None:
        """The span of the value in the body, quotes included, if it is a string."""
        return self._span(find_only_string) or self._span(find)

    def value_at(self) -> int | None:
        """The offset of the value in the body."""
        span, _ = find_member(self._piece.document, self._name)
        return span and self._piece.body_offset(span[0])

    def _span(self, finder: Callable[[bytes, str], tuple[int, int] | None]) -> tuple[int, int] | None:
        span = finder(self._piece.document, self._name)
        return span and (self._piece.body_offset(span[0]), self._piece.body_offset(span[1]))


class Scan:
    """Finds the members called `names` of a document's top level; `members` has them once `slices` has ended.

    `size`: bytes of a slice; `kept`, `opening`: see KEPT and OPENING.
    """

    def __init__(
        self, body: bytes, names: Collection[str], *, size: int = SLICE, kept: int = KEPT, opening: int = OPENING
    ) -> None:
        self.members: dict[str, Member] = {}
        self.is_object = False
        # Configuration
        self._body = body
        self._names = names
        self._largest = self._size = size
        self._kept = kept
        self._opening = opening
        # Offset of the next byte to read; text not yet parsed, and its offsets
        self._at = len(BOM_UTF8) if body.startswith(BOM_UTF8) else 0
        self._text = b""
        self._places = Places([])
        self._in_long_string = False
        # Containers open at the beginning of the text, and whether a value of the innermost precedes
        self._stack = ""
        self._follows = False
        self._ended = False
        # Members whose value is incomplete
        self._growing: list[Member] = []

    def slices(self) -> Iterator[None]:
        """Yields after each slice. Raises NotJSON."""
        while self._at < len(self._body):
            try:
                if self._ended:
                    self._pass_space()
                elif self._in_long_string:
                    self._pass_string()
                else:
                    self._pass_slice()
            except RecursionError:
                # Too deep for the parsers; a small slice cannot be.
                self._size = max(self._size // 4, 1)
                continue
            self._size = min(self._size + self._size // 16 + 1, self._largest)
            yield
        self._finish()

    def _pass_slice(self) -> None:
        window = self._body[self._at : self._at + self._size]
        places = self._places.followed(len(self._text), self._at)
        text = self._text + window if self._text else window
        masked = mask(text)
        parts = masked.split(b'"')
        cut = last_cut(parts, len(text))
        if cut is None:
            self._places = places
            self._at += len(window)
            self._text = text
            self._shorten(masked.rfind(b'"') + 1 if len(parts) % 2 == 0 else 0)
            return
        end, brackets = cut
        self._accept(text[:end], brackets, places)
        self._at += len(window)
        self._text = text[end:]
        self._places = places.after(end)
        if self._ended:
            self._check_end(self._text, self._places.of(0))

    def _accept(self, text: bytes, brackets: bytes, places: Places) -> None:
        """Parse a slice and take its top-level members."""
        closers, opened = collapse(brackets)
        stack = self._stack
        depth = max(len(stack) - closers, 0)
        # Index of the outermost container around the slice
        base = max(depth - 1, 0)
        left = stack[:depth] + opened
        if len(left) > MAX_DEPTH:
            raise NotJSON(f"nested deeper than {MAX_DEPTH} levels")
        follows = not text.endswith((b"[", b"{"))
        piece = Piece(prefix(stack, base, self._follows), text, suffix(left, base, follows), places)
        value = self._judge(piece)
        is_object = self.is_object if stack else type(value) is dict
        at_top = is_object and not base
        # Before any change of state: the slice may be too deep.
        open_names = self._open_names(value, piece, suffix(left, 0, follows, b"1")) if at_top and len(left) > 1 else []
        for member in self._growing:
            member.grow(text, suffix(left, 0, follows))
        self._growing = [member for member in self._growing if base and self._has_room(member)]
        if at_top:
            self.members.update({name: Member(name, value[name], piece) for name in self._names if name in value})
            self._growing += [self.members[name] for name in open_names]
        self.is_object, self._stack, self._follows, self._ended = is_object, left, follows, not left

    def _has_room(self, member: Member) -> bool:
        member.whole = member.size < self._opening
        return member.whole

    def _open_names(self, value: dict[str, Any], piece: Piece, other_after: bytes) -> list[str]:
        """The members whose value continues after the slice: those that differ if it is completed differently."""
        found = [name for name in self._names if type(value.get(name)) in (dict, list)]
        other = judge(b"%b%b%b" % (piece.before, piece.text, other_after)) if found else {}
        return [name for name in found if value[name] != other[name]]

    def _judge(self, piece: Piece) -> Any:
        try:
            return judge(piece.document)
        except NotJSON as exc:
            at = None if exc.at is None else piece.body_offset(exc.at)
            raise NotJSON(exc.why, at) from None

    def _shorten(self, string: int) -> None:
        """Shrink text that has no place to cut. `string`: offset of the string in which it ends, or 0."""
        text = self._text
        if string:
            if len(text) - string > self._kept:
                end = safe_end(text, string, string + self._kept)
                self._at = self._places.of(end)
                self._text = text[:end]
                self._in_long_string = True
        elif text[-1:] in _SPACES:
            self._text = text.rstrip(SPACE) + b" "
        else:
            self._text = text[: len(text.rstrip(DIGITS)) + _KEPT_DIGITS]
        if len(self._text) > 8 * (self._largest + self._kept):
            self._finish()

    def _pass_string(self) -> None:
        """Skip to the end of a string that exceeds the kept size."""
        at, body = self._at, self._body
        window = body[at : at + max(self._size, 16)]
        end = end_of_string(window)
        self._in_long_string = end < 0
        if end < 0 and at + len(window) < len(body):
            end = safe_end(body, at, at + len(window)) - at
        if end < 0:
            # It has no end; the final parse reports that.
            self._at = len(body)
            return
        try:
            judge(b'"%b"' % window[:end])
        except NotJSON as exc:
            raise NotJSON(exc.why, None if exc.at is None else at + exc.at - 1) from None
        self._at += end

    def _pass_space(self) -> None:
        window = self._body[self._at : self._at + self._size]
        self._check_end(window, self._at)
        self._at += len(window)

    def _check_end(self, text: bytes, at: int) -> None:
        if rest := text.lstrip(SPACE):
            raise NotJSON("Extra data", at + len(text) - len(rest))

    def _finish(self) -> None:
        """Parse the rest, which must be a document without brackets and commas."""
        if not self._ended:
            start = prefix(self._stack, max(len(self._stack) - 1, 0), self._follows)
            self._judge(Piece(start, self._text, b"", self._places))


def find(document: bytes, name: str) -> tuple[int, int] | None:
    """The span of the top-level string `name` in a valid document, quotes included, or None."""
    if len(document) <= _FINE:
        return find_string(document, name)
    scan = Scan(document, (name,), size=_FINE, kept=_FINE_KEPT)
    for _ in scan.slices():
        pass
    member = scan.members.get(name)
    return None if member is None else member._span(find_string)
