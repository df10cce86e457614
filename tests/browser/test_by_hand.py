"""What people do with the keyboard alone, and without a script."""

import re

from playwright.sync_api import Locator, expect
from playwright.sync_api import Page as Tab

from tests.browser.conftest import Visitor, World

PATIENCE = 30_000


def tab_to(tab: Tab, target: Locator, most: int = 150) -> None:
    """Press Tab until it has the focus."""
    wanted = target.element_handle()
    assert wanted is not None
    for _ in range(most):
        if tab.evaluate("one => one === document.activeElement", wanted):
            return
        tab.keyboard.press("Tab")
    raise AssertionError(f"{most} times Tab did not lead to {target}")


def test_the_keyboard_drains_a_backend_and_returns_it(world: World, visit: Visitor) -> None:
    tab = visit(world, "/console/")
    tab_to(tab, tab.get_by_role("link", name="Backends", exact=True).first)
    tab.keyboard.press("Enter")
    expect(tab.get_by_role("heading", name="Backends")).to_be_visible()
    row = tab.locator("tr", has_text="llama-3-8b").first
    backend = row.locator("th").inner_text()
    drain = tab.get_by_role("link", name=f"Drain {backend}")
    tab_to(tab, drain)
    tab.keyboard.press("Enter")
    # Escape leaves, and the focus is where it was.
    expect(tab.get_by_role("dialog")).to_be_visible()
    tab.keyboard.press("Escape")
    expect(tab.get_by_role("dialog")).to_have_count(0)
    expect(drain).to_be_focused()
    tab.keyboard.press("Enter")
    expect(tab.get_by_label("Reason")).to_be_focused()
    tab.keyboard.type("new driver")
    tab.keyboard.press("Enter")

    expect(tab.get_by_role("status").filter(has_text="no new requests")).to_be_visible()
    expect(tab.locator("#live")).to_contain_text("2 of 2", timeout=PATIENCE)
    back = tab.get_by_role("link", name=f"Return {backend}")
    tab_to(tab, back)
    tab.keyboard.press("Enter")
    expect(tab.get_by_role("dialog")).to_be_visible()
    tab_to(tab, tab.get_by_role("dialog").get_by_role("button", name="Return"))
    tab.keyboard.press("Enter")
    expect(tab.get_by_role("link", name=f"Drain {backend}")).to_be_visible(timeout=PATIENCE)


def test_the_keyboard_finds_a_failed_request(world: World, visit: Visitor) -> None:
    failed = world.failure()
    tab = visit(world, "/console/")
    tab_to(tab, tab.get_by_role("link", name="Requests", exact=True).first)
    tab.keyboard.press("Enter")
    tab_to(tab, tab.get_by_label("Request id"))
    tab.keyboard.type(failed)
    tab.keyboard.press("Enter")

    expect(tab.locator("h1")).to_contain_text(failed)
    expect(tab.locator("main")).to_contain_text("failed")


def test_the_keyboard_rotates_a_key(world: World, visit: Visitor) -> None:
    tab = visit(world, "/console/")
    tab_to(tab, tab.get_by_role("link", name="Keys", exact=True).first)
    tab.keyboard.press("Enter")
    tab_to(tab, tab.get_by_role("link", name="notebook").first)
    tab.keyboard.press("Enter")
    rotate = tab.get_by_role("link", name=re.compile("^Rotate")).first
    tab_to(tab, rotate)
    tab.keyboard.press("Enter")
    expect(tab.get_by_role("dialog")).to_be_visible()
    tab_to(tab, tab.get_by_role("dialog").get_by_role("button", name="Rotate"))
    tab.keyboard.press("Enter")

    expect(tab.locator("main")).to_contain_text("sk-ia-")
    expect(tab.locator("main")).to_contain_text("once")


def test_without_a_script_a_backend_is_drained_and_returned(world: World, visit: Visitor) -> None:
    tab = visit(world, "/console/backends", script=False)
    tab.get_by_label("Model").select_option("mistral-7b")
    tab.get_by_role("button", name="Show").click()
    row = tab.locator("tr", has_text="mistral-7b").first
    backend = row.locator("th").inner_text()
    tab.get_by_role("link", name=f"Drain {backend}").click()
    tab.get_by_label("Reason").fill("no script")
    tab.get_by_role("dialog").get_by_role("button", name="Drain").click()
    expect(tab.locator(".notice")).to_be_visible()
    expect(tab.locator("#live")).to_contain_text("no script")
    tab.get_by_role("link", name=f"Return {backend}").click()
    tab.get_by_role("dialog").get_by_role("button", name="Return").click()

    expect(tab.get_by_role("link", name=f"Drain {backend}")).to_be_visible()


def test_without_a_script_a_one_time_url_logs_in_and_the_session_ends(world: World, visit: Visitor) -> None:
    tab = visit(world, "/console/keys?organisation=sued", None, script=False)
    expect(tab.get_by_label("E-mail")).to_be_visible()
    tab.get_by_label("E-mail").fill("admin@example.org")
    tab.get_by_label("Password").fill("wrong")
    tab.get_by_role("button", name="Sign in").click()
    expect(tab.get_by_role("alert")).to_contain_text("wrong")
    world.cookies("admin")
    tab.get_by_label("Password").fill("a long enough password")
    tab.get_by_role("button", name="Sign in").click()

    expect(tab).to_have_url(f"{world.url}/console/keys?organisation=sued")
    tab.get_by_role("button", name="Sign out").click()
    expect(tab).to_have_url(f"{world.url}/console/login")
