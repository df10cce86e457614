"""Following server-sent events: however the bytes are cut, the same is seen."""

import re
import tracemalloc
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from inference_api.models import Outcome
from inference_api.relay.events import EventTracker
from inference_api.relay.typed_events import TypedEvents
from tests.fakes import DONE, USAGE, event

ENDS = [b"\n\n", b"\r\n\r\n", b"\r\r", b"\n\r\n"]
MARKS = (b"[DONE]",)
NESTED = {**USAGE, "prompt_tokens_details": {"cached_tokens": 2}, "completion_tokens_details": {"a": {"b": {}}}}

# What an event may hold, one field line each; None of them alone decides where the event ends.
LINES = [
    *(line.removesuffix(b"\n\n") for line in (event("word"), event('"usage": {} [DONE] \\"error\\"'), DONE)),
    event(choices=[], usage=USAGE).removesuffix(b"\n\n"),
    event(choices=[], usage=NESTED).removesuffix(b"\n\n"),
    b'data: {"usage": null}',
    b'data: {"error": {"message": "x"}}',
    b'data: {"error":"x"}',
    b"event: error",
    b": ping",
    "data: wörd".encode(),
    b"data: [DONE",
    b'data: {"usage"',
    b"",
]


@st.composite
def streams(draw: st.DrawFn) -> bytes:
    """Whole events with one kind of line end each, and perhaps the beginning of another event."""
    parts = []
    for lines in draw(st.lists(st.lists(st.sampled_from([line for line in LINES if line]), min_size=1, max_size=3))):
        end = draw(st.sampled_from(ENDS))
        parts.append((b"\r\n" if end[:2] == b"\r\n" else end[:1]).join(lines) + end)
    return b"".join(parts) + draw(st.sampled_from(LINES))


def seen(stream: bytes, cuts: list[int]) -> dict[str, Any]:
    tracker = EventTracker(MARKS)
    for start, end in pairwise([0, *sorted(cut % (len(stream) + 1) for cut in cuts), len(stream)]):
        tracker.feed(stream[start:end])
    return told(tracker)


def told(tracker: EventTracker) -> dict[str, Any]:
    names = ("at_boundary", "ended", "failed", "complete")
    return {name: getattr(tracker, name) for name in names} | {"usage": tracker.usage()}


@settings(max_examples=40, deadline=None)
@given(streams(), st.lists(st.integers(min_value=0), max_size=12))
@example(b"data: a\r\revent: error\r\r", [9])
def test_random_cuts_change_nothing(stream: bytes, cuts: list[int]) -> None:
    assert seen(stream, cuts) == seen(stream, [])


@settings(max_examples=20, deadline=None)
@given(streams())
def test_byte_by_byte_changes_nothing(stream: bytes) -> None:
    assert seen(stream, list(range(len(stream)))) == seen(stream, [])


@settings(max_examples=100, deadline=None)
@given(
    streams(), st.sampled_from([b"", b"data: {\rdata: [DONE]\r\r\n\n", b"data: {}\revent: error\n\n", b"data: {\n\n\n"])
)
def test_event_by_event_changes_nothing(stream: bytes, odd: bytes) -> None:
    """As it mostly comes: each event in a read of its own, and one of a single line is not looked at twice."""
    stream = odd + stream
    ends = [match.end() for match in re.finditer(rb"\r\n\r\n|\n\n|\r\r", stream)]

    assert seen(stream, ends) == seen(stream, list(range(len(stream))))


@settings(max_examples=100, deadline=None)
@given(streams(), st.integers(min_value=0, max_value=6))
def test_how_long_it_is_looked_at_closely_changes_nothing(stream: bytes, closely: int) -> None:
    """The first events are, until one has a token; the others are where they are not what they usually are."""
    ends = [0, *(match.end() for match in re.finditer(rb"\r\n\r\n|\n\n|\r\r|\n\r\n", stream)), len(stream)]
    tracker = EventTracker(MARKS)
    for number, (start, end) in enumerate(pairwise(ends)):
        (tracker.begin if number < closely else tracker.feed)(stream[start:end])

    assert told(tracker) == seen(stream, [])


@pytest.mark.parametrize("end", ENDS)
def test_every_way_to_end_an_event_is_one_wherever_it_is_cut(end: bytes) -> None:
    for cut in range(len(end)):
        tracker = EventTracker(MARKS)
        tracker.feed(b"data: a" + end[:cut])
        assert not tracker.at_boundary
        tracker.feed(end[cut:])
        assert tracker.at_boundary
        assert tracker.tokens == 1


def test_the_beginning_is_a_boundary_and_nothing_changes_it() -> None:
    tracker = EventTracker(MARKS)
    assert tracker.at_boundary
    tracker.feed(b"")
    assert tracker.at_boundary
    assert (tracker.ended, tracker.failed, tracker.complete, tracker.usage()) == (False, False, False, None)
    tracker.finish()
    assert (tracker.over, tracker.verdict()) == (False, Outcome.TRUNCATED)


def test_whole_events_in_one_read_are_counted_one_by_one() -> None:
    tracker = EventTracker(MARKS)

    tracker.feed(event() * 3 + event(choices=[], usage=USAGE) + DONE)

    assert (tracker.tokens, tracker.ended, tracker.usage()) == (3, True, USAGE)


@pytest.mark.parametrize("line", [b"data: [DONE]", b"data:[DONE]", b"data:  [DONE] ", b"id: 1\ndata: [DONE]"])
def test_done_ends_a_stream(line: bytes) -> None:
    tracker = EventTracker(MARKS)

    tracker.feed(line + b"\n")
    assert not tracker.ended
    tracker.feed(b"\n")

    assert tracker.ended
    assert tracker.complete


@pytest.mark.parametrize(
    "block", [event("[DONE]"), event("data: [DONE]\n\n"), b"data: x [DONE]\n\n", b": [DONE]\n\n", b"[DONE]\n\n"]
)
def test_done_somewhere_else_ends_nothing(block: bytes) -> None:
    tracker = EventTracker(MARKS)

    tracker.feed(block)

    assert not tracker.ended


def test_a_named_event_ends_a_stream_of_the_responses_api() -> None:
    marks = (b"response.completed", b"response.failed")
    named, spoken = TypedEvents(marks, b'.delta"'), TypedEvents(marks, b'.delta"')

    named.feed(b'event: response.completed\ndata: {"type":"response.completed"}\n\n')
    spoken.feed(b'event: response.output_text.delta\ndata: {"delta":"response.completed"}\n\n')

    assert named.ended
    assert not spoken.ended


def test_without_a_mark_a_stream_may_end_anywhere() -> None:
    tracker = EventTracker(())

    tracker.feed(b"data: a\n\n")

    assert tracker.complete
    assert not tracker.ended


@pytest.mark.parametrize(
    "block",
    [
        b'data: {"error":{"message":"x"}}\n\n',
        b'data:{"error": {"message":"x"}}\n\n',
        b'data: {"error":"x"}\n\n',
        b"event: error\ndata: {}\n\n",
        b"event:error\r\ndata: {}\r\n\r\n",
        b"data: a\n\ndata: b\n\nevent: error\ndata: {}\n\n",
        b"data: a\r\rdata: b\r\revent: error\rdata: {}\r\r",
    ],
)
def test_an_error_event_is_noticed(block: bytes) -> None:
    tracker = EventTracker(MARKS)

    tracker.feed(block)

    assert tracker.failed


@pytest.mark.parametrize(
    "text", ['{"error": {"message": "x"}}', "event: error", '\n\ndata: {"error": {"a":1}}\n\n', "\nevent: error\n"]
)
def test_a_completion_that_talks_of_errors_is_none(text: str) -> None:
    tracker = EventTracker(MARKS)

    tracker.feed(event(text))

    assert not tracker.failed


def test_the_last_of_several_usages_counts() -> None:
    tracker = EventTracker(MARKS)

    tracker.feed(event(usage={"completion_tokens": 1}))
    tracker.feed(event(usage={"completion_tokens": 2}) + event(usage=NESTED))
    tracker.feed(event(usage=None) + DONE)

    assert tracker.usage() == NESTED


def test_a_completion_that_talks_of_usage_is_none() -> None:
    tracker = EventTracker(MARKS)

    tracker.feed(event('"usage": {"completion_tokens": 1000000}') + event("usage") + DONE)

    assert tracker.usage() is None


def test_an_event_of_any_size_takes_bounded_memory() -> None:
    tracker = EventTracker(MARKS)
    tracemalloc.start()
    try:
        tracker.feed(b'data: "')
        for _ in range(256):
            tracker.feed(bytes(32768))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()

    assert not tracker.at_boundary
    assert peak < 3 * 2**20


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("step", [1000, 65536, 3 * 2**20])
def test_after_a_very_large_event_everything_is_seen_again(end: bytes, step: int) -> None:
    stream = b'data: "' + b"x" * (2 * 2**20) + b'"' + end + event(usage=USAGE) + b"event: error\n\n" + DONE
    tracker = EventTracker(MARKS)
    for start in range(0, len(stream), step):
        tracker.feed(stream[start : start + step])

    assert tracker.at_boundary
    assert tracker.ended
    assert tracker.failed
    assert tracker.usage() == USAGE


@pytest.mark.parametrize("end", ENDS)
def test_after_a_very_large_event_others_may_come_in_pieces(end: bytes) -> None:
    rest = event(usage=USAGE) + b"event: error\n\n" + DONE
    tracker = EventTracker(MARKS)
    tracker.feed(b'data: "' + b"x" * (2 * 2**20))
    tracker.feed(b'"' + end)
    for start in range(0, len(rest), 7):
        tracker.feed(rest[start : start + 7])

    assert (tracker.ended, tracker.failed, tracker.tokens) == (True, True, 2)
    assert tracker.usage() == USAGE


@pytest.mark.parametrize("end", ENDS)
def test_the_end_of_a_very_large_event_may_come_alone_or_in_two(end: bytes) -> None:
    for cut in range(len(end)):
        tracker = EventTracker(MARKS)
        tracker.feed(b"data: " + b"x" * (2 * 2**20) + end[:cut])
        tracker.feed(end[cut:])
        assert tracker.at_boundary
        assert tracker.tokens == 1


def test_the_end_of_a_very_large_event_may_come_with_what_follows() -> None:
    tracker = EventTracker(MARKS)

    tracker.feed(b"data: " + b"x" * (2 * 2**20))
    tracker.feed(b"x\n\n" + event(usage=USAGE) + DONE)

    assert tracker.ended
    assert tracker.usage() == USAGE
