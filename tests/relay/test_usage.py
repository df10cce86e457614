"""What engines report of their tokens, in the shapes of three APIs, and where it stands in an answer."""

from typing import Any

import orjson
import pytest

from inference_api.models import Usage
from inference_api.relay.usage import find_usage, later, usage_of
from tests.fakes import USAGE

NESTED = {**USAGE, "prompt_tokens_details": {"cached_tokens": 2}, "completion_tokens_details": {"a": {"b": {}}}}

REPORTED: dict[str, tuple[dict[str, Any], Usage]] = {
    "OpenAI": ({"prompt_tokens": 1, "completion_tokens": 2}, Usage(1, None, 2)),
    "OpenAI, details": (
        {
            "prompt_tokens": 9,
            "prompt_tokens_details": {"cached_tokens": 4},
            "completion_tokens": 7,
            "completion_tokens_details": {"reasoning_tokens": 5},
        },
        Usage(9, 4, 7, 5),
    ),
    "OpenAI, no details": (
        {"prompt_tokens": 1, "prompt_tokens_details": None, "completion_tokens": 0},
        Usage(1, None, 0),
    ),
    "embeddings": ({"prompt_tokens": 5, "total_tokens": 5}, Usage(5)),
    "Responses": (
        {
            "input_tokens": 9,
            "input_tokens_details": {"cached_tokens": 0},
            "output_tokens": 3,
            "output_tokens_details": {"reasoning_tokens": 1},
        },
        Usage(9, 0, 3, 1),
    ),
    "Messages": ({"input_tokens": 2, "output_tokens": 3}, Usage(2, None, 3)),
    "Messages, cached": (
        {"input_tokens": 2, "cache_read_input_tokens": 10, "cache_creation_input_tokens": 100, "output_tokens": 3},
        Usage(112, 10, 3),
    ),
    "Messages, null": ({"input_tokens": 2, "cache_read_input_tokens": None, "output_tokens": 3}, Usage(2, None, 3)),
    "both": (
        {"prompt_tokens": 9, "completion_tokens": 1, "input_tokens": 2, "cache_read_input_tokens": 7},
        Usage(9, None, 1),
    ),
    "nonsense": ({"prompt_tokens": "1", "completion_tokens": -2}, Usage()),
    "more nonsense": ({"prompt_tokens": True, "completion_tokens": 2.5, "prompt_tokens_details": [1]}, Usage()),
    "nonsense of others": ({"input_tokens": "9", "input_tokens_details": 3, "output_tokens": None}, Usage()),
    "nothing": ({}, Usage()),
}


@pytest.mark.parametrize("what", REPORTED)
def test_usage_is_read_in_every_shape(what: str) -> None:
    reported, usage = REPORTED[what]

    assert usage_of(reported) == usage


@pytest.mark.parametrize(
    ("start", "delta", "usage"),
    [
        ({"input_tokens": 9, "output_tokens": 1}, {"output_tokens": 5}, Usage(9, None, 5)),
        # vLLM knows what was cached only at the end.
        (
            {"input_tokens": 9, "output_tokens": 0},
            {"input_tokens": 2, "cache_read_input_tokens": 7, "output_tokens": 5},
            Usage(9, 7, 5),
        ),
        ({"input_tokens": 9, "output_tokens": 1}, {"input_tokens": 0, "output_tokens": 5}, Usage(9, None, 5)),
        ({"input_tokens": 9}, {"input_tokens": None, "cache_read_input_tokens": 0, "output_tokens": 5}, Usage(9, 0, 5)),
    ],
)
def test_two_reports_of_one_message_are_one(start: dict[str, Any], delta: dict[str, Any], usage: Usage) -> None:
    assert usage_of(later(start, delta)) == usage


@pytest.mark.parametrize(
    ("text", "usage"),
    [
        (b'{"usage":{"a":1}}', {"a": 1}),
        (b'{"usage" :\n {"a":1},"x":{}}', {"a": 1}),
        (orjson.dumps({"usage": NESTED}), NESTED),
        (b'{"usage":{"a":"}"},"b":1}', {"a": "}"}),
        (b'{"usage":{"a":1},"x":{"usage":null}}', {"a": 1}),
        (b'{"usage":{}}', {}),
        (b'{"usage":null}', None),
        (b'{"usage":[{"a":1}]}', None),
        (b'{"usage":{"a":1', None),
        (b'{"usage":{"a":1 nonsense}}}}}}}}}}}}', None),
        (orjson.dumps({"content": '"usage":{"a":1}'}), None),
        (b"", None),
    ],
)
def test_usage_in_a_piece_of_json(text: bytes, usage: Any) -> None:
    assert find_usage(text) == usage
