"""Selects the headers of a backend's answer for the client. Pure."""

from inference_api.headers import HOP_BY_HOP, PLAIN_CONNECTION, Verdicts, header_lines, without_connection_headers
from inference_api.models import RawHeaders

# Set by the router itself (date, server, x-request-id, CORS), or a leak from one client to another (cookies).
_NOT_RETURNED = HOP_BY_HOP | {b"set-cookie", b"server", b"date", b"alt-svc", b"x-request-id"}
_RETRY_HINTS = frozenset({b"retry-after", b"x-should-retry"})
_EVENT_STREAM = b"text/event-stream"
_NO_CODING = frozenset({b"", b"identity"})
# Without these, nginx and similar proxies buffer events.
_UNBUFFERED = [(b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no")]
_OURS_IN_A_STREAM = frozenset(name for name, _ in _UNBUFFERED)

_is_dropped = Verdicts(lambda name: name in _NOT_RETURNED or name.startswith(b"access-control-"))
_needs_a_look = Verdicts(lambda name: name in _RETRY_HINTS or name == b"connection")


def returned(status: int, headers: RawHeaders) -> RawHeaders:
    """The backend's (lower-case) response headers that the client may see, in their order."""
    kept = [pair for pair in headers if not _is_dropped[pair[0]]]
    if any([_needs_a_look[name] for name, _ in headers]):
        if any(name == b"connection" and value not in PLAIN_CONNECTION for name, value in headers):
            kept = without_connection_headers(kept, headers)
        if status not in (429, 503):
            kept = [pair for pair in kept if pair[0] not in _RETRY_HINTS]
    return kept


class ReturnedHead:
    """A response head as the client gets it, without length and request id, which differ from answer to answer.

    `is_stream`, `is_json`, `is_sequence` (of JSON texts): by its content type. `is_coded`: the body is compressed, and
    only the client can read it.
    """

    __slots__ = ("_lines", "headers", "is_coded", "is_json", "is_sequence", "is_stream", "length")

    def __init__(self, status: int, headers: RawHeaders) -> None:
        kept = returned(status, headers)
        seen = dict(kept)
        kind = seen.get(b"content-type", b"").partition(b";")[0].strip().lower()
        # Some backends compress in spite of `accept-encoding: identity`.
        coding = seen.get(b"content-encoding")
        self.is_coded = coding is not None and coding.lower() not in _NO_CODING
        self.is_stream = kind == _EVENT_STREAM and not self.is_coded and status not in (204, 304)
        self.is_json = kind.endswith((b"/json", b"+json")) and not self.is_coded
        self.is_sequence = not self.is_json and kind.find(b"json") >= 0
        # Content-Length of the backend's answer, or None.
        self.length = seen.get(b"content-length")
        self.headers = [pair for pair in kept if pair[0] != b"content-length"]
        self._lines: bytes | None = None

    def of_events(self) -> RawHeaders:
        """The headers of a stream of events, whatever the content type of the backend's answer."""
        kept = [pair for pair in self.unbuffered() if pair[0] != b"content-type"]
        return [*kept, (b"content-type", _EVENT_STREAM + b"; charset=utf-8")]

    def unbuffered(self) -> RawHeaders:
        """The headers of an answer that proxies must not buffer."""
        return [pair for pair in self.headers if pair[0] not in _OURS_IN_A_STREAM] + _UNBUFFERED

    @property
    def lines(self) -> bytes:
        """`headers` as lines of a head."""
        if self._lines is None:
            self._lines = header_lines(self.headers)
        return self._lines
