"""Recognises other protocols than HTTP/1.1, for a helpful error."""

from inference_api.errors import BadRequest

_TLS_HANDSHAKE = (b"\x16\x03\x00", b"\x16\x03\x01", b"\x16\x03\x02", b"\x16\x03\x03")
_HTTP_2 = b"PRI * HTTP/2"


def not_http(data: bytes, reason: object) -> BadRequest:
    """The error for bytes that are not HTTP/1.1; `reason`: of the parser."""
    if data.startswith(_TLS_HANDSHAKE):
        why = "this port speaks plain HTTP, not TLS"
    elif data.startswith(_HTTP_2):
        why = "this port speaks HTTP/1.1, not HTTP/2"
    else:
        return BadRequest(f"Not valid HTTP/1.1: {reason}.")
    error = BadRequest(f"{why[0].upper()}{why[1:]}.")
    error.logged = {"why": why}
    return error
