"""/deployments, /model-actions, /pods, /logs over HTTP, on a driver that does what the test says."""

import asyncio
from collections.abc import Callable
from typing import Any

import orjson
import pytest

from control_plane.pure.lifecycle import DriverError, Event, Exit, Instance, Observed
from tests.control_plane.conftest import Running
from tests.control_plane.drivers import Scripted
from tests.control_plane.people import acting_as, error
from tests.fakes import until

pytestmark = pytest.mark.anyio
NEW = {"if-none-match": "*"}
DEPLOYMENT = {"driver": "processes", "object": "engine", "min": 1, "max": 3}
# A name with what paths and queries have, too
MODEL = "team/llama-3:8b"


@pytest.fixture
def driver() -> Scripted:
    return Scripted()


@pytest.fixture
async def running(start_sqlite: Callable[..., Any], driver: Scripted) -> Running:
    """A control plane with one model that has a deployment."""
    found: Running = await start_sqlite(outside=driver.connections())
    await found.admin.put(f"/models/{MODEL}", json={"name": MODEL, "backends": [{"url": "http://10.0.0.1:8000"}]})
    assert (await put(found, DEPLOYMENT, NEW)).status_code == 201
    return found


async def put(running: Running, body: Any, headers: dict[str, str], model: str = MODEL) -> Any:
    return await running.admin.put(f"/api/v1/deployments/{model}", json=body, headers=headers)


async def act(running: Running, action: str, **more: Any) -> Any:
    return await running.admin.post("/api/v1/model-actions", json={"model": MODEL, "action": action, **more})


async def audited(running: Running) -> list[tuple[str, Any, Any, Any]]:
    rows = (await running.admin.get("/api/v1/audit")).json()["data"]
    return [
        (row["action"], row["before"], row["after"], row["reason"])
        for row in rows
        if row["action"].startswith("deployment.")
    ]


async def test_an_engine_is_started_scaled_and_stopped(running: Running, driver: Scripted) -> None:
    stopped = (await running.admin.get(f"/api/v1/deployments/{MODEL}")).json()
    started = await act(running, "start", reason="a demo")
    scaled = await act(running, "scale", replicas=3)
    ended = await act(running, "stop", reason="night")

    assert (stopped["state"], stopped["ready"], stopped["wanted"]) == ("stopped", 0, 0)
    assert [one.status_code for one in (started, scaled, ended)] == [202, 202, 202]
    assert (started.json()["state"], started.json()["ready"], started.json()["wanted"]) == ("ready", 1, 1)
    assert (scaled.json()["ready"], ended.json()["state"]) == (3, "stopped")
    assert driver.scaled == [1, 3, 0]
    assert await audited(running) == [
        ("deployment.stop", {"instances": 3}, {"instances": 0}, "night"),
        ("deployment.scale", {"instances": 1}, {"instances": 3}, None),
        ("deployment.start", {"instances": 0}, {"instances": 1}, "a demo"),
        ("deployment.create", None, {**DEPLOYMENT, "model": MODEL, **UNSET}, None),
    ]


UNSET = {"namespace": None, "idle_seconds": None, "scale_to_zero": False}


async def test_a_start_is_within_what_the_deployment_says(running: Running, driver: Scripted) -> None:
    etag = (await running.admin.get(f"/api/v1/deployments/{MODEL}")).headers["etag"]
    assert (await put(running, {**DEPLOYMENT, "min": 2}, {"if-match": etag})).status_code == 200

    started, few, many = [await act(running, "start"), *[await act(running, "scale", replicas=n) for n in (1, 4)]]

    assert (started.status_code, driver.scaled) == (202, [2])
    for answer in (few, many):
        assert (answer.status_code, answer.json()["error"]["param"]) == (422, "replicas")


async def test_a_start_of_what_runs_stops_nothing(running: Running, driver: Scripted) -> None:
    answers = [await act(running, "scale", replicas=3), await act(running, "start")]

    assert [one.json()["wanted"] for one in answers] == [3, 3]
    assert driver.scaled == [3, 3]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"action": "scale"}, "replicas"),
        ({"action": "start", "replicas": 2}, "replicas"),
        ({"action": "scale", "replicas": -1}, "replicas"),
        ({"action": "restart"}, "action"),
        ({"action": "start", "reason": "x" * 501}, "reason"),
    ],
)
async def test_an_action_that_cannot_be_is_refused(running: Running, driver: Scripted, body: Any, param: str) -> None:
    answer = await running.admin.post("/api/v1/model-actions", json={"model": MODEL, **body})

    assert (answer.status_code, answer.json()["error"]["errors"][0]["param"].split(".")[-1]) == (422, param)
    assert driver.scaled == []


async def test_who_else_sets_the_number_is_named(running: Running, driver: Scripted) -> None:
    driver.observed = Observed(1, owner="ScaledObject llama")

    answer = await act(running, "stop")

    assert error(answer)[:2] == (409, "owned")
    assert "ScaledObject llama" in answer.text
    assert driver.scaled == []


async def test_without_a_deployment_nothing_is_started(running: Running) -> None:
    await running.admin.put("/models/other", json={"name": "other", "backends": [{"url": "http://10.0.0.1:8000"}]})

    answer = await running.admin.post("/api/v1/model-actions", json={"model": "other", "action": "start"})

    assert error(answer)[:2] == (409, "no_deployment")


@pytest.mark.parametrize(
    ("reason", "status", "code"),
    [("forbidden", 403, "scaling_disabled"), ("conflict", 409, "conflict"), ("garbage", 502, "driver_failed")],
)
async def test_what_a_driver_refuses_is_said_and_in_the_log(
    running: Running, driver: Scripted, monkeypatch: pytest.MonkeyPatch, reason: str, status: int, code: str
) -> None:
    async def refuse(object: str, instances: int) -> None:
        raise DriverError(reason, "The Role lacks patch of deployments/scale.")

    monkeypatch.setattr(driver, "scale", refuse)

    answer = await act(running, "start")

    assert error(answer)[:2] == (status, code)
    assert "The Role lacks patch" in answer.text
    assert [row[0] for row in await audited(running)][:2] == ["deployment.failed", "deployment.start"]


async def test_a_driver_that_is_away_leaves_the_state_unknown(running: Running, driver: Scripted) -> None:
    driver.problem = DriverError("away", "The API server does not answer.")

    shown = (await running.admin.get("/api/v1/deployments")).json()["data"][0]
    answer = await act(running, "start")

    assert (shown["state"], shown["reason"]) == ("unknown", "The API server does not answer.")
    assert error(answer)[:2] == (503, "driver_away")
    assert answer.headers["retry-after"]


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"driver": "kubernetes"}, "driver"),
        ({"driver": "docker"}, "driver"),
        ({"object": "../etc"}, "object"),
        ({"min": 4}, "max"),
        ({"max": 5}, "max"),
        ({"max": 0, "min": 0}, "max"),
        ({"idle_seconds": 600}, "idle_seconds"),
        ({"idle_seconds": 1, "scale_to_zero": True}, "idle_seconds"),
        ({"namespace": "kube-system"}, "namespace"),
    ],
)
async def test_a_deployment_that_cannot_be_is_refused(running: Running, change: Any, param: str) -> None:
    answer = await put(running, {**DEPLOYMENT, **change}, {"if-match": "*"})

    assert (answer.status_code, answer.json()["error"]["param"].split(".")[-1]) == (422, param)


async def test_a_deployment_is_of_a_model_of_the_catalogue(running: Running) -> None:
    answer = await put(running, DEPLOYMENT, NEW, "unknown")

    assert (answer.status_code, answer.json()["error"]["param"]) == (422, "model")


async def test_a_deployment_is_changed_and_removed_by_its_version(running: Running, driver: Scripted) -> None:
    path = f"/api/v1/deployments/{MODEL}"
    etag = (await running.admin.get(path)).headers["etag"]
    await act(running, "start")
    still = (await running.admin.get(path)).headers["etag"]
    blind, again = [await put(running, DEPLOYMENT, headers) for headers in ({}, NEW)]
    changed = await put(running, {**DEPLOYMENT, "max": 2}, {"if-match": etag})
    late = await running.admin.delete(path, headers={"if-match": etag})
    gone = await running.admin.delete(path, headers={"if-match": changed.headers["etag"]})

    assert still == etag
    assert [one.status_code for one in (blind, again, changed, late, gone)] == [428, 412, 200, 412, 204]
    assert (await running.admin.get(path)).status_code == 404
    # What runs goes on.
    assert driver.scaled == [1]


async def test_deployments_are_listed_by_page(running: Running) -> None:
    for name in ("a", "z"):
        await running.admin.put(f"/models/{name}", json={"name": name, "backends": [{"url": "http://10.0.0.1:8000"}]})
        await put(running, DEPLOYMENT, NEW, name)

    first = (await running.admin.get("/api/v1/deployments?limit=2")).json()
    second = (await running.admin.get(f"/api/v1/deployments?limit=2&after={first['next']}")).json()
    one = (await running.admin.get("/api/v1/deployments", params={"model": MODEL, "limit": 1})).json()

    assert [row["model"] for row in first["data"]] == ["a", MODEL]
    assert ([row["model"] for row in second["data"]], second["next"]) == (["z"], None)
    assert [row["model"] for row in one["data"]] == [MODEL]


async def test_pods_are_listed_by_page(running: Running, driver: Scripted) -> None:
    await driver.scale("engine", 3)

    first = (await running.admin.get("/api/v1/pods?limit=2")).json()
    rest = (await running.admin.get("/api/v1/pods", params={"model": MODEL, "after": first["next"]})).json()

    assert [row["name"] for row in first["data"] + rest["data"]] == ["engine-0", "engine-1", "engine-2"]
    assert {(row["model"], row["state"]) for row in rest["data"]} == {(MODEL, "ready")}


async def test_the_last_lines_of_a_log_are_read(running: Running, driver: Scripted) -> None:
    await driver.scale("engine", 1)
    driver.add(*(f"line {number}" for number in range(5)))

    whole = (await running.admin.get("/api/v1/logs?pod=engine-0")).json()
    tail = (await running.admin.get("/api/v1/logs?pod=engine-0&tail=2&container=side&previous=true")).json()

    assert whole["lines"] == [f"main: line {number}" for number in range(5)]
    assert not whole["truncated"]
    assert tail == {
        "model": MODEL,
        "pod": "engine-0",
        "container": "side",
        "previous": True,
        "lines": ["side: line 3", "side: line 4"],
        "truncated": True,
    }


@pytest.mark.parametrize(
    ("query", "status", "code"),
    [
        ("pod=other-0", 404, "not_found"),
        ("pod=engine-0&model=unknown", 404, "not_found"),
        ("pod=engine-0&container=x", 422, "validation_error"),
        ("pod=engine-0&tail=0", 422, "validation_error"),
        ("pod=engine-0&tail=2001", 422, "validation_error"),
        ("", 422, "validation_error"),
    ],
)
async def test_a_log_that_is_not_there(running: Running, driver: Scripted, query: str, status: int, code: str) -> None:
    await driver.scale("engine", 1)

    for follow in ("", "&follow=true"):
        assert error(await running.admin.get(f"/api/v1/logs?{query}{follow}"))[:2] == (status, code)


async def test_logs_that_may_not_be_read_are_refused(running: Running, driver: Scripted) -> None:
    await driver.scale("engine", 1)
    driver.reads_logs = False

    answer = await running.admin.get("/api/v1/logs?pod=engine-0")

    assert error(answer)[:2] == (403, "logs_disabled")
    assert "CONTROL_PLANE_KUBERNETES_LOGS" in answer.text


class Events:
    """What a stream has sent so far."""

    def __init__(self) -> None:
        self.found: list[tuple[str, Any]] = []

    async def read(self, running: Running, query: str = "pod=engine-0") -> None:
        async with running.admin.stream("GET", f"/api/v1/logs?{query}&follow=true") as answer:
            assert answer.status_code == 200
            assert answer.headers["content-type"].startswith("text/event-stream")
            kind = ""
            async for line in answer.aiter_lines():
                name, _, value = line.partition(": ")
                if name == "event":
                    kind = value
                elif name == "data":
                    self.found.append((kind, orjson.loads(value)))


async def test_a_log_is_followed_to_its_end(running: Running, driver: Scripted) -> None:
    await driver.scale("engine", 1)
    driver.add("old")
    events = Events()
    reading = asyncio.create_task(events.read(running))
    await until(lambda: events.found == [("line", "main: old")])
    driver.add("new\nevent: end", "<b>")
    await until(lambda: len(events.found) == 3)
    driver.add(None)
    await reading

    assert events.found[1:3] == [("line", "main: new\nevent: end"), ("line", "main: <b>")]
    assert events.found[3][0] == "end"
    assert len(events.found) == 4


async def test_who_leaves_ends_the_reading(running: Running, driver: Scripted) -> None:
    await driver.scale("engine", 1)
    reading = asyncio.create_task(Events().read(running))
    await until(lambda: driver.following == 1)
    reading.cancel()

    await until(lambda: driver.following == 0)


async def test_a_log_that_is_followed_does_not_hold_the_process(running: Running, driver: Scripted) -> None:
    await driver.scale("engine", 1)
    events = Events()
    reading = asyncio.create_task(events.read(running))
    await until(lambda: driver.following == 1)
    running.application.end_answers()
    await reading

    assert events.found[-1][0] == "end"


async def test_a_failing_instance_is_shown_with_its_last_exit(running: Running, driver: Scripted) -> None:
    died = Instance("engine-0", "failing", "killed: out of memory", 1, 4, Exit(137, "OOMKilled", 2), tail=("oom",))
    driver.observed = Observed(1, (died,), (Event(5, True, "BackOff", "restarting", "engine-0", 3),))

    found = (await running.admin.get(f"/api/v1/deployments/{MODEL}")).json()

    assert (found["state"], found["reason"]) == ("failing", "engine-0: killed: out of memory")
    assert found["instances"][0]["last_exit"] == {"code": 137, "reason": "OOMKilled", "at": "1970-01-01T00:00:00.002Z"}
    assert found["instances"][0]["tail"] == ["oom"]
    assert found["events"][0]["message"] == "restarting"


async def test_lines_of_a_log_are_for_those_who_may_read_logs(running: Running, driver: Scripted) -> None:
    driver.observed = Observed(1, (Instance("engine-0", "failing", "exit code 1", tail=("prompt: my secret",)),))
    paths = (
        "/api/v1/deployments",
        f"/api/v1/deployments/{MODEL}",
        "/api/v1/pods",
        f"/console/models/{MODEL}?tab=engine",
    )
    shown = {}
    for name, role in (("oscar", "operator"), ("vera", "viewer")):
        async with acting_as(running, name, role) as client:
            answers = [await client.get(path) for path in paths]
            assert {answer.status_code for answer in answers} == {200}
            shown[role] = [("my secret" in answer.text, "exit code 1" in answer.text) for answer in answers]

    assert shown == {"operator": [(True, True)] * 4, "viewer": [(False, True)] * 4}


async def test_a_kept_answer_has_no_line_of_a_log(running: Running, driver: Scripted) -> None:
    driver.observed = Observed(0, (Instance("engine-0", "failing", "exit code 1", tail=("prompt: my secret",)),))

    async def look(instances: int) -> None:
        driver.observed = driver.observed._replace(wanted=instances)

    driver.scale = lambda object, instances: look(instances)  # type: ignore[method-assign]
    headers = {"idempotency-key": "start-1"}
    body = {"model": MODEL, "action": "start"}
    answers = [await running.admin.post("/api/v1/model-actions", json=body, headers=headers) for _ in range(2)]

    assert [one.status_code for one in answers] == [202, 202]
    assert ["my secret" in one.text for one in answers] == [False, False]
