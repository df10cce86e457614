"""Limits of request heads, and their ASGI scopes."""

from urllib.parse import unquote

from starlette.types import Scope

from inference_api.errors import HeadersTooLarge
from inference_api.models import RawHeaders
from inference_api.server.strict_head import head_error, wrong_lines

# The order of magnitude of gunicorn and Envoy; an SDK sends 20 headers, together 1 KiB.
_MAX_HEADERS = 100
_MAX_HEAD = 32 * 1024
# Ends a head, and the chunks of a body.
EMPTY_LINE = b"\r\n\r\n"


def check_size(head: bytes) -> None:
    """Raises HeadersTooLarge for an incomplete head that is too large, empty lines before it included."""
    if len(head) > _MAX_HEAD:
        raise HeadersTooLarge(f"The request head is larger than {_MAX_HEAD} bytes.")


def scope_of(head: bytes, method: bytes, target: bytes, headers: RawHeaders, version: str) -> Scope:
    """The scope of a parsed head; `head`: its bytes. Raises RouterError if it is not acceptable."""
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
    """Path and query of a target in absolute form, as clients send it to a proxy (RFC 9112 3.2.2)."""
    return b"/" + target.partition(b"://")[2].partition(b"/")[2]
