"""The cookies of the console: `__Host-` ones, which only its own origin can set; plain ones on http loopback."""

from collections.abc import Iterable
from ipaddress import ip_address
from urllib.parse import urlsplit

from starlette.types import Scope

SESSION, LOGIN = "ia_session", "ia_login"


class Cookies:
    """`origin`: of the console."""

    def __init__(self, origin: str) -> None:
        parts = urlsplit(origin)
        # Elsewhere without TLS no browser keeps the cookie: nobody can log in, rather than everybody listen.
        self.secure = parts.scheme == "https" or not _is_loopback(parts.hostname or "")
        self.usable = parts.scheme == "https" or not self.secure

    def name(self, cookie: str) -> str:
        return f"__Host-{cookie}" if self.secure else cookie

    def read(self, scope: Scope, cookie: str) -> str | None:
        """Its value; None if there is none, or more than one."""
        wanted = self.name(cookie)
        found = [value for name, value in _pairs(scope["headers"]) if name == wanted]
        return found[0] if len(found) == 1 else None

    def has(self, scope: Scope, cookie: str) -> bool:
        wanted = self.name(cookie)
        return any(name == wanted for name, _ in _pairs(scope["headers"]))

    def write(self, cookie: str, value: str, seconds: int) -> str:
        """A Set-Cookie header; 0 seconds: the browser forgets it."""
        secure = "; Secure" if self.secure else ""
        return f"{self.name(cookie)}={value}; Path=/; Max-Age={seconds}; HttpOnly; SameSite=Lax{secure}"


def _pairs(headers: Iterable[tuple[bytes, bytes]]) -> Iterable[tuple[str, str]]:
    for header, line in headers:
        if header == b"cookie":
            for part in line.decode("latin-1").split(";"):
                name, _, value = part.strip().partition("=")
                yield name, value


def _is_loopback(host: str) -> bool:
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False
