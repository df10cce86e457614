"""The pictures of README and documentation: taken of the demo, so that they show what there is.

`scripts/pictures` writes them to docs/images; without that option they are taken, looked at, and thrown away.
"""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from playwright.sync_api import Page as Tab
from playwright.sync_api import expect

from tests.browser.conftest import Visitor, World

ROOT = Path(__file__).parents[2]
# Bytes: a reader of README loads all of them.
LARGEST = 120_000
PATIENCE = 60_000


def overview(world: World, tab: Tab) -> None:
    expect(tab.get_by_role("img").first).to_be_visible(timeout=PATIENCE)


def request(world: World, tab: Tab) -> None:
    """One that was tried again."""
    tab.goto(f"{world.url}/console/requests?model=mistral-7b&tries=more")
    tab.get_by_role("table").get_by_role("link").first.click(timeout=PATIENCE)
    expect(tab.locator(".waterfall .bar").first).to_be_visible()


def usage(world: World, tab: Tab) -> None:
    tab.goto(f"{world.url}/console/usage?range=24h&group_by=model")
    expect(tab.get_by_role("img").first).to_be_visible(timeout=PATIENCE)


def playground(world: World, tab: Tab) -> None:
    tab.goto(f"{world.url}/console/playground?model=llama-3-8b&model2=mistral-7b")
    tab.get_by_label(re.compile("^(Message|User)")).first.fill("Which of you answers first?")
    tab.get_by_role("button", name="Send").click()
    expect(tab.locator("main")).to_contain_text(re.compile(r"tokens/s|tokens per second"), timeout=PATIENCE)


PICTURES: dict[str, Callable[[World, Tab], None]] = {
    "overview": overview,
    "request": request,
    "usage": usage,
    "playground": playground,
}


@pytest.mark.parametrize("name", PICTURES)
def test_a_picture(world: World, visit: Visitor, name: str, tmp_path: Path, pytestconfig: pytest.Config) -> None:
    wanted = pytestconfig.getoption("--pictures")
    folder = tmp_path if wanted is None else Path(wanted)
    tab = visit(world, "/console/", dark=name == "playground")
    PICTURES[name](world, tab)
    tab.set_viewport_size({"width": 1280, "height": 860})
    path = folder / f"{name}.png"
    tab.screenshot(path=path, animations="disabled")

    assert 10_000 < path.stat().st_size < LARGEST
    assert (ROOT / "docs" / "images" / path.name).exists()


def test_each_picture_is_shown_and_small() -> None:
    texts = "".join((ROOT / name).read_text() for name in ("README.md", "docs/console.md"))
    shown = {Path(name).name for name in re.findall(r"!\[[^\]]+\]\(([^)]+\.png)\)", texts)}
    kept = {path.name: path.stat().st_size for path in (ROOT / "docs" / "images").glob("*.png")}

    assert shown == kept.keys() == {f"{name}.png" for name in PICTURES}
    assert {name: size for name, size in kept.items() if size >= LARGEST} == {}
