"""One number everywhere: what routers count for Prometheus, what /api/v1 sums, and what the pages show."""

import re
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import httpx
import pytest
from playwright.sync_api import Page as Tab
from playwright.sync_api import expect
from prometheus_client.parser import text_string_to_metric_families

from tests.browser.conftest import Visitor, World, running

PATIENCE = 60_000
# Requests by model and router
ASKED = {("llama-3-8b", 0): 5, ("llama-3-8b", 1): 2, ("mistral-7b", 0): 3, ("mistral-7b", 1): 4, ("gpt2", 1): 6}


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """A demo without callers of its own."""
    with running(tmp_path_factory.mktemp("demo"), rate=0, yesterday=False) as world:
        key = world.demo.keys["notebook"].secret
        with httpx.Client(trust_env=False, timeout=30, headers={"authorization": f"Bearer {key}"}) as client:
            for (model, router), times in ASKED.items():
                body = {"model": model, "max_tokens": 3, "messages": [{"role": "user", "content": "hello"}]}
                for number in range(times):
                    url = f"{world.demo.routers[router]}/v1/chat/completions"
                    # Some of the engines break off.
                    with suppress(httpx.RemoteProtocolError):
                        client.post(url, json={**body, "stream": number % 2 == 0})
        world.until(lambda: usage(world)["totals"]["requests"] == sum(ASKED.values()))
        yield world


def usage(world: World) -> dict[str, Any]:
    found: dict[str, Any] = world.admin.get("/api/v1/usage", params={"group_by": "model"}).json()
    return found


def counted(world: World) -> Counter[str]:
    """Requests by model, as both routers count them."""
    found: Counter[str] = Counter()
    for url in world.demo.routers:
        for family in text_string_to_metric_families(httpx.get(f"{url}/metrics", trust_env=False).text):
            for sample in family.samples:
                if sample.name == "inference_api_requests_total":
                    found[sample.labels["model_name"]] += round(sample.value)
    return found


def table(tab: Tab, name: str) -> dict[str, list[str]]:
    """The cells of each row, by its first one."""
    rows = tab.get_by_role("table", name=re.compile(name)).locator("tbody tr")
    texts = [row.locator("th, td").all_inner_texts() for row in rows.all()]
    return {first.strip().splitlines()[0]: [cell.strip() for cell in rest] for first, *rest in texts}


def test_requests_are_the_same_for_routers_api_and_pages(own: World, visit: Visitor) -> None:
    answer = usage(own)
    by_model = {row["group"]["model"]: row for row in answer["rows"]}
    asked: Counter[str] = Counter()
    for (model, _router), times in ASKED.items():
        asked[model] += times

    tab = visit(own, "/console/usage?range=24h&group_by=model")

    def shown() -> dict[str, list[str]]:
        # Sums of a range stay as they are for some seconds.
        tab.reload()
        return table(tab, "By model")

    own.until(lambda: {model: int(cells[0].replace(",", "")) for model, cells in shown().items()} == asked)
    assert {model: row["requests"] for model, row in by_model.items()} == asked
    assert counted(own) == asked
    # Columns of the table that the API has, too
    for model, cells in table(tab, "By model").items():
        row = by_model[model]
        assert [int(cells[place].replace(",", "")) for place in (1, 3, 5)] == [
            row["errors"],
            row["input_tokens"],
            row["output_tokens"],
        ]


def test_the_overview_and_a_model_show_the_same(own: World, visit: Visitor) -> None:
    tab = visit(own, "/console/")
    expect(tab.locator("main")).to_contain_text(f"{sum(ASKED.values())} in 1 h", timeout=PATIENCE)
    tab.goto(f"{own.url}/console/models/mistral-7b?tab=metrics")
    reported = table(tab, "Now, by router")

    expect(tab.locator("main")).to_contain_text("7 in 1 h", timeout=PATIENCE)
    assert sum(int(cells[2]) for cells in reported.values()) == 7
