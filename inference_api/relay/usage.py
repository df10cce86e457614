"""Reads the token counts that engines report, in the shapes of the OpenAI, Responses and Messages APIs. Pure."""

import re
from collections.abc import Mapping
from typing import Any

import orjson

from inference_api.models import Usage

USAGE = re.compile(rb'"usage"\s*:\s*\{')


# The fields of Usage, as a tuple: making a Usage costs more than reading it, and most requests need the numbers only.
Counts = tuple[int | None, int | None, int | None, int | None]


def usage_of(reported: Mapping[str, Any]) -> Usage:
    """The usage that a `usage` object reports."""
    return Usage(*counts(reported))


def counts(reported: Mapping[str, Any]) -> Counts:
    """The same as a plain tuple."""
    get = reported.get
    prompt, completion = get("prompt_tokens"), get("completion_tokens")
    if prompt is None and completion is None:
        return _of_other_apis(reported)
    details, more = get("prompt_tokens_details"), get("completion_tokens_details")
    return (
        prompt if type(prompt) is int and prompt >= 0 else None,
        _detail(details, "cached_tokens") if details else None,
        completion if type(completion) is int and completion >= 0 else None,
        _detail(more, "reasoning_tokens") if more else None,
    )


def _of_other_apis(reported: Mapping[str, Any]) -> Counts:
    prompt, completion = _count(reported, "input_tokens"), _count(reported, "output_tokens")
    details, more = reported.get("input_tokens_details"), reported.get("output_tokens_details")
    if details is not None:
        return prompt, _detail(details, "cached_tokens"), completion, _detail(more, "reasoning_tokens")
    # The Messages API counts them apart.
    cached, created = _count(reported, "cache_read_input_tokens"), _count(reported, "cache_creation_input_tokens")
    if prompt is not None:
        prompt += (cached or 0) + (created or 0)
    return prompt, cached, completion, _detail(more, "reasoning_tokens")


def later(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    """Merge two reports of one answer: the later one counts, except where it has nothing, or 0."""
    return {**before, **{name: value for name, value in after.items() if value or name not in before}}


def find_usage(text: bytes) -> dict[str, Any] | None:
    """The last `"usage": {...}` object in a part of a JSON text, or None.

    A quote inside a JSON string is escaped, so a completion that talks about "usage" cannot match.
    """
    at = text.rfind(b'"usage"')
    while at >= 0:
        if match := USAGE.match(text, at):
            return _object(text, match.end() - 1)
        at = text.rfind(b'"usage"', 0, at)
    return None


def _object(text: bytes, start: int) -> dict[str, Any] | None:
    # It ends at one of the next closing braces; nested objects (prompt_tokens_details) are few.
    end = start
    for _ in range(8):
        end = text.find(b"}", end) + 1
        if end == 0:
            break
        try:
            found: dict[str, Any] = orjson.loads(text[start:end])
        except orjson.JSONDecodeError:
            continue
        return found
    return None


def _detail(details: Any, name: str) -> int | None:
    return _count(details, name) if isinstance(details, dict) else None


def _count(reported: Mapping[str, Any], name: str) -> int | None:
    value = reported.get(name)
    return value if type(value) is int and value >= 0 else None
