"""Finds members of the top level of a JSON body, so that they can be edited byte by byte. Sans-IO."""

import re
from collections.abc import Collection, Generator
from typing import NamedTuple

from inference_api.upstream.json_text import judge

# Marks between two yields: a millisecond
_SLICE = 2000
_MARK = re.compile(rb'["{}\[\]:,]')
_SPACES = re.compile(rb"[ \t\n\r]*+")
_SCALAR = re.compile(rb"[^ \t\n\r,}]*+")
# Of a member whose next one has not been found yet
_NEXT = -2
_QUOTE, _COLON, _COMMA, _OPENERS = ord('"'), ord(":"), ord(","), b"{["


class MemberPlace(NamedTuple):
    """Where a member of a body is. `key` is the offset of its name, `start` and `end` are those of its value.

    `number` counts all members from 0; `before` is the end of the member before it, `after` the name of the next one;
    -1: there is none.
    """

    name: str
    number: int
    key: int
    start: int
    end: int
    before: int
    after: int


def find_places(body: bytes, names: Collection[str]) -> Generator[None, None, list[MemberPlace]]:
    """The members of these names, in order, repeated ones too, of a valid document that is an object."""
    walk = _Walk(body, names)
    at, marks = body.find(b"{") + 1, 0
    while walk.depth and (match := _MARK.search(body, at)):
        place = match.start()
        at = place + 1
        if body[place] == _QUOTE:
            at = yield from _after_string(body, at)
            walk.string(place, at)
        else:
            walk.mark(body[place], place)
        marks += 1
        if marks % _SLICE == 0:
            yield
    return walk.found


class _Walk:
    """What was found of a body so far."""

    def __init__(self, body: bytes, names: Collection[str]) -> None:
        self.found: list[MemberPlace] = []
        self.depth = 1
        self._body = body
        self._names = names
        # Of the member at hand: its number, the span of its name, and its value; -1: not found yet
        self._number = 0
        self._key = self._key_end = self._start = self._end = -1
        # End of the member before it
        self._before = -1

    def string(self, start: int, end: int) -> None:
        if self.depth > 1:
            return
        if self._key >= 0:
            self._end = end
            return
        self._key, self._key_end, self._end = start, end, -1
        if self.found and self.found[-1].after == _NEXT:
            self.found[-1] = self.found[-1]._replace(after=start)

    def mark(self, mark: int, at: int) -> None:
        if mark in _OPENERS:
            self.depth += 1
        elif mark == _COLON:
            if self.depth == 1:
                self._start = _end_of(_SPACES, self._body, at + 1)
        elif mark == _COMMA:
            if self.depth == 1:
                self._member(_NEXT)
        else:
            self.depth -= 1
            if self.depth == 1:
                self._end = at + 1
            elif not self.depth and self._key >= 0:
                self._member(-1)

    def _member(self, after: int) -> None:
        """The member at hand is complete."""
        end = _end_of(_SCALAR, self._body, self._start) if self._end < 0 else self._end
        name = _name_of(self._body[self._key : self._key_end], self._names)
        if name is not None:
            self.found.append(MemberPlace(name, self._number, self._key, self._start, end, self._before, after))
        self._key, self._before, self._number = -1, end, self._number + 1


def _after_string(body: bytes, at: int) -> Generator[None, None, int]:
    """The offset after the string in which `at` is, which begins there."""
    steps, quote = 0, -1
    while True:
        if quote < at:
            quote = body.find(b'"', at)
        escape = body.find(b"\\", at, quote)
        if escape < 0:
            return quote + 1
        at = escape + 2
        steps += 1
        if steps % _SLICE == 0:
            yield


def _name_of(token: bytes, names: Collection[str]) -> str | None:
    """The name that a key spells, if it is one of `names`."""
    if token.find(b"\\") < 0:
        return next((name for name in names if token == b'"%b"' % name.encode()), None)
    name = judge(token)
    return name if name in names else None


def _end_of(pattern: "re.Pattern[bytes]", body: bytes, at: int) -> int:
    match = pattern.match(body, at)
    return at if match is None else match.end()
