"""From an answer to what it votes for: two answers vote alike if their ballots are equal. Pure.

In steps, as an answer may be large: a step takes a few milliseconds at most.
"""

import json
import re
from collections.abc import Generator, Hashable
from decimal import Decimal, InvalidOperation
from typing import Any, Literal, NamedTuple, NoReturn
from unicodedata import normalize

import orjson

from inference_api.relay.dialects import is_aborted
from inference_api.relay.usage import Counts, counts

Compare = Literal["exact", "text", "json", "number"]
# Comparing what is nested deeper could fail.
_DEEPEST = 100
_NUMBER = re.compile(r"[+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")


class Vote(NamedTuple):
    """`ballot`: None is like no other one, not even another None; `is_whole`: the engine did not abort it."""

    ballot: Hashable | None
    tokens: Counts
    is_whole: bool


def read_vote(body: bytes, compare: Compare) -> Generator[None, None, Vote | None]:
    """The vote of a chat completion or a completion; None: it is no JSON object."""
    document = _document(body)
    yield
    if not isinstance(document, dict):
        return None
    usage, choices = document.get("usage"), document.get("choices")
    ballots = []
    for choice in choices if isinstance(choices, list) else ():
        ballots.append((yield from _of_choice(choice, compare)))
    ballot = None if not ballots or None in ballots else tuple(ballots)
    return Vote(ballot, counts(usage if isinstance(usage, dict) else {}), not is_aborted(document))


def _document(body: bytes) -> Any:
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError:
        pass
    try:
        # Engines write NaN, lone surrogates, and a byte order mark.
        return json.loads(body)
    except (ValueError, RecursionError):
        return None


def _of_choice(choice: Any, compare: Compare) -> Generator[None, None, Hashable | None]:
    if not isinstance(choice, dict):
        return None
    message = choice.get("message")
    if not isinstance(message, dict):
        text = choice.get("text")
    else:
        calls = message.get("tool_calls") or ([{"function": call}] if (call := message.get("function_call")) else None)
        if calls:
            found = yield from _of_calls(calls)
            return found
        text = message.get("content")
        # A refusal is an answer, too.
        text = message.get("refusal") if text is None else _joined(text)
    if not isinstance(text, str):
        return None
    ballot = yield from _of_text(text, compare)
    return ballot


def _joined(content: Any) -> Any:
    """The text of a content of parts."""
    if not isinstance(content, list):
        return content
    parts = [part.get("text") if isinstance(part, dict) else None for part in content]
    return None if None in parts else "".join(map(str, parts))


def _of_calls(calls: Any) -> Generator[None, None, Hashable | None]:
    """Names and arguments of tool calls, in order; ids are the engine's own."""
    found: list[Hashable] = []
    for call in calls if isinstance(calls, list) else ():
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict):
            return None
        arguments = function.get("arguments") or {}
        value = _parsed(arguments) if isinstance(arguments, str) else _value(arguments)
        yield
        if value is None:
            return None
        found.append((str(function.get("name")), value))
    return ("calls", *found) if found else None


def _of_text(text: str, compare: Compare) -> Generator[None, None, Hashable | None]:
    if compare == "json":
        value = _parsed(text)
        yield
        return value
    if compare == "number":
        return _number(text.strip())
    if compare == "text":
        text = normalize("NFKC", text)
        yield
        # Once more: folding may undo it.
        text = normalize("NFKC", text.casefold())
        yield
        text = " ".join(text.split())
        yield
    return "text", text


def _number(text: str) -> Hashable | None:
    if _NUMBER.fullmatch(text) is None:
        return None
    try:
        return "number", Decimal(text)
    except InvalidOperation:
        # An exponent beyond all bounds
        return None


def _parsed(text: str) -> Hashable | None:
    """A JSON text by its value; None if it is none."""
    try:
        return _value(json.loads(text, parse_float=Decimal, parse_constant=_no_constant))
    except (ValueError, ArithmeticError, RecursionError):
        return None


def _value(value: Any) -> Hashable | None:
    try:
        return _canonical(value)
    except RecursionError:
        return None


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"JSON has no {name}")


def _canonical(value: Any, depth: int = 0) -> Hashable:
    """Equal for equal values: members in any order, and 1 is 1.0, but not true. Raises RecursionError."""
    if depth > _DEEPEST:
        raise RecursionError
    if isinstance(value, dict):
        return "object", frozenset((name, _canonical(one, depth + 1)) for name, one in value.items())
    if isinstance(value, list):
        return "array", tuple(_canonical(one, depth + 1) for one in value)
    if isinstance(value, bool):
        return "boolean", value
    if isinstance(value, float):
        return "value", Decimal(repr(value))
    return "value", value
