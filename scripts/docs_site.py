"""A hook of MkDocs: pages of the repository outside of docs/ are pages of the site too.

Links are written for the repository, where GitHub shows the same files; the hook rewrites them for the site, in which
docs/x.md is x.md and k8s/README.md keeps its path.
"""

import os
import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
OUTSIDE = (
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "SECURITY.md",
    "benchmarks/README.md",
    *sorted(str(path.relative_to(ROOT)) for folder in ("k8s", "examples") for path in ROOT.glob(f"{folder}/**/*.md")),
)
_LINK = re.compile(r"(?P<text>\[[^\]]*\])\((?P<target>(?![a-z]+:)[^)#\s]+)(?P<anchor>#[^)\s]*)?\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for path in OUTSIDE:
        files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))
    pages = [f"docs/{path.relative_to(ROOT / 'docs')}" for path in (ROOT / "docs").rglob("*.md")]
    for page in (*pages, *OUTSIDE):
        for link in _LINK.finditer((ROOT / page).read_text()):
            path = _path(page, link["target"])
            # A file that is no page is shown as it is.
            if (ROOT / path).is_file() and _source(path) not in files.src_uris:
                files.append(File.generated(config, _source(path), abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    here = page.file.src_uri if page.file.src_uri in OUTSIDE else f"docs/{page.file.src_uri}"

    def linked(link: re.Match[str]) -> str:
        path = _path(here, link["target"])
        if (ROOT / path).is_dir():
            path = f"{path}/README.md"
            if path not in OUTSIDE:
                return link["text"][1:-1]
        target = os.path.relpath(_source(path), posixpath.dirname(page.file.src_uri) or ".")
        return f"{link['text']}({target}{link['anchor'] or ''})"

    return _LINK.sub(linked, markdown)


def _path(page: str, target: str) -> str:
    """The path in the repository of what a page links to."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(page), target))


def _source(path: str) -> str:
    """The path in the site's sources of a path in the repository."""
    return path.removeprefix("docs/")
