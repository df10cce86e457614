"""What differs between two texts or two JSON values, line by line: entries, audit rows, versions of prompts."""

import json
from collections.abc import Iterator, Sequence
from difflib import SequenceMatcher
from typing import Any, Literal, NamedTuple

from markupsafe import Markup

# Lines around a change that are shown, and the fewest that are worth a fold
_CONTEXT, _FEWEST = 3, 3
# Lines of each side beyond which only the ends that they share are found: difflib is quadratic.
_LONGEST = 2_000

Kind = Literal["same", "added", "removed", "fold"]


class Line(NamedTuple):
    """`before`, `after`: its number in either text, from 1; None where it is not.

    A folded row stands for `stands_for` equal lines, and its text says so.
    """

    kind: Kind
    text: str
    before: int | None
    after: int | None
    stands_for: int = 1

    @property
    def sign(self) -> str:
        """For those who do not see colours."""
        return {"same": " ", "added": "+", "removed": "-", "fold": "…"}[self.kind]


class Diff(NamedTuple):
    """In a page it is a block of code (`{{ diff }}`), a line each, with its sign."""

    lines: tuple[Line, ...]
    added: int
    removed: int

    def __html__(self) -> Markup:
        line = Markup('<span class="{}">{} {}</span>')
        text = Markup("").join(line.format(one.kind, one.sign, one.text) for one in self.lines)
        return Markup('<pre class="diff" tabindex="0" role="region" aria-label="{}">{}</pre>').format(
            self.summary, text
        )

    @property
    def same(self) -> bool:
        return not self.added and not self.removed

    @property
    def summary(self) -> str:
        """`2 lines added, 1 removed`, or `no difference`."""
        if self.same:
            return "no difference"
        parts = [f"{self.added} {'line' if self.added == 1 else 'lines'} added"] if self.added else []
        if self.removed:
            parts.append(f"{self.removed} removed" if parts else f"{self.removed} {_lines(self.removed)} removed")
        return ", ".join(parts)


def _lines(number: int) -> str:
    return "line" if number == 1 else "lines"


def of_texts(before: str | None, after: str | None, context: int | None = _CONTEXT) -> Diff:
    """`context`: equal lines around each change; None: all of them. None for a text: there was none."""
    old = [] if before is None else before.splitlines()
    new = [] if after is None else after.splitlines()
    rows = list(_rows(old, new))
    added, removed = (sum(row.kind == kind for row in rows) for kind in ("added", "removed"))
    return Diff(tuple(rows if context is None else _folded(rows, context)), added, removed)


def of_values(before: Any, after: Any, context: int | None = _CONTEXT) -> Diff:
    """Of two JSON values; None: there was none. Keys are sorted: their order is no difference."""
    return of_texts(pretty(before), pretty(after), context)


def pretty(value: Any) -> str | None:
    """A JSON value over lines, its keys sorted; None for None."""
    return None if value is None else json.dumps(value, indent=2, ensure_ascii=False, sort_keys=True, default=str)


def _rows(old: Sequence[str], new: Sequence[str]) -> Iterator[Line]:
    for tag, i1, i2, j1, j2 in _changes(old, new):
        if tag == "equal":
            for i, j in zip(range(i1, i2), range(j1, j2), strict=True):
                yield Line("same", old[i], i + 1, j + 1)
            continue
        yield from (Line("removed", old[i], i + 1, None) for i in range(i1, i2))
        yield from (Line("added", new[j], None, j + 1) for j in range(j1, j2))


def _changes(old: Sequence[str], new: Sequence[str]) -> Iterator[tuple[str, int, int, int, int]]:
    """As difflib's opcodes, in bounded time."""
    shared = min(len(old), len(new))
    head = next((i for i in range(shared) if old[i] != new[i]), shared)
    tail = next((i for i in range(shared - head) if old[-1 - i] != new[-1 - i]), shared - head)
    i2, j2 = len(old) - tail, len(new) - tail
    if head:
        yield "equal", 0, head, 0, head
    if max(i2, j2) - head > _LONGEST:
        yield "replace", head, i2, head, j2
    else:
        for tag, a1, a2, b1, b2 in SequenceMatcher(None, old[head:i2], new[head:j2], autojunk=False).get_opcodes():
            yield tag, a1 + head, a2 + head, b1 + head, b2 + head
    if tail:
        yield "equal", i2, len(old), j2, len(new)


def _folded(rows: Sequence[Line], context: int) -> Iterator[Line]:
    """Runs of equal lines away from changes as one row."""
    changed = [place for place, row in enumerate(rows) if row.kind != "same"]
    near = {place + step for place in changed for step in range(-context, context + 1)}
    run: list[Line] = []
    for place, row in enumerate(rows):
        if place not in near:
            run.append(row)
            continue
        yield from _fold(run)
        run = []
        yield row
    yield from _fold(run)


def _fold(run: Sequence[Line]) -> Sequence[Line]:
    if len(run) < _FEWEST:
        return run
    return [Line("fold", f"{len(run):,} equal lines", run[0].before, run[0].after, len(run))]
