"""Answers of engines that send what they like: the page that shows them is one that can be sent."""

import json
from typing import Any

import pytest

from control_plane.pure.chat import MOST, Problem, Transcript

HOSTILE: list[Any] = [
    [],
    1,
    {"choices": [1, None, [], {"delta": "x"}, {"delta": {"content": {"a": 1}, "tool_calls": 5}}]},
    {"choices": {"delta": {}}, "usage": "many", "model": {"a": 1}, "error": "no object"},
    {"choices": [{"finish_reason": {"a": 1}, "delta": {"reasoning": [1]}}]},
    {"usage": {"prompt_tokens": 10**400, "completion_tokens": -1, "prompt_tokens_details": []}},
    {"usage": {"prompt_tokens": True, "completion_tokens": 1.5}},
    {"error": {"message": {"a": 1}}},
]


@pytest.mark.parametrize("found", HOSTILE, ids=str)
def test_what_is_no_answer_is_none(found: Any) -> None:
    transcript = Transcript()
    transcript.feed(b"data: " + json.dumps(found).encode() + b"\n\n")
    tokens = transcript.input_tokens, transcript.output_tokens, transcript.cached_tokens

    assert (transcript.text, transcript.reasoning, transcript.finish, transcript.model) == ("", "", None, None)
    assert tokens == (None, None, None)


def test_nesting_without_end_and_half_characters_are_shown_as_far_as_they_can_be() -> None:
    transcript = Transcript()
    deep = b'{"choices": [{"delta": {"tool_calls": [' + b"[" * 200_000 + b"]" * 200_000 + b"]}}]}"
    transcript.feed(b"data: " + deep + b"\n\n")
    transcript.feed(b'data: {"choices": [{"delta": {"content": "a\\ud83d", "tool_calls": ["\\ud83d"]}}]}\n\n')
    transcript.feed(b'data: {"error": {"message": "b\\udc00", "code": 400}}\n\n')

    assert transcript.text == 'a?"?"\n'
    assert transcript.problem == Problem("b?", "400")


def test_an_answer_without_end_is_kept_to_a_bound() -> None:
    transcript, fed = Transcript(), 0
    data = b"data: " + json.dumps({"choices": [{"delta": {"content": "x" * 100_000}}]}).encode() + b"\n\n"
    while not transcript.full:
        transcript.feed(data)
        fed += 1
    transcript.feed(data)

    assert len(transcript.text) == fed * 100_000 < MOST + 100_001
    assert transcript.problem is not None
    assert "longer" in transcript.problem.message
