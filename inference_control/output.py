"""What is printed: a table of a list, lines of an object, or JSON. Pure."""

import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

_WIDEST = 48
# Members of usage records and reports that are Unix milliseconds
_MOMENTS = frozenset({"at", "since", "retry_at", "started_at", "received_at"})


def as_json(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False)


def as_table(objects: Iterable[Mapping[str, Any]], columns: Sequence[str]) -> str:
    """Columns without a value in any object are left out, but for the first."""
    rows = [[cell(column, one.get(column)) for column in columns] for one in objects]
    kept = [place for place in range(len(columns)) if place == 0 or not rows or any(row[place] != "-" for row in rows)]
    lines = [[columns[place].upper().replace("_", " ") for place in kept]]
    lines += [[_short(row[place]) for place in kept] for row in rows]
    widths = [max(len(line[place]) for line in lines) for place in range(len(kept))]
    return "\n".join(
        "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def as_lines(one: Mapping[str, Any]) -> str:
    """`name: value` lines."""
    width = max(map(len, one), default=0) + 1
    return "\n".join(f"{name + ':':<{width}} {cell(name, value)}" for name, value in one.items())


def cell(name: str, value: Any) -> str:
    """A value in words, on one line and without control characters: it may be another's text."""
    if value is None or value == [] or value == {}:
        return "-"
    if name in _MOMENTS and isinstance(value, int) and not isinstance(value, bool):
        text = datetime.fromtimestamp(value / 1000, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    elif isinstance(value, bool):
        text = "yes" if value else "no"
    elif isinstance(value, Mapping):
        text = _mapping(value)
    elif isinstance(value, list):
        text = ", ".join(_mapping(one) if isinstance(one, Mapping) else str(one) for one in value)
    else:
        text = str(value)
    return "".join(character if character.isprintable() else "?" for character in text)


def _mapping(value: Mapping[str, Any]) -> str:
    if set(value) == {"routers", "of", "missing"}:
        return f"{value['routers']}/{value['of']}"
    if "url" in value and isinstance(value["url"], str):
        return value["url"]
    if set(value) == {"kind", "name"}:
        return str(value["name"] or value["kind"])
    if set(value) == {"type", "id"}:
        return f"{value['type']}:{value['id']}"
    if set(value) == {"organisation", "role"}:
        return f"{value['role']} of {value['organisation']}"
    return " ".join(f"{name}={cell(name, one)}" for name, one in value.items() if one is not None)


def _short(text: str) -> str:
    return text if len(text) <= _WIDEST else f"{text[: _WIDEST - 3]}..."
