"""Addresses of what is kept elsewhere, logs and traces: templates such as https://logs.example.com/?q={backend}."""

import re
from collections.abc import Mapping
from urllib.parse import quote, urlsplit

# What a template may have: times are of RFC 3339, those in `_ms` Unix milliseconds.
NAMES = ("backend", "model", "router", "request_id", "start", "end", "start_ms", "end_ms")
_PLACE = re.compile(r"\{([a-z_]+)\}")


def checked(template: str) -> str:
    """A template that can only lead to the host it names. Raises ValueError."""
    parts = urlsplit(template)
    if parts.scheme not in ("http", "https") or not parts.hostname or "@" in parts.netloc:
        raise ValueError("must be an http:// or https:// URL, without user and password")
    if not template.isprintable() or " " in template:
        raise ValueError("must have no spaces; write them as %20")
    if "{" in parts.netloc or "}" in parts.netloc:
        raise ValueError("must name its host: a {name} may stand behind the first / only")
    unknown = [name for name in _PLACE.findall(template) if name not in NAMES]
    if unknown or re.search(r"[{}]", _PLACE.sub("", template)):
        raise ValueError(f"may have {{{'}, {'.join(NAMES)}}}; write other braces as %7B and %7D")
    return template


def filled(template: str, values: Mapping[str, str]) -> str:
    """Each value is quoted: it stays within the part of the URL where it stands. `values`: all of NAMES."""
    return _PLACE.sub(lambda found: quote(values[found[1]], safe=""), template)
