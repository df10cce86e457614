"""Follows one direction of a WebSocket, frame by frame (RFC 6455, 5), without changing a byte. Sans-IO."""

import os
from collections.abc import Callable

_CONTINUATION, _TEXT, _BINARY, _CLOSE = 0, 1, 2, 8
# Bytes up to which a text message is kept until it is whole
_KEPT = 1 << 20
# The longest reason of a close frame
_REASON = 123


class Frames:
    """`feed` returns the bytes that may be passed on: all but the beginning of a frame's head.

    `limit`: bytes of a message. `on_text` gets each whole text message, unmasked ones only.
    """

    __slots__ = (
        "_closing", "_head", "_kept", "_left", "_limit", "_on_text", "_size", "_text", "_whole", "closed",
        "is_too_large",
    )  # fmt: skip

    def __init__(self, limit: int, on_text: Callable[[bytes], None] | None = None) -> None:
        self._limit = limit
        self._on_text = on_text
        # The beginning of a head; bytes of the current frame that are to come
        self._head = b""
        self._left = 0
        # The message so far: its bytes; its text, if that is kept; whether this frame is its last
        self._size = 0
        self._text: list[bytes] | None = None
        self._kept = self._whole = False
        # This frame ends the connection; it has been passed.
        self._closing = self.closed = False
        self.is_too_large = False

    @property
    def at_boundary(self) -> bool:
        """Whether the bytes that were passed end with a frame."""
        return not self._left

    def feed(self, data: bytes) -> bytes:
        """Stops before a message that `is_too_large`, and after a close frame, which sets `closed`."""
        if self._head:
            data, self._head = self._head + data, b""
        at, end = 0, len(data)
        while at < end and not (self.closed or self.is_too_large):
            if self._left:
                piece = data[at : at + self._left] if self._kept else b""
                taken = min(self._left, end - at)
                at += taken
                self._take(taken, piece)
                continue
            size = _head_size(data, at, end)
            if size is None or size > end - at:
                self._head = data[at:]
                return data[:at]
            if not self._begin(data, at, size):
                break
            at += size
            self._take(0, b"")
        return data if at == end else data[:at]

    def _begin(self, data: bytes, at: int, size: int) -> bool:
        """Read the head of a frame. False: its message is too large."""
        first, second = data[at], data[at + 1]
        length = second & 127
        if length == 126:
            length = int.from_bytes(data[at + 2 : at + 4])
        elif length == 127:
            length = int.from_bytes(data[at + 2 : at + 10])
        kind, masked = first & 15, second & 128
        if kind >= _CLOSE:
            # Between the frames of a message
            self._kept, self._whole = False, False
            self.is_too_large = length > self._limit
        else:
            self._size = length if kind != _CONTINUATION else self._size + length
            self.is_too_large = self._size > self._limit
            if kind != _CONTINUATION:
                self._text = [] if kind == _TEXT and self._on_text is not None and not masked else None
            if self._size > _KEPT:
                self._text = None
            self._kept, self._whole = self._text is not None, first & 128 != 0
        if self.is_too_large:
            return False
        self._left = length
        self._closing = kind == _CLOSE
        return True

    def _take(self, taken: int, piece: bytes) -> None:
        self._left -= taken
        if self._kept and piece and self._text is not None:
            self._text.append(piece)
        if self._left:
            return
        self.closed = self._closing
        if self._kept and self._whole and self._text is not None and self._on_text is not None:
            text, self._text, self._kept = b"".join(self._text), None, False
            self._on_text(text)


def _head_size(data: bytes, at: int, end: int) -> int | None:
    """Bytes of a frame's head, None if even that is not known."""
    if end - at < 2:
        return None
    second = data[at + 1]
    return 2 + {126: 2, 127: 8}.get(second & 127, 0) + (4 if second & 128 else 0)


def close_frame(code: int, reason: str = "", *, masked: bool = False) -> bytes:
    """`masked`: as clients send it."""
    payload = code.to_bytes(2) + reason.encode()[:_REASON]
    if not masked:
        return bytes((0x80 | _CLOSE, len(payload))) + payload
    mask = os.urandom(4)
    covered = bytes(byte ^ mask[place & 3] for place, byte in enumerate(payload))
    return bytes((0x80 | _CLOSE, 0x80 | len(payload))) + mask + covered
