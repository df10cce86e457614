"""A scrape: the whole page, however it is asked for, without holding up the event loop that writes it."""

import asyncio
import gc
import gzip
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text
from prometheus_client.registry import Collector

from inference_api.http.accounts import Accounts
from inference_api.http.head import RequestHeaders
from inference_api.http.pages import Probes, create_pages
from inference_api.models import Outcome
from inference_api.observe.exposition import Family
from inference_api.observe.families import Families
from inference_api.observe.metrics import Metrics
from inference_api.observe.scrape import Exposition
from inference_api.routing.balance import make_balancer
from inference_api.routing.catalogue import parse_catalogue
from inference_api.routing.fleet import Fleet
from inference_api.routing.registry import Registry, RegistryStatus
from inference_api.settings import Settings
from tests.conftest import serving
from tests.fakes import in_background, raw_client, until
from tests.records import record_of

pytestmark = pytest.mark.anyio
Start = Callable[..., Any]
OPENMETRICS = {"accept": "application/openmetrics-text"}


def busy_router(models: int) -> Families:
    """What there is to show when each model has answered streams and JSON on three routes."""
    fleet = Fleet(make_balancer)
    entries = [{"name": f"m{number}", "backends": [{"url": f"http://e{number}"}]} for number in range(models)]
    fleet.update(parse_catalogue({"models": entries}))
    metrics = Metrics(lambda: fleet.models)
    for model in fleet.models.values():
        for route in ("chat_completions", "completions", "responses"):
            metrics.record(record_of(model.name, route=route))
            metrics.record(record_of(model.name, route=route, stream=True, first=0.1, tokens=(1, None, 2, None)))
        metrics.attempt(model.backends[0], Outcome.OK)
    return Families(metrics, lambda: RegistryStatus("static", models, 0.0, {}))


async def read(page: AsyncIterator[bytes]) -> list[bytes]:
    return [piece async for piece in page]


@asynccontextmanager
async def turning() -> AsyncIterator[list[float]]:
    """The CPU that this thread has taken in each turn of its event loop beside the body."""
    turns: list[float] = []
    done = False

    async def turn() -> None:
        before = time.thread_time()
        while not done:
            await asyncio.sleep(0)
            now = time.thread_time()
            turns.append(now - before)
            before = now

    async with in_background(turn()):
        yield turns
        done = True


# By itself


@pytest.fixture
def tidy() -> Iterator[None]:
    """The garbage of other tests is not the scrape's."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.parametrize("models", [100, 1000])
@pytest.mark.usefixtures("tidy")
async def test_the_event_loop_goes_on_between_slices_however_many_series_there_are(models: int) -> None:
    exposition = Exposition(busy_router(models), CollectorRegistry())
    samples = [piece.count(b"\n") for piece in await read(exposition.page(False, False))]
    began = time.thread_time()
    async with turning() as turns:
        await read(exposition.page(False, True))
    took = time.thread_time() - began

    assert sum(samples) > 240 * models
    # 0.3 ms on a machine that has nothing else to do.
    assert max(samples) < 600
    assert len(turns) > len(samples)
    if models == 1000:
        assert max(turns) < took / 10


async def test_several_scrapes_take_turns() -> None:
    exposition = Exposition(busy_router(100), CollectorRegistry())
    (alone,) = await asyncio.gather(read(exposition.page(False, False)))
    async with turning() as turns:
        pages = await asyncio.gather(*(read(exposition.page(False, False)) for _ in range(8)))

    assert all(len(b"".join(page)) == len(b"".join(alone)) for page in pages)
    # A slice in each turn of the loop, not one of each scrape.
    assert len(turns) >= 8 * (len(alone) - 2)


async def test_between_slices_it_lets_go_for_as_long_as_it_is_told() -> None:
    families = [Family("gauge", f"g{number}", "Text.", (), [((), 1)]) for number in range(10)]
    exposition = Exposition(lambda: families, CollectorRegistry(), pause=0.02, size=1)
    began = time.monotonic()
    pieces = await read(exposition.page(False, False))

    assert len(pieces) > 20
    assert time.monotonic() - began > 20 * 0.02


class Slow(Collector):
    """Reads a file that takes its time; and has more to say than fits into a slice."""

    def __init__(self) -> None:
        self.threads: list[str] = []
        self.go_on = threading.Event()

    def collect(self) -> Iterator[Metric]:
        self.threads.append(threading.current_thread().name)
        assert self.go_on.wait(15)
        family = GaugeMetricFamily("slow", "Text.", labels=("number",))
        for number in range(50):
            family.add_metric([str(number)], number)
        yield family


@pytest.mark.parametrize("openmetrics", [False, True])
async def test_what_others_collect_is_there_and_collected_elsewhere(openmetrics: bool) -> None:
    slow, collectors = Slow(), CollectorRegistry()
    collectors.register(slow)
    own = [Family("gauge", "own", "Text.", (), [((), 1)])]
    exposition = Exposition(lambda: own, collectors, size=100)

    async def go_on() -> None:
        await until(lambda: slow.threads)
        slow.go_on.set()

    async with in_background(go_on()):
        pieces = await read(exposition.page(openmetrics, False))

    page = b"".join(pieces).decode()
    parsed = list(parse_openmetrics(page) if openmetrics else parse_text(page))  # type: ignore[no-untyped-call]
    assert [(family.name, len(family.samples)) for family in parsed] == [("own", 1), ("slow", 50)]
    assert max(map(len, pieces)) < 200
    assert threading.current_thread().name not in slow.threads
    assert page.endswith("# EOF\n") == openmetrics


# Over HTTP


@asynccontextmanager
async def pages_of(exposition: Exposition) -> AsyncIterator[httpx.AsyncClient]:
    probes = Probes(Registry(Fleet(make_balancer), parse_catalogue({"models": []})), exposition)
    served: Any = SimpleNamespace(app=Accounts(create_pages(probes.ops_routes()), (), RequestHeaders(), lambda: "id"))
    async with (
        serving(served, Settings()) as url,
        httpx.AsyncClient(base_url=url, timeout=20, trust_env=False) as client,
    ):
        yield client


async def test_a_scraper_gets_the_format_and_the_coding_that_it_takes(start_router: Start) -> None:
    served = await start_router()
    got: dict[tuple[str, str], Any] = {}
    for accept in ("application/openmetrics-text;version=1.0.0,*/*;q=0.1", "application/openmetrics-text;q=0,*/*"):
        for coding in ("gzip", "gzip;q=0"):
            async with served.client.stream(
                "GET", "/metrics", headers={"accept": accept, "accept-encoding": coding}
            ) as answer:
                raw = b"".join([piece async for piece in answer.aiter_raw()])
            assert answer.headers["vary"] == "accept, accept-encoding"
            compressed = answer.headers.get("content-encoding") == "gzip"
            assert compressed == (coding == "gzip")
            got[accept[:32], coding] = answer.headers["content-type"], gzip.decompress(raw) if compressed else raw

    kinds = [kind for kind, _ in got.values()]
    assert kinds[0] == kinds[1] == "application/openmetrics-text; version=1.0.0; charset=utf-8; escaping=underscores"
    assert kinds[2] == kinds[3] == "text/plain; version=0.0.4; charset=utf-8"
    for kind, page in got.values():
        openmetrics = kind.startswith("application")
        parse = parse_openmetrics if openmetrics else parse_text
        names = {family.name for family in parse(page.decode())}
        assert {"inference_api_requests", "process_cpu_seconds", "python_gc_collections"} <= names
        assert page.endswith(b"# EOF\n") == openmetrics


async def test_head_is_get_without_a_page(start_router: Start) -> None:
    served = await start_router()
    answer = await served.client.head("/metrics", headers=OPENMETRICS)

    assert (answer.status_code, answer.content) == (200, b"")
    assert answer.headers["content-type"].startswith("application/openmetrics-text")
    assert "content-length" not in answer.headers


async def test_there_is_an_end_to_how_many_scrapes_are_under_way() -> None:
    exposition = Exposition(busy_router(10), CollectorRegistry(), most=2)
    async with pages_of(exposition) as client:
        for _ in ("at first", "after others have ended"):
            under_way = [exposition.page(False, False) for _ in range(2)]
            for page in under_way:
                await anext(page)
            refused = await client.get("/metrics")
            assert (await client.get("/healthz")).status_code == 200
            for page in under_way:
                await read(page)
            answered = await client.get("/metrics")

            assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
            assert answered.status_code == 200


async def test_a_scraper_that_leaves_or_does_not_read_takes_a_place_and_no_more(tmp_path: Any) -> None:
    read_at: list[int] = []

    def endless() -> Iterator[Any]:
        for number in range(10_000_000):
            if number % 1000 == 0:
                read_at.append(number)
            yield (str(number),), 1

    exposition = Exposition(
        lambda: [Family("gauge", "endless", "Text.", ("n",), endless())], CollectorRegistry(), most=1
    )
    async with pages_of(exposition) as client:
        async with raw_client(client.base_url.port or 0) as scraper:
            await scraper.send(b"GET /metrics HTTP/1.1\r\nhost: x\r\n\r\n")
            await until(lambda: exposition.busy)
            # Nobody reads: what is written ends with the buffers on the way.
            while True:
                before = len(read_at)
                await asyncio.sleep(0.3)
                if before == len(read_at):
                    break
            assert exposition.busy
        await until(lambda: not exposition.busy)
