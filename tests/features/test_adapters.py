"""Adapters and names from engines: a router on a real socket, and engines that list what they have."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from typing import Any

import orjson
import pytest

from inference_api.app import ENTRY
from inference_api.routing.catalogue import parse_catalogue
from inference_api.routing.fleet import Adapter
from tests.conftest import Served
from tests.fakes import CHAT, STREAM, hang, json_response, post, raw, raw_client, until
from tests.faults.quiescence import quiet
from tests.listed import NOT_FOUND, ListingEngine, card
from tests.policies import EXAMPLE, entry, policy_of

pytestmark = pytest.mark.anyio
Start = Callable[..., Any]
DISCOVER: dict[str, Any] = {"discover": True, "served_model_name": None}


@pytest.fixture
async def engine() -> AsyncIterator[Callable[..., Any]]:
    """`await engine("lora")` -> an engine of `m` that has this adapter."""
    async with AsyncExitStack() as stack:

        async def start(*adapters: str, names: tuple[str, ...] = ("m",)) -> ListingEngine:
            made = ListingEngine(*adapters, names=names)
            await stack.enter_async_context(made)
            return made

        yield start


async def started(
    start_router: Start, *engines: ListingEngine, entry: dict[str, Any] | None = None, **more: Any
) -> Served:
    """A router that has asked its engines, and asks them again every 0.1 s."""
    more = {"engine_interval": 0.1, "health_interval": 30.0} | more
    served: Served = await start_router(*engines, entry={"discover": True, **(entry or {})}, **more)
    await until(lambda: served.router.probes.state == "ready")
    await until(lambda: all(engine.asked for engine in engines))
    ready = served.router.features["adapters"].ready
    assert ready is not None
    await until(lambda: ready() is None)
    return served


def names(served: Served) -> set[str]:
    return set(served.router.core.fleet.by_name)


async def test_an_adapter_is_a_model_of_its_own_on_the_backends_that_have_it(
    engine: Start, start_router: Start
) -> None:
    without, having = await engine(), await engine("lora")
    served = await started(start_router, without, having)
    await until(lambda: "lora" in names(served))

    answers = [await served.chat(model="lora") for _ in range(10)]
    stream = await served.chat(stream=True, model="lora")

    assert {answer.status_code for answer in (*answers, stream)} == {200}
    assert having.models == ["lora"] * 11
    assert without.models == []
    line = served.lines[-1]
    assert (line["model"], line["parent"], line["backend"]) == ("lora", "m", having.url.partition("//")[2])
    assert await served.metric("inference_api_requests_total", model_name="lora", code="200", stream="false") == 10
    assert await served.metric("inference_api_model_backends", model_name="lora") == 1
    assert await served.metric("inference_api_model_backends", model_name="m") == 2


async def test_the_base_model_keeps_all_of_its_backends_and_has_no_parent(engine: Start, start_router: Start) -> None:
    engines = [await engine(), await engine("lora")]
    served = await started(start_router, *engines)
    for _ in range(40):
        assert (await served.chat()).status_code == 200

    assert all(engine.models and {*engine.models} == {"m"} for engine in engines)
    assert all("parent" not in line for line in served.lines)


async def test_adapters_are_listed_with_their_parent(engine: Start, start_router: Start) -> None:
    served = await started(start_router, await engine("lora"))
    await until(lambda: "lora" in names(served))

    base, lora = (await served.client.get("/v1/models")).json()["data"]
    assert (base["id"], lora["id"], lora["parent"], lora["aliases"]) == ("m", "lora", "m", [])
    assert "parent" not in base
    assert (await served.client.get("/v1/models/lora")).json() == lora


async def test_an_adapter_loaded_later_is_served_and_one_unloaded_is_not(engine: Start, start_router: Start) -> None:
    only = await engine()
    served = await started(start_router, only)
    assert (await served.chat(model="lora")).status_code == 404
    only.says("lora")
    await until(lambda: "lora" in names(served))
    assert (await served.chat(model="lora")).status_code == 200
    only.says()
    view = served.router.core.fleet.by_name["lora"]
    await until(lambda: not view.backends)

    refused = await served.chat(model="lora")
    assert refused.status_code == 503
    error = refused.json()["error"]
    assert (error["code"], error["message"]) == ("no_backend_available", "The model 'lora' has no available backend.")
    assert "retry-after" in refused.headers
    assert "has this adapter" in served.lines[-1]["why"]
    assert [one["id"] for one in (await served.client.get("/v1/models")).json()["data"]] == ["m"]
    assert (await served.client.get("/v1/models/lora")).status_code == 503
    assert await served.metric("inference_api_model_backends", model_name="lora") == 0
    assert (await served.chat()).status_code == 200


async def test_requests_of_adapters_count_in_their_parent(engine: Start, start_router: Start) -> None:
    only = await engine("lora")
    only.script = hang
    served = await started(start_router, only, entry={"max_in_flight": 2})
    await until(lambda: "lora" in names(served))
    fleet = served.router.core.fleet
    base, lora = fleet.by_name["m"], fleet.by_name["lora"]

    async with quiet(served):
        async with raw_client(served.port) as one, raw_client(served.port) as two:
            await one.send(post("/v1/chat/completions", {**CHAT, "model": "lora"}))
            await two.send(post("/v1/chat/completions", CHAT))
            await until(lambda: base.in_flight == 2)
            assert lora.in_flight == 2
            assert lora.backends[0] is base.backends[0]
            assert base.backends[0].in_flight == base.backends[0].origin.in_flight == 2

            for name in ("m", "lora"):
                refused = await served.chat(model=name)
                assert (refused.status_code, refused.json()["error"]["code"]) == (503, "overloaded")
            assert await served.metric("inference_api_requests_in_flight", model_name="m") == 2
            assert await served.metric("inference_api_requests_in_flight", model_name="lora") == 0
        await until(lambda: base.in_flight == lora.in_flight == 0)


async def test_an_address_has_one_circuit(engine: Start, start_router: Start) -> None:
    good, bad = await engine("lora"), await engine("lora")
    served = await started(start_router, good, bad)
    await until(lambda: len(getattr(served.router.core.fleet.by_name.get("lora"), "backends", ())) == 2)
    bad.script = raw(json_response({}, "502 Bad Gateway"))
    base, lora = (served.router.core.fleet.by_name[name] for name in ("m", "lora"))
    for _ in range(40):
        await served.chat(model="lora")
        if base.open:
            break

    assert [backend.url for backend in base.open] == [bad.url] == [backend.url for backend in lora.open]
    assert [backend.url for backend in lora.available] == [good.url]


async def test_a_404_about_the_model_goes_to_another_holder_once(engine: Start, start_router: Start) -> None:
    forgetful, having = await engine("lora"), await engine("lora")
    served = await started(start_router, forgetful, having, engine_interval=300.0)
    await until(lambda: len(getattr(served.router.core.fleet.by_name.get("lora"), "backends", ())) == 2)
    forgetful.adapters = []
    for number in range(20):
        assert (await served.chat(model="lora", stream=number % 2 == 0)).status_code == 200

    assert forgetful.models == ["lora"]
    assert len(having.models) == 20
    assert sum(line["attempts"] == 2 for line in served.lines) == 1

    having.adapters = []
    passed_on = await served.chat(model="lora")
    assert (passed_on.status_code, passed_on.json()) == (404, NOT_FOUND)
    assert (await served.chat(model="lora")).json()["error"]["code"] == "no_backend_available"
    assert served.router.core.fleet.by_name["m"].in_flight == 0


async def test_two_404s_are_passed_on(engine: Start, start_router: Start) -> None:
    engines = [await engine("lora") for _ in range(3)]
    served = await started(start_router, *engines, engine_interval=300.0)
    await until(lambda: len(getattr(served.router.core.fleet.by_name.get("lora"), "backends", ())) == 3)
    for one in engines:
        one.adapters = []

    assert (await served.chat(model="lora")).json() == NOT_FOUND
    assert sum(len(one.models) for one in engines) == 2


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b'{"error": "no"}', b'{"error": {"type": "NotFoundError", "param": "tool"}}', b"x" * 40_000],
)
async def test_another_404_is_the_clients(engine: Start, start_router: Start, body: bytes) -> None:
    one, two = await engine("lora"), await engine("lora")
    served = await started(start_router, one, two)
    await until(lambda: len(getattr(served.router.core.fleet.by_name.get("lora"), "backends", ())) == 2)
    one.script = two.script = raw(b"HTTP/1.1 404 Not Found\r\ncontent-length: %d\r\n\r\n" % len(body), body)

    answer = await served.chat(model="lora")

    assert (answer.status_code, answer.content) == (404, body)
    assert len(one.requests) + len(two.requests) == 1
    assert len(served.router.core.fleet.by_name["lora"].backends) == 2


async def test_a_404_that_breaks_off_is_an_error(engine: Start, start_router: Start) -> None:
    only = await engine("lora")
    served = await started(start_router, only)
    await until(lambda: "lora" in names(served))
    only.script = raw(b"HTTP/1.1 404 Not Found\r\ncontent-length: 99\r\n\r\n{", close=True)

    assert (await served.chat(model="lora")).status_code == 502
    assert served.router.core.fleet.by_name["m"].in_flight == 0


async def test_a_client_that_leaves_while_a_404_arrives_leaves_nothing(engine: Start, start_router: Start) -> None:
    only = await engine("lora")

    async def slow(request: Any, line: Any) -> None:
        await line.send(b"HTTP/1.1 404 Not Found\r\ncontent-length: 99\r\n\r\n{")
        await line.gone()

    served = await started(start_router, only)
    await until(lambda: "lora" in names(served))
    only.script = slow
    async with quiet(served):
        async with raw_client(served.port) as client:
            await client.send(post("/v1/chat/completions", {**STREAM, "model": "lora"}))
            await until(lambda: only.busy)
        await until(lambda: not only.busy)
    assert served.router.core.fleet.by_name["m"].in_flight == 0


async def test_the_price_and_the_rest_of_the_entry_are_the_parents(engine: Start, start_router: Start) -> None:
    only = await engine("lora", names=("base",))
    given = {"price": {"input": 1, "output": 2}, "served_model_name": "base", "aliases": ["short"], "owner": "team"}
    served = await started(start_router, only, entry=given)
    await until(lambda: "lora" in names(served))
    await served.chat(model="short")
    await served.chat(model="lora")

    assert only.models == ["base", "lora"]
    assert [line["cost_nanos"] for line in served.lines] == [13000, 13000]
    assert await served.metric("inference_api_cost_nanos_total", model_name="lora") == 13000
    assert (await served.client.get("/v1/models/lora")).json()["owned_by"] == "team"


async def test_patterns_of_keys_apply_to_the_name_of_the_adapter(
    engine: Start, start_router: Start, tmp_path: Any
) -> None:
    only = await engine("lora", "secret")
    policy = tmp_path / "policy.json"
    policy.write_bytes(orjson.dumps(policy_of(entry(models=["m", "lora"]))))
    served = await started(start_router, only, auth="keys", policy=str(policy))
    await until(lambda: "secret" in names(served))
    served.client.headers["x-api-key"] = EXAMPLE.key

    assert (await served.chat(model="lora")).status_code == 200
    refused = await served.chat(model="secret")
    assert (refused.status_code, refused.json()["error"]["code"]) == (403, "model_not_found")
    assert {one["id"] for one in (await served.client.get("/v1/models")).json()["data"]} == {"m", "lora"}


async def test_adapters_without_discover_are_assumed_on_all_backends(engine: Start, start_router: Start) -> None:
    one, two = await engine("a"), await engine("a", "b")
    served: Served = await start_router(one, two, entry={"adapters": ["a", "b"]}, engine_interval=300.0)

    assert {(await served.chat(model=name)).status_code for name in ("a", "b") * 20} == {200}
    assert one.models.count("b") == 1
    assert {card["id"] for card in (await served.client.get("/v1/models")).json()["data"]} == {"m", "a", "b"}


async def test_a_list_of_adapters_admits_only_those(engine: Start, start_router: Start) -> None:
    served = await started(start_router, await engine("a", "b"), entry={"adapters": ["b"]})
    await until(lambda: "b" in names(served))

    assert names(served) == {"m", "b"}


async def test_further_names_of_an_engine_are_aliases(engine: Start, start_router: Start) -> None:
    only = await engine("lora", names=("m", "gpt-4o"))
    served = await started(start_router, only)
    await until(lambda: "gpt-4o" in names(served))

    assert (await served.chat(model="gpt-4o")).status_code == 200
    assert only.models == ["m"]
    assert (served.lines[-1]["model"], served.lines[-1]["asked_model"]) == ("m", "gpt-4o")
    [base, _] = (await served.client.get("/v1/models")).json()["data"]
    assert base["aliases"] == ["gpt-4o"]


async def test_a_backend_that_lacks_the_name_gets_no_requests(
    engine: Start, start_router: Start, caplog: pytest.LogCaptureFixture
) -> None:
    right, wrong = await engine(), await engine(names=("org/Other",))
    served = await started(start_router, right, wrong)
    base = served.router.core.fleet.by_name["m"]
    await until(lambda: len(base.available) == 1)
    for _ in range(20):
        assert (await served.chat()).status_code == 200

    assert wrong.models == []
    # Once more after an answer that a busy machine gave too late.
    told = {text for text in caplog.messages if "does not serve" in text}
    assert told == {
        'a backend does not serve the model of its entry: it serves "org/Other"; set served_model_name: "org/Other"'
    }
    cards = (await served.client.get("/backends")).json()["data"]
    assert [(one["state"], one.get("reason")) for one in cards] == [
        ("ready", None),
        ("unhealthy", 'it serves "org/Other"; set served_model_name: "org/Other"'),
    ]
    label = wrong.url.partition("//")[2]
    assert await served.metric("inference_api_backend_probe_failures_total", backend=label, kind="model") > 0
    assert await served.metric("inference_api_model_backends", model_name="m") == 1

    wrong.names = ("m",)
    wrong.says()
    await until(lambda: len(base.available) == 2)


async def test_where_no_backend_has_the_name_there_is_none(engine: Start, start_router: Start) -> None:
    served = await started(start_router, await engine(names=("other",)))
    base = served.router.core.fleet.by_name["m"]
    await until(lambda: not base.available)

    refused = await served.chat()
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "no_backend_available")
    assert "asleep" not in refused.json()["error"]["message"]
    assert 'set served_model_name: "other"' in served.lines[-1]["why"]


async def test_a_router_is_ready_once_its_engines_were_asked(engine: Start, start_router: Start) -> None:
    slow = await engine("lora")
    release = asyncio.Event()
    page = slow.page

    async def late(request: Any, line: Any) -> None:
        await release.wait()
        await page(request, line)

    slow.page = late
    served: Served = await start_router(slow, entry={"discover": True}, health_interval=30.0)
    await until(lambda: served.router.probes.state == "ready" and slow.asked)
    waiting = await served.client.get("/readyz")
    assert (waiting.status_code, waiting.json()["status"]) == (503, "starting")
    release.set()
    ready = served.router.features["adapters"].ready
    assert ready is not None
    await until(lambda: ready() is None)

    assert (await served.client.get("/readyz")).status_code == 200
    assert (await served.chat(model="lora")).status_code == 200


async def test_engines_are_asked_with_the_credentials_of_the_entry(engine: Start, start_router: Start) -> None:
    only = await engine("lora")
    seen: list[str | None] = []
    page = only.page

    async def guarded(request: Any, line: Any) -> None:
        seen.append(request.header("authorization"))
        allowed = request.header("authorization") == "Bearer secret"
        await (page(request, line) if allowed else line.send(json_response({}, "401 Unauthorized")))

    only.page = guarded
    given = {"credentials": {"env": "BACKEND_TOKEN"}}
    served = await started(start_router, only, entry=given, tokens={"BACKEND_TOKEN": "secret"})
    await until(lambda: "lora" in names(served))

    assert (await served.chat(model="lora")).status_code == 200


async def test_a_catalogue_with_another_entry_takes_effect_on_its_adapters(engine: Start, start_router: Start) -> None:
    one, two = await engine("lora"), await engine("lora")
    served = await started(start_router, one, two)
    fleet = served.router.core.fleet
    await until(lambda: len(getattr(fleet.by_name.get("lora"), "backends", ())) == 2)
    before = fleet.by_name["lora"]
    document = {"name": "m", "backends": [{"url": two.url}], "discover": True, "balancing": "round_robin"}
    fleet.update(parse_catalogue({"models": [document]}, ENTRY))
    after = fleet.by_name["lora"]
    assert isinstance(after, Adapter)
    assert after is not before
    assert [backend.url for backend in after.backends] == [two.url]
    assert (after.entry.balancing, after.entry.name) == ("round_robin", "lora")
    assert (await served.chat(model="lora")).status_code == 200
    assert one.models == []

    fleet.update(parse_catalogue({"models": [{"name": "lora", "backends": [{"url": one.url}]}]}, ENTRY))
    assert fleet.by_name["lora"].parent is None
    assert set(fleet.served) == set(fleet.by_name) == {"lora"}


async def test_a_listing_of_garbage_counts_and_changes_nothing(engine: Start, start_router: Start) -> None:
    only = await engine("lora")
    served = await started(start_router, only, engine_interval=0.5)
    await until(lambda: "lora" in names(served))
    only.page = raw(b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\n<html")
    failures = served.router.core.discovery.failures
    await until(lambda: failures["models"])

    assert (await served.chat(model="lora")).status_code == 200
    assert await served.metric("inference_api_discovery_failures_total", reason="models") >= 1
    view = served.router.core.fleet.by_name["lora"]
    await until(lambda: not view.backends)
    assert (await served.chat()).status_code == 200
    assert (await served.chat(model="lora")).status_code == 503


async def test_lists_without_cards_are_of_engines_that_load(engine: Start, start_router: Start) -> None:
    loading, ready = await engine(), await engine()
    loading.lists()
    served = await started(start_router, loading, ready)
    base = served.router.core.fleet.by_name["m"]
    await until(lambda: len(base.available) == 1)

    assert [backend.url for backend in base.available] == [ready.url]
    loading.lists(card("m"))
    await until(lambda: len(base.available) == 2)


async def test_a_place_that_an_adapter_frees_is_for_who_waits_for_its_model(engine: Start, start_router: Start) -> None:
    only = await engine("lora")
    release = asyncio.Event()
    inner = only.script

    async def late(request: Any, line: Any) -> None:
        await release.wait()
        await inner(request, line)

    only.script = late
    entry = {"max_in_flight": 1, "queue": {"timeout": 30, "size": 20}}
    served = await started(start_router, only, entry=entry)
    await until(lambda: "lora" in names(served))
    first = asyncio.create_task(served.chat(model="lora"))
    await until(lambda: only.busy)
    waiting = [asyncio.create_task(served.chat(model=name)) for name in ("m", "lora")]
    base = served.router.core.fleet.by_name["m"]
    await until(lambda: base.waiting)
    release.set()

    assert [(await task).status_code for task in (first, *waiting)] == [200] * 3
    assert (base.in_flight, base.waiting) == (0, ())


async def test_a_request_may_wait_for_an_adapter_to_be_loaded(engine: Start, start_router: Start) -> None:
    only = await engine("lora")
    served = await started(start_router, only, entry={"hold": 30})
    await until(lambda: "lora" in names(served))
    only.says()
    view = served.router.core.fleet.by_name["lora"]
    await until(lambda: not view.backends)
    waiting = asyncio.create_task(served.chat(model="lora"))
    await until(lambda: view.waiting)
    only.says("lora")

    assert (await waiting).status_code == 200
    assert served.lines[-1]["parent"] == "m"
