"""Frames: what is passed of a WebSocket is the frames' bytes, whatever the reads are; limits and texts are seen."""

import os

from hypothesis import given
from hypothesis import strategies as st
from websockets.frames import Frame, Opcode

from inference_api.relay.frames import Frames, close_frame


def wire(kind: Opcode, payload: bytes, final: bool = True, masked: bool = False) -> bytes:
    return Frame(kind, payload, fin=final).serialize(mask=masked)


MESSAGES = st.lists(
    st.tuples(st.sampled_from([Opcode.TEXT, Opcode.BINARY]), st.lists(st.integers(0, 70_000), min_size=1, max_size=3)),
    max_size=4,
)


@given(MESSAGES, st.booleans(), st.lists(st.integers(1, 200), max_size=40))
def test_all_bytes_pass_and_texts_are_whole(
    messages: list[tuple[Opcode, list[int]]], masked: bool, cuts: list[int]
) -> None:
    data, texts, seen = b"", [], list[bytes]()
    for kind, sizes in messages:
        pieces = [os.urandom(4).hex().encode() * (size // 8) for size in sizes]
        for number, piece in enumerate(pieces):
            last = number == len(pieces) - 1
            data += wire(kind if number == 0 else Opcode.CONT, piece, last, masked)
            data += wire(Opcode.PING, b"between", masked=masked)
        texts += [b"".join(pieces)] if kind is Opcode.TEXT and not masked else []
    frames = Frames(1 << 20, seen.append)

    passed, at = b"", 0
    for cut in [*cuts, len(data)]:
        passed += frames.feed(data[at : at + cut])
        at += cut

    assert passed == data
    assert seen == texts
    assert frames.at_boundary
    assert not frames.closed


@given(st.integers(0, 5000), st.integers(1, 7))
def test_a_boundary_is_the_end_of_a_frame(size: int, step: int) -> None:
    data = wire(Opcode.BINARY, b"x" * size)
    frames, passed = Frames(1 << 20), 0

    for at in range(0, len(data), step):
        passed += len(frames.feed(data[at : at + step]))
        # Of a head nothing is passed before it is whole.
        assert frames.at_boundary == (passed in (0, len(data)))
    assert passed == len(data)


def test_nothing_of_a_message_that_is_too_large_is_passed_and_fragments_count_together() -> None:
    frames = Frames(100)
    first = wire(Opcode.TEXT, b"x" * 60, final=False)
    good = wire(Opcode.CONT, b"y" * 40)

    assert frames.feed(first + good) == first + good
    assert not frames.is_too_large
    assert frames.feed(first + wire(Opcode.CONT, b"y" * 41)) == first
    assert frames.is_too_large
    assert frames.at_boundary
    assert frames.feed(b"more") == b""

    huge = Frames(100)
    assert huge.feed(b"\x82\x7f") == b""
    assert huge.feed((1 << 63).to_bytes(8)) == b""
    assert huge.is_too_large


def test_after_a_close_frame_nothing_is_passed() -> None:
    frames = Frames(100)
    closing = wire(Opcode.CLOSE, b"\x03\xe8bye")

    assert frames.feed(closing[:3]) == closing[:3]
    assert not frames.closed
    assert frames.feed(closing[3:] + wire(Opcode.TEXT, b"late")) == closing[3:]
    assert frames.closed
    assert frames.feed(b"more") == b""


def test_a_text_that_is_longer_than_what_is_kept_is_passed_and_not_seen() -> None:
    seen: list[bytes] = []
    frames = Frames(1 << 30, seen.append)
    data = wire(Opcode.TEXT, b"x" * (1 << 20), final=False) + wire(Opcode.CONT, b"y") + wire(Opcode.TEXT, b"z")

    assert frames.feed(data) == data
    assert seen == [b"z"]


def test_close_frames_are_those_of_the_standard() -> None:
    assert close_frame(1012, "restart") == wire(Opcode.CLOSE, b"\x03\xf4restart")
    masked = close_frame(1001, masked=True)
    mask, covered = masked[2:6], masked[6:]
    assert masked[:2] == b"\x88\x82"
    assert bytes(byte ^ mask[place] for place, byte in enumerate(covered)) == b"\x03\xe9"
