"""The playground with its script: answers as they come, side by side, stopped, and continued."""

import re

import pytest
from playwright.sync_api import expect

from tests.browser.conftest import Visitor, World, all_answered

# The first one starts a whole demo.
pytestmark = pytest.mark.timeout(180)
# Milliseconds; the processor is shared with the demo.
PATIENCE = 30_000
TYPED = "What do <b>routers</b> do, and which of you two says it first?"
PAGE = "/console/playground?model=llama-3-8b"


def test_two_models_answer_side_by_side(world: World, visit: Visitor) -> None:
    tab = visit(world, PAGE)
    tab.get_by_label("Message", exact=True).first.fill(TYPED)
    tab.get_by_label("Beside it").select_option("mistral-7b")
    tab.wait_for_url("**model2=mistral-7b**")
    # Another choice takes nothing of what was typed.
    expect(tab.get_by_label("Message", exact=True).first).to_have_value(TYPED)

    results = all_answered(tab, lambda: tab.get_by_label("Message", exact=True).first.press("Control+Enter"), PATIENCE)

    expect(results).to_have_count(2)
    expect(results.locator("[data-is=state]")).to_have_text(["done", "done"], timeout=PATIENCE)
    for text in results.locator("[data-is=text]").all():
        expect(text).to_contain_text("<b>routers</b>")
        assert text.locator("b").count() == 0
    for name, shape in (("first", r"\d m?s"), ("took", r"\d m?s"), ("speed", "tokens/s"), ("cost", "USD")):
        expect(results.locator(f"[data-is={name}]").first).to_have_text(re.compile(shape), timeout=PATIENCE)
    # Screen readers get the answers once, as a whole.
    expect(tab.locator("#told")).to_contain_text("mistral-7b: ")
    link = results.first.locator("[data-is=request] a").get_attribute("href")
    assert link is not None
    assert re.fullmatch(r"/console/requests\?id=[\w.-]+", link)
    assert TYPED not in tab.url

    results.first.get_by_role("button", name="Continue").click()
    expect(tab.get_by_label("Message", exact=True)).to_have_count(3)
    tab.get_by_role("button", name="View code").click()
    expect(tab.locator("#code pre")).to_have_count(3)


def test_an_answer_is_stopped(world: World, visit: Visitor) -> None:
    tab = visit(world, PAGE)
    tab.get_by_label("Message", exact=True).first.fill(TYPED * 40)
    tab.get_by_role("button", name="Send").click()
    lane = tab.locator("#results .lane")
    expect(lane.locator("[data-is=text]")).not_to_be_empty(timeout=PATIENCE)
    tab.get_by_role("button", name="Stop").click()

    expect(lane.locator("[data-is=state]")).to_have_text("stopped")
    expect(tab.get_by_role("button", name="Stop")).to_be_hidden()
    expect(tab.get_by_role("button", name="Send")).to_be_enabled()
    # Its tokens and cost are those of the usage record.
    expect(lane.locator("[data-is=cost]")).to_have_text(re.compile("USD"), timeout=PATIENCE)
    id = lane.locator("[data-is=request]").inner_text()
    record = world.admin.get(f"/api/v1/requests/{id}").json()
    assert record["outcome"] == "client_gone"


def test_a_refusal_is_shown_in_words(world: World, visit: Visitor) -> None:
    tab = visit(world, "/console/playground?model=nothing")
    tab.get_by_label("Message", exact=True).first.fill(TYPED)
    tab.get_by_role("button", name="Send").click()

    lane = tab.locator("#results .lane")
    expect(lane.locator("[data-is=state]")).to_have_text("failed", timeout=PATIENCE)
    expect(lane.locator("[data-is=problem]")).to_contain_text("model_not_found")
    expect(tab.get_by_role("button", name="Send")).to_be_enabled()
