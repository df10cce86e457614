"""What the console shows itself with: its templates, and its static files under a URL that has their digest.

All of it is read once, at the start. `htmx-4.0.1.min.js` is the file of npm's `htmx.org@4.0.1`, unchanged (0BSD,
`htmx.LICENSE`); a test compares its digest with HTMX.
"""

import gzip
import hashlib
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import DictLoader, Environment, StrictUndefined

_FOLDER = Path(__file__).parent
# SHA-256 of the vendored file
HTMX = "a0abb04f2f45a1f89d1d4844023245537e5e6014c87b144553e0607b4cc32130"
_TYPES = {".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml", ".LICENSE": "text/plain"}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; form-action 'self'; "
    "frame-ancestors 'none'; base-uri 'none'"
)


class Asset(NamedTuple):
    """A static file, as it is and compressed by gzip."""

    media_type: str
    body: bytes
    compressed: bytes


@cache
def assets() -> Mapping[str, Asset]:
    """The static files by name."""
    found = {}
    for path in sorted((_FOLDER / "static").iterdir()):
        body = path.read_bytes()
        found[path.name] = Asset(_TYPES[path.suffix], body, gzip.compress(body, mtime=0))
    return found


@cache
def base() -> str:
    """The URL below which the static files are; another one in every release that changes one of them."""
    digest = hashlib.sha256()
    for name, asset in assets().items():
        digest.update(f"{name}:{len(asset.body)}:".encode() + asset.body)
    return f"/console/static/{digest.hexdigest()[:16]}"


@cache
def _sources() -> Mapping[str, str]:
    folder = _FOLDER / "templates"
    return {path.relative_to(folder).as_posix(): path.read_text() for path in sorted(folder.rglob("*.html"))}


def environment(filters: Mapping[str, Any], **names: Any) -> Environment:
    """Templates that escape every value and refuse every unknown name. Each is compiled at its first use.

    `filters` and `names`: what each template may use.
    """
    made = Environment(
        loader=DictLoader(dict(_sources())),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        auto_reload=False,
        cache_size=-1,
        extensions=["jinja2.ext.do", "jinja2.ext.loopcontrols"],
    )
    made.filters.update(filters)
    made.globals.update(names)
    return made


def compile_all(templates: Environment) -> None:
    """Some seconds of a CPU all in all: for a thread, so that nobody's first page waits."""
    for name in _sources():
        templates.get_template(name)
