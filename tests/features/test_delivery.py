"""Every record arrives, whatever the control plane does in between; what cannot is counted, and nobody waits."""

import asyncio
import errno
import math
import os
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import orjson
import pytest

from inference_api.features.delivery.outbox import Outbox, Verdict, fitting, verdict
from inference_api.features.delivery.sender import Answer, Delivery, posting, read_answer
from inference_api.features.delivery.spool import Spool
from inference_api.upstream.transport import Transport
from tests.fakes import until
from tests.features import control_plane
from tests.features.control_plane import ControlPlane, answers
from tests.ports import free_port

pytestmark = pytest.mark.anyio


def lines(start: int, count: int, size: int = 0) -> list[bytes]:
    return [orjson.dumps({"id": f"id-{number}", "x": "x" * size}) for number in range(start, start + count)]


def ids(start: int, count: int) -> set[str]:
    return {f"id-{number}" for number in range(start, start + count)}


@pytest.fixture
async def plane() -> AsyncIterator[ControlPlane]:
    async with ControlPlane() as plane:
        yield plane


@asynccontextmanager
async def delivering(
    plane: ControlPlane, spool: Spool | None = None, capacity: int = 10_000, left: float = 5.0, **more: Any
) -> AsyncIterator[Delivery]:
    """A delivery that runs as in the router, with all pauses a tenth as long; at the end it is stopped."""
    transport, stop_by = Transport(keepalive=0.1), [math.inf]
    async with httpx.AsyncClient(base_url=plane.url, transport=transport, timeout=5.0) as client:
        delivery = Delivery(
            posting(client),
            spool,
            Outbox(capacity),
            seconds_left=lambda: stop_by[0] - time.monotonic(),
            **{"age": 0.1, "rand": lambda: 0.1, "adopt_every": 0.1, **more},
        )
        task = asyncio.create_task(delivery.run())
        await asyncio.sleep(0)
        try:
            yield delivery
        finally:
            stop_by[0] = time.monotonic() + left
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            delivery.close()


def put(delivery: Delivery, start: int, count: int) -> None:
    for line in lines(start, count):
        delivery.put(line.decode())


async def test_a_batch_goes_when_it_is_full_or_old_enough(plane: ControlPlane) -> None:
    async with delivering(plane, age=0.5) as delivery:
        put(delivery, 0, 1200)
        # The control plane has them a moment before its answer is here.
        await until(lambda: delivery.results["delivered"] == 1200)

        assert plane.batches == [500, 500, 200]
        await until(lambda: not len(delivery.outbox))


async def test_a_batch_fits_into_a_request(plane: ControlPlane) -> None:
    async with delivering(plane) as delivery:
        for line in lines(0, 100, 25_000):
            delivery.put(line.decode())
        await until(lambda: len(plane.stored) == 100)

    assert max(plane.batches) < 42


MISHAPS: dict[str, control_plane.Mishap] = {
    "500": answers("500 Internal Server Error", "internal_error"),
    "503": answers("503 Service Unavailable", "storage_unavailable"),
    "401": answers("401 Unauthorized", "invalid_api_key"),
    "403": answers("403 Forbidden", "insufficient_scope"),
    "408": answers("408 Request Timeout", "timeout"),
    "429": answers("429 Too Many Requests", "too_many"),
    "404": answers("404 Not Found", "not_found"),
    "reset": control_plane.resets,
    "dies after it stored": control_plane.stores_and_dies,
}


@pytest.mark.parametrize("spooled", [False, True])
@pytest.mark.parametrize("name", MISHAPS)
async def test_what_is_no_fault_of_the_batch_is_kept(
    name: str, spooled: bool, plane: ControlPlane, tmp_path: Path
) -> None:
    plane.mishap = MISHAPS[name]
    async with delivering(plane, Spool(tmp_path, "a") if spooled else None) as delivery:
        put(delivery, 0, 300)
        await until(lambda: len(plane.batches) >= 3)
        if spooled:
            await until(lambda: delivery.results["spooled"] == 300)
        assert delivery.results["delivered"] == 0
        plane.mishap = None
        put(delivery, 300, 100)
        await until(lambda: delivery.results["delivered"] == 400)
        await until(lambda: not len(delivery.outbox))

    # Each exactly once, also those that a control plane stored and then did not know of.
    assert plane.stored.keys() == ids(0, 400)
    assert not any(delivery.dropped.values())
    assert os.listdir(tmp_path) == []


async def test_one_that_is_away_is_found_when_it_is_back(tmp_path: Path) -> None:
    plane = ControlPlane(free_port())
    async with delivering(plane, Spool(tmp_path, "a")) as delivery:
        put(delivery, 0, 700)
        await until(lambda: delivery.results["spooled"] == 700)
        async with plane:
            await until(lambda: delivery.results["delivered"] == 700)

    assert plane.stored.keys() == ids(0, 700)


async def test_a_slow_one_gets_everything(plane: ControlPlane, tmp_path: Path) -> None:
    plane.mishap = control_plane.is_slow
    async with delivering(plane, Spool(tmp_path, "a"), capacity=2000) as delivery:
        # Faster than it takes them: a part goes by way of the spool.
        for number in range(0, 3000, 500):
            put(delivery, number, 500)
            await asyncio.sleep(0.1)
        plane.mishap = None
        await until(lambda: delivery.results["delivered"] == 3000)

    assert delivery.results["spooled"] > 0
    assert plane.stored.keys() == ids(0, 3000)
    assert not any(delivery.dropped.values())


async def test_one_that_never_answers_fills_the_spool_not_the_queue(plane: ControlPlane, tmp_path: Path) -> None:
    plane.mishap = control_plane.hangs
    async with delivering(plane, Spool(tmp_path, "a"), capacity=1000, left=0.0) as delivery:
        for number in range(0, 3000, 250):
            put(delivery, number, 250)
            await until(lambda: len(delivery.outbox) < 750)
        assert len(plane.batches) == 1

    assert delivery.results["spooled"] == 3000
    assert not any(delivery.dropped.values())


async def test_refused_records_are_dropped_and_the_others_are_not(
    plane: ControlPlane, caplog: pytest.LogCaptureFixture
) -> None:
    plane.refuses = lambda record: record["id"].endswith("7")
    async with delivering(plane) as delivery:
        put(delivery, 0, 1000)
        await until(lambda: not len(delivery.outbox))

    assert plane.stored.keys() == {name for name in ids(0, 1000) if not name.endswith("7")}
    assert (delivery.results["delivered"], delivery.dropped["refused"]) == (900, 100)
    assert [record.message for record in caplog.records if "refused" in record.message] == [
        "the control plane refused usage records: clock_skew"
    ]


STATUSES = {400: "Bad Request", 413: "Payload Too Large", 415: "Unsupported Media Type", 422: "Unprocessable Entity"}


@pytest.mark.parametrize("spooled", [False, True])
@pytest.mark.parametrize("status", STATUSES)
async def test_a_bad_record_does_not_take_its_batch_with_it(
    status: int, spooled: bool, plane: ControlPlane, tmp_path: Path
) -> None:
    bad = {"id-0", "id-333", "id-499"}
    plane.mishap = control_plane.chokes_on(lambda record: record["id"] in bad, f"{status} {STATUSES[status]}")
    spool = Spool(tmp_path, "a") if spooled else None
    if spool is not None:
        spool.append(lines(0, 500))
    async with delivering(plane, spool) as delivery:
        if spool is None:
            put(delivery, 0, 500)
        await until(lambda: delivery.dropped["refused"] == 3)
        await until(lambda: delivery.results["delivered"] == 497)

    assert plane.stored.keys() == ids(0, 500) - bad


async def test_a_smaller_limit_is_found(plane: ControlPlane) -> None:
    plane.mishap = control_plane.chokes_on(lambda record: False, "413 Payload Too Large", most=70)
    async with delivering(plane) as delivery:
        put(delivery, 0, 1000)
        await until(lambda: delivery.results["delivered"] == 1000)

    assert plane.stored.keys() == ids(0, 1000)


async def test_without_a_spool_the_newest_go(plane: ControlPlane) -> None:
    plane.mishap = control_plane.resets
    async with delivering(plane, capacity=100) as delivery:
        put(delivery, 0, 150)
        await until(lambda: len(plane.batches) >= 2)
        plane.mishap = None
        await until(lambda: delivery.results["delivered"] == 100)

    assert plane.stored.keys() == ids(0, 100)
    assert delivery.dropped["queue_full"] == 50


async def test_a_full_spool_loses_its_oldest_file(plane: ControlPlane, tmp_path: Path) -> None:
    plane.mishap = control_plane.resets
    async with delivering(plane, Spool(tmp_path, "a", limit=16_000), capacity=50) as delivery:
        for number in range(0, 1500, 30):
            put(delivery, number, 30)
            await until(lambda: not len(delivery.outbox))
        lost = delivery.dropped["spool_full"]
        plane.mishap = None
        await until(lambda: delivery.results["delivered"] == 1500 - lost)

    assert 0 < lost < 1100
    assert plane.stored.keys() >= ids(lost + 500, 1000 - lost)
    assert "id-1499" in plane.stored


async def test_a_full_disk_costs_no_record_that_fits_into_memory(
    plane: ControlPlane, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    room = [0]

    def write(fd: int, data: memoryview) -> int:
        if len(data) > room[0]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        room[0] -= len(data)
        return os.write(fd, data)

    plane.mishap = control_plane.resets
    async with delivering(plane, Spool(tmp_path, "a", write=write), capacity=100) as delivery:
        put(delivery, 0, 100)
        await until(lambda: "No space left" in caplog.text)
        put(delivery, 100, 10)
        assert delivery.dropped["spool_error"] == 10
        room[0] = 1_000_000
        await until(lambda: delivery.results["spooled"] == 100)
        plane.mishap = None
        await until(lambda: delivery.results["delivered"] == 100)

    assert plane.stored.keys() == ids(0, 100)
    assert caplog.text.count("No space left") == 1


async def test_a_full_queue_that_nothing_can_take_does_not_stop_the_loop(plane: ControlPlane, tmp_path: Path) -> None:
    def write(fd: int, data: memoryview) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    plane.mishap = control_plane.resets
    spool = Spool(tmp_path, "a", write=write)
    async with delivering(plane, spool, capacity=100, left=0.0, age=1.0, rand=lambda: 1.0) as delivery:
        put(delivery, 0, 100)
        await until(lambda: delivery.spool_broken)
        began = time.process_time()
        for _ in range(200):
            await asyncio.sleep(0.001)
        took = time.process_time() - began

    # A loop that does not wait leaves others ten turns of each second.
    assert took < 5


async def test_what_an_earlier_process_left_is_delivered(plane: ControlPlane, tmp_path: Path) -> None:
    left = Spool(tmp_path, "b")
    left.append(lines(0, 600))
    async with delivering(plane, Spool(tmp_path, "a")) as delivery:
        put(delivery, 600, 10)
        await until(lambda: len(plane.stored) == 10)
        # It has ended meanwhile.
        left.close()
        await until(lambda: len(plane.stored) == 610)

    assert os.listdir(tmp_path) == []


async def test_the_end_flushes_the_queue(plane: ControlPlane, tmp_path: Path) -> None:
    async with delivering(plane, Spool(tmp_path, "a"), age=60.0) as delivery:
        put(delivery, 0, 1499)
        await until(lambda: len(plane.batches) >= 1)

    assert plane.stored.keys() == ids(0, 1499)
    assert os.listdir(tmp_path) == []


async def test_the_end_spools_what_cannot_be_delivered(plane: ControlPlane, tmp_path: Path) -> None:
    plane.mishap = control_plane.resets
    async with delivering(plane, Spool(tmp_path, "a"), age=60.0) as delivery:
        put(delivery, 0, 100)
    plane.mishap = None
    async with delivering(plane, Spool(tmp_path, "b")) as delivery:
        await until(lambda: delivery.results["delivered"] == 100)

    assert plane.stored.keys() == ids(0, 100)


async def test_the_end_waits_for_a_control_plane_that_comes_back(plane: ControlPlane) -> None:
    """There is no spool, so it tries as long as the process has time."""
    plane.mishap = control_plane.resets
    async with delivering(plane, age=60.0, left=10.0) as delivery:
        put(delivery, 0, 100)

        async def mend() -> None:
            await until(lambda: len(plane.batches) >= 3)
            plane.mishap = None

        mending = asyncio.create_task(mend())
    await mending

    assert plane.stored.keys() == ids(0, 100)


async def test_the_end_comes_in_time(plane: ControlPlane, caplog: pytest.LogCaptureFixture) -> None:
    plane.mishap = control_plane.hangs
    async with delivering(plane, left=0.0, age=60.0) as delivery:
        put(delivery, 0, 100)

    [lost] = [record for record in caplog.records if "were lost" in record.message]
    assert lost.__dict__["fields"] == {"records": 100}


async def test_a_record_that_comes_after_the_end_is_spooled(plane: ControlPlane, tmp_path: Path) -> None:
    async with delivering(plane, Spool(tmp_path, "a")) as delivery:
        pass
    # A request that was cut at the end of the drain.
    delivery = Delivery(posting(httpx.AsyncClient()), Spool(tmp_path, "a"))
    put(delivery, 0, 3)
    delivery.close()

    again = Spool(tmp_path, "b")
    assert again.adopt() == 3
    assert again.read() == lines(0, 3)


async def test_the_loop_does_not_wait_for_the_disk(plane: ControlPlane, tmp_path: Path) -> None:
    blocked, released = asyncio.Event(), threading.Event()
    loop = asyncio.get_running_loop()

    def write(fd: int, data: memoryview) -> int:
        loop.call_soon_threadsafe(blocked.set)
        released.wait(10)
        return os.write(fd, data)

    plane.mishap = control_plane.resets
    async with delivering(plane, Spool(tmp_path, "a", write=write), capacity=1000) as delivery:
        put(delivery, 0, 100)
        async with asyncio.timeout(10):
            await blocked.wait()
        put(delivery, 100, 1000)
        assert (len(delivery.outbox), delivery.dropped["queue_full"]) == (1000, 100)
        released.set()
        await until(lambda: delivery.results["spooled"] >= 100)
        plane.mishap = None
        await until(lambda: delivery.results["delivered"] == 1000)


# Pure parts


@pytest.mark.parametrize(
    ("statuses", "expected"),
    [
        ((200,), Verdict.TAKEN),
        ((400, 413, 415, 422), Verdict.SPLIT),
        ((0, 201, 204, 301, 401, 403, 404, 405, 408, 429, 500, 502, 503, 504), Verdict.KEPT),
    ],
)
def test_what_becomes_of_a_batch(statuses: tuple[int, ...], expected: Verdict) -> None:
    assert {verdict(status) for status in statuses} == {expected}


@pytest.mark.parametrize(
    ("status", "text", "answer"),
    [
        (200, b'{"accepted": 3, "duplicates": 0, "refused": []}', Answer(200)),
        (200, b'{"refused": [{"code": "clock_skew"}, 3]}', Answer(200, "clock_skew", 2)),
        (200, b'{"refused": [3]}', Answer(200, "None", 1)),
        (200, b"<html>", Answer(0, "answered 200 without a JSON object")),
        (200, b"[]", Answer(0, "answered 200 without a JSON object")),
        (502, b"<html>", Answer(502, "answered 502 without a JSON object")),
        (401, b'{"error": {"code": "invalid_api_key"}}', Answer(401, "answered 401 invalid_api_key")),
        (401, b'{"error": "x"}', Answer(401, "answered 401")),
    ],
)
def test_an_answer_of_the_control_plane(status: int, text: bytes, answer: Answer) -> None:
    assert read_answer(status, text) == answer


def test_a_batch_has_at_least_one_record() -> None:
    assert [fitting([b"x" * 100] * 10, most, size) for most, size in ((3, 1000), (500, 250), (500, 10))] == [3, 2, 1]
    assert fitting([]) == 0


def test_what_was_taken_has_room_to_come_back() -> None:
    outbox = Outbox(10)
    assert [outbox.put(line) for line in lines(0, 11)] == [True] * 10 + [False]
    taken = outbox.take(4)
    assert not outbox.put(b"x")
    outbox.give_back(taken)
    assert outbox.take(10) == lines(0, 10)
    outbox.settle(10)
    assert len(outbox) == 0


class Trickle(ControlPlane):
    """Answers without an end."""

    async def serve(self, request: Any, line: Any) -> None:
        await line.send(b"HTTP/1.1 200 OK\r\ncontent-length: 99999999\r\n\r\n")
        while True:
            await line.send(b"x" * 65536)


async def test_an_answer_without_an_end_is_none() -> None:
    async with Trickle() as plane, httpx.AsyncClient(base_url=plane.url, transport=Transport()) as client:
        assert await posting(client)(b"") == Answer(0, "the answer is too large")
