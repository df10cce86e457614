"""Header hygiene, both ways: what may go to a backend, and what may come back to a client. Pure."""

import re
from collections.abc import Callable
from typing import NamedTuple

import httpx

from inference_api.models import RawHeaders

# An allow-list, so that nothing new ever leaks: credentials, cookies, forwarding claims and engine controls stay here.
# `endpoint-load-metrics-format` asks an engine for its load, which comes back as `endpoint-load-metrics` (ORCA).
FORWARDED = frozenset(
    {
        b"accept",
        b"content-type",
        b"endpoint-load-metrics-format",
        b"traceparent",
        b"tracestate",
        b"user-agent",
        b"x-session-id",
    }
)
FORWARDED_PREFIXES = (b"openai-", b"anthropic-")

# RFC 9110 7.6.1, and the names that older proxies treat the same way.
HOP_BY_HOP = frozenset(
    {
        b"connection",
        b"keep-alive",
        b"proxy-authenticate",
        b"proxy-authorization",
        b"proxy-connection",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
        b"http2-settings",
    }
)
# The router's own to say (date, server, x-request-id, CORS), or a leak from one client to another (cookies).
_NOT_RETURNED = HOP_BY_HOP | {b"set-cookie", b"server", b"date", b"alt-svc", b"x-request-id"}
# May never be forwarded, even when FORWARD_HEADERS asks: framing, coding and routing are the router's.
NEVER_FORWARDED = HOP_BY_HOP | {
    b"host", b"content-length", b"expect", b"accept-encoding", b"cookie", b"authorization", b"x-request-id",
}  # fmt: skip

_REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,128}")
# The values of Connection that name no header.
_PLAIN = frozenset({b"keep-alive", b"close", b"Keep-Alive", b"Close"})
_RETRY_HINTS = frozenset({b"retry-after", b"x-should-retry"})


class _Verdicts(dict[bytes, bool]):
    """Remembers a verdict per header name. Bounded: names come from strangers."""

    def __init__(self, judge: Callable[[bytes], bool]) -> None:
        super().__init__()
        self._judge = judge

    def __missing__(self, name: bytes) -> bool:
        verdict = self._judge(name)
        if len(name) <= 64:
            if len(self) >= 4096:
                self.clear()
            self[name] = verdict
        return verdict


class Inbound(NamedTuple):
    """What the router reads from a request's headers, and the ones that go on to the backend."""

    request_id: str
    content_type: bytes
    # The content type without its parameters, in lower case
    media_type: bytes
    content_length: bytes | None
    content_encoding: bytes | None
    authorization: bytes | None
    session_id: bytes | None
    forwarded: RawHeaders
    # `forwarded` as lines of a request head
    lines: bytes


class RequestHeaders:
    """Reads the (lower-case) headers of a request. `extra`: names that are forwarded beside the usual ones."""

    def __init__(self, extra: frozenset[bytes] = frozenset()) -> None:
        names = FORWARDED | extra
        self._forwarded = _Verdicts(lambda name: name in names or name.startswith(FORWARDED_PREFIXES))

    def __call__(self, headers: RawHeaders) -> Inbound:
        """`request_id` is "" if the client gave none that is valid: one is to be minted."""
        is_forwarded = self._forwarded
        # Reversed: of a repeated header the first counts, as it does for the engines.
        seen = dict(headers[::-1]).get
        forwarded = [pair for pair in headers if is_forwarded[pair[0]]]
        connection = seen(b"connection")
        if connection is not None and (connection not in _PLAIN or _repeats(headers, b"connection")):
            forwarded = _without(forwarded, headers)
        content_type = seen(b"content-type", b"")
        return Inbound(
            _request_id(seen(b"x-request-id"), seen(b"x-correlation-id")),
            content_type,
            content_type.partition(b";")[0].strip().lower(),
            seen(b"content-length"),
            seen(b"content-encoding"),
            seen(b"authorization"),
            seen(b"x-session-id"),
            forwarded,
            header_lines(forwarded),
        )


_EVENT_STREAM = b"text/event-stream"
_NO_CODING = frozenset({b"", b"identity"})
# Without these nginx and its kin hold events back.
_UNBUFFERED = [(b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no")]
_OURS_IN_A_STREAM = frozenset(name for name, _ in _UNBUFFERED)

_is_dropped = _Verdicts(lambda name: name in _NOT_RETURNED or name.startswith(b"access-control-"))
_needs_a_look = _Verdicts(lambda name: name in _RETRY_HINTS or name == b"connection")


def returned(status: int, headers: RawHeaders) -> RawHeaders:
    """The backend's (lower-case) response headers that the client may see, in their order."""
    kept = [pair for pair in headers if not _is_dropped[pair[0]]]
    if any([_needs_a_look[name] for name, _ in headers]):
        if any(name == b"connection" and value not in _PLAIN for name, value in headers):
            kept = _without(kept, headers)
        if status not in (429, 503):
            kept = [pair for pair in kept if pair[0] not in _RETRY_HINTS]
    return kept


class ReturnedHead:
    """A response head as the client gets it, but for what differs from answer to answer: its length and request id.

    `is_stream`, `is_json`, `is_sequence` (of JSON texts): what it says of the body. `is_coded`: nobody but the client
    can read that.
    """

    __slots__ = ("_lines", "headers", "is_coded", "is_json", "is_sequence", "is_stream", "length")

    def __init__(self, status: int, headers: RawHeaders) -> None:
        kept = returned(status, headers)
        seen = dict(kept)
        kind = seen.get(b"content-type", b"").partition(b";")[0].strip().lower()
        # Asked for `identity`, some compress all the same.
        coding = seen.get(b"content-encoding")
        self.is_coded = coding is not None and coding.lower() not in _NO_CODING
        self.is_stream = kind == _EVENT_STREAM and not self.is_coded and status not in (204, 304)
        self.is_json = kind.endswith((b"/json", b"+json")) and not self.is_coded
        self.is_sequence = not self.is_json and kind.find(b"json") >= 0
        # Of the backend's answer; None: it did not say.
        self.length = seen.get(b"content-length")
        self.headers = [pair for pair in kept if pair[0] != b"content-length"]
        self._lines: bytes | None = None

    def of_events(self) -> RawHeaders:
        """The headers of an answer that is passed on as it comes, event by event, whatever it said of itself."""
        kept = [pair for pair in self.unbuffered() if pair[0] != b"content-type"]
        return [*kept, (b"content-type", _EVENT_STREAM + b"; charset=utf-8")]

    def unbuffered(self) -> RawHeaders:
        """The headers of an answer that nothing between here and the client is to hold back."""
        return [pair for pair in self.headers if pair[0] not in _OURS_IN_A_STREAM] + _UNBUFFERED

    @property
    def lines(self) -> bytes:
        """`headers` as lines of a head."""
        if self._lines is None:
            self._lines = header_lines(self.headers)
        return self._lines


def header_lines(headers: RawHeaders) -> bytes:
    """The lines of a head. Raises httpx.LocalProtocolError if a name or value would start another line."""
    lines = b"".join([b"%b: %b\r\n" % pair for pair in headers])
    if lines.count(b"\n") != len(headers) or lines.count(b"\r") != len(headers) or lines.count(b"\0"):
        raise httpx.LocalProtocolError("a request header holds a line break")
    return lines


def _request_id(*candidates: bytes | None) -> str:
    for candidate in candidates:
        if candidate is not None and _REQUEST_ID.fullmatch(candidate):
            return candidate.decode("ascii")
    return ""


def _repeats(headers: RawHeaders, name: bytes) -> bool:
    return [pair[0] for pair in headers].count(name) > 1


def _without(kept: RawHeaders, headers: RawHeaders) -> RawHeaders:
    """`kept` less what the Connection lines of `headers` name."""
    lines = b",".join(value for name, value in headers if name == b"connection")
    # A sender must not strip what frames the message by naming it.
    named = {token.strip().lower() for token in lines.split(b",")} - {b"content-type", b"content-length"}
    return [pair for pair in kept if pair[0] not in named]
