"""Checks of request heads beyond those of the parser, against request smuggling: a head must have one meaning.

llhttp refuses bare CR and LF within a head, NUL and other controls, folded lines, names that are not tokens, a
repeated, signed, empty or overflowing Content-Length, Content-Length beside Transfer-Encoding, and a target that is not
ASCII (tests/faults shows each). This module refuses what llhttp accepts and two parsers may read differently (RFC 9112
2.2, 3, 3.2, 6.1, 6.3; RFC 9110 7.2). Pure; about 3 us for a sound head of 20 headers.
"""

import re
from urllib.parse import unquote_to_bytes

from inference_api.errors import BadRequest, RouterError, UnknownURL, URITooLong
from inference_api.models import RawHeaders

# nginx and gunicorn allow 8 KiB and 4 KiB; the router's longest paths hold a model's name.
MAX_TARGET = 8 * 1024

_DECIDING = frozenset({b"host", b"content-length", b"transfer-encoding", b"content-type"})
_ALNUM = b"0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
# llhttp skips any CR and LF before the method, and blanks around the target; it accepts RTSP and ICE, too.
_REQUEST_LINE = re.compile(rb"(?:\r\n)*+[!-~]++ [!-~]++ HTTP/[0-9]\.[0-9]\r\n")
# RFC 3986 3.2.2, 3.2.3. Compose files and some clusters name hosts with underscores.
_HOST = re.compile(rb"(?:[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(?::[0-9]{0,5})?")
# Characters of a path (RFC 3986 pchar) without further checks. Not `;`, at which some servers cut a path.
_PLAIN = _ALNUM + b"-_~/:@!$&'()*+,="
_ESCAPED_SLASH = re.compile(rb"%2f", re.IGNORECASE)
_NOT_ESCAPED = re.compile(rb"%(?![0-9A-Fa-f]{2})")
# Some servers read a backslash as a slash, or end the path at one of the others; DEL is a control character.
_CUTTING = b"\\;#\x7f"
# The only paths with ids; these may hold slashes, escaped or not.
_IDS = b"/v1/models/"


def wrong_lines(head: bytes, count: int) -> RouterError | None:
    """The error for the bytes of a head with `count` parsed headers; None if they are a request line and that many
    lines, each ending with CR LF."""
    line = _REQUEST_LINE.match(head)
    if line is None:
        return BadRequest(
            "The request line must be METHOD target HTTP/1.1, with one space between them, and end in CR LF."
        )
    ends = head.count(b"\r\n")
    empty = head.count(b"\n", 0, line.end()) - 1
    if ends != head.count(b"\n") or ends != head.count(b"\r") or ends != empty + 1 + count + 1:
        return BadRequest("The request head has a line that does not end in CR LF, or is not a header.")
    return None


def head_error(method: bytes, target: bytes, headers: RawHeaders, version: str) -> RouterError | None:
    """The error for a head, or None if it is valid. `headers`: with lower-case names, in order."""
    deciding = [pair for pair in headers if pair[0] in _DECIDING]
    value_of = dict(deciding)
    if len(value_of) != len(deciding) and (error := _repeated(deciding)):
        return error
    host = value_of.get(b"host")
    # RFC 9112 3.2: only HTTP/1.0 may omit Host.
    if host is None and version == "1.1":
        return BadRequest("The request has no Host header.")
    if host is not None and not _HOST.fullmatch(host):
        return BadRequest("The Host header is not a host name or address, with or without a port number.")
    return _wrong_framing(value_of, version) or _wrong_target(method, target, host)


def _repeated(deciding: RawHeaders) -> RouterError | None:
    """Reject repeated headers: parsers may take the first or the last. Content-Type has the boundary of forms."""
    names = [name for name, _ in set(deciding) if name == b"content-type"]
    names += [name for name, _ in deciding if name != b"content-type"]
    if len(set(names)) == len(names):
        return None
    return BadRequest("The request has Host, Content-Length or Transfer-Encoding more than once, or two Content-Types.")


def _wrong_framing(value_of: dict[bytes, bytes], version: str) -> RouterError | None:
    if version not in ("1.1", "1.0"):
        return BadRequest("The request is not HTTP/1.1.")
    length = value_of.get(b"content-length")
    # Not every parser reads `3 ` as `3`; 12 digits are a terabyte.
    if length is not None and (not length.isdigit() or len(length) > 12):
        return BadRequest("The Content-Length is not a number of 1 to 12 digits.")
    coding = value_of.get(b"transfer-encoding")
    if coding is not None:
        if length is not None or version == "1.0":
            return BadRequest("The request has a Transfer-Encoding beside a Content-Length, or in HTTP/1.0.")
        if coding.lower() != b"chunked":
            return BadRequest("The Transfer-Encoding must be chunked, and nothing else.")
    return None


def _wrong_target(method: bytes, target: bytes, host: bytes | None) -> RouterError | None:
    if len(target) > MAX_TARGET:
        return URITooLong(MAX_TARGET)
    path = target.partition(b"?")[0]
    if path[:1] != b"/" or method == b"CONNECT":
        scheme, separator, rest = path.partition(b"://")
        if method == b"CONNECT" or not separator or scheme.lower() not in (b"http", b"https"):
            return BadRequest("The request target must be a path, as in POST /v1/chat/completions.")
        authority, _, path = rest.partition(b"/")
        if host is None or authority.lower() != host.lower():
            return BadRequest("The host in the request target is not the one of the Host header.")
    if path.translate(None, _PLAIN) and _is_odd(path):
        return UnknownURL(method.decode("ascii"), path.decode("ascii", "replace"))
    return None


def _is_odd(path: bytes) -> bool:
    """Whether two parsers may read different paths. No route has such characters."""
    if _NOT_ESCAPED.search(path) or (_ESCAPED_SLASH.search(path) and not path.startswith(_IDS)):
        return True
    plain = unquote_to_bytes(path)
    if any(byte < 32 or byte in _CUTTING for byte in plain):
        return True
    return any(segment in (b".", b"..") for segment in plain.split(b"/"))
