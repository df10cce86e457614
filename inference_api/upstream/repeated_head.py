"""Response heads that a backend repeats byte for byte, but for the date and the digits of the length. Sans-IO.

Equal bytes parse equally, so an answer with a known head skips the parser (docs/adr/0008).
"""

import re
from typing import Any

from inference_api.models import RawHeaders

# A Date has a fixed length (RFC 9110 5.6.7); any printable text of that length is a valid header value, too.
_VARIABLE = re.compile(rb"(?i:\r\n(?:date:[ \t]*+([ -~]{29})|content-length:[ \t]*+([0-9]{1,12})))(?=\r\n)")
_LONGEST = 4096


class RepeatedHead:
    """The head of a whole answer: status 200, one Content-Length, kept alive."""

    __slots__ = ("_date_at", "_headers", "_length_at", "_match", "returned")

    def __init__(self, pattern: re.Pattern[bytes], headers: RawHeaders, date_at: int | None, length_at: int) -> None:
        self._match = pattern.match
        self._headers = headers
        self._date_at = date_at
        self._length_at = length_at
        # The relay's rendering of the headers.
        self.returned: Any = None

    @classmethod
    def learn(cls, data: bytes, headers: RawHeaders) -> "RepeatedHead | None":
        """Make one from the bytes of one read, and the (lower-case) headers parsed from them.

        None unless the read is one whole answer with one Content-Length and at most one Date.
        """
        end = data.find(b"\r\n\r\n") + 4
        names = [name for name, _ in headers]
        dates = names.count(b"date")
        if not 4 <= end <= _LONGEST or names.count(b"content-length") != 1 or dates > 1:
            return None
        spans = [(m.start(m.lastindex or 0), m.end(), m.lastindex) for m in _VARIABLE.finditer(data, 0, end)]
        if len(spans) != 1 + dates:
            return None
        pattern, at = b"", 0
        for first, last, kind in spans:
            pattern += re.escape(data[at:first]) + (b"(?P<date>[ -~]{29})" if kind == 1 else b"(?P<length>[0-9]{1,12})")
            at = last
        known = cls(
            re.compile(pattern + re.escape(data[at:end])),
            headers.copy(),
            names.index(b"date") if dates else None,
            names.index(b"content-length"),
        )
        return known if known.read(data) is not None else None

    def read(self, data: bytes) -> tuple[RawHeaders, bytes] | None:
        """Headers and body, if `data` is one whole answer with this head."""
        match = self._match(data)
        if match is None:
            return None
        length, at = match["length"], match.end()
        if len(data) - at != int(length):
            return None
        headers = self._headers.copy()
        headers[self._length_at] = (b"content-length", length)
        if self._date_at is not None:
            headers[self._date_at] = (b"date", match["date"])
        return headers, data[at:]


class RepeatedHeads:
    """The last head that one origin repeated."""

    __slots__ = ("_learn_at", "_parsed", "newest")

    def __init__(self) -> None:
        self.newest: RepeatedHead | None = None
        # Recorded at the 2nd, 4th, 8th ... parsed answer, so that a backend with varying heads soon costs nothing.
        self._parsed = 0
        self._learn_at = 2

    def parsed(self, data: bytes, headers: RawHeaders) -> None:
        """`data`, one read, was parsed as one whole answer: status 200, kept alive."""
        self._parsed += 1
        if self._parsed >= self._learn_at:
            self._learn_at *= 2
            self.newest = RepeatedHead.learn(data, headers)
