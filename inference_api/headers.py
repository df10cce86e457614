"""Names and lines of HTTP headers, for both directions. Pure."""

from collections.abc import Callable, Collection, Iterable, Sequence

import httpx

from inference_api.models import Extra, RawHeaders

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
# Never forwarded, not even by FORWARD_HEADERS: the router sets framing, coding and routing itself.
NEVER_FORWARDED = HOP_BY_HOP | {
    b"host", b"content-length", b"expect", b"accept-encoding", b"cookie", b"authorization", b"x-request-id",
}  # fmt: skip

# Values of Connection that are not header names.
PLAIN_CONNECTION = frozenset({b"keep-alive", b"close", b"Keep-Alive", b"Close"})


class Verdicts(dict[bytes, bool]):
    """Caches a decision per header name. Bounded, since clients choose the names."""

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


def header_lines(headers: RawHeaders) -> bytes:
    """The lines of a head. Raises httpx.LocalProtocolError if a name or value holds a line break."""
    lines = b"".join([b"%b: %b\r\n" % pair for pair in headers])
    if lines.count(b"\n") != len(headers) or lines.count(b"\r") != len(headers) or lines.count(b"\0"):
        raise httpx.LocalProtocolError("a request header holds a line break")
    return lines


def without_lines(lines: bytes, names: Collection[str]) -> bytes:
    """The lines of a head without those of these headers."""
    if not any(b"\n%b:" % name.encode("ascii") in lines for name in names):
        return lines
    kept = [line for line in lines.split(b"\r\n")[:-1] if line.partition(b":")[0].decode("latin-1") not in names]
    return b"".join([b"%b\r\n" % line for line in kept])


def extra_lines(extra: Sequence[Extra]) -> bytes:
    """Lines of the headers that features add to an answer. Raises as `header_lines`."""
    return b"".join([one if type(one) is bytes else header_lines([one]) for one in extra])  # type: ignore[list-item]


def extra_pairs(extra: Iterable[Extra]) -> RawHeaders:
    """The same as pairs."""
    pairs: RawHeaders = []
    for one in extra:
        if isinstance(one, bytes):
            pairs += [(name, value) for name, _, value in (line.partition(b": ") for line in one.split(b"\r\n")[:-1])]
        else:
            pairs.append(one)
    return pairs


def is_repeated(headers: RawHeaders, name: bytes) -> bool:
    return [pair[0] for pair in headers].count(name) > 1


def without_connection_headers(kept: RawHeaders, headers: RawHeaders) -> RawHeaders:
    """`kept` without the headers that the Connection lines of `headers` name."""
    lines = b",".join(value for name, value in headers if name == b"connection")
    # A sender must not remove the framing of the message by naming it.
    named = {token.strip().lower() for token in lines.split(b",")} - {b"content-type", b"content-length"}
    return [pair for pair in kept if pair[0] not in named]
