"""What the router reads of a request's headers, and which of them go to a backend. Pure."""

import re
from typing import NamedTuple

from inference_api.headers import PLAIN_CONNECTION, Verdicts, header_lines, is_repeated, without_connection_headers
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

_REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,128}")


class RequestHead(NamedTuple):
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
    # All of them, names in lower case. Where a head repeats an earlier one, Content-Length may be that one's.
    headers: RawHeaders


class RequestHeaders:
    """Reads the (lower-case) headers of a request. `extra`: names that are forwarded beside the usual ones."""

    def __init__(self, extra: frozenset[bytes] = frozenset()) -> None:
        names = FORWARDED | extra
        self._forwarded = Verdicts(lambda name: name in names or name.startswith(FORWARDED_PREFIXES))

    def __call__(self, headers: RawHeaders) -> RequestHead:
        """`request_id` is "" if the client gave none that is valid: one is to be minted."""
        is_forwarded = self._forwarded
        # Reversed: of a repeated header the first counts, as it does for the engines.
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
        )


def _request_id(*candidates: bytes | None) -> str:
    for candidate in candidates:
        if candidate is not None and _REQUEST_ID.fullmatch(candidate):
            return candidate.decode("ascii")
    return ""
