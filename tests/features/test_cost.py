"""Cost: integers from the digits of a price, and never 0 for what is not known."""

from collections.abc import Callable
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from inference_api.app import ENTRY
from inference_api.features.cost import PRICE, Price, cost_of
from inference_api.routing.catalogue import parse_catalogue
from tests.conftest import Served
from tests.fakes import (
    CHAT,
    COMPLETION,
    DONE,
    LAST_CHUNK,
    SSE_HEAD,
    FakeEngine,
    chunk,
    event,
    json_response,
    raw,
    until,
)

pytestmark = pytest.mark.anyio
Start = Callable[..., Any]

PRICED = {"input": 0.20, "cached_input": 0.02, "output": 0.60, "request": 0}


def price(**given: Any) -> Price:
    [entry] = parse_catalogue({"models": [{"name": "m", "price": given}]}, ENTRY).values()
    found = PRICE.of(entry)
    assert found is not None
    return found


def problem(given: Any) -> str:
    [found] = parse_catalogue({"models": [{"name": "m", "price": given}]}, ENTRY).problems
    return found


def test_a_price_is_taken_by_its_digits() -> None:
    assert price(**PRICED) == (200_000_000, 20_000_000, 600_000_000, 0)
    assert price(input=0.1, output=0.000000001, request=0.3) == (100_000_000, 100_000_000, 1, 300_000_000)
    assert price(input=1_000_000, output=0) == (10**15, 10**15, 0, 0)


def test_zero_is_a_price() -> None:
    assert price(input=0, output=0) == (0, 0, 0, 0)
    assert any(price(input=0, output=0, request=0.01))


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"input": 1}, "output"),
        ({"input": -1, "output": 1}, "greater than or equal to 0"),
        ({"input": 1, "output": 1_000_001}, "less than or equal to 1000000"),
        ({"input": 0.0000000001, "output": 1}, "9 digits"),
        ({"input": "1", "output": 1}, "input must be a number"),
        ({"input": True, "output": 1}, "input must be a number"),
        ({"input": 1, "output": 1, "cache": 1}, "cache"),
    ],
)
def test_a_price_that_is_none_is_refused_by_name(given: Any, says: str) -> None:
    assert says in problem(given)


def test_cached_tokens_are_a_part_of_the_input() -> None:
    assert cost_of(price(**PRICED), 812, 512, 120) == 142_240
    # More cached tokens than input is a fault of the engine; the cost does not become negative.
    assert cost_of(price(**PRICED), 10, 20, 0) == 200


@given(st.integers(0, 10**9), st.integers(0, 10**9), st.integers(0, 10**9))
def test_a_cost_is_whole_and_rounded_down(input_tokens: int, cached: int, output_tokens: int) -> None:
    rates = price(input=0.000001, cached_input=0, output=0.000001, request=0.5)
    exact = (max(input_tokens - cached, 0) + output_tokens) * 1000

    assert cost_of(rates, input_tokens, cached, output_tokens) == exact // 10**6 + 500_000_000


USAGE = {"prompt_tokens": 812, "completion_tokens": 120, "prompt_tokens_details": {"cached_tokens": 512}}
# OpenAI counts cached tokens inside of the prompt, Anthropic beside it: LIT#14849, #14874, #19772.
RESPONSE = {"input_tokens": 812, "input_tokens_details": {"cached_tokens": 512}, "output_tokens": 120}
MESSAGE = {"input_tokens": 300, "cache_read_input_tokens": 512, "output_tokens": 120}


async def cost_in_the_log(served: Served) -> Any:
    await until(lambda: served.lines)
    return served.lines.pop().get("cost_nanos", "none")


async def test_a_cost_is_in_the_log_and_the_metric(start_engine: Start, start_router: Start) -> None:
    engine: FakeEngine = await start_engine(raw(json_response(COMPLETION | {"usage": USAGE})))
    served: Served = await start_router(engine, entry={"price": PRICED})

    await served.chat()

    assert await cost_in_the_log(served) == 142_240
    assert await served.metric("inference_api_cost_nanos_total", model_name="m") == 142_240


ROUTES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "/v1/completions": ({"prompt": "x"}, USAGE),
    "/v1/responses": ({"input": "x"}, RESPONSE),
    "/v1/messages": ({"messages": [], "max_tokens": 9}, MESSAGE),
}


@pytest.mark.parametrize("path", ROUTES)
async def test_every_api_has_a_cost(path: str, start_engine: Start, start_router: Start) -> None:
    """LIT#30276, #38176: /v1/messages and /v1/responses were never counted."""
    body, usage = ROUTES[path]
    engine: FakeEngine = await start_engine(raw(json_response({"id": "x", "usage": usage})))
    served: Served = await start_router(engine, entry={"price": PRICED})

    await served.client.post(path, json={"model": "m", **body})

    assert await cost_in_the_log(served) == 142_240


async def test_a_stream_has_a_cost(start_engine: Start, start_router: Start) -> None:
    last = b"data: " + orjson.dumps({"choices": [], "usage": USAGE}) + b"\n\n"
    engine: FakeEngine = await start_engine(raw(SSE_HEAD, chunk(event("a")), chunk(last), chunk(DONE) + LAST_CHUNK))
    served: Served = await start_router(engine, entry={"price": PRICED})

    await served.chat(stream=True)

    assert await cost_in_the_log(served) == 142_240


async def test_what_is_not_known_has_no_cost(start_engine: Start, start_router: Start) -> None:
    """LIT#26806: neither a missing price nor missing tokens are 0."""
    engine: FakeEngine = await start_engine(raw(json_response(COMPLETION | {"usage": USAGE})))
    unpriced: Served = await start_router(engine)
    await unpriced.chat()
    silent: FakeEngine = await start_engine(raw(json_response({"choices": []})))
    unknown: Served = await start_router(silent, entry={"price": PRICED})
    await unknown.chat()

    assert await cost_in_the_log(unpriced) == "none"
    assert await cost_in_the_log(unknown) == "none"


async def test_what_no_engine_answered_costs_nothing(start_engine: Start, start_router: Start) -> None:
    engine: FakeEngine = await start_engine(raw(json_response({"error": {}}, "400 Bad Request")))
    served: Served = await start_router(engine, entry={"price": PRICED | {"request": 1}})

    await served.chat()

    assert await cost_in_the_log(served) == 0


async def test_the_price_is_that_of_the_beginning(start_engine: Start, start_router: Start) -> None:
    """A reload during the request does not change its price."""
    engine: FakeEngine = await start_engine()
    served: Served = await start_router(engine, entry={"price": PRICED})
    core = served.router.core

    async def script(request: Any, line: Any) -> None:
        dearer = {"name": "m", "backends": [{"url": engine.url}], "price": {"input": 999, "output": 999}}
        core.registry.replace_static(parse_catalogue({"models": [dearer]}, ENTRY))
        await line.send(json_response(COMPLETION | {"usage": USAGE}))

    engine.script = script
    await served.client.post("/v1/chat/completions", json=CHAT)

    assert await cost_in_the_log(served) == 142_240
    assert PRICE.of(core.fleet.models["m"].entry) == price(input=999, output=999)


async def test_a_price_that_is_added_holds_from_the_next_request_on(start_engine: Start, start_router: Start) -> None:
    engine: FakeEngine = await start_engine(raw(json_response(COMPLETION | {"usage": USAGE})))
    served: Served = await start_router(engine)
    await served.chat()
    assert await cost_in_the_log(served) == "none"

    priced = {"name": "m", "backends": [{"url": engine.url}], "price": PRICED}
    served.router.core.registry.replace_static(parse_catalogue({"models": [priced]}, ENTRY))
    await served.chat()

    assert await cost_in_the_log(served) == 142_240
