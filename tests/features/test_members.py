"""Models that run for others, whatever becomes of them: nothing stays taken, and the answer says who gave it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.conftest import Served
from tests.fakes import (
    STREAM,
    Line,
    Received,
    Script,
    hang,
    json_response,
    post,
    raw,
    raw_client,
    until,
)
from tests.faults.quiescence import quiet
from tests.features.limited import Limited
from tests.features.members import BUSY, OK, STREAMED, cut, real, reset
from tests.features.test_usage import Accounted, account, plane  # noqa: F401
from tests.policies import write

pytestmark = pytest.mark.anyio
Start = Callable[..., Any]
URL = "/v1/chat/completions"
PRICE = {"price": {"input": 1, "output": 1}}


# What becomes of a member of any kind
FATES = [reset, BUSY, STREAMED, cut]


def race(name: str, *members: str) -> dict[str, Any]:
    return {"name": name, "race": {"members": members, "stagger": 60}}


def split(name: str, first: str, second: str) -> dict[str, Any]:
    return {"name": name, "split": {"variants": {first: 1, second: 0}}}


async def ask(served: Served, model: str) -> int:
    """The status; 0: the answer broke."""
    try:
        return (await served.client.post(URL, json=STREAM | {"model": model, "max_tokens": 50})).status_code
    except httpx.RemoteProtocolError:
        return 0


@pytest.mark.parametrize("others", [[], [{"scope": "all", "requests": 99, "per": 60}]])
@pytest.mark.parametrize("fate", FATES)
async def test_a_member_gives_back_what_it_took_from_its_models_limits(
    fate: Script, others: list[Any], start_engine: Start, start_router: Start
) -> None:
    """Also if no limit of the request itself is held, or if another model answers."""
    limits = [{"scope": "model", "name": "b", "streams": 1}, {"scope": "model", "name": "b", "tokens": 900, "per": 60}]
    limited = Limited(limits=limits + others)
    dead, engine = await start_engine(reset), await start_engine(fate)
    models = [real("a", dead, fallbacks=["b"]), real("b", engine), race("fastest", "b", "a")]
    served: Served = await start_router(models=models, features=limited.features, max_attempts=1, usage="log")

    async with quiet(served):
        statuses = [await ask(served, model) for model in ("a", "a", "fastest", "fastest")]
    await until(lambda: len(served.lines) == 4)

    assert 429 not in statuses
    assert len(engine.requests) == 4
    assert limited.store.streams("model:b").own == 0
    # Less than was reserved for two of them
    assert limited.used("model:b:tokens:60") < 100


async def test_tokens_of_a_vote_that_is_a_fallback_are_not_of_the_model_that_failed(
    start_engine: Start, start_router: Start
) -> None:
    names = ("a", "b", "c")
    limits = [{"scope": "model", "name": name, "tokens": 900, "per": 60} for name in names]
    limited = Limited(limits=[*limits, {"scope": "all", "tokens": 900, "per": 60}])
    dead, engine = await start_engine(BUSY), await start_engine(OK)
    vote = {"name": "sure", "consensus": {"members": ["b", "c"]}}
    models = [real("a", dead, fallbacks=["sure"]), real("b", engine), real("c", engine), vote]
    served: Served = await start_router(models=models, features=limited.features, max_attempts=1, usage="log")

    assert (await served.chat(model="a", max_tokens=50)).headers["x-inference-votes"] == "2/2"
    await until(lambda: served.lines)

    used = [limited.used(f"{holder}:tokens:60") for holder in ("model:a", "model:b", "model:c", "all:")]
    assert used == [0, 8, 8, 16]


async def test_a_model_that_answers_after_a_race_with_it_failed_counts_once(
    start_engine: Start, start_router: Start
) -> None:
    replies = iter([BUSY, OK])

    async def second_time(request: Received, line: Line) -> None:
        await next(replies)(request, line)

    limits = [{"scope": "model", "name": name, "tokens": 900, "per": 60} for name in ("b", "fastest")]
    limited = Limited(limits=limits)
    dead, engine = await start_engine(BUSY), await start_engine(second_time)
    models = [
        real("a", dead, fallbacks=["fastest", "b"]),
        real("b", engine),
        real("c", dead),
        race("fastest", "b", "c"),
    ]
    served: Served = await start_router(models=models, features=limited.features, max_attempts=1, usage="log")

    assert (await served.chat(model="a", max_tokens=50)).headers["x-inference-fallback"] == "2"
    await until(lambda: served.lines)

    assert [limited.used(f"model:{name}:tokens:60") for name in ("b", "fastest")] == [8, 0]


async def test_a_client_that_leaves_while_a_fallback_runs(start_engine: Start, start_router: Start) -> None:
    limited = Limited(limits=[{"scope": "model", "name": "b", "streams": 1}])
    dead, engine = await start_engine(reset), await start_engine(hang)
    models = [real("a", dead, fallbacks=["b"]), real("b", engine)]
    served: Served = await start_router(models=models, features=limited.features, max_attempts=1)

    async with quiet(served), raw_client(served.port) as client:
        await client.send(post(URL, STREAM | {"model": "a"}))
        await until(lambda: engine.busy)
        client.close()
        await until(lambda: served.lines)

    [line] = served.lines
    assert limited.store.streams("model:b").own == 0
    # Tried last
    assert (line["model"], line["asked_model"], line["attempts"]) == ("b", "a", 1)
    assert line["backend"] == engine.url.removeprefix("http://")


@pytest.mark.parametrize("fate", [reset, BUSY, raw(json_response({}, "400 Bad Request"))])
async def test_a_member_that_fails_keeps_no_part_of_a_budget(
    fate: Script, start_engine: Start, start_router: Start, tmp_path: Path
) -> None:
    budget = {"scope": "all", "tokens": 1000, "per": "day"}
    policy = write(tmp_path / "policy.json", {"budgets": [budget]})
    dead, engine = await start_engine(reset), await start_engine(fate)
    models = [real("a", dead, fallbacks=["b"]), real("b", engine)]
    served: Served = await start_router(models=models, policy=str(policy), max_attempts=1)

    for _ in range(3):
        assert (await served.chat(model="a", max_tokens=500)).status_code != 429
    engine.script = OK

    # If anything of it were still reserved, it would be used up.
    assert (await served.chat(model="a", max_tokens=500)).status_code == 200


async def test_an_empty_purse_has_no_fallback_that_costs(
    start_engine: Start, start_router: Start, tmp_path: Path
) -> None:
    """A free model passes a budget that is used up; the model that would answer for it does not."""
    policy = write(tmp_path / "policy.json", {"budgets": [{"scope": "all", "cost": 0.000001, "per": "day"}]})
    free = {"price": {"input": 0, "output": 0}}
    dead, engine, other = await start_engine(BUSY), await start_engine(OK), await start_engine(OK)
    models = [real("a", dead, fallbacks=["b", "c"], **free), real("b", engine, **PRICE), real("c", other, **free)]
    served: Served = await start_router(models=models, policy=str(policy), max_attempts=1)

    first, second = await served.chat(model="a"), await served.chat(model="a")

    assert [answer.headers["x-inference-model"] for answer in (first, second)] == ["b", "c"]
    assert (await served.chat(model="b")).status_code == 429


async def test_a_fallback_that_is_virtual_is_named_by_the_member_that_answered(
    start_engine: Start,
    account: Start,  # noqa: F811
) -> None:
    dead, engine = await start_engine(BUSY), await start_engine(OK)
    models = [real("a", dead, fallbacks=["fastest"], **PRICE), real("b", engine, **PRICE), race("fastest", "b", "a")]
    it: Accounted = await account(models=models, max_attempts=1)

    answer = await it.served.chat(model="a")
    [record] = await it.records()

    assert (answer.headers["x-inference-model"], answer.headers["x-inference-fallback"]) == ("b", "1")
    assert (record["asked_model"], record["model"], record["attempts"]) == ("a", "b", 1)
    assert await it.served.metric("inference_api_requests_total", model_name="b") == 1
    assert await it.served.metric("inference_api_cost_nanos_total", model_name="b") == record["cost_nanos"] > 0


@pytest.mark.parametrize(("second", "is_of_second"), [(cut, True), (BUSY, False)])
async def test_the_attempts_of_a_record_are_those_of_its_model(
    second: Script,
    is_of_second: bool,
    start_engine: Start,
    account: Start,  # noqa: F811
) -> None:
    first, other = await start_engine(BUSY), await start_engine(second)
    it: Accounted = await account(models=[real("a", first, fallbacks=["b"]), real("b", other)], max_attempts=1)

    await ask(it.served, "a")
    [record] = await it.records()

    engine = other if is_of_second else first
    assert record["attempts"] == 1
    assert [tried["backend"] for tried in record["attempt_details"]] == [engine.url.removeprefix("http://")]


@pytest.mark.parametrize(("model", "variant"), [("outer", "fastest"), ("fastest", "a")])
async def test_the_outermost_split_names_its_variant_also_through_a_race(
    model: str,
    variant: str,
    start_engine: Start,
    account: Start,  # noqa: F811
) -> None:
    engine = await start_engine(OK)
    models = [
        real("a", engine),
        real("b", engine),
        split("inner", "a", "b"),
        race("fastest", "inner", "b"),
        split("outer", "fastest", "b"),
    ]
    it: Accounted = await account(models=models)

    answer = await it.served.chat(model=model)
    [record] = await it.records()

    assert answer.headers.get_list("x-inference-variant") == [variant]
    assert (record["variant"], record["model"], answer.headers["x-inference-model"]) == (variant, "a", "a")


async def test_a_variant_that_lost_a_race_before_its_head_is_not_counted(
    start_engine: Start, start_router: Start
) -> None:
    slow, engine = await start_engine(hang), await start_engine(OK)
    models = [real("a", engine), real("b", slow), split("inner", "b", "a"), race("fastest", "inner", "a")]
    models[-1]["race"]["stagger"] = 0
    served: Served = await start_router(models=models)

    async with quiet(served):
        answer = await served.chat(model="fastest")

    assert answer.headers["x-inference-model"] == "a"
    assert "variant_requests_total{" not in (await served.client.get("/metrics")).text


async def test_an_adapter_that_no_engine_has_listed_yet_is_a_variant_without_a_backend(
    start_engine: Start, start_router: Start
) -> None:
    engine = await start_engine(OK)
    models = [real("a", engine, discover=True, adapters=["lora"]), split("chat", "lora", "a")]
    served: Served = await start_router(models=models)

    answer = await served.chat(model="chat")

    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "no_backend_available")


async def test_votes_within_a_vote_are_named_once(start_engine: Start, start_router: Start) -> None:
    engine = await start_engine(OK)
    votes = [{"name": name, "consensus": {"members": [member, "b"]}} for name, member in (("in", "a"), ("out", "in"))]
    served: Served = await start_router(models=[real("a", engine), real("b", engine), *votes])

    answer = await served.chat(model="out")

    assert answer.headers.get_list("x-inference-votes") == ["2/2"]
    assert served.lines[-1]["votes"] == "2/2"


async def test_what_is_reserved_for_operators_goes_to_no_fallback_or_shadow_that_refuses_it(
    start_engine: Start, start_router: Start
) -> None:
    dead, refusing, allowing = await start_engine(BUSY), await start_engine(OK), await start_engine(OK)
    models = [
        real("a", dead, fallbacks=["b", "c"], engine_fields="allow", shadow={"to": "b", "sample": 1}),
        real("b", refusing),
        real("c", allowing, engine_fields="allow"),
    ]
    served: Served = await start_router(models=models, max_attempts=1)

    async with quiet(served):
        answer = await served.chat(model="a", kv_transfer_params={"do_remote_decode": True})

    assert answer.headers["x-inference-model"] == "c"
    assert not refusing.requests


async def test_a_member_of_a_race_takes_no_request(start_engine: Start, start_router: Start) -> None:
    limited = Limited(limits=[{"scope": "model", "name": "a", "requests": 1, "per": 60}])
    engine = await start_engine(STREAMED)
    models = [race("fastest", "a", "b"), real("a", engine), real("b", engine)]
    served: Served = await start_router(models=models, features=limited.features)

    assert [await ask(served, "fastest") for _ in range(2)] == [200, 200]
    assert limited.used("model:a:requests:60") == 0
