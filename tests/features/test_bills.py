"""What races, votes, hedges and shadows cost: a record for each run, and the tokens that the caller pays for."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Served
from tests.fakes import COMPLETION, USAGE, FakeEngine, hang, json_response, raw, until
from tests.faults.quiescence import quiet
from tests.features.test_usage import Accounted, account, plane  # noqa: F401
from tests.policies import write

pytestmark = pytest.mark.anyio
Start = Callable[..., Any]
OK = raw(json_response(COMPLETION))
PRICE = {"price": {"input": 1, "output": 1}}
TOKENS = USAGE["prompt_tokens"] + USAGE["completion_tokens"]
COST = TOKENS * 1000


def real(name: str, *engines: FakeEngine, **more: Any) -> dict[str, Any]:
    return {"name": name, "backends": [engine.url for engine in engines], **PRICE, **more}


def shown(record: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(record[name] for name in ("kind", "asked_model", "model", "outcome", "usage_source", "cost_nanos"))


async def test_a_vote_is_paid_for_by_member(start_engine: Start, account: Start) -> None:  # noqa: F811
    engines = [await start_engine(script) for script in (OK, OK, hang)]
    vote = {"name": "sure", "consensus": {"members": ["a", "b", "c"]}}
    models = [real(name, engine) for name, engine in zip("abc", engines, strict=True)]
    it: Accounted = await account(models=[*models, vote])

    async with quiet(it.served):
        assert (await it.served.chat(model="sure")).status_code == 200
        records = await it.records(3)

    by_model = {record["model"]: record for record in records}
    assert shown(by_model["a"]) == ("request", "sure", "a", "ok", "reported", COST)
    assert shown(by_model["b"]) == ("vote", "sure", "b", "ok", "reported", COST)
    assert by_model["c"]["kind"] == "vote"
    assert by_model["c"]["outcome"] == "vote_lost"
    assert by_model["a"]["votes"] == "2/3"
    assert len({record["request_id"] for record in records}) == 1


async def test_the_members_of_a_vote_settle_the_limits_of_the_caller(
    start_engine: Start, start_router: Start, tmp_path: Path
) -> None:
    limits = [{"tokens": 100_000, "per": 3600}, {"requests": 9, "per": 3600}]
    policy = write(tmp_path / "policy.json", {"anonymous": {"limits": limits}})
    engines = [await start_engine(OK) for _ in "ab"]
    vote = {"name": "sure", "consensus": {"members": ["a", "b"]}}
    models = [real(name, engine) for name, engine in zip("ab", engines, strict=True)]
    served: Served = await start_router(models=[*models, vote], policy=str(policy))

    first = await served.chat(model="sure", max_tokens=500)
    await until(lambda: served.lines)
    second = await served.chat(model="sure", max_tokens=500)

    left, more = (
        [int(answer.headers[f"x-ratelimit-remaining-{unit}"]) for answer in (first, second)]
        for unit in ("requests", "tokens")
    )
    assert left == [8, 7]
    # Both reserve the same; what the first one has reserved became what its members took.
    assert more[0] - more[1] == 2 * TOKENS


async def test_no_consensus_is_paid_for_by_member(start_engine: Start, account: Start) -> None:  # noqa: F811
    other = raw(json_response({**COMPLETION, "choices": [{"index": 0, "message": {"content": "another"}}]}))
    engines = [await start_engine(script) for script in (OK, other)]
    vote = {"name": "sure", "consensus": {"members": ["a", "b"], "on_split": "error"}}
    it: Accounted = await account(
        models=[*(real(name, engine) for name, engine in zip("ab", engines, strict=True)), vote]
    )

    assert (await it.served.chat(model="sure")).status_code == 502
    records = await it.records(3)

    assert sorted((record["kind"], record["cost_nanos"]) for record in records) == [
        ("request", 0), ("vote", COST), ("vote", COST),
    ]  # fmt: skip
    [request] = [record for record in records if record["kind"] == "request"]
    assert (request["code"], request["attempts"], request["status"]) == ("no_consensus", 1, 502)


async def test_a_race_is_paid_for_by_member(start_engine: Start, account: Start) -> None:  # noqa: F811
    engines = [await start_engine(script) for script in (hang, OK)]
    race = {"name": "fastest", "race": {"members": ["a", "b"]}}
    it: Accounted = await account(
        models=[*(real(name, engine) for name, engine in zip("ab", engines, strict=True)), race]
    )

    assert (await it.served.chat(model="fastest")).status_code == 200
    records = await it.records(2)

    by_model = {record["model"]: record for record in records}
    assert shown(by_model["b"]) == ("request", "fastest", "b", "ok", "reported", COST)
    assert (by_model["a"]["kind"], by_model["a"]["outcome"]) == ("race", "race_lost")


async def test_hedges_and_shadows_cost_nothing(start_engine: Start, account: Start) -> None:  # noqa: F811
    asked: list[FakeEngine] = []
    late, quick, copy = await start_engine(), await start_engine(), await start_engine(OK)

    def turn(engine: FakeEngine) -> Any:
        async def script(request: Any, line: Any) -> None:
            asked.append(engine)
            await (hang if len(asked) == 1 else OK)(request, line)

        return script

    late.script, quick.script = turn(late), turn(quick)
    more = {"hedge": {"after": 50}, "shadow": {"to": "next", "sample": 1}}
    it: Accounted = await account(models=[real("m", late, quick, **more), real("next", copy)])

    async with quiet(it.served):
        assert (await it.served.chat()).status_code == 200
        records = await it.records(3)

    by_kind = {record["kind"]: record for record in records}
    assert shown(by_kind["request"]) == ("request", "m", "m", "ok", "reported", COST)
    assert (by_kind["hedge"]["outcome"], by_kind["hedge"]["cost_nanos"]) == ("hedge_lost", 0)
    assert shown(by_kind["shadow"]) == ("shadow", "m", "next", "ok", "reported", 0)
    assert by_kind["shadow"]["output_tokens"] == USAGE["completion_tokens"]
    assert await it.served.metric("inference_api_cost_nanos_total", model_name="m") == COST
    assert await it.served.metric("inference_api_cost_nanos_total", model_name="next") == 0
