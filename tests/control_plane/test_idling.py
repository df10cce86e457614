"""When routers start a model, and when it is stopped again: by a driver and reports that say what the test says."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from control_plane.pure.idling import Life, Traffic, Watched, is_idle, traffic_of
from control_plane.pure.lifecycle import DriverError, Instance, Observed, State
from control_plane.pure.records import MINUTE
from control_plane.pure.reports import Reported
from control_plane.services.idling import Idling
from tests.control_plane.conftest import NOON, Clock, Running, starting
from tests.control_plane.drivers import Scripted
from tests.control_plane.test_fleet import report, reports
from tests.control_plane.usage import record, send
from tests.postgresql import PostgreSQL

pytestmark = pytest.mark.anyio
BODY = {"router": "r-1", "reason": "hold", "waiting": 3}
ENTRY = {"name": "m", "backends": ["http://10.0.0.1:8000"], "aliases": ["other"], "hold": 60}
DEPLOYMENT = {"driver": "kubernetes", "object": "engine", "scale_to_zero": True, "idle_seconds": 60}
Start = Callable[..., Any]


@pytest.fixture
def driver() -> Scripted:
    return Scripted("kubernetes")


@pytest.fixture
async def plane(start_sqlite: Start, driver: Scripted) -> Running:
    """With a model `m` and its deployment. Its own task looks now and then, as a second control plane would."""
    running: Running = await start_sqlite(outside=driver.connections())
    await running.admin.put("/models/m", json=ENTRY)
    await deploy(running)
    return running


async def deploy(plane: Running, **more: Any) -> None:
    found = await plane.admin.get("/api/v1/deployments/m")
    known = {"if-none-match": "*"} if found.status_code == 404 else {"if-match": found.headers["etag"]}
    answer = await plane.admin.put("/api/v1/deployments/m", json=DEPLOYMENT | more, headers=known)
    assert answer.status_code in (200, 201), answer.text


async def activated(plane: Running, model: str = "m") -> tuple[int, str]:
    answer = await plane.router.post(f"/activations/{model}", json=BODY)
    found = answer.json()
    return answer.status_code, found["state"] if "state" in found else found["error"]["message"]


async def deployment(plane: Running) -> dict[str, Any]:
    found: dict[str, Any] = (await plane.admin.get("/api/v1/deployments/m")).json()
    return found


async def deeds(plane: Running) -> list[tuple[str, str, str]]:
    rows = (await plane.admin.get("/api/v1/audit", params={"object": "model:m"})).json()["data"]
    return [
        (row["action"], row["actor"]["kind"], row["reason"])
        for row in reversed(rows)
        if row["action"].startswith("deployment.")
    ]


async def test_a_model_is_started_once_for_all_who_ask(plane: Running, driver: Scripted) -> None:
    first = await asyncio.gather(*(activated(plane) for _ in range(5)), activated(plane, "other"))
    plane.clock.advance(10)
    again = await activated(plane)

    assert {*first, again} == {(202, "starting")}
    assert driver.scaled == [1]
    assert await deeds(plane) == [("deployment.start", "router", "3 requests are held at r-1")]
    # It is ready for its driver, and no router has said so.
    assert (await deployment(plane))["last_activation_at"] == "2026-11-28T12:00:10Z"


async def test_a_model_that_fails_is_starting_as_long_as_its_driver_tries(plane: Running, driver: Scripted) -> None:
    driver.observed = Observed(1, (Instance("engine-0", "failing", "exit code 1"),))

    assert await activated(plane) == (202, "starting")
    assert driver.scaled == []


async def test_what_cannot_be_started_says_why(plane: Running, driver: Scripted) -> None:
    found = {}
    driver.observed = Observed(0, owner="ScaledObject gpt2")
    found["ScaledObject gpt2 sets"] = await activated(plane)
    driver.observed = Observed(None)
    found["does not exist"] = await activated(plane)
    driver.observed, driver.scales = Observed(0), False
    found["the driver 'kubernetes' may not start"] = await activated(plane)
    driver.scales = True
    await deploy(plane, scale_to_zero=False, idle_seconds=None)
    found["scale_to_zero: false"] = await activated(plane)
    etag = (await plane.admin.get("/api/v1/deployments/m")).headers["etag"]
    await plane.admin.delete("/api/v1/deployments/m", headers={"if-match": etag})
    found["no deployment"] = await activated(plane)

    assert {status for status, _ in found.values()} == {409}
    assert {why: said for why, (_, said) in found.items() if why not in said} == {}
    assert driver.scaled == []


async def test_a_driver_that_is_away_is_asked_again(plane: Running, driver: Scripted) -> None:
    driver.problem = DriverError("away", "The API server does not answer.")
    away = await activated(plane)
    driver.problem = None

    assert away == (503, "The API server does not answer.")
    assert await activated(plane) == (202, "starting")


async def idle(plane: Running, seconds: float = 300, **more: Any) -> Idling:
    """A service that has seen the model ready, and reports without requests for so long since."""
    service = Idling(plane.plane, every=0)
    for wait in (0, seconds):
        plane.clock.advance(wait)
        await quiet(plane, **more)
        await service.turn()
    return service


async def quiet(plane: Running, **more: Any) -> None:
    await reports(
        plane, r1=report(models=[{"name": "m", "in_flight": 0, "queued": 0, "requests": 10, "errors": 0} | more])
    )


async def test_an_idle_model_is_stopped(plane: Running, driver: Scripted) -> None:
    await activated(plane)

    await idle(plane, 30)
    before = list(driver.scaled)
    await idle(plane)

    assert before == [1]
    assert driver.scaled == [1, 0]
    assert (await deeds(plane))[1:] == [("deployment.stop", "system", "idle for 60 s")]
    assert (await deployment(plane))["was_ready_at"] is None


@pytest.mark.parametrize("more", [{"in_flight": 1}, {"queued": 1}])
async def test_a_model_with_requests_is_not_idle(plane: Running, driver: Scripted, more: dict[str, int]) -> None:
    await activated(plane)

    await idle(plane, **more)

    assert driver.scaled == [1]


async def test_requests_between_two_looks_count(plane: Running, driver: Scripted) -> None:
    await activated(plane)
    service = await idle(plane, 30)

    plane.clock.advance(50)
    await quiet(plane, requests=11)
    await service.turn()
    plane.clock.advance(50)
    await quiet(plane, requests=11)
    await service.turn()
    plane.clock.advance(10)
    await send(plane, record(model="m", at=plane.clock() - 1_000))
    await quiet(plane, requests=11)
    await service.turn()

    assert driver.scaled == [1]


async def test_without_reports_nothing_is_stopped(plane: Running, driver: Scripted) -> None:
    await activated(plane)
    service = await idle(plane, 10)

    plane.clock.advance(300)
    await service.turn()
    await quiet(plane)
    await service.turn()

    assert driver.scaled == [1]


@pytest.mark.parametrize(
    ("draining", "gone", "scaled"), [(False, 300, [1]), (True, 300, [1, 0]), (False, 1800, [1, 0])]
)
async def test_a_router_that_is_lost_may_serve_on(
    plane: Running, driver: Scripted, draining: bool, gone: float, scaled: list[int]
) -> None:
    await activated(plane)
    await reports(plane, r2=report(draining=draining))
    plane.clock.advance(gone)

    await idle(plane, 100)

    assert driver.scaled == scaled


async def test_what_runs_two_models_is_not_stopped(plane: Running, driver: Scripted) -> None:
    await activated(plane)
    await plane.admin.put("/models/n", json={"name": "n", "backends": ["http://10.0.0.1:8000"]})
    other = {"driver": "kubernetes", "object": "engine"}
    made = await plane.admin.put("/api/v1/deployments/n", json=other, headers={"if-none-match": "*"})

    await idle(plane)

    assert made.status_code == 201
    assert driver.scaled == [1]


async def test_what_may_not_be_stopped_is_not_tried(plane: Running, driver: Scripted) -> None:
    await activated(plane)
    driver.scales = False

    await idle(plane)

    assert driver.scaled == [1]
    assert [action for action, _, _ in await deeds(plane)] == ["deployment.start"]


class Refusing(Scripted):
    """It counts what it refuses."""

    async def scale(self, object: str, instances: int) -> None:
        self.scaled.append(instances)
        raise DriverError("forbidden", "The control plane may not.")


async def test_a_stop_that_is_refused_is_tried_again_as_late_as_the_first(start_sqlite: Start) -> None:
    driver = Refusing("kubernetes")
    driver.observed = Observed(1, (Instance("engine-0", "ready"),))
    plane: Running = await start_sqlite(outside=driver.connections())
    await plane.admin.put("/models/m", json={"name": "m", "backends": ["http://10.0.0.1:8000"], "hold": 60})
    await deploy(plane)

    service = await idle(plane)
    plane.clock.advance(300)
    await quiet(plane)
    for _ in range(10):
        await service.turn()

    # Twice; and the task of the control plane itself looks now and then.
    assert 2 <= len(driver.scaled) <= 5


async def test_what_others_scale_is_not_stopped(plane: Running, driver: Scripted) -> None:
    await activated(plane)
    driver.observed = driver.observed._replace(owner="ScaledObject gpt2")

    await idle(plane)

    assert driver.scaled == [1]


async def test_what_no_request_would_start_again_is_not_stopped(plane: Running, driver: Scripted) -> None:
    await activated(plane)
    await plane.admin.put("/models/m", json={**ENTRY, "hold": None})

    await idle(plane)

    assert driver.scaled == [1]


async def test_of_two_control_planes_one_starts_and_one_stops(
    server: PostgreSQL, template: str, driver: Scripted
) -> None:
    clock = Clock()
    async with starting(server.url(server.create(template))) as start:
        one, two = [await start(clock=clock, outside=driver.connections()) for _ in range(2)]
        await one.admin.put("/models/m", json={"name": "m", "backends": ["http://10.0.0.1:8000"], "hold": 60})
        await two.plane.documents.refresh("models")
        await deploy(one)

        started = await asyncio.gather(*(activated(plane) for plane in (one, two) for _ in range(5)))
        services = [Idling(plane.plane, every=0) for plane in (one, two)]
        for wait in (0, 300, 0, 0):
            clock.advance(wait)
            await quiet(one)
            await asyncio.gather(*(service.turn() for service in services))

        assert set(started) == {(202, "starting")}
        assert [action for action, _, _ in await deeds(one)] == ["deployment.start", "deployment.stop"]
        assert driver.scaled == [1, 0]


def life(state: State = "ready", ready: int | None = 0, activated: int | None = None, busy: int = 0) -> Life:
    return Life(state, 60, None if ready is None else NOON + ready, activated and NOON + activated, NOON + busy)


@pytest.mark.parametrize(
    ("found", "after", "idle"),
    [
        (life(), 59_999, False),
        (life(), 60_000, True),
        (life(busy=1), 60_000, False),
        (life(ready=None), 60 * MINUTE, False),
        (life("loading"), 60 * MINUTE, False),
        (life("failing"), 60_000, True),
        # Ready since it was asked for: only the time without requests counts.
        (life(ready=2, activated=1), 60_002, True),
        # Asked for, and not ready since
        (life("failing", activated=1), 29 * MINUTE, False),
        (life("failing", activated=1), 31 * MINUTE, True),
        (life()._replace(idle_seconds=None), 60 * MINUTE, False),
    ],
)
def test_what_is_idle(found: Life, after: int, idle: bool) -> None:
    assert is_idle(found, NOON + after) is idle


def test_traffic_is_that_of_all_routers() -> None:
    rows = [report(models=[{"name": name, "in_flight": 1, "queued": 2, "requests": 7, "errors": 0}]) for name in "mno"]
    reported = [Reported(f"r{number}", row, NOON, 5_000) for number, row in enumerate([*rows, rows[0]])]

    assert traffic_of(reported, {"m", "n"}) == {
        "m": Traffic(6, {("r0", "9f3c5a1e77b04d21"): 7, ("r3", "9f3c5a1e77b04d21"): 7}),
        "n": Traffic(3, {("r1", "9f3c5a1e77b04d21"): 7}),
    }


def test_what_was_not_seen_counts_as_a_request() -> None:
    watched = Watched()
    still = {"m": Traffic(0, {("r", "boot"): 5})}
    for at, traffic, busy_at in (
        (1, still, 1),
        (2, still, 1),
        (3, {"m": Traffic(0, {("r", "boot"): 6})}, 3),
        (4, {"m": Traffic(0, {("r", "boot"): 6, ("new", "boot"): 0})}, 3),
        (5, {"m": Traffic(0, {("r", "other"): 1})}, 5),
        (6, {}, 6),
        (7, still, 7),
        (8, still, 7),
    ):
        watched.see({"m"}, traffic, at)
        assert watched.busy_at("m") == busy_at


async def test_a_process_that_does_not_run_is_drained(start_sqlite: Start, clock: Clock) -> None:
    driver = Scripted()
    address = "127.0.0.1:8001"
    driver.observed = Observed(0, (Instance("engine", "stopped", address=address),))
    plane: Running = await start_sqlite(clock=clock, outside=driver.connections())
    backends = ["http://localhost:8001", "http://10.0.0.2:8001"]
    await plane.admin.put("/models/m", json={"name": "m", "backends": backends})
    await deploy(plane, driver="processes")
    service = Idling(plane.plane)

    async def holds(*wanted: tuple[str, str, str]) -> None:
        """At once, or soon: the task of the control plane may have looked before the driver changed."""
        async with asyncio.timeout(30):
            while True:
                await service.turn()
                rows = (await plane.router.get("/overrides")).json()["overrides"]
                if tuple((row["backend"], row["model"], row["action"]) for row in rows) == wanted:
                    return
                await asyncio.sleep(0.05)

    drained = ("localhost:8001", "m", "drain")

    await holds(drained)
    clock.advance(13 * 3600)
    await holds(drained)
    clock.advance(13 * 3600)
    await holds(drained)
    driver.observed = Observed(1, (Instance("engine", "ready", address=address),))
    await holds()
    driver.observed = Observed(1, (Instance("engine", "failing", address=address),))
    await holds(drained)
    driver.problem = DriverError("away", "It does not answer.")
    await holds(drained)
    driver.problem = None
    await deploy(plane, driver="processes", scale_to_zero=False, idle_seconds=None)
    await holds()


@pytest.fixture
def clock() -> Clock:
    return Clock()
