"""What a request head may be, the ASGI scope it stands for, and what is known of one that comes again and again."""

import re
from urllib.parse import unquote

from starlette.types import Scope

from inference_api.errors import HeadersTooLarge
from inference_api.models import RawHeaders
from inference_api.server.cycle import HeadCache
from inference_api.server.strict_head import head_error, wrong_lines

# gunicorn's and Envoy's order of magnitude; an SDK sends 20 headers of 1 KiB together.
_MAX_HEADERS = 100
_MAX_HEAD = 32 * 1024
# It ends a head, and the chunks of a body.
EMPTY_LINE = b"\r\n\r\n"
_LENGTH_LINE = re.compile(rb"\r\ncontent-length:[ \t]*+([0-9]{1,12})\r\n", re.IGNORECASE)


def check_size(head: bytes) -> None:
    """Raises HeadersTooLarge for what has come of a head, the empty lines before it included."""
    if len(head) > _MAX_HEAD:
        raise HeadersTooLarge(f"The request head is larger than {_MAX_HEAD} bytes.")


def scope_of(head: bytes, method: bytes, target: bytes, headers: RawHeaders, version: str) -> Scope:
    """The scope of a head as the parser read it; `head`: its bytes. Raises RouterError if it is not to be taken."""
    if len(headers) > _MAX_HEADERS:
        raise HeadersTooLarge(f"The request has more than {_MAX_HEADERS} headers.")
    error = wrong_lines(head, len(headers)) or head_error(method, target, headers, version)
    if error is not None:
        raise error
    target, _, query = target.partition(b"?")
    if target[:1] != b"/":
        target = _origin_form(target)
    path = target.decode("ascii")
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": version,
        "method": method.decode("ascii"),
        "scheme": "http",
        "path": unquote(path) if "%" in path else path,
        "raw_path": target,
        "query_string": query,
        "root_path": "",
        "headers": headers,
        "state": {},
    }


def _origin_form(target: bytes) -> bytes:
    """RFC 9112 3.2.2: a client that takes the router for a proxy names scheme and host as well."""
    return b"/" + target.partition(b"://")[2].partition(b"/")[2]


class RepeatedHead(HeadCache):
    """A request head that was parsed, and accepted, on this connection: the next one often differs in its length only.

    Where every other byte is the same, so is all that parsing would say. Comparing costs a tenth of parsing.
    """

    __slots__ = ("_after", "_before", "_headers", "_length_at", "_scope")

    def __init__(self, before: bytes, after: bytes, scope: Scope) -> None:
        super().__init__()
        self._before = before
        self._after = after
        self._scope = {name: value for name, value in scope.items() if name not in ("extensions", "state")}
        self._headers: list[tuple[bytes, bytes]] = scope["headers"]
        self._length_at = [name for name, _ in self._headers].index(b"content-length")

    @classmethod
    def learn(cls, data: bytes, scope: Scope) -> "RepeatedHead | None":
        """From the bytes of one read and what they were parsed to; None unless they are one whole request."""
        end = data.find(EMPTY_LINE) + 4
        lengths = list(_LENGTH_LINE.finditer(data, 0, end))
        if len(lengths) != 1 or len(data) - end != int(lengths[0][1]):
            return None
        first, last = lengths[0].span(1)
        return cls(data[:first], data[last:end], scope)

    def body_at(self, data: bytes) -> int:
        """Where the body begins if `data` is one whole request with this head, else 0."""
        first = len(self._before)
        last = data.find(b"\r", first, first + 13)
        length = data[first:last]
        if not (data.startswith(self._before) and length.isdigit() and data.startswith(self._after, last)):
            return 0
        at = last + len(self._after)
        return at if len(data) - at == int(length) else 0

    def scope(self, length: int) -> Scope:
        headers = self._headers.copy()
        headers[self._length_at] = (b"content-length", b"%d" % length)
        return {**self._scope, "headers": headers, "state": {}}
