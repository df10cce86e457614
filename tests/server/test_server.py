"""The process: how it starts, what it logs, and how it stops. The command itself, on ports of its own."""

import asyncio
import resource
import signal
import socket
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import orjson
import pytest

from inference_api.app import build
from inference_api.application import Application
from inference_api.core import Outside
from inference_api.http.pages import create_pages
from inference_api.observe.log import Fields
from inference_api.server.flow import Deadlines
from inference_api.server.server import Server, listen, ops_thread, raise_file_limit, server_config
from inference_api.settings import Settings, SettingsError
from tests.command import catalogue_of, closed, command, log_of, ready
from tests.fakes import (
    CHAT,
    DONE,
    LAST_CHUNK,
    STREAM,
    Line,
    Received,
    chunk,
    event,
    hang,
    in_background,
    post,
    raw_client,
    read_answer,
    sse,
    until,
)
from tests.ports import free_port

pytestmark = pytest.mark.anyio
Start = Callable[..., Any]
URL = "/v1/chat/completions"


# Stop


async def test_sigterm_lets_a_stream_finish(tmp_path: Path, start_engine: Start) -> None:
    go_on = asyncio.Event()

    async def script(request: Received, line: Line) -> None:
        await sse(event("first"))(request, line)
        await go_on.wait()
        await line.send(chunk(DONE) + LAST_CHUNK)

    async with command(tmp_path, await start_engine(script)) as router:
        await ready(router.client)
        async with router.client.stream("POST", URL, json=STREAM) as response:
            chunks = response.aiter_raw()
            assert await anext(chunks) == event("first")
            router.tell(signal.SIGTERM)
            await closed(router.port)
            go_on.set()
            assert b"".join([data async for data in chunks]) == DONE
        code, out, err = await router.stop()

    assert (code, err) == (0, "")
    serving, *_, request, stopped = log_of(out)
    assert (serving["event"], serving["address"]) == ("serving", f"127.0.0.1:{router.port}")
    assert (request["event"], request["outcome"], stopped["event"]) == ("request", "ok", "stopped")


async def test_readiness_ends_with_the_signal_not_with_the_last_stream(tmp_path: Path, start_engine: Start) -> None:
    ops_port = free_port()
    engine = await start_engine(sse(event(), then=Line.gone))

    async with command(tmp_path, engine, ops_port=ops_port) as router:
        await ready(router.client)
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{ops_port}", trust_env=False) as ops:
            assert (await ops.get("/readyz")).status_code == 200
            async with router.client.stream("POST", URL, json=STREAM) as response:
                # Kept: a generator that nobody holds is closed, and the client leaves.
                body = response.aiter_raw()
                await anext(body)
                router.tell(signal.SIGTERM)
                await closed(router.port)
                during = await ops.get("/readyz")
        code, _, _ = await router.stop()

    assert (during.status_code, during.json()["status"], code) == (503, "draining", 0)


@asynccontextmanager
async def in_process(router: Application, settings: Settings, **more: Any) -> AsyncIterator[tuple[Server, int]]:
    """(server, port) of a router in this process; it ends when the test tells the server to."""
    with listen("127.0.0.1", 0, "PORT") as listener:
        server = Server(server_config(router.app, settings), **more)
        async with in_background(server.serve(sockets=[listener])):
            await until(lambda: server.started)
            yield server, listener.getsockname()[1]


async def test_a_stream_longer_than_the_drain_is_told_and_cut(tmp_path: Path, start_engine: Start) -> None:
    engine = await start_engine(sse(event(), then=Line.gone))
    settings = Settings(catalogue=catalogue_of(tmp_path, engine), drain_timeout=0.1)
    lines: list[Fields] = []
    router = build(settings, Outside(write_line=lines.append))

    async with in_process(router, settings) as (server, port), raw_client(port) as client:
        await client.send(post(URL, STREAM))
        await client.reader.readuntil(b"data: ")
        server.should_exit = True
        async with asyncio.timeout(20):
            rest = await client.reader.read(-1)

    assert b'"code":"router_shutting_down"' in rest
    assert not rest.endswith(LAST_CHUNK)
    assert (len(lines), router.core.admission.in_flight) == (1, 0)
    await until(lambda: engine.busy == 0)


async def test_a_request_that_waits_longer_than_the_drain_is_told_when_to_come_back(
    tmp_path: Path, start_engine: Start
) -> None:
    engine = await start_engine(hang)
    settings = Settings(catalogue=catalogue_of(tmp_path, engine), drain_timeout=0.1)
    router = build(settings)

    async with in_process(router, settings) as (server, port), raw_client(port) as idle, raw_client(port) as client:
        await client.send(post(URL, CHAT))
        await until(lambda: engine.busy == 1)
        server.should_exit = True
        async with asyncio.timeout(20):
            assert await idle.reader.read(-1) == b""
            reply = await read_answer(client.reader)

    assert (reply.status, reply.headers["connection"], reply.headers["retry-after"]) == (503, "close", "1")
    assert orjson.loads(reply.body)["error"]["code"] == "shutting_down"


async def test_requests_are_taken_until_the_delay_is_over(tmp_path: Path, start_engine: Start) -> None:
    settings = Settings(catalogue=catalogue_of(tmp_path, await start_engine()))
    router = build(settings)

    async with in_process(router, settings, delay=2, on_stop=router.drain) as (server, port):
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", trust_env=False) as client:
            server.handle_exit(signal.SIGTERM, None)
            probe, answer = await client.get("/readyz"), await client.post(URL, json=CHAT)
            told = server.should_exit
        await until(lambda: server.should_exit)

    assert (probe.status_code, probe.json()["status"]) == (503, "draining")
    assert (answer.status_code, told) == (200, False)


async def test_a_second_signal_does_not_wait(tmp_path: Path) -> None:
    stops: list[str] = []
    server = Server(server_config(create_pages([]), Settings()), delay=60, on_stop=lambda: stops.append("stop"))

    told = []
    for _ in range(2):
        server.handle_exit(signal.SIGTERM, None)
        told.append((server.should_exit, server.force_exit))

    # The delay; then neither that nor streams are waited for.
    assert told == [(False, False), (True, True)]
    assert stops == ["stop"] * 2


# Start


async def test_small_answers_are_sent_at_once_on_any_loop() -> None:
    """asyncio looks at the listener's protocol; uvloop does not need to be told."""
    nodelay: list[int] = []

    def look(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nodelay.append(writer.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
        writer.close()

    async def main() -> None:
        async with await asyncio.start_server(look, sock=listen("127.0.0.1", 0, "PORT")) as server:
            reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
            await reader.read()
            writer.close()
            await writer.wait_closed()

    await asyncio.to_thread(asyncio.run, main())
    assert nodelay == [1]


def test_the_variable_of_the_other_port_is_named_for_it() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as taken,
        pytest.raises(SettingsError, match=r"^INFERENCE_API_OPS_PORT=\d"),
    ):
        listen("127.0.0.1", taken.getsockname()[1], "OPS_PORT")


@pytest.mark.parametrize("host", ["256.0.0.1", "no such host", "192.0.2.1", "a..b", "x" * 64])
def test_an_address_that_is_not_ours_is_named(host: str) -> None:
    with pytest.raises(SettingsError) as caught:
        listen(host, 8000, "PORT")

    assert host in str(caught.value)


def test_an_ipv6_address_can_be_listened_on() -> None:
    with listen("::1", 0, "PORT") as listener:
        assert listener.family is socket.AF_INET6
        assert not listener.getblocking()


def test_a_server_in_a_thread_leaves_the_signals_of_the_process_alone() -> None:
    server = Server(server_config(create_pages([]), Settings()))
    before = signal.getsignal(signal.SIGTERM)

    def handler_inside() -> Any:
        with server.capture_signals():
            return signal.getsignal(signal.SIGTERM)

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(handler_inside).result() == before


async def test_probes_may_have_a_port_of_their_own(tmp_path: Path, start_engine: Start) -> None:
    ops_port = free_port()

    revision = {"IMAGE_REVISION": "0a1b2c"}
    async with command(tmp_path, await start_engine(), environ=revision, ops_port=ops_port) as router:
        await ready(router.client)
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{ops_port}", trust_env=False) as ops:
            answer = await router.client.post(URL, json=CHAT)
            probes = [await ops.get(path) for path in ("/healthz", "/readyz", "/metrics")]
            others = [await ops.get("/v1/models"), await ops.post(URL, json=CHAT)]
        on_main = [await router.client.get(path) for path in ("/healthz", "/readyz", "/metrics")]
        # Ctrl-C is a way to stop, not a failure.
        router.tell(signal.SIGINT)
        code, _, err = await router.stop()

    assert (answer.status_code, code, err) == (200, 0, "")
    assert [probe.status_code for probe in probes] == [200, 200, 200]
    assert 'inference_api_requests_total{model_name="m",route="chat_completions",code="200"' in probes[2].text
    assert ',revision="0a1b2c",' in probes[2].text
    # Balancers check the port of the clients too; names of backends are not for them.
    assert [page.status_code for page in (*others, *on_main)] == [404, 404, 200, 200, 404]
    # It is the same server as on the main port.
    for page in (*probes, *others):
        assert (len(page.headers["x-request-id"]), "server" in page.headers) == (32, False), page.url
    assert [page.json()["request_id"] for page in others] == [page.headers["x-request-id"] for page in others]


async def test_the_port_of_the_probes_has_deadlines_and_ids_of_its_own(tmp_path: Path, start_engine: Start) -> None:
    settings = Settings(catalogue=catalogue_of(tmp_path, await start_engine()))
    lines: list[Fields] = []
    router = build(settings, Outside(write_line=lines.append))

    with listen("127.0.0.1", 0, "OPS_PORT") as listener, ops_thread(router.ops, listener, Deadlines(header=0.2)):
        port = listener.getsockname()[1]
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", trust_env=False) as ops:
            named = await ops.get("/healthz", headers={"x-request-id": "mine"})
            wrong = [await ops.post("/healthz"), await ops.get("/nope")]
        async with raw_client(port) as slow, raw_client(port) as mute, raw_client(port) as odd:
            await slow.send(b"GET /healthz HTTP/1.1\r\nhost:")
            await odd.send(b"GET /healthz HTTP/1.1\r\n\r\n")
            async with asyncio.timeout(20):
                late, refused = await read_answer(slow.reader), await read_answer(odd.reader)
                assert await mute.reader.read(-1) == b""

    assert (named.status_code, named.headers["x-request-id"]) == (200, "mine")
    assert [(page.status_code, page.json()["error"]["code"]) for page in wrong] == [
        (405, "method_not_allowed"),
        (404, "unknown_url"),
    ]
    for page in wrong:
        assert page.json()["request_id"] == page.headers["x-request-id"] != ""
    assert (late.status, refused.status) == (408, 400)
    assert "server" not in late.headers
    # Its thread touches neither log nor metrics.
    assert lines == []


def test_the_soft_limit_of_open_files_is_raised_to_the_hard_one() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 512), hard))
        raise_file_limit()
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (hard, hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
