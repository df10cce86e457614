"""Walks through the text of a large JSON object: its members, and the items of its lists, one by one.

Each item is decoded by the C scanner of the standard library; the whole document is never built.
"""

import json
import re
from collections.abc import Collection, Iterator
from json.decoder import scanstring  # type: ignore[attr-defined]
from typing import Any

_SPACE = re.compile(r"[ \t\r\n]*")


class Walk:
    """`items(lists)` yields (name, index, item) for each item of the lists of these names, and (name, -1, value) for
    every other member; a list ends with (name, -1, []).

    Raises ValueError: the text is not a JSON object, or a key is given twice in one object.
    """

    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0
        decoder: Any = json.JSONDecoder(object_pairs_hook=_once)
        self._scan = decoder.scan_once

    def items(self, lists: Collection[str]) -> Iterator[tuple[str, int, Any]]:
        seen: set[str] = set()
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
        try:
            value, self._at = self._scan(self._text, self._at)
        except StopIteration:
            raise self._wrong("a value") from None
        except RecursionError:
            raise ValueError("it is nested too deeply") from None
        self._skip()
        return value

    def _name(self) -> str:
        if self._text[self._at : self._at + 1] != '"':
            raise self._wrong("a name")
        name, self._at = scanstring(self._text, self._at + 1)
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
        if not self._at:
            self._skip()
        if self._text[self._at : self._at + 1] != mark:
            return False
        self._at += 1
        self._skip()
        return True

    def _skip(self) -> None:
        found = _SPACE.match(self._text, self._at)
        self._at = found.end() if found else self._at

    def _wrong(self, expected: str) -> ValueError:
        line = self._text.count("\n", 0, self._at) + 1
        return ValueError(f"{expected} is expected in line {line}, at character {self._at}")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        raise _twice(next(name for name in names if names.count(name) > 1))
    return made


def _twice(name: str) -> ValueError:
    return ValueError(f"the key {name[:64]!r} is given twice")
