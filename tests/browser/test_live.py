"""Pages stay fresh by one request at a time, show what is away, and have no stale green."""

import os
import re
import signal
from collections.abc import Iterator

import pytest
from playwright.sync_api import Page as Tab
from playwright.sync_api import Request, Response, expect

from tests.browser.conftest import Visitor, World, running

# Milliseconds: some rounds of asking
PATIENCE = 30_000
_HIDDEN = "Object.defineProperty(document, 'hidden', {get: () => %s, configurable: true})"


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """A demo whose processes are stopped."""
    with running(tmp_path_factory.mktemp("demo"), rate=0, yesterday=False) as world:
        yield world


def rounds(tab: Tab) -> list[Request]:
    """The requests for a part of the page, as they come."""
    found: list[Request] = []
    tab.on("request", lambda request: found.append(request) if "hx-request-type" in request.headers else None)
    return found


def is_part(answer: Response) -> bool:
    return answer.request.headers.get("hx-request-type") == "partial"


def test_a_tab_asks_one_thing_at_a_time_and_keeps_focus(world: World, visit: Visitor) -> None:
    tab = visit(world, "/console/backends")
    asked = rounds(tab)
    link = tab.get_by_role("link", name=re.compile("^Drain ")).first
    link.focus()

    with tab.expect_response(is_part, timeout=PATIENCE):
        pass
    with tab.expect_response(is_part, timeout=PATIENCE):
        pass

    assert {request.url for request in asked} == {f"{world.url}/console/backends"}
    expect(link).to_be_focused()


def test_a_hidden_tab_asks_nothing(world: World, visit: Visitor) -> None:
    tab = visit(world, "/console/login", None)
    tab.context.add_cookies(world.cookies("admin"))  # type: ignore[arg-type]
    tab.clock.install()
    tab.goto(f"{world.url}/console/backends")
    asked = rounds(tab)
    tab.evaluate(_HIDDEN % "true")
    # Twelve rounds by the clock of the page
    tab.clock.run_for(60_000)
    hidden = len(asked)
    tab.evaluate(_HIDDEN % "false")
    with tab.expect_response(is_part, timeout=PATIENCE):
        tab.clock.run_for(6_000)

    assert hidden == 0


def test_pause_stops_it_and_goes_on(world: World, visit: Visitor) -> None:
    tab = visit(world, "/console/backends")
    asked = rounds(tab)
    tab.get_by_role("button", name="Pause").click()
    with tab.expect_response(is_part, timeout=PATIENCE):
        tab.get_by_role("button", name="Resume").click()

    assert len(asked) == 1


def test_a_control_plane_that_is_away_is_never_green(own: World, visit: Visitor) -> None:
    tab = visit(own, "/console/backends")
    expect(tab.locator(".state.ok").first).to_be_visible()
    visit.watched[-1].may_fail = True
    ready = tab.locator(".state.ok").first.evaluate("one => getComputedStyle(one).color")
    plane = own.child("control plane")
    os.kill(plane.pid, signal.SIGSTOP)
    try:
        expect(tab.locator("#away")).to_contain_text("does not answer", timeout=PATIENCE)
        stale = tab.locator(".state.ok").first.evaluate("one => getComputedStyle(one).color")
    finally:
        os.kill(plane.pid, signal.SIGCONT)

    assert stale != ready
    expect(tab.locator("#away")).to_be_hidden(timeout=PATIENCE)


def test_a_router_that_is_away_is_shown_as_lost(own: World, visit: Visitor) -> None:
    tab = visit(own, "/console/routers")
    router = own.child("router")
    os.kill(router.pid, signal.SIGSTOP)
    try:
        expect(tab.locator("#live")).to_contain_text("lost", timeout=60_000)
        tab.goto(f"{own.url}/console/")
        expect(tab.locator("#live")).to_contain_text(re.compile("1 lost|lost"), timeout=PATIENCE)
    finally:
        os.kill(router.pid, signal.SIGCONT)
