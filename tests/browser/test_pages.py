"""Every page at every width, light and dark, for every role: it fits, it is accessible, it asks nobody else."""

import re
from collections.abc import Iterator

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Page as Tab

from control_plane.app import CONSOLE
from control_plane.http.console.shell import Page
from control_plane.pure.roles import Principal
from tests.browser.conftest import ROLES, WIDTHS, Visitor, World

PAGES = [page for page in CONSOLE if page.title != "Unknown"]
_RULES = {"runOnly": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"]}
_LINKS = "Array.from(document.links, one => one.getAttribute('href')).filter(one => one.startsWith('/console'))"


@pytest.fixture(scope="module")
def addresses(world: World, browser: object) -> dict[str, str]:
    """A URL for the pattern of each page: those with a part in them as the lists link to them."""
    visitor = Visitor(browser)  # type: ignore[arg-type]
    found = {page.path: page.path for page in PAGES if "{" not in page.path}
    try:
        tab = visitor(world, "/console/")
        for path in list(found.values()):
            tab.goto(f"{world.url}{path}")
            for link in tab.evaluate(_LINKS):
                for page in PAGES:
                    if "{" in page.path and re.fullmatch(pattern(page), link.partition("?")[0]):
                        found.setdefault(page.path, link)
    finally:
        for context in visitor.contexts:
            context.close()
    return found


def pattern(page: Page) -> str:
    return re.sub(r"\{\w+(:path)?\}", lambda match: ".+" if match[1] else "[^/]+", page.path)


def serious(tab: Tab) -> Iterator[str]:
    """What axe finds that keeps somebody from using the page."""
    for violation in Axe().run(tab, options=_RULES).response["violations"]:
        if violation["impact"] in ("serious", "critical"):
            for node in violation["nodes"][:5]:
                yield f"{violation['id']}: {node['target']} {node['html'][:200]}"


# Tables of which a part is not seen; those of a chart's numbers, which somebody opens, have a column for each group.
CUT_OFF = """[...document.querySelectorAll(".scroll")]
    .filter(one => one.scrollWidth > one.clientWidth && !one.closest("details"))
    .map(one => one.innerText.slice(0, 80))"""
# Figures beyond their cell
TOO_WIDE = """[...document.querySelectorAll(".figure")]
    .filter(one => one.scrollWidth > one.clientWidth).map(one => one.innerText)"""


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.path)
def test_a_page_fits_and_is_accessible(world: World, visit: Visitor, addresses: dict[str, str], page: Page) -> None:
    assert page.path in addresses, "no list links to it"
    tab = visit(world, addresses[page.path])

    found: list[str] = []
    for width in WIDTHS:
        tab.set_viewport_size({"width": width, "height": 900})
        beyond = tab.evaluate("document.documentElement.scrollWidth - innerWidth")
        found += [f"{beyond} pixels beyond {width}"] if beyond > 0 else []
        if width >= 1280:
            found += [f"{width}: {cut}" for cut in tab.evaluate(CUT_OFF)]
        found += [f"{width}: {figure}" for figure in tab.evaluate(TOO_WIDE)]
    for width, dark in ((390, False), (1280, True), (1280, False)):
        tab.set_viewport_size({"width": width, "height": 900})
        tab.emulate_media(color_scheme="dark" if dark else "light")
        found += [f"{width}{' dark' * dark}: {one}" for one in serious(tab)]
    assert found == []
    assert tab.locator("h1").count() == 1


@pytest.mark.parametrize("role", ROLES)
def test_a_role_sees_its_pages(world: World, visit: Visitor, role: str) -> None:
    platform, own = ROLES[role]
    principal = Principal("user", role, platform, {} if own is None else {world.organisation: own})
    tab = visit(world, "/console/", role)

    for page in PAGES:
        if page.group is None or not page.allows(principal):
            continue
        answer = tab.goto(f"{world.url}{page.path}")
        assert answer is not None
        assert answer.status == 200, page.path
        assert tab.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0, page.path
        assert list(serious(tab)) == [], page.path


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("path", ["/console/login", "/console/setup?token=none", "/console/nowhere"])
def test_what_needs_no_right_is_accessible_too(world: World, visit: Visitor, path: str, width: int, dark: bool) -> None:
    tab = visit(world, path, None if "nowhere" not in path else "admin", width, dark)

    assert list(serious(tab)) == []
    assert tab.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0
