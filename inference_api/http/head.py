"""Reads the headers of a request, and selects those for the backend. Pure."""

import re
from typing import Any, NamedTuple

from inference_api.headers import PLAIN_CONNECTION, Verdicts, header_lines, is_repeated, without_connection_headers
from inference_api.models import RawHeaders

# An allow-list, so that no new header leaks: credentials, cookies, proxy headers and engine controls are dropped.
# `endpoint-load-metrics-format` requests an engine's load, returned as `endpoint-load-metrics` (ORCA).
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

_REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,128}")


class RequestHead(NamedTuple):
    """The headers that the router reads, and those that it forwards to the backend."""

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
    # All headers, names in lower case. In a repeated head, Content-Length may be that of the earlier one.
    headers: RawHeaders
    # What features have read from the headers, under their own names: not read again in a head that repeats this one.
    notes: dict[str, Any]


class RequestHeaders:
    """Reads the (lower-case) headers of a request. `extra`: additional names to forward."""

    def __init__(self, extra: frozenset[bytes] = frozenset()) -> None:
        names = FORWARDED | extra
        self._forwarded = Verdicts(lambda name: name in names or name.startswith(FORWARDED_PREFIXES))

    def __call__(self, headers: RawHeaders) -> RequestHead:
        """Read the headers. `request_id` is "" without a valid one of the client: the caller mints one."""
        is_forwarded = self._forwarded
        # Reversed: the first of repeated headers counts, as in the engines.
        seen = dict(headers[::-1]).get
        forwarded = [pair for pair in headers if is_forwarded[pair[0]]]
        connection = seen(b"connection")
        if connection is not None and (connection not in PLAIN_CONNECTION or is_repeated(headers, b"connection")):
            forwarded = without_connection_headers(forwarded, headers)
        content_type = seen(b"content-type", b"")
        return RequestHead(
            _request_id(seen(b"x-request-id"), seen(b"x-correlation-id")),
            content_type,
            content_type.partition(b";")[0].strip().lower(),
            seen(b"content-length"),
            seen(b"content-encoding"),
            seen(b"authorization"),
            seen(b"x-session-id"),
            forwarded,
            header_lines(forwarded),
            headers,
            {},
        )


def _request_id(*candidates: bytes | None) -> str:
    for candidate in candidates:
        if candidate is not None and _REQUEST_ID.fullmatch(candidate):
            return candidate.decode("ascii")
    return ""
