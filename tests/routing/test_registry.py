"""The registry client, before a real registry on a real port, and before everything a registry can do wrong."""

import asyncio
import errno
import gzip
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import orjson
import pytest
import uvicorn
from pytest_httpx import HTTPXMock

from inference_api.errors import ModelNotFound
from inference_api.routing.balance import make_balancer
from inference_api.routing.catalogue import parse_catalogue
from inference_api.routing.entries import CatalogueEntry, Credentials
from inference_api.routing.fleet import Fleet
from inference_api.routing.registry import Registry
from inference_api.server.server import Server, listen
from registry_stub.app import create_app
from registry_stub.store import Store
from tests.fakes import Line, Received, Script, ScriptedServer, hang, in_background, json_response, raw, until

pytestmark = pytest.mark.anyio
Start = Callable[..., Any]


def listing(*names: str, **more: Any) -> dict[str, Any]:
    return {"models": [{"name": name, **more} for name in names]}


class Client:
    """A Registry over the static catalogue {s}, and what can be seen of it from outside."""

    def __init__(self, http: httpx.AsyncClient | None, **options: Any) -> None:
        self.fleet = Fleet(make_balancer)
        self.changes: list[list[str]] = []
        static = parse_catalogue(listing("s"))
        self.registry = Registry(self.fleet, static, http, on_change=self._changed, **options)
        # What the registry changed, not what there was.
        self.changes.clear()

    def _changed(self) -> None:
        self.changes.append(self.names)

    @property
    def names(self) -> list[str]:
        return list(self.fleet.models)


@pytest.fixture
async def connect() -> AsyncIterator[Callable[..., Client]]:
    """`connect(url, ...)` -> a Client of the registry there; keywords are options of Registry."""
    async with AsyncExitStack() as stack:

        def connect(
            url: str = "http://registry",
            per_read: float = 30,
            statuses: list[int] | None = None,
            **options: Any,
        ) -> Client:
            async def note(response: httpx.Response) -> None:
                if statuses is not None:
                    statuses.append(response.status_code)

            http = httpx.AsyncClient(base_url=url, timeout=per_read, trust_env=False, event_hooks={"response": [note]})
            stack.push_async_callback(http.aclose)
            return Client(http, **options)

        yield connect


@pytest.fixture
async def start_server() -> AsyncIterator[Callable[[Script], Awaitable[ScriptedServer]]]:
    async with AsyncExitStack() as stack:

        async def start(script: Script) -> ScriptedServer:
            server = ScriptedServer(script)
            await stack.enter_async_context(server)
            return server

        yield start


# Against a real registry


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store(tmp_path / "registry.sqlite3") as store:
        yield store


@pytest.fixture
async def real(store: Store) -> AsyncIterator[str]:
    """The URL of a registry over `store`."""
    listener = listen("127.0.0.1", 0, "PORT")
    config = uvicorn.Config(create_app(store), lifespan="off", log_config=None, access_log=False, ws="none")
    server = Server(config)
    async with in_background(server.serve(sockets=[listener])):
        await until(lambda: server.started)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        server.should_exit = True
    listener.close()


def put(store: Store, name: str, **more: Any) -> None:
    store.put(CatalogueEntry.model_validate({"name": name, **more}), now=1)


async def test_an_unchanged_catalogue_is_not_sent_again(connect: Start, real: str, store: Store) -> None:
    put(store, "a", aliases=["x"])
    statuses: list[int] = []
    client = connect(real, statuses=statuses)

    await client.registry.refresh()
    await client.registry.refresh()
    assert (statuses, client.changes) == ([200, 304], [["a"]])

    put(store, "b")
    await client.registry.refresh()
    assert (statuses, client.changes[-1]) == ([200, 304, 200], ["a", "b"])
    assert client.registry.resolve("x") is client.registry.resolve("a")


async def test_what_is_deleted_in_the_registry_is_gone(connect: Start, real: str, store: Store) -> None:
    put(store, "a")
    put(store, "b")
    client = connect(real)
    await client.registry.refresh()
    store.delete("a")
    await client.registry.refresh()

    assert client.names == ["b"]
    with pytest.raises(ModelNotFound):
        client.registry.resolve("a")


async def test_a_router_takes_its_models_from_the_registry(
    real: str, store: Store, start_engine: Start, start_router: Start
) -> None:
    engine = await start_engine()
    served = await start_router(registry_url=real, models=[{"name": "m"}])
    # An empty one is believed the second time.
    assert (await served.client.get("/readyz")).json() == {"status": "ready", "catalogue": "static", "models": 1}
    await served.router.core.registry.refresh()
    assert (await served.client.get("/readyz")).json() == {"status": "ready", "catalogue": "registry", "models": 0}
    assert (await served.chat()).status_code == 404

    put(store, "m", backends=[{"url": engine.url}])
    await served.router.core.registry.refresh()

    assert (await served.chat()).status_code == 200
    assert (await served.client.get("/v1/models")).json()["data"][0]["id"] == "m"
    assert await served.metric("inference_api_registry_models", source="registry") == 1
    assert await served.metric("inference_api_registry_last_success_timestamp_seconds") > time.time() - 60


# Looking


async def test_one_that_stops_waiting_does_not_stop_the_look(connect: Start, httpx_mock: HTTPXMock) -> None:
    answering = asyncio.Event()

    async def answer(request: httpx.Request) -> httpx.Response:
        await answering.wait()
        return httpx.Response(200, json=listing("a"))

    httpx_mock.add_callback(answer)
    client = connect()
    patient, impatient = (asyncio.create_task(client.registry.refresh()) for _ in range(2))
    await until(httpx_mock.get_requests)
    impatient.cancel()
    with pytest.raises(asyncio.CancelledError):
        await impatient
    answering.set()
    await patient

    assert client.names == ["a"]


async def test_each_failure_in_a_row_doubles_the_pause_and_an_answer_ends_that(
    connect: Start, httpx_mock: HTTPXMock
) -> None:
    polls: list[float] = []

    def answer(request: httpx.Request) -> httpx.Response:
        polls.append(asyncio.get_running_loop().time())
        return httpx.Response(500) if len(polls) < 6 else httpx.Response(200, json=listing("a"))

    httpx_mock.add_callback(answer, is_reusable=True)
    client = connect(refresh=0.02, rand=lambda: 0.99)
    task = asyncio.create_task(client.registry.run())
    await until(lambda: len(polls) >= 12)
    task.cancel()
    gaps = [later - earlier for earlier, later in pairwise(polls)]

    # A busy machine only adds to a gap; the loop's clock ticks in milliseconds.
    for gap, longest in zip(gaps[:5], [0.02, 0.04, 0.08, 0.16, 0.32], strict=True):
        assert 0.99 * longest - 0.004 <= gap < 0.99 * longest + 10
    assert min(gaps[5:]) < 0.3


async def test_the_loop_outlives_failures_and_ends_when_cancelled(
    connect: Start, httpx_mock: HTTPXMock, caplog: pytest.LogCaptureFixture
) -> None:
    refused = httpx.ConnectError("All connection attempts failed")
    refused.__cause__ = ConnectionRefusedError(errno.ECONNREFUSED, "x")
    httpx_mock.add_exception(refused)
    httpx_mock.add_response(500)
    httpx_mock.add_response(json=listing("a"), is_reusable=True)
    client = connect(refresh=0.01)
    task = asyncio.create_task(client.registry.run())
    await until(lambda: client.names == ["a"])
    task.cancel()

    with pytest.raises(asyncio.CancelledError):
        await task
    assert client.registry.status().failures == {"connect": 1, "status": 1}
    assert caplog.messages[0] == "the registry cannot be used: it cannot be reached (connection refused)"


async def test_a_failure_nobody_thought_of_does_not_end_the_loop(connect: Start, httpx_mock: HTTPXMock) -> None:
    httpx_mock.add_exception(RuntimeError("the transport has a bug"))
    httpx_mock.add_response(json=listing("a"), is_reusable=True, is_optional=True)
    client = connect(refresh=0.01)
    task = asyncio.create_task(client.registry.run())
    try:
        await until(lambda: client.names == ["a"])
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError, RuntimeError):
            await task


async def test_without_a_registry_there_is_nothing_to_look_at() -> None:
    client = Client(None)
    await client.registry.start()
    await asyncio.wait_for(client.registry.run(), 1)

    assert client.names == ["s"]
    assert client.registry.status() == ("static", 1, 0.0, {})


# The start


async def test_the_first_look_comes_before_the_first_request(connect: Start, httpx_mock: HTTPXMock) -> None:
    httpx_mock.add_response(json=listing("a"))
    client = connect()
    await client.registry.start()

    assert client.names == ["a"]
    assert client.registry.source == "registry"


async def test_a_registry_that_hangs_delays_the_start_only_so_long(connect: Start, start_server: Start) -> None:
    late = asyncio.Event()

    async def script(request: Received, line: Line) -> None:
        await late.wait()
        await line.send(json_response(listing("a")))

    client = connect((await start_server(script)).url, cold_start=0.05)
    await asyncio.wait_for(client.registry.start(), 5)
    assert (client.names, client.registry.source) == (["s"], "static")
    assert client.registry.status().failures == {"timeout": 1}

    late.set()
    await client.registry.refresh()
    assert client.names == ["a"]


# What can go wrong

FAULTS: dict[str, tuple[str, dict[str, Any]]] = {
    "a 404": ("status", {"status_code": 404, "json": listing("x")}),
    "a 500": ("status", {"status_code": 500, "json": listing("x")}),
    "a 204": ("status", {"status_code": 204}),
    "a redirect": ("status", {"status_code": 302, "headers": {"location": "http://169.254.169.254/models"}}),
    "nothing": ("garbage", {"content": b""}),
    "HTML": ("garbage", {"html": "<html>captive portal</html>"}),
    "half of it": ("garbage", {"content": b'{"models": [{"name": "a"}'}),
    "not UTF-8": ("garbage", {"content": b'{"models": [{"name": "\xff"}]}'}),
    "too deep": ("garbage", {"content": b'{"models":' + b"[" * 100_000}),
    "a list": ("garbage", {"json": [{"name": "x"}]}),
    "a mapping of models": ("garbage", {"json": {"models": {"x": {}}}}),
    "only refused entries": ("garbage", {"json": listing("x", backends=[{"url": "http://169.254.169.254"}])}),
}


async def assert_kept(client: Client, reason: str | None = None) -> None:
    """The second look fails, and all that was known stays."""
    await client.registry.refresh()
    before = client.registry.status()
    assert before[:2] == ("registry", 1)
    async with asyncio.timeout(60):
        await client.registry.refresh()
    status = client.registry.status()

    assert client.names == ["a"]
    assert client.changes == [["a"]]
    assert status[:3] == before[:3]
    assert sum(status.failures.values()) == 1
    assert reason is None or status.failures == {reason: 1}


async def test_an_unchanged_that_was_not_asked_for_is_no_answer(connect: Start, httpx_mock: HTTPXMock) -> None:
    httpx_mock.add_response(status_code=304)
    client = connect()
    await client.registry.refresh()

    assert client.registry.status()[::3] == ("static", {"status": 1})
    assert client.names == ["s"]


@pytest.mark.parametrize("fault", FAULTS)
async def test_a_bad_answer_leaves_the_last_good_catalogue(connect: Start, httpx_mock: HTTPXMock, fault: str) -> None:
    reason, response = FAULTS[fault]
    httpx_mock.add_response(json=listing("a"), headers={"etag": '"1"'})
    httpx_mock.add_response(**response)

    await assert_kept(connect(), reason)


@pytest.mark.parametrize(
    ("exception", "reason"),
    [
        (httpx.ConnectTimeout("slow"), "timeout"),
        (httpx.ReadTimeout("slow"), "timeout"),
        (httpx.ConnectError("no such name"), "connect"),
        (httpx.RemoteProtocolError("broken"), "connect"),
        (httpx.InvalidURL("a redirect to nowhere"), "connect"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else value,
)
async def test_no_answer_leaves_the_last_good_catalogue(
    connect: Start, httpx_mock: HTTPXMock, exception: Exception, reason: str
) -> None:
    httpx_mock.add_response(json=listing("a"))
    httpx_mock.add_exception(exception)

    await assert_kept(connect(), reason)


HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n"


async def drip(request: Received, line: Line) -> None:
    """A byte now and then: never long enough without one for a timeout between two reads."""
    await line.send(HEAD, b"content-length: 1000000\r\n\r\n")
    while not line.writer.is_closing():
        await line.send(b" ")
        await asyncio.sleep(0.02)


async def pour(request: Received, line: Line) -> None:
    """A body without an end."""
    await line.send(HEAD, b"\r\n")
    while not line.writer.is_closing():
        await line.send(b" " * 65536)


WIRE: dict[str, tuple[str, Script]] = {
    "hangs": ("timeout", hang),
    "drips": ("timeout", drip),
    "never ends": ("garbage", pour),
    "breaks off": ("connect", raw(HEAD, b'content-length: 100\r\n\r\n{"models": [', close=True)),
    "closes": ("connect", raw(close=True)),
    "is no HTTP": ("connect", raw(b"SSH-2.0-OpenSSH_9.9\r\n", close=True)),
}


@pytest.mark.parametrize("fault", WIRE)
async def test_a_registry_that_fails_on_the_wire_leaves_the_last_good_catalogue(
    connect: Start, start_server: Start, fault: str
) -> None:
    reason, script = WIRE[fault]
    good = raw(json_response(listing("a")))

    async def turn(request: Received, line: Line) -> None:
        await (good if len(server.requests) == 1 else script)(request, line)

    server = await start_server(turn)

    # Longer than a busy machine stands still, as the first answer must come in time.
    patience = 2.0 if reason == "timeout" else 30.0
    await assert_kept(connect(server.url, patience, timeout=patience, max_bytes=1 << 20), reason)


async def test_a_registry_that_is_down_leaves_the_last_good_catalogue_until_it_is_back(
    connect: Start, start_server: Start, caplog: pytest.LogCaptureFixture
) -> None:
    now = [0.0]
    server = await start_server(raw(json_response(listing("a"))))
    client = connect(server.url, refresh=10, clock=lambda: now[0])
    await client.registry.refresh()
    await server.stop()
    caplog.clear()
    caplog.set_level(logging.INFO, "inference_api")
    for now[0] in (10.0, 20.0, 30.0, 3600.0):
        await client.registry.refresh()
        assert client.names == ["a"]
    assert client.registry.status()[::3] == ("stale", {"connect": 4})

    await server.__aenter__()
    await client.registry.refresh()
    assert client.registry.source == "registry"
    assert "the registry answers" in caplog.messages
    # Once it is known to be down the age of its catalogue is news, and nothing else; when it is down again that is.
    await server.stop()
    await client.registry.refresh()
    assert [message.partition(":")[0] for message in caplog.messages] == [
        "the registry cannot be used",
        "the registry's catalogue is stale, and stays in use until the registry answers",
        "the registry answers",
        "the registry cannot be used",
    ]


async def test_another_reason_of_a_failure_is_news(
    connect: Start, httpx_mock: HTTPXMock, caplog: pytest.LogCaptureFixture
) -> None:
    for answer in ({"status_code": 500}, {"status_code": 500}, {"text": "garbage"}, {"status_code": 500}):
        httpx_mock.add_response(**answer)
    client = connect()
    for _ in range(4):
        await client.registry.refresh()

    assert [message.partition(" (")[0][:60] for message in caplog.messages] == [
        "the registry cannot be used: it answered with the status 500",
        "the registry cannot be used: its answer is not a catalogue: ",
        "the registry cannot be used: it answered with the status 500",
    ]


async def test_each_change_of_the_catalogue_is_told(
    connect: Start, httpx_mock: HTTPXMock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "inference_api")
    other = {"models": [{"name": "b", "engine": "tgi"}, *({"name": f"m{number}"} for number in range(11))]}
    answers(httpx_mock, listing("a", "b"), listing("a", "b"), other)
    client = connect()
    for _ in range(3):
        await client.registry.refresh()

    told = [record.fields for record in caplog.records if record.message == "the catalogue has changed"]  # type: ignore[attr-defined]
    shown = [f"m{number}" for number in range(10)]
    assert told == [
        {"models": 2, "added": ["a", "b"], "removed": ["s"]},
        {"models": 12, "added": [*shown, "and 1 more"], "removed": ["a"], "changed": ["b"]},
    ]


async def test_a_catalogue_counts_as_live_for_two_and_a_half_looks(connect: Start, httpx_mock: HTTPXMock) -> None:
    now = [1000.0]
    httpx_mock.add_response(json=listing("a"), headers={"etag": '"1"'})
    httpx_mock.add_response(304)
    client = connect(refresh=10, clock=lambda: now[0])
    await client.registry.refresh()

    sources = []
    for now[0] in (1024.9, 1025.1, 5000.0):
        sources.append(client.registry.source)
    await client.registry.refresh()

    assert sources == ["registry", "stale", "stale"]
    assert client.registry.source == "registry"
    assert client.registry.resolve("a").name == "a"


async def test_a_registry_that_never_answered_leaves_the_static_catalogue(
    connect: Start, httpx_mock: HTTPXMock, caplog: pytest.LogCaptureFixture
) -> None:
    httpx_mock.add_response(503, is_reusable=True)
    client = connect()
    for _ in range(5):
        await client.registry.refresh()

    assert client.registry.status() == ("static", 1, 0.0, {"status": 5})
    assert client.names == ["s"]
    assert caplog.messages == ["the registry cannot be used: it answered with the status 503"]


async def test_the_static_catalogue_never_mixes_with_the_registrys(connect: Start, httpx_mock: HTTPXMock) -> None:
    httpx_mock.add_response(json=listing("a"))
    httpx_mock.add_response(500)
    client = connect()
    await client.registry.refresh()
    await client.registry.refresh()

    with pytest.raises(ModelNotFound):
        client.registry.resolve("s")


@pytest.mark.parametrize("etag", ['"\u00e9"', "x" * 257, '"a\tb"'], ids=["not ASCII", "long", "a control character"])
async def test_an_etag_that_could_not_be_sent_back_is_not(connect: Start, start_server: Start, etag: str) -> None:
    good = json_response(listing("a"), headers=b"etag: " + etag.encode() + b"\r\n")
    server = await start_server(raw(good))
    client = connect(server.url)
    await client.registry.refresh()
    await client.registry.refresh()

    assert client.registry.status().failures == {}
    assert [request.header("if-none-match") for request in server.requests] == [None, None]


async def test_a_compressed_answer_is_neither_asked_for_nor_unpacked(connect: Start, start_server: Start) -> None:
    bomb = gzip.compress(orjson.dumps(listing("b", owner="o" * 100)))
    head = b"HTTP/1.1 200 OK\r\ncontent-encoding: gzip\r\ncontent-length: %d\r\n\r\n" % len(bomb)

    async def turn(request: Received, line: Line) -> None:
        await raw(json_response(listing("a")) if len(server.requests) == 1 else head + bomb)(request, line)

    server = await start_server(turn)
    await assert_kept(connect(server.url), "garbage")
    assert {request.header("accept-encoding") for request in server.requests} == {"identity"}


async def test_a_redirect_is_not_followed_whatever_the_client_would_do(httpx_mock: HTTPXMock) -> None:
    httpx_mock.add_response(302, headers={"location": "http://169.254.169.254/models"})
    async with httpx.AsyncClient(base_url="http://registry", follow_redirects=True) as http:
        client = Client(http)
        await client.registry.refresh()

    assert client.registry.status().failures == {"status": 1}
    assert len(httpx_mock.get_requests()) == 1


# Suddenly empty


def answers(httpx_mock: HTTPXMock, *said: Any) -> None:
    """One answer per look: a listing, or a status."""
    for number, one in enumerate(said):
        if isinstance(one, int):
            httpx_mock.add_response(one)
        else:
            httpx_mock.add_response(json=one, headers={"etag": f'"{number}"'})


async def test_a_look_that_found_nothing_says_so_once(
    connect: Start, httpx_mock: HTTPXMock, caplog: pytest.LogCaptureFixture
) -> None:
    answers(httpx_mock, listing("a"), listing(), listing())
    client = connect()
    for _ in range(3):
        await client.registry.refresh()

    assert sum("lists no models" in message for message in caplog.messages) == 1
    assert client.registry.status()[:2] == ("registry", 0)


@pytest.mark.parametrize(
    ("said", "known"),
    [
        ([listing("a"), listing()], ["a"]),
        ([listing("a"), listing(), listing()], []),
        ([listing("a"), listing(), listing("b"), listing()], ["b"]),
        ([listing("a"), listing(), 304, listing()], ["a"]),
        ([listing("a"), listing(), listing(), listing("b")], ["b"]),
        ([listing("a"), listing(), listing(), listing("b"), listing()], ["b"]),
        # Of one that begins empty
        ([listing()], ["s"]),
        ([listing(), listing()], []),
        ([listing(), 500, listing()], ["s"]),
        ([listing(), listing("a")], ["a"]),
        ([500, listing()], ["s"]),
    ],
)
async def test_no_models_at_all_is_believed_when_said_twice_in_a_row(
    connect: Start, httpx_mock: HTTPXMock, said: list[Any], known: list[str]
) -> None:
    answers(httpx_mock, *said)
    client = connect()
    for _ in said:
        await client.registry.refresh()

    assert client.names == known
    assert (client.registry.source == "static") == (known == ["s"])


async def test_where_nothing_is_served_an_empty_registry_is_believed_at_once(
    connect: Start, httpx_mock: HTTPXMock
) -> None:
    answers(httpx_mock, listing())
    client = connect()
    client.fleet.update({})
    await client.registry.refresh()

    assert client.registry.status()[:2] == ("registry", 0)


# What is the same, and what is news


async def test_an_answer_that_says_the_same_changes_nothing(
    connect: Start, httpx_mock: HTTPXMock, caplog: pytest.LogCaptureFixture
) -> None:
    httpx_mock.add_response(json={"models": [{"name": "a"}, {"name": "bad", "engine": "x"}]}, is_reusable=True)
    client = connect()
    for _ in range(3):
        await client.registry.refresh()

    assert client.changes == [["a"]]
    assert sum("is refused" in message for message in caplog.messages) == 1


async def test_a_new_fault_beside_the_same_models_is_told(
    connect: Start, httpx_mock: HTTPXMock, caplog: pytest.LogCaptureFixture
) -> None:
    answers(httpx_mock, listing("a"), {"models": [{"name": "a"}, {"name": "bad", "engine": "x"}]})
    client = connect()
    await client.registry.refresh()
    await client.registry.refresh()

    [message] = caplog.messages
    assert message.startswith("an entry of the registry is refused: model 'bad': engine 'x': must be vllm, ")


async def test_keys_of_a_newer_registry_are_ignored_and_told_once(
    connect: Start, httpx_mock: HTTPXMock, caplog: pytest.LogCaptureFixture
) -> None:
    newer = {
        "name": "a",
        "backends": [{"url": "http://a:1", "zone": "x"}, "http://b:1", {"url": "http://c:1", "zone": "y", "rack": 1}],
        "credentials": {"env": "BACKEND_A", "kind": "x"},
        "colour": "red",
    }
    other = {"models": [newer, {"name": "b", "colour": 1}], "version": 2}
    answers(httpx_mock, {"models": [newer], "version": 2}, {"models": [newer], "version": 2}, other)
    client = connect()
    for _ in range(3):
        await client.registry.refresh()

    assert client.names == ["a", "b"]
    entry = client.fleet.models["a"].entry
    assert [backend.url for backend in entry.backends] == ["http://a:1", "http://b:1", "http://c:1"]
    assert isinstance(entry.credentials, Credentials)
    assert caplog.messages == [
        "unknown keys in the registry's entries are ignored: backends.rack, backends.zone, colour, credentials.kind"
    ]


async def test_an_entry_of_unknown_keys_is_refused(connect: Start, httpx_mock: HTTPXMock) -> None:
    hostile = {"name": "bad", **{f"key{number}": 1 for number in range(200_000)}}
    answers(httpx_mock, {"models": [{"name": "a"}, hostile]})
    client = connect()
    async with asyncio.timeout(10):
        await client.registry.refresh()

    assert client.names == ["a"]


async def test_what_is_not_valid_beside_an_unknown_key_is_refused(
    connect: Start, httpx_mock: HTTPXMock, caplog: pytest.LogCaptureFixture
) -> None:
    answers(httpx_mock, {"models": [{"name": "a"}, {"name": "bad", "colour": 1, "engine": "x"}]})
    client = connect()
    await client.registry.refresh()

    assert client.names == ["a"]
    assert any("model 'bad': engine 'x': must be" in message for message in caplog.messages)


# Resolving


async def test_an_unknown_name_is_refused_with_the_known_ones_when_they_are_few() -> None:
    client = Client(None)

    with pytest.raises(ModelNotFound, match=r"The model 'nope' does not exist\. Known models: s\."):
        client.registry.resolve("nope")
    client.fleet.update(parse_catalogue(listing(*(f"m{number}" for number in range(11)))))
    with pytest.raises(ModelNotFound, match="GET /v1/models lists them"):
        client.registry.resolve("nope")


async def test_a_static_entry_that_is_refused_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    Registry(Fleet(make_balancer), parse_catalogue({"models": [{"name": "m", "x": 1}]}))

    message = "an entry of the static catalogue is refused: model 'm': unknown key 'x'"
    assert caplog.messages == [message]
