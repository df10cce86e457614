"""What hedging does for the slowest requests, with a router and engines on real sockets, and what it costs.

    python -m benchmarks.hedging --requests 3000 --rate 40

Of three engines one is slow now and then: an answer takes 20 to 40 ms, but a tenth of that engine's takes a second, as
with a pause of its garbage collector, or with a long prompt in the same batch. Requests arrive at random. The same ones
are sent to a router without `hedge` and to one with it. Engines, router and client share one event loop.
"""

import argparse
import asyncio
import tempfile
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from random import Random
from time import perf_counter
from typing import Any, NamedTuple

import orjson
import uvloop

from benchmarks.samples import quantile
from inference_api.app import GROUPS, build
from inference_api.core import Outside
from inference_api.server.server import Server, listen, server_config
from inference_api.settings import make_settings

_BODY = orjson.dumps({"choices": [{"index": 0, "message": {"role": "assistant", "content": "hi"}}]})
_ANSWER = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b" % (len(_BODY), _BODY)
_REQUEST = orjson.dumps({"model": "m", "messages": [{"role": "user", "content": "hello"}]})
_FAST, _SLOW = (0.020, 0.040), 1.0


class Case(NamedTuple):
    """`slow`: share of the slow engine's answers; `rate`: requests per second."""

    requests: int = 3000
    rate: float = 40.0
    engines: int = 3
    slow: float = 0.1
    hedge: dict[str, Any] | None = None
    seed: int = 1


class Result(NamedTuple):
    """Milliseconds; `extra`: requests that engines got beyond those of the clients, as a share of those."""

    p50: float
    p95: float
    p99: float
    slowest: float
    extra: float


class Engine:
    """Answers after a random time; a connection that closes ends its work."""

    def __init__(self, slow: float, rand: Random) -> None:
        self._slow = slow
        self._rand = rand
        self.requests = 0
        self._server: asyncio.Server | None = None

    @asynccontextmanager
    async def running(self) -> AsyncIterator[str]:
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        async with server:
            yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
            server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).lower()
                length = next((int(line[15:]) for line in head.split(b"\r\n") if line[:15] == b"content-length:"), 0)
                await reader.readexactly(length)
                if head[:4] == b"post":
                    self.requests += 1
                    await asyncio.sleep(_SLOW if self._rand.random() < self._slow else self._rand.uniform(*_FAST))
                writer.write(_ANSWER)
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            # At the end its task is cancelled by the loop, which would complain.
            pass
        finally:
            writer.close()


async def measure(case: Case) -> Result:
    rand = Random(case.seed)
    engines = [Engine(case.slow if number == 0 else 0.0, Random(case.seed + number)) for number in range(case.engines)]
    async with AsyncExitStack() as stack:
        urls = [await stack.enter_async_context(engine.running()) for engine in engines]
        port = await stack.enter_async_context(_router(urls, case.hedge))
        times = await _load(port, case, rand)
    asked = sum(engine.requests for engine in engines)
    p50, p95, p99 = (1000 * quantile(times, share) for share in (0.5, 0.95, 0.99))
    return Result(p50, p95, p99, 1000 * max(times), asked / case.requests - 1)


@asynccontextmanager
async def _router(urls: list[str], hedge: dict[str, Any] | None) -> AsyncIterator[int]:
    entry = {"name": "m", "backends": urls, **({} if hedge is None else {"hedge": hedge})}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "catalogue.json"
        path.write_bytes(orjson.dumps({"models": [entry]}))
        settings = make_settings({"catalogue": path}, GROUPS)
        router = build(settings, Outside())
        listener = listen("127.0.0.1", 0, "PORT")
        server = Server(server_config(router.app, settings, router.rejected, 0.0))
        task = asyncio.create_task(server.serve(sockets=[listener]))
        try:
            yield listener.getsockname()[1]
        finally:
            server.should_exit = True
            listener.close()
            await task


async def _load(port: int, case: Case, rand: Random) -> list[float]:
    """Seconds of each request. All arrive when they are due, whatever became of those before."""
    idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []
    head = (
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
    )

    async def ask() -> float:
        reader, writer = idle.pop() if idle else await asyncio.open_connection("127.0.0.1", port)
        began = perf_counter()
        writer.write(head % len(_REQUEST) + _REQUEST)
        answer = await reader.readuntil(b"\r\n\r\n")
        if not answer.startswith(b"HTTP/1.1 200"):
            raise RuntimeError(answer.decode("latin-1"))
        await reader.readexactly(len(_BODY))
        took = perf_counter() - began
        idle.append((reader, writer))
        return took

    asking = []
    for _ in range(case.requests):
        asking.append(asyncio.create_task(ask()))
        await asyncio.sleep(rand.expovariate(case.rate))
    times = list(await asyncio.gather(*asking))
    for _, writer in idle:
        writer.close()
    return times


def table(rows: dict[str, Result]) -> str:
    lines = ["| | p50 | p95 | p99 | slowest | extra requests |", "|---|---|---|---|---|---|"]
    for name, row in rows.items():
        times = " | ".join(f"{one:.0f} ms" for one in row[:4])
        lines.append(f"| {name} | {times} | {100 * row.extra:.1f} % |")
    return "\n".join(lines)


async def compare(case: Case) -> dict[str, Result]:
    return {
        "without": await measure(case),
        "`hedge: {}`": await measure(case._replace(hedge={})),
        "`hedge: {after: 100}`": await measure(case._replace(hedge={"after": 100})),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=3000)
    parser.add_argument("--rate", type=float, default=40.0)
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    print(table(uvloop.run(compare(Case(given.requests, given.rate, seed=given.seed)))))


if __name__ == "__main__":
    main()
