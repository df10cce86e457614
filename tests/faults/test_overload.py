"""T81, T82: more than there is room for. Some are refused, at once and politely; nobody else notices."""

import asyncio
import os
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack, contextmanager, suppress
from pathlib import Path
from statistics import median
from typing import Any

import httpx
import orjson
import pytest

from inference_api.server.server import connection_limit
from tests.command import Command, command, log_of, ready
from tests.fakes import CHAT, STREAM, Answer, Line, Received, answer, event, post, raw_client, read_answer, sse, until
from tests.faults.lab import URL, Lab, outcomes
from tests.ports import free_port

pytestmark = pytest.mark.anyio
Start = Callable[..., Any]


# T81

SLOTS, EACH, SERVED = 10, 0.2, 100
ASK = post(URL, CHAT)


async def test_t81_five_times_the_load_costs_the_excess_and_nothing_else(tmp_path: Path, start_engine: Start) -> None:
    async def script(request: Received, line: Line) -> None:
        await asyncio.sleep(EACH)
        await answer(request, line)

    ops_port = free_port()
    engine = await start_engine(script)
    async with (
        command(tmp_path, engine, ops_port=ops_port, max_in_flight=SLOTS) as router,
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{ops_port}", timeout=5, trust_env=False) as ops,
    ):
        await ready(router.client)
        answers: list[Answer] = []
        refusals: list[float] = []

        def is_going_on() -> bool:
            return sum(reply.status == 200 for reply in answers) < SERVED

        async def user() -> None:
            async with raw_client(router.port) as client:
                while is_going_on():
                    began = time.monotonic()
                    await client.send(ASK)
                    answers.append(await read_answer(client.reader))
                    if answers[-1].status == 503:
                        refusals.append(time.monotonic() - began)
                        await asyncio.sleep(EACH)

        users = [asyncio.create_task(user()) for _ in range(5 * SLOTS)]
        probes = []
        while is_going_on():
            for path in ("/healthz", "/readyz", "/metrics"):
                began = time.monotonic()
                assert (await ops.get(path)).status_code == 200
                probes.append(time.monotonic() - began)
            await asyncio.sleep(0.05)
        await asyncio.gather(*users)
        afterwards = [await router.client.post(URL, json=CHAT) for _ in range(3)]
        code, _, err = await router.stop()

    assert (code, err) == (0, "")
    refused = [reply for reply in answers if reply.status != 200]
    assert {(reply.status, orjson.loads(reply.body)["error"]["code"]) for reply in refused} == {(503, "overloaded")}
    assert {reply.headers["retry-after"] for reply in refused} == {"1"}
    assert len(refused) > SLOTS
    # 100 ms are allowed for a probe and 50 for a refusal: most are in time, and few so late as a busy machine is.
    assert median(probes) < 0.1
    assert sorted(probes)[len(probes) * 9 // 10] < 1
    assert median(refusals) < 0.05
    assert [reply.status_code for reply in afterwards] == [200] * 3


# T82


async def test_t82_with_few_files_some_clients_are_refused_and_the_others_served(
    tmp_path: Path, start_engine: Start
) -> None:
    engine = await start_engine(sse(event(), then=Line.gone))
    async with command(tmp_path, engine, files=128) as router, AsyncExitStack() as stack:
        await ready(router.client)
        await router.client.aclose()
        clients = [await stack.enter_async_context(raw_client(router.port)) for _ in range(500)]
        streams = await asyncio.gather(*(first_event_of(client) for client in clients))
        served = sum(streams)
        assert 20 < served < 128
        assert engine.busy == served
        assert router.files < 128

        before = cpu_seconds(router)
        await asyncio.sleep(0.5)
        assert cpu_seconds(router) - before < 0.25

        await stack.aclose()
        await until(lambda: engine.busy == 0)
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{router.port}", trust_env=False) as later:
            await ready(later)
            metrics = (await later.get("/metrics")).text
        code, out, err = await router.stop()

    assert (code, err) == (0, "")
    lines = [line for line in log_of(out) if line["event"] == "request" and line["route"] != "models"]
    assert [line["outcome"] for line in lines].count("client_gone") == served
    assert [line.get("code") for line in lines].count("overloaded") == 500 - served
    assert 'outcome="connect_failed"' not in metrics


async def first_event_of(client: Line) -> bool:
    """Ask for a stream: whether it began, or the connection was closed."""
    try:
        await client.send(post(URL, STREAM))
        await client.reader.readuntil(b"data: ")
    except (ConnectionError, asyncio.IncompleteReadError):
        return False
    return True


def cpu_seconds(router: Command) -> float:
    fields = Path(f"/proc/{router.process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextmanager
def no_files_left() -> Iterator[None]:
    """Until the end nothing can be opened in this process."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    opened: list[int] = []
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))) + 1, hard))
    try:
        with suppress(OSError):
            while True:
                opened.append(os.open("/dev/null", os.O_RDONLY))
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for number in opened:
            os.close(number)


async def test_t82_a_router_without_files_is_overloaded_and_its_backend_not_to_blame(lab: Lab) -> None:
    served = await lab.router(engine := await lab.engine(), upstream_keepalive=0.05)
    await served.client.get("/healthz")
    await until(lambda: engine.open == 0)
    # The files of those connections are closed a turn of the loop later; a connection would find one of them.
    for _ in range(10):
        await asyncio.sleep(0.01)

    with no_files_left():
        refused = await served.chat()

    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "overloaded")
    assert refused.headers["retry-after"] == "1"
    assert (await served.chat()).status_code == 200
    assert outcomes(served) == ["shed", "ok"]
    assert await served.metric("inference_api_upstream_attempts_total", outcome="shed") == 1
    assert await served.metric("inference_api_upstream_attempts_total", outcome="connect_failed") == 0


@pytest.mark.parametrize(
    ("files", "in_flight", "clients"),
    [(128, 1000, 40), (1024, 1000, 488), (1024, 100, 876), (1048576, 1000, 1047528), (10, 1000, 1)],
)
def test_t82_files_are_kept_for_the_backends(
    files: int, in_flight: int, clients: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (files, files))

    assert connection_limit(in_flight) == clients


async def test_t82_one_client_too_many_is_disconnected_and_counted(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(resource, "getrlimit", lambda _: (52, 52))
        served = await lab.router(await lab.engine())

    async with raw_client(served.port) as one, raw_client(served.port) as two:
        for client in (one, two):
            await client.send(ASK)
            assert (await read_answer(client.reader)).status == 200
        async with raw_client(served.port) as third:
            assert not await first_event_of(third)
        assert outcomes(served) == ["ok", "ok", "shed"]
    async with raw_client(served.port) as later:
        await later.send(ASK)
        assert (await read_answer(later.reader)).status == 200


def test_t82_without_a_limit_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (resource.RLIM_INFINITY,) * 2)

    assert connection_limit(1000) > 2**31
