"""Asking backends for their load, and whether they sleep: what engines say, what counts, and what must not."""

import asyncio
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inference_api.discovery.engine_metrics import EngineMetrics
from inference_api.discovery.gauges import Gauges
from inference_api.routing.backend import Origin, Reading
from inference_api.routing.balance import make_balancer
from inference_api.routing.catalogue import parse_catalogue
from inference_api.routing.entries import Engine
from inference_api.routing.fleet import Fleet
from inference_api.upstream.transport import Transport
from tests.fakes import Line, Received, Script, chunk, hang, json_response, raw, until

pytestmark = pytest.mark.anyio
Start = Callable[..., Any]

VLLM = """\
# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="m"} 3.0
# HELP vllm:num_requests_waiting Number of requests waiting to be processed.
# TYPE vllm:num_requests_waiting gauge
vllm:num_requests_waiting{engine="0",model_name="m"} 2.0
vllm:num_requests_waiting_by_reason{engine="0",model_name="m",reason="capacity"} 50.0
# TYPE vllm:kv_cache_usage_perc gauge
vllm:kv_cache_usage_perc{engine="0",model_name="m"} 0.25
vllm:prompt_tokens_total{engine="0",model_name="m"} 12345.0
"""
TWO_CORES = """\
vllm:num_requests_running{engine="0",model_name="m"} 3.0
vllm:num_requests_running{engine="1",model_name="m"} 4.0
vllm:num_requests_waiting{engine="0",model_name="m"} 0.0
vllm:num_requests_waiting{engine="1",model_name="m"} 1.0
vllm:kv_cache_usage_perc{engine="0",model_name="m"} 0.5
vllm:kv_cache_usage_perc{engine="1",model_name="m"} 0.25
"""
OLD_VLLM = (
    'vllm:num_requests_running{m="a"} 1\nvllm:num_requests_waiting{m="a"} 0\nvllm:gpu_cache_usage_perc{m="a"} 1\n'
)
TGI = """\
# TYPE tgi_queue_size gauge
tgi_queue_size 7
# TYPE tgi_batch_current_size gauge
tgi_batch_current_size 5
tgi_batch_current_max_tokens 9999
"""
SGLANG = """\
# TYPE sglang:num_running_reqs gauge
sglang:num_running_reqs{engine_type="unified",model_name="m",pp_rank="0",tp_rank="0"} 6.0
sglang:num_running_reqs_offline_batch{engine_type="unified",model_name="m"} 40.0
sglang:num_queue_reqs{engine_type="unified",model_name="m",pp_rank="0",tp_rank="0"} 4.0
sglang:num_grammar_queue_reqs{engine_type="unified",model_name="m"} 30.0
sglang:token_usage{engine_type="unified",model_name="m",pp_rank="0",tp_rank="0"} 0.28
"""
LLAMA_CPP = """\
# HELP llamacpp:requests_processing Number of requests processing.
# TYPE llamacpp:requests_processing gauge
llamacpp:requests_processing 4
# HELP llamacpp:requests_deferred Number of requests deferred.
# TYPE llamacpp:requests_deferred gauge
llamacpp:requests_deferred 9
llamacpp:n_busy_slots_per_decode 3.5
"""
ODD_LABELS = 'vllm:num_requests_running{m="a} 9 \\" {"} 1e1 1700000000\nvllm:num_requests_waiting 0 1700000000'


def sleep_states(awake: int, engine: int = 0, offloaded: int = 0) -> str:
    labels = f'engine="{engine}",model_name="m"'
    return (
        f'vllm:engine_sleep_state{{{labels},sleep_state="awake"}} {awake}.0\n'
        f'vllm:engine_sleep_state{{{labels},sleep_state="weights_offloaded"}} {offloaded}.0\n'
        f'vllm:engine_sleep_state{{{labels},sleep_state="discard_all"}} 0.0\n'
    )


def fed(*parts: bytes, engine: Engine = "vllm", sleep_only: bool = False) -> Gauges:
    gauges = Gauges(engine, sleep_only)
    for part in parts:
        gauges.feed(part)
    return gauges


def read(*parts: bytes, engine: Engine = "vllm") -> Reading:
    return fed(*parts, engine=engine).reading()


# What engines say


@pytest.mark.parametrize(
    ("engine", "page", "reading"),
    [
        ("vllm", VLLM, (3, 2, 0.25)),
        ("vllm", TWO_CORES, (7, 1, 0.375)),
        ("vllm", OLD_VLLM, (1, 0, 1)),
        ("tgi", TGI, (5, 7, None)),
        ("sglang", SGLANG, (6, 4, 0.28)),
        ("llamacpp", LLAMA_CPP, (4, 9, None)),
        ("vllm", ODD_LABELS, (10, 0, None)),
    ],
    ids=["vllm", "two cores", "an old vllm", "tgi", "sglang", "llama.cpp", "odd labels"],
)
def test_the_load_is_read_from_what_engines_say(engine: Engine, page: str, reading: tuple[float, ...]) -> None:
    assert read(page.encode(), engine=engine) == reading
    assert read(page.replace("\n", "\r\n").encode(), engine=engine) == reading


@pytest.mark.parametrize(
    ("page", "asleep"),
    [
        (sleep_states(1), False),
        (sleep_states(0, offloaded=1), True),
        # Half awake: its weights are there, its cache is not.
        (sleep_states(0), True),
        (sleep_states(1) + sleep_states(0, engine=1), True),
        (sleep_states(1) + sleep_states(1, engine=1), False),
        (sleep_states(1).replace("\n", " 1700000000\n"), False),
        ("", None),
        ('vllm:engine_sleep_state{sleep_state="discard_all"} 1.0\n', None),
    ],
    ids=[
        "awake",
        "asleep",
        "half awake",
        "one of two cores",
        "both awake",
        "a timestamp",
        "an old vllm",
        "other states",
    ],
)
@pytest.mark.parametrize("around", [("", ""), (VLLM, VLLM)])
@pytest.mark.parametrize("sleep_only", [False, True])
def test_whether_it_sleeps_is_read_from_what_vllm_says(
    page: str, asleep: bool | None, around: tuple[str, str], sleep_only: bool
) -> None:
    gauges = fed((around[0] + page + around[1]).encode(), sleep_only=sleep_only)

    assert gauges.asleep() is asleep


def test_who_asks_for_the_sleep_only_need_not_read_what_follows_it() -> None:
    gauges, states = fed(VLLM.encode(), sleep_only=True), (sleep_states(1) + sleep_states(1, engine=1)).encode()
    told = []
    for part in (states[:60], states[60:200], states[200:], b"# HELP", b" vllm:next\n", VLLM.encode()):
        gauges.feed(part)
        told.append(gauges.complete)

    assert told == [False, False, False, False, True, True]
    assert not fed(VLLM.encode(), states, VLLM.encode()).complete


@given(st.lists(st.integers(0, len(VLLM)), max_size=8))
def test_it_does_not_matter_how_the_bytes_arrive(cuts: list[int]) -> None:
    data, edges = VLLM.encode(), [0, *sorted(cuts), len(VLLM)]

    assert read(*(data[a:b] for a, b in pairwise(edges))) == (3, 2, 0.25)


@pytest.mark.parametrize(
    "page",
    [
        "",
        "<html>",
        "vllm:num_requests_running 1\n",
        "vllm:num_requests_running 1\nvllm:num_requests_waiting\n",
        'vllm:num_requests_running 1\nvllm:num_requests_waiting{a="b"}\n',
        "vllm:num_requests_running 1\nvllm:num_requests_waiting NaN\n",
        "vllm:num_requests_running 1\nvllm:num_requests_waiting -1\n",
        "vllm:num_requests_running 1\nvllm:num_requests_waiting +Inf\n",
        "vllm:num_requests_running 1\nvllm:num_requests_waiting{a=\n",
        "vllm:num_requests_running 1\nvllm:num_requests_waiting many\n",
        "x" * 70_000,
        "x\n" * 3_000_000,
    ],
    ids=[
        *(
            "empty",
            "html",
            "half of it",
            "no value",
            "no value of a label",
            "not a number",
            "negative",
            "infinite",
            "cut",
            "a word",
        ),
        *("a long line", "a long page"),
    ],
)
def test_what_does_not_tell_the_load_is_refused(page: str) -> None:
    with pytest.raises(ValueError, match=r"load|not in Prometheus|could not convert"):
        read(page.encode())


@pytest.mark.parametrize("page", [b"x" * 70_000, b"x\n" * 3_000_000], ids=["a line", "a page"])
def test_what_is_too_long_is_refused_before_it_ends(page: bytes) -> None:
    with pytest.raises(ValueError, match="not in Prometheus"):
        Gauges("vllm").feed(page)


def test_a_cache_that_is_more_than_full_is_not_shown() -> None:
    assert read(VLLM.replace("0.25", "25").encode()) == (3, 2, None)


@given(st.binary(max_size=200))
def test_any_bytes_are_a_reading_or_refused(data: bytes) -> None:
    for page in (data, VLLM.encode() + data, b"\nvllm:num_requests_running" + data):
        try:
            reading = read(page)
        except ValueError:
            continue
        assert reading.running >= 0
        assert reading.waiting >= 0


# Asking


def page(running: float, waiting: float) -> Script:
    text = f"vllm:num_requests_running {running}\nvllm:num_requests_waiting {waiting}\n".encode()
    return raw(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(text) + text)


def note_sleep(origin: Origin, asleep: bool | None) -> None:
    origin.asleep = asleep


class Asking:
    """An EngineMetrics over one model, at a time that the test sets."""

    def __init__(
        self, transport: Transport, *urls: str, every: float = 10.0, sleep_only: bool = False, **more: Any
    ) -> None:
        """`more`: options of EngineMetrics, and keys of the entry."""
        options = {name: more.pop(name) for name in ("timeout", "concurrency") if name in more}
        self.now = 1000.0
        self.failed: list[Origin] = []
        self.last_byte_at = 0.0
        self.fleet = Fleet(make_balancer)
        document = {"models": [{"name": "m", "backends": [{"url": url} for url in urls], **more}]}
        self.fleet.update(parse_catalogue(document))
        self.backends = self.fleet.models["m"].backends
        self.signal = EngineMetrics(
            self.fleet,
            transport,
            every,
            self.failed.append,
            note_sleep,
            sleep_only=sleep_only,
            last_byte_at=lambda url: self.last_byte_at,
            clock=lambda: self.now,
            wall=lambda: 5.0,
            **options,
        )

    async def poll(self) -> list[float]:
        """What others have put on each backend, after one look."""
        async with asyncio.timeout(20):
            await self.signal.poll()
        return [backend.origin.reported for backend in self.backends]


async def test_what_is_not_our_own_is_others(start: Start, transport: Transport) -> None:
    servers = [await start(page(3, 2)), await start(page(1, 0)), await start(page(0, 0))]
    asking = Asking(transport, *(server.url for server in servers))
    first, second, _ = asking.backends
    first.origin.in_flight, second.origin.in_flight = 4, 2

    # Of the second one's own, one has not arrived there yet.
    assert await asking.poll() == [1, 0, 0]
    assert [backend.origin.reading for backend in asking.backends] == [(3, 2, None), (1, 0, None), (0, 0, None)]
    assert {backend.origin.scraped_at for backend in asking.backends} == {5.0}
    [request] = servers[0].requests
    assert (request.method, request.target) == ("GET", "/metrics")
    assert request.header("accept-encoding") == "identity"


async def test_requests_that_end_meanwhile_are_not_taken_for_others(start: Start, transport: Transport) -> None:
    async def script(request: Received, line: Line) -> None:
        asking.backends[0].origin.in_flight = 0
        await page(5, 0)(request, line)

    asking = Asking(transport, (await start(script)).url)
    asking.backends[0].origin.in_flight = 5

    assert await asking.poll() == [0]


async def test_requests_that_come_meanwhile_are_not_taken_for_others(start: Start, transport: Transport) -> None:
    async def script(request: Received, line: Line) -> None:
        asking.backends[0].origin.in_flight = 5
        await page(5, 0)(request, line)

    asking = Asking(transport, (await start(script)).url)

    assert await asking.poll() == [0]


async def test_an_engine_of_two_models_is_asked_once_and_the_requests_of_both_are_own(
    start: Start, transport: Transport
) -> None:
    server = await start(page(5, 0))
    asking = Asking(transport, server.url)
    both = [{"name": name, "backends": [{"url": server.url}]} for name in ("m", "n")]
    asking.fleet.update(parse_catalogue({"models": both}))
    m, n = (model.backends[0] for model in asking.fleet.models.values())
    assert m.origin is n.origin
    m.origin.in_flight = 4
    await asking.poll()

    assert (m.origin.reported, n.origin.reported) == (1, 1)
    assert len(server.requests) == 1


async def test_an_engine_of_which_only_the_api_is_known_is_not_asked(start: Start, transport: Transport) -> None:
    server = await start(page(5, 0))
    asking = Asking(transport, server.url, engine="openai")

    assert await asking.poll() == [0]
    assert server.requests == []
    assert asking.failed == []


async def endless(request: Received, line: Line) -> None:
    await line.send(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
    while not line.writer.is_closing():
        await line.send(chunk(b"some_metric 1\n" * 4000))


async def dripping(request: Received, line: Line) -> None:
    await line.send(b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\n")
    while not line.writer.is_closing():
        await line.send(b"\n")
        await asyncio.sleep(0.02)


SILENT: dict[str, Script] = {
    "hangs": hang,
    "drips": dripping,
    "never ends": endless,
    "closes": raw(close=True),
    "breaks off": raw(b"HTTP/1.1 200 OK\r\ncontent-length: 99\r\n\r\nvllm:", close=True),
    "a 404": raw(json_response({"detail": "Not Found"}, "404 Not Found")),
    "a redirect": raw(json_response({}, "302 Found", b"location: http://169.254.169.254/metrics\r\n")),
    "JSON": raw(json_response({})),
}


@pytest.mark.parametrize("fault", SILENT)
async def test_a_backend_that_does_not_tell_counts_as_without_the_signal(
    start: Start, transport: Transport, fault: str
) -> None:
    bad, good = await start(SILENT[fault]), await start(page(4, 0))
    asking = Asking(transport, bad.url, good.url, timeout=0.8)

    assert await asking.poll() == [0, 4]
    assert asking.failed == [asking.backends[0].origin]
    assert (asking.backends[0].origin.reading, asking.backends[0].origin.scraped_at) == (None, 0.0)
    assert bad.connections == 1
    if fault == "never ends":
        await until(lambda: bad.open == 0)


async def test_what_is_old_is_dropped(start: Start, transport: Transport) -> None:
    server = await start(page(4, 0))
    asking = Asking(transport, server.url)
    assert await asking.poll() == [4]
    server.script = raw(close=True)
    reported = []
    for asking.now in (1010.0, 1020.0, 1020.1, 1030.0):
        reported += await asking.poll()

    assert reported == [4, 4, 0, 0]
    assert asking.backends[0].origin.reading is None
    # When it last told stays known.
    assert asking.backends[0].origin.scraped_at == 5.0
    server.script = page(2, 0)
    assert await asking.poll() == [2]


async def test_a_backend_that_comes_back_brings_nothing_old(start: Start, transport: Transport) -> None:
    server = await start(page(4, 0))
    asking = Asking(transport, server.url)
    await asking.poll()
    [backend] = asking.backends
    backend.in_flight = backend.origin.in_flight = 1
    asking.fleet.update(parse_catalogue({"models": [{"name": "m"}]}))
    await asking.poll()
    server.script = raw(close=True)
    asking.fleet.update(parse_catalogue({"models": [{"name": "m", "backends": [{"url": server.url}]}]}))
    await asking.poll()

    assert asking.fleet.models["m"].backends == (backend,)
    assert (backend.origin.reported, backend.origin.reading) == (0, None)


async def test_a_backend_that_tells_again_is_not_put_last(start: Start, transport: Transport) -> None:
    asked: list[str] = []

    def noting(name: str, script: Script) -> Script:
        async def note(request: Received, line: Line) -> None:
            asked.append(name)
            await script(request, line)

        return note

    silent, again = await start(noting("silent", raw(close=True))), await start(noting("again", raw(close=True)))
    asking = Asking(transport, silent.url, again.url, concurrency=1)
    await asking.poll()
    again.script = noting("again", page(4, 0))
    await asking.poll()
    asked.clear()

    assert await asking.poll() == [0, 4]
    assert asked == ["again", "silent"]


async def test_backends_that_hang_delay_only_each_other(start: Start, transport: Transport) -> None:
    hanging, good = [await start(hang) for _ in range(4)], await start(page(4, 0))
    asking = Asking(transport, *(server.url for server in hanging), good.url, every=3, concurrency=2)

    # The first look ends with its interval; after it those that hang are known.
    await asking.poll()
    assert (await asking.poll())[-1] == 4


async def test_it_goes_on_until_cancelled_and_outlives_faults(
    start: Start, transport: Transport, caplog: pytest.LogCaptureFixture
) -> None:
    server = await start(page(4, 0))
    asking = Asking(transport, server.url, every=0.02)
    models, asking.fleet.models = asking.fleet.models, None  # type: ignore[assignment]
    task = asyncio.create_task(asking.signal.run())
    await until(lambda: "polling the metrics of engines failed" in caplog.messages)
    asking.fleet.models = models
    await until(lambda: len(server.requests) > 2)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task

    assert asking.backends[0].origin.reported == 4


# Asking whether they sleep


def telling(text: str) -> Script:
    return raw(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(text) + text.encode())


@pytest.mark.parametrize("sleep_only", [False, True])
async def test_a_backend_tells_when_it_sleeps_and_when_it_wakes(
    start: Start, transport: Transport, sleep_only: bool
) -> None:
    server = await start(telling(sleep_states(0) + VLLM))
    asking = Asking(transport, server.url, sleep_only=sleep_only)
    [backend] = asking.backends
    await asking.poll()
    assert backend.origin.asleep is True
    assert (backend.origin.reading is None) == sleep_only
    server.script = telling(sleep_states(1) + VLLM)
    await asking.poll()

    assert backend.origin.asleep is False


@pytest.mark.parametrize("fault", SILENT)
async def test_a_backend_that_does_not_tell_whether_it_sleeps_is_awake_and_has_not_failed(
    start: Start, transport: Transport, fault: str
) -> None:
    server = await start(telling(sleep_states(0)))
    asking = Asking(transport, server.url, sleep_only=True, timeout=0.3)
    [backend] = asking.backends
    await asking.poll()
    server.script = SILENT[fault]
    states = []
    for asking.now in (1010.0, 1020.0, 1020.1):
        await asking.poll()
        states.append(backend.origin.asleep)

    # JSON says that there is no such gauge; the others say nothing, until what was known is too old.
    assert states == ([None] * 3 if fault == "JSON" else [True, True, None])


async def test_only_those_that_have_been_silent_are_asked_whether_they_sleep(
    start: Start, transport: Transport
) -> None:
    server = await start(telling(sleep_states(1)))
    asking = Asking(transport, server.url, sleep_only=True)
    [backend] = asking.backends
    asking.now, asking.last_byte_at = 1010.0, 1005.0
    await asking.poll()
    assert server.requests == []
    # Nothing since that look: it may have fallen asleep.
    server.script = telling(sleep_states(0))
    asking.now = 1020.0
    await asking.poll()
    assert backend.origin.asleep is True
    # The last bytes before it slept came after the look had begun.
    asking.now, asking.last_byte_at = 1030.0, 1020.0
    await asking.poll()

    assert len(server.requests) == 2
    assert backend.origin.asleep is True


async def test_an_engine_that_cannot_tell_is_not_asked_whether_it_sleeps(start: Start, transport: Transport) -> None:
    server = await start(telling(sleep_states(0)))
    asking = Asking(transport, server.url, sleep_only=True, engine="sglang")
    [backend] = asking.backends
    # The entry was another one when it said that.
    backend.origin.asleep = True
    await asking.poll()

    assert server.requests == []
    assert backend.origin.asleep is None


async def test_a_long_page_is_left_when_it_has_told(start: Start, transport: Transport) -> None:
    async def script(request: Received, line: Line) -> None:
        await line.send(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
        await line.send(chunk(sleep_states(0).encode()))
        while not line.writer.is_closing():
            await line.send(chunk(b"some_metric 1\n" * 4000))

    server = await start(script)
    asking = Asking(transport, server.url, sleep_only=True)
    await asking.poll()

    assert asking.backends[0].origin.asleep is True
    await until(lambda: server.open == 0)
