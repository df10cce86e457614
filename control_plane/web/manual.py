"""What operators read in an incident, as pages: the runbook and the guides of this release."""

import re
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import NamedTuple

from markdown_it import MarkdownIt
from markdown_it.token import Token
from markupsafe import Markup

# Files of the project by the name of their page. A wheel has copies of them.
FILES: Mapping[str, str] = {
    "runbook": "k8s/runbook.md",
    **{name: f"docs/{name}.md" for name in ("troubleshooting", "operations", "http", "prompts", "realtime")},
}
_COPIES = Path(__file__).parent / "help"
_PROJECT = Path(__file__).parents[2]
# What may be wider than the page can be scrolled by the keyboard, too.
_SCROLLED = (
    ("<pre>", '<pre tabindex="0">'),
    ("<table>", '<div class="scroll" tabindex="0"><table>'),
    ("</table>", "</table></div>"),
)


class Manual(NamedTuple):
    """`parts`: title and anchor of each section."""

    title: str
    html: Markup
    parts: tuple[tuple[str, str], ...]


def address(place: str) -> str:
    """The page of a file and anchor of the project: `k8s/runbook.md#x` -> `/console/help/runbook#x`."""
    file, _, anchor = place.partition("#")
    name = next(name for name, known in FILES.items() if known == file)
    return f"/console/help/{name}#{anchor}" if anchor else f"/console/help/{name}"


@cache
def manuals() -> Mapping[str, Manual]:
    """All of them, by name."""
    return {name: _rendered(_text(name, file)) for name, file in FILES.items()}


def _text(name: str, file: str) -> str:
    copy = _COPIES / f"{name}.md"
    return (copy if copy.exists() else _PROJECT / file).read_text()


def _rendered(text: str) -> Manual:
    # No HTML of its own
    parser = MarkdownIt("commonmark", {"html": False}).enable("table")
    tokens = parser.parse(text)
    headings = list(_headings(tokens))
    for token in tokens:
        if token.children is not None:
            token.children = list(_linked(token.children))
    # The first heading is the page's.
    (title, _), *parts = headings
    rest = tokens[next(place for place, token in enumerate(tokens) if token.type == "heading_close") + 1 :]
    html = parser.renderer.render(rest, parser.options, {})
    for before, after in _SCROLLED:
        html = html.replace(before, after)
    return Manual(title, Markup(html), tuple(parts))


def _headings(tokens: list[Token]) -> Iterator[tuple[str, str]]:
    """Title and anchor, which the heading gets, as the documentation's site makes it."""
    for place, token in enumerate(tokens):
        if token.type == "heading_open":
            title = tokens[place + 1].content
            anchor = re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")
            token.attrSet("id", anchor)
            yield title.replace("`", ""), anchor


def _linked(tokens: list[Token]) -> Iterator[Token]:
    """Links to pages that are here; of others the text."""
    is_kept = True
    for token in tokens:
        if token.type == "link_open":
            target = _target(str(token.attrGet("href")))
            is_kept = target is not None
            token.attrSet("href", target or "")
        if token.type not in ("link_open", "link_close") or is_kept:
            yield token


def _target(given: str) -> str | None:
    if given.startswith(("#", "https://")):
        return given
    file, _, anchor = given.partition("#")
    name = next((name for name, known in FILES.items() if known.endswith(file.removeprefix("../"))), None)
    return name and address(f"{FILES[name]}#{anchor}")
