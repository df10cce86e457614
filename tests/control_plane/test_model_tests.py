"""Tests of models: verdicts, through a real router and directly, what is kept, and the schedule."""

import asyncio
import json
from collections.abc import Awaitable, Callable, Mapping
from itertools import pairwise
from typing import Any

import pytest
from sqlalchemy import select

from control_plane.clients.router import Router
from control_plane.connections import Connections
from control_plane.data.tables import audit, keys
from control_plane.errors import Refused
from control_plane.pure.lifecycle import DriverError, Instance, Observed
from control_plane.pure.model_tests import MOST, Got, Kind, answered, due, health, is_other_kind, kinds, listed
from control_plane.services import lending, model_results, model_tests
from control_plane.services.testing import Schedule
from tests.control_plane.acts import act_of
from tests.control_plane.conftest import Running
from tests.control_plane.drivers import Scripted
from tests.control_plane.test_overview import catalogue
from tests.fakes import Line, Received, hang, json_response, until
from tests.ports import free_port

pytestmark = pytest.mark.anyio
NO_CHAT = {"error": {"message": "The model does not support Chat Completions API", "code": 400}}
VECTOR = {"data": [{"embedding": [0.6, 0.8]}]}
RANKED = {"results": [{"index": 1, "relevance_score": 0.25}, {"index": 0, "relevance_score": 0.5}]}


def got(body: Any, status: int = 200) -> Got:
    return Got(status, body if isinstance(body, bytes) else json.dumps(body).encode())


def said(text: str | None, **usage: Any) -> Any:
    return {"choices": [{"message": {"content": text}}], "usage": usage}


@pytest.mark.parametrize(
    ("kind", "body", "verdict", "words"),
    [
        ("chat", said("Hel\x1b[31mlo\n", completion_tokens=3), "ok", "“Hel [31mlo ”, 3 tokens"),
        ("chat", {"choices": [{"message": {"content": None, "reasoning": "So"}}]}, "ok", "“So”"),
        ("chat", said(None, completion_tokens=8), "ok", "no text, 8 tokens"),
        ("chat", said(""), "failed", "without a token"),
        ("chat", {"choices": []}, "failed", "form"),
        ("chat", [], "failed", "form"),
        ("chat", b"<html>", "failed", "JSON"),
        ("chat", b"[" * 100_000, "failed", "JSON"),
        ("chat", b" " * (MOST + 1), "failed", "256 KiB"),
        ("completion", {"choices": [{"text": " there"}]}, "ok", "“ there”"),
        ("embedding", VECTOR, "ok", "2 dimensions, of length 1"),
        ("embedding", {"data": [{"embedding": [0, 0.0]}]}, "failed", "zero"),
        ("embedding", {"data": [{"embedding": [1.0, float("nan")]}]}, "failed", "NaN"),
        ("embedding", {"data": [{"embedding": [1.0, None]}]}, "failed", "NaN"),
        ("embedding", {"data": [{"embedding": []}]}, "failed", "empty"),
        ("embedding", {"data": [{"embedding": "AACAPw=="}]}, "failed", "empty"),
        ("rerank", RANKED, "ok", "scores 0.5, 0.25"),
        ("rerank", [{"index": 0, "score": 1}, {"index": 1, "score": -7}], "ok", "scores 1, -7"),
        ("rerank", {"results": [{"index": 0, "relevance_score": 1}] * 2}, "failed", "others"),
        ("rerank", {"results": [{"index": 2, "relevance_score": 1}]}, "failed", "others"),
        (
            "rerank",
            {"results": [{"index": 0, "score": float("inf")}, {"index": 1, "score": 1}]},
            "failed",
            "no numbers",
        ),
    ],
)
def test_the_verdict_on_an_answer(kind: Kind, body: Any, verdict: str, words: str) -> None:
    found = answered(kind, got(body))

    assert (found.verdict, words in found.words) == (verdict, True), found


def test_a_refusal_has_the_words_of_the_engine_or_of_the_router() -> None:
    found = [
        answered("chat", got(body, status)).words
        for status, body in ((400, NO_CHAT), (404, {"detail": "Not Found"}), (422, {"error": "no"}), (500, b"oops"))
    ]

    assert found == [
        "400: The model does not support Chat Completions API",
        "404: Not Found",
        "422: no",
        "500: 4 bytes that are no error",
    ]
    assert [is_other_kind(one) for one in (got(NO_CHAT, 400), got({"detail": "Not Found"}, 404))] == [True, True]
    assert not is_other_kind(got({"error": {"message": "The model 'm' does not exist"}}, 404))
    assert not is_other_kind(got(NO_CHAT, 500))


def test_a_list_of_models_names_one_or_not() -> None:
    many = {"data": [{"id": "a"}, {"id": "b"}, {}, 7]}

    assert listed(got(many), "b").verdict == listed(got({"id": "b", "object": "model"}), "b").verdict == "ok"
    assert listed(got(many), "c").words == "It does not name 'c'; it names 'a', 'b'."
    assert [listed(one, "c").verdict for one in (got({"data": {}}), got(b"x"), got({}, 503))] == ["failed"] * 3
    assert [health(got(b"", status)).verdict for status in (200, 404, 503)] == ["ok", "skipped", "failed"]


def test_the_entry_says_which_kinds_there_may_be() -> None:
    assert kinds(None) == ("chat", "completion", "embedding", "rerank")
    assert kinds(("rerank", "embeddings", "tokenize")) == ("embedding", "rerank")


def test_turns_are_spread_over_the_interval_and_come_once_in_it() -> None:
    names = [f"m-{number}" for number in range(50)]
    last = dict.fromkeys(names, 0)
    turns: dict[str, list[int]] = {name: [] for name in names}
    for now in range(1, 180_000, 1000):
        for name in due(names, last, now, 60_000):
            last[name] = now
            turns[name].append(now)

    assert {len(found) for found in turns.values()} <= {2, 3}
    assert {round((b - a) / 1000) for found in turns.values() for a, b in pairwise(found)} == {60}
    assert len({found[-1] for found in turns.values()}) > 20


class Engine:
    """Answers by path; `bodies`: what it was asked for."""

    def __init__(self, **answers: tuple[str, Any]) -> None:
        self._answers = answers
        self.bodies: list[dict[str, Any]] = []

    async def __call__(self, request: Received, line: Line) -> None:
        self.bodies.append(json.loads(request.body))
        status, body = self._answers.get(request.target.rpartition("/")[2], ("404 Not Found", {"detail": "Not Found"}))
        await line.send(json_response(body, status))


Start = Callable[..., Awaitable[Any]]


@pytest.fixture
async def start(start_sqlite: Start, start_engine: Start, start_router: Start) -> Start:
    """`await start(script, key=value)` -> a control plane with a router, and the engine of the model `m`."""

    async def started(script: Any = None, entry: Mapping[str, Any] | None = None, **settings: Any) -> Any:
        engine = await start_engine(script)
        served = {"m": {"backends": [{"url": engine.url}], **(entry or {})}}
        router = await start_router(models=[{"name": name, **one} for name, one in served.items()])
        plane = await start_sqlite(router_url=router.url, **settings)
        await catalogue(plane, **served)
        return plane, engine

    return started


async def tried(plane: Running, model: str = "m", **options: Any) -> dict[str, Any]:
    act = act_of(plane, "bob", "operator")
    return await model_tests.test(plane.plane, act, model, **options)


def verdicts(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [(step["name"], step["verdict"]) for step in result["steps"]]


async def test_a_model_is_tested_through_the_router_and_its_kind_is_found(start: Start) -> None:
    script = Engine(completions=("400 Bad Request", NO_CHAT), embeddings=("200 OK", VECTOR))
    plane, _ = await start(script)

    result = await tried(plane)

    assert verdicts(result) == [("health", "skipped"), ("listed", "ok"), ("call", "ok")]
    assert (result["model"], result["backend"], result["kind"], result["by"], result["ok"]) == (
        "m", None, "embedding", "bob", True,
    )  # fmt: skip
    words = result["steps"][2]["words"]
    assert words.startswith("No chat (400: The model does not support Chat Completions API). No completion (")
    assert words.endswith("embedding: 2 dimensions, of length 1")
    assert all(step["took_ms"] >= 0 for step in result["steps"])
    assert [(body.get("max_tokens"), body.get("temperature")) for body in script.bodies] == [
        (8, 0), (8, 0), (None, None),
    ]  # fmt: skip
    # Kept, listed, written down; with a key that says what it is for.
    listing = (await plane.admin.get("/api/v1/model-tests?model=m")).json()
    assert listing == {"data": [result], "next": None}
    async with plane.plane.database.main.read() as connection:
        (row,) = await connection.execute(select(audit).where(audit.c.action == "model.test"))
        lent = (await connection.execute(select(keys))).one()
        assert await lending.ids(connection, model_tests.KEY) == {lent.id}
    assert (row.actor, row.object_id, row.after["ok"]) == ("bob", "m", True)
    assert (lent.name, lent.user) == ("system:tests", "bob")


async def test_a_kind_may_be_chosen(start: Start) -> None:
    plane, engine = await start(Engine(rerank=("200 OK", RANKED)))

    asked = {"model": "m", "action": "test", "kind": "rerank"}
    answer = await plane.admin.post("/api/v1/model-actions", json=asked)
    assert (answer.status_code, answer.json()["ok"], answer.json()["kind"]) == (200, True, "rerank")
    assert not (await tried(plane, kind="chat"))["ok"]
    with pytest.raises(Refused, match="'sing'"):
        await tried(plane, kind="sing")
    assert [request.target for request in engine.requests] == ["/v1/rerank", "/v1/chat/completions"]


async def test_a_backend_of_the_entry_may_be_asked_directly_and_no_other(start: Start) -> None:
    plane, engine = await start(entry={"served_model_name": "m-of-the-engine", "headers": {"x-of": "entry"}})

    result = await tried(plane, backend=engine.url)
    with pytest.raises(Refused, match="backend"):
        await tried(plane, backend="http://169.254.169.254")

    # The engine of the tests names "m" only.
    assert verdicts(result) == [("health", "ok"), ("listed", "failed"), ("call", "ok")]
    (asked,) = engine.requests
    assert json.loads(asked.body)["model"] == "m-of-the-engine"
    assert (asked.header("x-of"), asked.header("authorization")) == ("entry", None)


async def test_what_is_away_fails_the_first_step_without_an_address(start: Start) -> None:
    plane, engine = await start()
    port = free_port()
    gone = {"backends": [{"url": f"http://127.0.0.1:{port}"}]}
    hidden = {"backends": [{"url": engine.url}], "credentials": {"env": "BACKEND_TOKEN"}}
    await catalogue(plane, gone=gone, hidden=hidden)

    result = await tried(plane, "gone", backend=f"http://127.0.0.1:{port}")

    assert verdicts(result) == [("health", "failed"), ("listed", "skipped"), ("call", "skipped")]
    assert str(port) not in str(result["steps"])
    with pytest.raises(Refused, match="credentials"):
        await tried(plane, "hidden", backend=engine.url)
    with pytest.raises(Refused, match="no model"):
        await tried(plane, "nobody")


async def test_a_failed_last_test_is_known_until_one_succeeds(start: Start) -> None:
    plane, engine = await start(Engine())

    first = await tried(plane, kind="chat")
    after = await model_results.failed(plane.plane)
    engine.script = Engine(completions=("200 OK", said("Hello")))
    await tried(plane, kind="chat")

    assert not first["ok"]
    assert [(name, one.failed and one.failed.name) for name, one in after.items()] == [("m", "call")]
    assert await model_results.failed(plane.plane) == {}


async def test_one_test_of_a_model_runs_at_once(start: Start) -> None:
    plane, engine = await start(hang)
    running = asyncio.create_task(tried(plane))
    await until(lambda: engine.busy == 1)

    with pytest.raises(Refused) as refused:
        await tried(plane)
    running.cancel()
    await until(lambda: engine.busy == 0)

    assert (refused.value.status, refused.value.code) == (409, "test_runs")
    assert plane.plane.testing == set()


async def test_without_a_router_the_setting_is_named(sqlite_plane: Running) -> None:
    await catalogue(sqlite_plane, m={"backends": [{"url": "http://10.0.0.1:8000"}]})

    with pytest.raises(Refused, match="CONTROL_PLANE_ROUTER_URL"):
        await tried(sqlite_plane)


async def test_the_schedule_tests_each_model_once_in_its_interval(start: Start) -> None:
    plane, engine = await start(model_test_every=3600)
    schedule = Schedule(plane.plane)

    for _ in range(3):
        await schedule.turn()
    assert engine.requests == []
    plane.clock.advance(3601)
    for _ in range(3):
        await schedule.turn()

    (result,) = await model_results.listed(plane.plane, "m", 9)
    assert (result.by, result.ok, result.kind) == (None, True, "chat")
    async with plane.plane.database.main.read() as connection:
        (lent,) = await connection.execute(select(keys))
        assert (await connection.execute(select(audit).where(audit.c.action == "model.test"))).all() == []
    assert (lent.name, lent.user) == ("system:tests", None)


async def test_a_test_starts_no_engine_and_the_schedule_keeps_none_awake(
    start_sqlite: Start, start_engine: Start, start_router: Start
) -> None:
    engine, driver = await start_engine(), Scripted()
    router = await start_router(engine)
    outside = Connections(Router(router.url), drivers=driver.connections().drivers)
    plane = await start_sqlite(router_url=router.url, model_test_every=3600, outside=outside)
    await catalogue(plane, m={"backends": [{"url": engine.url}]})

    async def deployed(etag: dict[str, str], **more: Any) -> dict[str, str]:
        body = {"driver": "processes", "object": "engine", "scale_to_zero": True, **more}
        answer = await plane.admin.put("/api/v1/deployments/m", json=body, headers=etag)
        return {"if-match": answer.headers["etag"]}

    async def asked() -> int:
        plane.clock.advance(3601)
        await schedule.turn()
        return len(engine.requests)

    schedule = Schedule(plane.plane)
    etag = await deployed({"if-none-match": "*"})
    with pytest.raises(Refused) as refused:
        await tried(plane)
    found = [await asked()]
    driver.observed = Observed(1, (Instance("engine", "loading"),))
    found.append(await asked())
    driver.problem = DriverError("away", "Nobody answers.")
    found.append(await asked())
    driver.problem, driver.observed = None, Observed(1, (Instance("engine", "ready"),))
    found.append(await asked())
    await deployed(etag, idle_seconds=600)
    found.append(await asked())

    assert (refused.value.status, refused.value.code) == (409, "stopped")
    assert found == [0, 0, 0, 1, 1]
