"""split: the variant of an id, and that a variant runs as if it had been asked for."""

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inference_api.features.splitting.slots import SLOTS, slot_of, variant_of
from tests.conftest import Served
from tests.fakes import DONE, event, json_response, raw
from tests.faults.quiescence import quiet
from tests.features.limited import Limited, key
from tests.features.members import OK, STREAMED, real
from tests.features.test_usage import Accounted, account, plane  # noqa: F401

pytestmark = pytest.mark.anyio
Start = Callable[..., Any]


def chat(*weights: int, **more: Any) -> dict[str, Any]:
    return {"name": "chat", "split": {"variants": dict(zip("ab", weights, strict=True)), **more}}


# Slots


@pytest.mark.parametrize(("id", "slot"), [("ana", 8837), ("bob", 548)])
def test_the_slot_of_an_id_is_the_contracts(id: str, slot: int) -> None:
    assert slot_of("chat", id) == slot


def test_the_variants_of_the_contract() -> None:
    assert [variant_of(slot, {"a": 90, "b": 10}) for slot in (8837, 548)] == ["a", "a"]
    assert [variant_of(slot, {"a": 50, "b": 50}) for slot in (8837, 548)] == ["b", "a"]


WEIGHTS = st.dictionaries(st.sampled_from("abcdefgh"), st.floats(0, 100), min_size=2).filter(lambda w: any(w.values()))


@given(WEIGHTS)
def test_every_slot_has_a_variant_and_the_shares_are_the_weights(weights: dict[str, float]) -> None:
    got = [variant_of(slot, weights) for slot in range(SLOTS)]

    total = sum(weights.values())
    for name, weight in weights.items():
        assert abs(got.count(name) - SLOTS * weight / total) <= 1


@given(WEIGHTS, st.sampled_from("abcdefgh"), st.floats(0.1, 100))
def test_a_variant_that_grows_moves_only_what_it_gains(weights: dict[str, float], last: str, more: float) -> None:
    before = {name: weight for name, weight in weights.items() if name != last} | {last: 1.0}
    after = before | {last: 1.0 + more}

    for slot in range(0, SLOTS, 7):
        was, now = variant_of(slot, before), variant_of(slot, after)
        # The last one grows at the expense of all: whoever has it keeps it.
        assert was != last or now == last


@given(WEIGHTS, st.sets(st.sampled_from("abcdefgh")))
def test_only_the_slots_of_variants_that_are_out_move(weights: dict[str, float], out: set[str]) -> None:
    some_left = any(weight for name, weight in weights.items() if name not in out)
    for slot in range(0, SLOTS, 97):
        usual, now = variant_of(slot, weights), variant_of(slot, weights, out.__contains__)
        if usual not in out:
            assert now == usual
        elif some_left:
            assert now not in out


# Requests


async def test_a_variant_answers(start_engine: Start, start_router: Start) -> None:
    a, b = await start_engine(OK), await start_engine(OK)
    served: Served = await start_router(models=[chat(50, 50), real("a", a), real("b", b, served_model_name="b-served")])

    answers = [await served.chat(model="chat", user=user) for user in ("ana", "bob", "ana")]

    assert [answer.headers["x-inference-variant"] for answer in answers] == ["b", "a", "b"]
    assert [answer.headers["x-inference-model"] for answer in answers] == ["b", "a", "b"]
    assert [b'"model":"b-served"' in request.body for request in b.requests] == [True, True]
    assert [line["variant"] for line in served.lines] == ["b", "a", "b"]
    assert [(line["model"], line["asked_model"]) for line in served.lines[:1]] == [("b", "chat")]
    assert await served.metric("inference_api_requests_total", model_name="b") == 2
    assert (
        await served.metric("inference_api_variant_requests_total", model_name="chat", variant="b", code_class="2xx")
        == 2
    )
    assert await served.metric("inference_api_variant_tokens_total", variant="b", type="output") > 0
    assert [card["id"] for card in (await served.client.get("/v1/models")).json()["data"]] == ["chat", "a", "b"]


async def test_what_is_sticky(start_engine: Start, start_router: Start) -> None:
    engine = await start_engine(OK)
    kinds = ("user", "key", "session", "none")
    splits = [{"name": kind, "split": {"variants": {"a": 50, "b": 50}, "sticky": kind}} for kind in kinds]
    served: Served = await start_router(models=[*splits, real("a", engine), real("b", engine)])

    async def variants(model: str, **more: Any) -> set[str]:
        found = set()
        for number in range(12):
            body = {"model": model, "messages": [], "user": f"user-{number}"}
            answer = await served.client.post("/v1/chat/completions", json=body, **more)
            found.add(answer.headers["x-inference-variant"])
        return found

    assert await variants("user") == {"a", "b"}
    assert len(await variants("key")) == 1
    assert await variants("session") == {"a", "b"}
    assert len(await variants("session", headers={"x-session-id": "s-1"})) == 1
    assert await variants("none") == {"a", "b"}


async def test_a_variant_without_a_backend_gives_its_traffic_away(start_engine: Start, start_router: Start) -> None:
    engine = await start_engine(OK)
    served: Served = await start_router(models=[chat(50, 50), real("a", engine), real("b")])

    answers = [await served.chat(model="chat", user=user) for user in ("ana", "bob")]

    assert [answer.status_code for answer in answers] == [200, 200]
    assert [answer.headers["x-inference-variant"] for answer in answers] == ["a", "a"]


async def test_an_error_names_the_variant(start_router: Start) -> None:
    served: Served = await start_router(models=[chat(50, 50), real("a"), real("b")])

    answer = await served.chat(model="chat", user="ana")

    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "no_backend_available")
    assert answer.headers["x-inference-variant"] == "b"
    assert [(line["model"], line["variant"]) for line in served.lines] == [("b", "b")]


async def test_a_stream_of_a_variant(start_engine: Start, start_router: Start) -> None:
    engine = await start_engine(STREAMED)
    served: Served = await start_router(models=[chat(50, 50), real("a", engine), real("b", engine)])

    async with quiet(served):
        answer = await served.chat(model="chat", stream=True, user="ana")

    assert answer.content == event("x") + DONE
    assert answer.headers["x-inference-variant"] == "b"
    first = "inference_api_variant_time_to_first_token_seconds_count"
    assert await served.metric(first, model_name="chat", variant="b") == 1


async def test_a_stored_response_is_found_at_the_variant(start_engine: Start, start_router: Start) -> None:
    engine = await start_engine(raw(json_response({"id": "resp_1"})))
    engine.page = raw(json_response({"id": "resp_1", "status": "completed"}))
    served: Served = await start_router(models=[chat(1, 0), real("a", engine), real("b")])

    made = await served.client.post("/v1/responses", json={"model": "chat", "input": "x"})
    found = await served.client.get("/v1/responses/resp_1")

    assert [made.status_code, found.status_code] == [200, 200]
    assert found.json()["status"] == "completed"


async def test_the_prefix_affinity_of_a_variant_holds(start_engine: Start, start_router: Start) -> None:
    engines = [await start_engine(OK) for _ in range(3)]
    variant = real("a", *engines, balancing="prefix_affinity")
    served: Served = await start_router(models=[chat(1, 0), variant, real("b")])

    for number in range(9):
        turns = [{"role": "user", "content": text} for text in ("hello", f"turn {number}")]
        assert (await served.chat(model="chat", messages=turns)).status_code == 200

    assert sorted(len(engine.requests) for engine in engines) == [0, 0, 9]


async def test_splits_nest_and_the_outermost_is_named(start_engine: Start, start_router: Start) -> None:
    engine = await start_engine(OK)
    outer = {"name": "outer", "split": {"variants": {"chat": 1, "b": 0}}}
    served: Served = await start_router(models=[outer, chat(1, 0), real("a", engine), real("b", engine)])

    answer = await served.chat(model="outer", user="ana")

    assert answer.headers["x-inference-variant"] == "chat"
    assert answer.headers["x-inference-model"] == "a"
    assert await served.metric("inference_api_variant_requests_total", model_name="chat", variant="a") == 1
    assert await served.metric("inference_api_variant_requests_total", model_name="outer", variant="chat") == 1


async def test_a_key_must_be_allowed_all_variants(start_engine: Start, start_router: Start) -> None:
    limited = Limited(keys=[key("all", models=["chat", "a", "b"]), key("some", models=["chat", "a"])])
    from inference_api.feature import Feature
    from inference_api.features.keys import Keys

    keys = Feature("access", resolve=Keys(limited.policies).resolve)
    engine = await start_engine(OK)
    models = [chat(1, 0), real("a", engine), real("b", engine)]
    served: Served = await start_router(models=models, features=[*limited.features, keys])

    async def ask(name: str) -> tuple[int, list[str]]:
        headers = {"authorization": f"Bearer {name}"}
        body = {"model": "chat", "messages": []}
        answer = await served.client.post("/v1/chat/completions", json=body, headers=headers)
        seen = (await served.client.get("/v1/models", headers=headers)).json()["data"]
        return answer.status_code, [card["id"] for card in seen]

    assert await ask("all") == (200, ["chat", "a", "b"])
    assert await ask("some") == (403, ["a"])


async def test_limits_of_the_name_and_of_the_variant_hold_together(start_engine: Start, start_router: Start) -> None:
    limits = [
        {"scope": "all", "requests": 10, "per": 60},
        {"scope": "model", "name": "chat", "requests": 5, "per": 60},
        {"scope": "model", "name": "a", "requests": 2, "per": 60},
        {"scope": "model", "name": "b", "requests": 1, "per": 60},
    ]
    limited = Limited(limits=limits)
    engine = await start_engine(OK)
    models = [chat(1, 0), real("a", engine), real("b", engine)]
    served: Served = await start_router(models=models, features=limited.features)

    answers = [await served.chat(model="chat") for _ in range(3)]

    assert [answer.status_code for answer in answers] == [200, 200, 429]
    assert "model 'a'" in answers[2].json()["error"]["message"]
    assert limited.used("model:a:requests:60") == limited.used("model:chat:requests:60") == 2
    # Taken once, and nothing by the one that was refused
    assert limited.used("all::requests:60") == 2
    assert limited.used("model:b:requests:60") == 0
    assert answers[0].headers.get_list("x-ratelimit-limit-requests") == ["2"]


async def test_the_record_has_asked_model_variant_and_the_variants_price(
    start_engine: Start,
    account: Start,  # noqa: F811
) -> None:
    engine = await start_engine(OK)
    priced = real("b", engine, price={"input": 1, "output": 1})
    it: Accounted = await account(models=[chat(50, 50), real("a", engine), priced])

    await it.served.chat(model="chat", user="ana")
    [record] = await it.records()

    assert (record["asked_model"], record["model"], record["variant"]) == ("chat", "b", "b")
    assert record["cost_nanos"] > 0
    assert await it.served.metric("inference_api_cost_nanos_total", model_name="b") == record["cost_nanos"]
