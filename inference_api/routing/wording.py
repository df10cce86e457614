"""Errors of an entry, worded for its author: the key, its value, and the valid values."""

import difflib
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from pydantic import ValidationError

Location = tuple[int | str, ...]

_SHOWN_ERRORS = 3
_LOOKED_AT = 20
_LONGEST = 64
# Fields with several shapes: pydantic lists the errors of every shape.
_SHAPES = {
    "credentials": "must be {env: BACKEND_...}, {file: /path/BACKEND_...} or passthrough",
    "priority": "must be client, ignore, caller or a whole number of 64 bits",
}
_BACKEND = 'must be a URL, or {url: "http://..."}'
_NAME = "no spaces; letters, digits and . _ : / @ -, at most 128, the first a letter or digit"
_PATTERNS = {
    "name": _NAME,
    "aliases": _NAME,
    "env": "the name must begin with BACKEND_, and have capitals, digits and _ only",
    "file": "the path must be absolute, and its last part must begin with BACKEND_",
}
# A value in place of a variable's name may be the secret itself.
_VARIABLE = re.compile(r"[A-Z][A-Z0-9]*(_[A-Z0-9]+)+")
# Names of classes and types that pydantic adds to a location.
_TAG = re.compile(r"[A-Z].*|.*\[.*|int|str|constrained-.*")


def describe(exc: ValidationError, keys: Mapping[str, Collection[str]]) -> str:
    """A pydantic error as one sentence: paths of the first invalid keys, with reasons.

    `keys`: the known keys of an entry ("") and of its parts, by their names.
    """
    return "; ".join(sentences(exc, keys))


def sentences(exc: ValidationError, keys: Mapping[str, Collection[str]]) -> list[str]:
    """As `describe`, one for each key; the last one may say how many more there are."""
    errors = _deepest(exc.errors(include_url=False, include_context=False))
    # A hostile entry may have a million errors, and each sentence takes time.
    found = list(dict.fromkeys(_sentence(error, keys) for error in errors[:_LOOKED_AT]))
    shown = found[:_SHOWN_ERRORS]
    if more := len(found) - len(shown) + len(errors[_LOOKED_AT:]):
        shown.append(f"and {more} more")
    return shown


def suggestion(word: str, known: Iterable[str]) -> str | None:
    """The most similar known word, if one is similar."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.75)
    return close[0] if close else None


def unknown_keys(exc: ValidationError) -> dict[Location, str]:
    """Locations of unknown keys -> their names, without indices of lists."""
    errors = exc.errors(include_url=False, include_context=False, include_input=False)
    places = [error["loc"] for error in errors if error["type"] == "extra_forbidden"]
    return {place: _place(part for part in place if not isinstance(part, int)) for place in places}


def without(raw: Any, places: Iterable[Location]) -> Any:
    """The JSON without the values at these locations of pydantic; for a list in all of its items."""
    for place in places:
        raw = _without(raw, place)
    return raw


def _without(node: Any, place: Location) -> Any:
    if not place:
        return node
    part, rest = place[0], place[1:]
    if isinstance(node, list) and isinstance(part, int):
        return [_without(item, rest) for item in node]
    if isinstance(node, dict) and not rest:
        return {key: value for key, value in node.items() if key != part}
    if isinstance(node, dict) and part in node:
        return {**node, part: _without(node[part], rest)}
    # Locations also contain the names of the shapes that were tried.
    return _without(node, rest)


def _deepest(errors: Iterable[Any]) -> list[Any]:
    """For a field with several shapes, the errors of the intended one."""
    errors = list(errors)
    meant = {error["loc"][0] for error in errors if len(error["loc"]) > 2 and error["loc"][0] in _SHAPES}
    return [error for error in errors if len(error["loc"]) > 2 or not meant.intersection(error["loc"][:1])]


def _sentence(error: Any, keys: Mapping[str, Collection[str]]) -> str:
    place, kind, value = error["loc"], error["type"], error["input"]
    if kind == "extra_forbidden":
        *within, key = place
        near = suggestion(str(key)[:_LONGEST], keys.get(str(within[0]) if within else "", ()))
        hint = f"; did you mean {near!r}?" if near else ""
        return f"{_place(within)}: unknown key {_shown(key)}{hint}" if within else f"unknown key {_shown(key)}{hint}"
    field = next((part for part in reversed(place) if isinstance(part, str) and not _TAG.fullmatch(part)), "")
    if not place:
        # Of the entry as a whole
        return _reason(error)
    where = _place(place)
    if place and place[0] in _SHAPES and len(place) <= 2:
        return f"{_place(place[:1])} {_SHAPES[place[0]]}"
    if kind == "tuple_type":
        return f"{where} must be a list{_as_list(value)}"
    if kind.startswith("model_"):
        return f"{where} {_BACKEND if field == 'backends' else 'must be a mapping, or an object of JSON'}"
    if kind == "string_pattern_mismatch" and field in _PATTERNS:
        return f"{where}{_known_value(field, value)}: {_PATTERNS[field]}"
    if kind == "literal_error":
        hint = "; openai for any other" if field == "engine" else ""
        return f"{where}{_known_value(field, value)}: {_reason(error).replace(chr(39), '')}{hint}"
    return f"{where}{f' {value}' if isinstance(value, int | float) else ''}: {_reason(error)}"


def _reason(error: Any) -> str:
    message: str = error["msg"].removeprefix("Value error, ")
    return re.sub(r"^(Input|String|Tuple) should ", "must ", message)


def _known_value(field: str, value: object) -> str:
    if not isinstance(value, str) or field == "file" or (field == "env" and not _VARIABLE.fullmatch(value)):
        return ""
    return f" {_shown(value)}"


def _as_list(value: object) -> str:
    if not isinstance(value, str) or len(value) > _LONGEST or "@" in value:
        return ""
    return f': ["{value}"]' if re.search(r"[^\w.-]", value) else f": [{value}]"


def _shown(value: object) -> str:
    return repr(str(value)[:_LONGEST])


def _place(location: Iterable[int | str]) -> str:
    parts = [str(part)[:_LONGEST] for part in location if not _TAG.fullmatch(str(part))]
    return ".".join(part if part.isidentifier() or part.isdigit() else repr(part) for part in parts) or "entry"
