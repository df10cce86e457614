"""Walks through the text of a large JSON object: its members, and the items of its lists, one by one.

Each item is decoded by the C scanner of the standard library. Neither the whole document nor the whole text is ever
one object: both would take the interpreter, and memory, for too long.
"""

import json
import re
from collections.abc import Collection, Iterable, Iterator
from json.decoder import scanstring  # type: ignore[attr-defined]
from typing import Any

_SPACE = re.compile(r"[ \t\r\n]*")
# Characters that are kept ahead, where there are as many: the longest name of a member
_AHEAD = 1024


class Walk:
    """`items(lists)` yields (name, index, item) for each item of the lists of these names, and (name, -1, value) for
    every other member; a list ends with (name, -1, []).

    `pieces`: the text, in order. Raises ValueError: it is not a JSON object, or a key is given twice in one object.
    """

    def __init__(self, pieces: Iterable[str]) -> None:
        self._pieces = iter(pieces)
        # A window of the text, the offset in it, and the lines before it; the rest is in `pieces` until `_is_last`.
        self._text = ""
        self._at = 0
        self._lines = 0
        self._is_last = False
        decoder: Any = json.JSONDecoder(object_pairs_hook=_once)
        self._scan = decoder.scan_once

    def items(self, lists: Collection[str]) -> Iterator[tuple[str, int, Any]]:
        seen: set[str] = set()
        self._skip()
        self._expect("{")
        more = not self._takes("}")
        while more:
            name = self._name()
            if name in seen:
                raise _twice(name)
            seen.add(name)
            if name in lists and self._takes("["):
                yield from self._elements(name)
                yield name, -1, []
            else:
                yield name, -1, self._value()
            more = self._goes_on("}")
        if self._at != len(self._text):
            raise self._wrong("the end")

    def _elements(self, name: str) -> Iterator[tuple[str, int, Any]]:
        index, more = 0, not self._takes("]")
        while more:
            yield name, index, self._value()
            index += 1
            more = self._goes_on("]")

    def _value(self) -> Any:
        wanted = 0
        while True:
            try:
                value, end = self._scan(self._text, self._at)
            except (StopIteration, json.JSONDecodeError) as exc:
                if self._is_last:
                    if isinstance(exc, StopIteration):
                        raise self._wrong("a value") from None
                    self._at = exc.pos
                    raise self._invalid(exc.msg) from None
            except RecursionError:
                raise ValueError("it is nested too deeply") from None
            else:
                # A number may go on in the next piece.
                if end < len(self._text) or self._is_last:
                    self._at = end
                    self._skip()
                    return value
            # The value is not whole yet. Twice as much each time: it is scanned again from its beginning.
            wanted = max(2 * wanted, 2 * (len(self._text) - self._at), _AHEAD)
            self._read(wanted)

    def _name(self) -> str:
        if self._text[self._at : self._at + 1] != '"':
            raise self._wrong("a name")
        name = None
        while name is None:
            try:
                name, self._at = scanstring(self._text, self._at + 1)
            except json.JSONDecodeError as exc:
                if self._is_last:
                    raise self._invalid(exc.msg) from None
                self._read(2 * (len(self._text) - self._at))
        self._skip()
        self._expect(":")
        return str(name)

    def _goes_on(self, end: str) -> bool:
        """Pass a comma, or the end."""
        if self._takes(","):
            return True
        self._expect(end)
        return False

    def _expect(self, mark: str) -> None:
        if not self._takes(mark):
            raise self._wrong(repr(mark))

    def _takes(self, mark: str) -> bool:
        if self._text[self._at : self._at + 1] != mark:
            return False
        self._at += 1
        self._skip()
        return True

    def _skip(self) -> None:
        """Pass white space, up to the next character of the text."""
        while True:
            found = _SPACE.match(self._text, self._at)
            self._at = found.end() if found else self._at
            if self._at < len(self._text) or self._is_last:
                return
            self._read(_AHEAD)

    def _read(self, wanted: int) -> None:
        """Extend the window to this many characters from here, or to the end of the text."""
        self._lines += self._text.count("\n", 0, self._at)
        parts, have = [self._text[self._at :]], len(self._text) - self._at
        while have < wanted:
            piece = next(self._pieces, None)
            if piece is None:
                self._is_last = True
                break
            parts.append(piece)
            have += len(piece)
        self._text, self._at = "".join(parts), 0

    def _wrong(self, expected: str) -> ValueError:
        return self._invalid(f"{expected} is expected")

    def _invalid(self, why: str) -> ValueError:
        line = self._lines + self._text.count("\n", 0, self._at) + 1
        return ValueError(f"{why} in line {line}")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        raise _twice(next(name for name in names if names.count(name) > 1))
    return made


def _twice(name: str) -> ValueError:
    return ValueError(f"the key {name[:64]!r} is given twice")
