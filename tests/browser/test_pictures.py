"""The pictures of README and documentation: taken of the demo, so that they show what there is.

`scripts/pictures` writes them to docs/images; without that option they are taken, looked at, and thrown away.
"""

import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Page as Tab
from playwright.sync_api import expect

from control_plane.pure.times import shown
from tests.browser.conftest import Visitor, World, all_answered, running

ROOT = Path(__file__).parents[2]
# Bytes: a reader of README loads all of them.
LARGEST = 150_000
# Requests of the sample callers, before which a minute looks empty
ENOUGH = 60
PATIENCE = 60_000


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """A demo that has run for a while, and in which a backend dies."""
    with running(tmp_path_factory.mktemp("demo")) as world:
        since = shown(time.time_ns() // 1_000_000)
        asked = {"start": since, "limit": ENOUGH}
        world.until(lambda: len(world.admin.get("/api/v1/requests", params=asked).json()["data"]) == ENOUGH, 180)
        yield world


def overview(world: World, tab: Tab) -> None:
    """With something to see."""
    os.kill(world.child("llama-3-8b").pid, signal.SIGKILL)
    expect(tab.locator("#live")).to_contain_text("degraded", timeout=PATIENCE)
    expect(tab.get_by_role("img").first).to_be_visible(timeout=PATIENCE)


def request(world: World, tab: Tab) -> None:
    """One that was tried again."""
    tab.goto(f"{world.url}/console/requests?model=mistral-7b&tries=more")
    tab.get_by_role("row").nth(1).get_by_role("link").first.click(timeout=PATIENCE)
    expect(tab.get_by_role("figure").filter(has_text="What happened")).to_be_visible()


def usage(world: World, tab: Tab) -> None:
    tab.goto(f"{world.url}/console/usage?range=24h&group_by=model")
    expect(tab.get_by_role("img").first).to_be_visible(timeout=PATIENCE)


def playground(world: World, tab: Tab) -> None:
    tab.goto(f"{world.url}/console/playground?model=llama-3-8b&model2=mistral-7b")
    tab.get_by_label("Message", exact=True).fill("Which of you answers first?")
    all_answered(tab, tab.get_by_role("button", name="Send").click, PATIENCE)
    for model in ("llama-3-8b", "mistral-7b"):
        answer = tab.get_by_role("article", name=f"Answer of {model}")
        expect(answer).to_contain_text("done", timeout=PATIENCE)
        expect(answer).to_contain_text("0.0", timeout=PATIENCE)


PICTURES: dict[str, Callable[[World, Tab], None]] = {
    "request": request,
    "usage": usage,
    "playground": playground,
    # The last: it breaks something.
    "overview": overview,
}


@pytest.mark.parametrize("name", PICTURES)
def test_a_picture(own: World, visit: Visitor, name: str, tmp_path: Path, pytestconfig: pytest.Config) -> None:
    wanted = pytestconfig.getoption("--pictures")
    folder = tmp_path if wanted is None else Path(wanted)
    tab = visit(own, "/console/", dark=name == "playground")
    PICTURES[name](own, tab)
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
