"""Header hygiene, both ways: what may go to a backend, and what may come back to a client. Pure."""

import re
from collections.abc import Callable, Iterable
from typing import NamedTuple

from inference_api.models import RawHeaders

# An allow-list, so that nothing new ever leaks: credentials, cookies, forwarding claims and engine controls stay here.
FORWARDED = frozenset({b"accept", b"content-type", b"traceparent", b"tracestate", b"user-agent", b"x-session-id"})
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
# May never be forwarded, even when FORWARD_HEADERS asks: framing and routing are the router's.
NEVER_FORWARDED = HOP_BY_HOP | {b"host", b"content-length", b"expect", b"cookie", b"authorization", b"x-request-id"}

_REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,128}")
_RETRY_HINTS = frozenset({b"retry-after", b"x-should-retry"})


class Inbound(NamedTuple):
    """What the router reads from a request's headers, and the ones that go on to the backend."""

    request_id: str
    content_type: bytes
    content_length: bytes | None
    content_encoding: bytes | None
    authorization: bytes | None
    session_id: bytes | None
    forwarded: RawHeaders


def read_request(headers: Iterable[tuple[bytes, bytes]], extra: frozenset[bytes], mint: Callable[[], str]) -> Inbound:
    """One pass over the (lower-case) request headers; `extra` names the ones FORWARD_HEADERS adds."""
    seen: dict[bytes, bytes] = {}
    forwarded: RawHeaders = []
    for pair in headers:
        name = pair[0]
        if name in FORWARDED or name in extra or name.startswith(FORWARDED_PREFIXES):
            forwarded.append(pair)
        # The first of a repeated header counts, as it does for the engines.
        if name not in seen:
            seen[name] = pair[1]
    connection = seen.get(b"connection")
    if connection is not None and connection not in (b"keep-alive", b"close"):
        forwarded = _without(forwarded, connection)
    return Inbound(
        _request_id(seen.get(b"x-request-id"), seen.get(b"x-correlation-id")) or mint(),
        seen.get(b"content-type", b""),
        seen.get(b"content-length"),
        seen.get(b"content-encoding"),
        seen.get(b"authorization"),
        seen.get(b"x-session-id"),
        forwarded,
    )


def returned(status: int, headers: Iterable[tuple[bytes, bytes]]) -> RawHeaders:
    """The backend's (lower-case) response headers that the client may see, in their order."""
    kept: RawHeaders = []
    connection = b""
    for pair in headers:
        name = pair[0]
        if name == b"connection":
            connection = pair[1]
        elif name not in _NOT_RETURNED and not name.startswith(b"access-control-"):
            kept.append(pair)
    if connection and connection.lower() not in (b"keep-alive", b"close"):
        kept = _without(kept, connection)
    if status not in (429, 503):
        kept = [pair for pair in kept if pair[0] not in _RETRY_HINTS]
    return kept


def _request_id(*candidates: bytes | None) -> str | None:
    for candidate in candidates:
        if candidate is not None and _REQUEST_ID.fullmatch(candidate):
            return candidate.decode("ascii")
    return None


def _without(headers: RawHeaders, connection: bytes) -> RawHeaders:
    named = {token.strip().lower() for token in connection.split(b",")}
    # A client must not strip what frames the message by naming it in Connection.
    named -= {b"content-type", b"content-length"}
    return [pair for pair in headers if pair[0] not in named]
