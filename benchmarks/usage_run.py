"""Does the control plane know of every request that an engine answered? Two routers, and all that can go wrong.

    .venv/bin/python -m benchmarks.usage_run                       # 1,000,000 requests: about ten minutes on two cores
    .venv/bin/python -m benchmarks.usage_run --requests 20000      # half a minute

Meanwhile the control plane is killed (twice), the disk of the spools is full while it is away (a limit of the size of
files, which the kernel sets), and a router is killed by -9; its successor adopts what it had spooled. At the end each
request that an engine answered must have exactly one record, with the engine's tokens. May be missing: what the routers
say that they dropped, and of the router that was killed what was in its queue, and in flight.
"""

import argparse
import asyncio
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, NamedTuple, cast

import httpx
import orjson
import uvloop

from benchmarks.usage_plane import read
from tests.ports import free_port

_CONNECTIONS = 16
# Bytes of a file, while the disk is "full": less than one batch
_FULL = 4096
_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b"
_ANSWER = '{{"choices":[{{"message":{{"content":"hi"}}}}],"usage":{{"prompt_tokens":{0},"completion_tokens":{1}}}}}'
_REQUEST = (
    b"POST /v1/chat/completions HTTP/1.1\r\nhost: r\r\ncontent-type: application/json\r\nx-request-id: r%d\r\n"
    b'content-length: 62\r\n\r\n{"model":"m","messages":[{"role":"user","content":"hello!!"}]}'
)
_BODY = _REQUEST.partition(b"\r\n\r\n")[2]


def tokens_of(number: int) -> tuple[int, int]:
    return number % 97, number % 13


class Engine(asyncio.Protocol):
    """Answers each request with tokens of its own, and counts it. `answered`: a byte per request."""

    answered: bytearray

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._data = b""

    def data_received(self, data: bytes) -> None:
        self._data += data
        head, end, body = self._data.partition(b"\r\n\r\n")
        if not end or (head.startswith(b"POST") and len(body) < len(_BODY)):
            return
        self._data = b""
        if head.startswith(b"GET"):
            self._transport.write(_HEAD % (11, b'{"data":[]}'))
            return
        # The router's own part follows the client's.
        number = int(head.partition(b"x-request-id: r")[2].partition(b"-")[0])
        self.answered[number] = min(self.answered[number] + 1, 255)
        answer = _ANSWER.format(*tokens_of(number)).encode()
        self._transport.write(_HEAD % (len(answer), answer))


class Client(asyncio.Protocol):
    """One connection in a closed loop."""

    def __init__(self, load: "Load", port: int) -> None:
        self._load, self._port = load, port
        self._transport: asyncio.Transport | None = None

    async def connect(self) -> None:
        while self._load.is_running:
            try:
                await asyncio.get_running_loop().create_connection(lambda: self, "127.0.0.1", self._port)
                return
            except OSError:
                await asyncio.sleep(0.05)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._next()

    def _next(self) -> None:
        number = self._load.take()
        if number is None:
            self._load.finished()
        elif self._transport is not None:
            self._transport.write(_REQUEST % number)

    def data_received(self, data: bytes) -> None:
        # An answer is one write of the router, and smaller than a read.
        self._load.statuses[data[9:12]] += 1
        self._next()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._load.is_running:
            self._load.statuses[b"lost"] += 1
            self._load.spawn(self.connect())


class Load:
    """Numbers the requests."""

    def __init__(self, requests: int) -> None:
        self.requests, self.sent = requests, 0
        self.statuses: Counter[bytes] = Counter()
        self.done = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def is_running(self) -> bool:
        return self.sent < self.requests

    def take(self) -> int | None:
        if self.sent == self.requests:
            return None
        self.sent += 1
        return self.sent - 1

    def finished(self) -> None:
        self.done.set()

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def reach(self, share: float) -> None:
        while True:
            if self.sent >= self.requests * share:
                return
            await asyncio.sleep(0.02)


class Usage(NamedTuple):
    """What a router says of its records."""

    delivered: int
    dropped: int
    waiting: int
    spooled: int


class Router:
    """One process of `inference-api serve`."""

    def __init__(self, catalogue: Path, spool: Path, plane: str, log: Path) -> None:
        self.port = free_port()
        settings = {
            "CATALOGUE": catalogue,
            "PORT": self.port,
            "REGISTRY_URL": plane,
            "USAGE": "registry",
            "USAGE_SPOOL": spool,
            "LOG_LEVEL": "error",
            "DRAIN_TIMEOUT": 30,
        }
        self._environ = {f"INFERENCE_API_{name}": str(value) for name, value in settings.items()}
        self._log = log
        self.process = self.start()

    def start(self) -> "subprocess.Popen[bytes]":
        with self._log.open("ab") as log:
            command = [sys.executable, "-m", "inference_api", "serve"]
            self.process = subprocess.Popen(command, env=self._environ, stdout=subprocess.DEVNULL, stderr=log)
        return self.process

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def limit_files(self, size: int) -> None:
        """Bytes of the largest file that it may write."""
        resource.prlimit(self.process.pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

    async def usage(self) -> Usage | None:
        """None: it does not answer."""
        try:
            async with httpx.AsyncClient(trust_env=False, timeout=10) as client:
                text = (await client.get(f"http://127.0.0.1:{self.port}/metrics")).text
        except httpx.HTTPError:
            return None

        def of(name: str) -> int:
            lines = (line for line in text.splitlines() if line.startswith(f"inference_api_usage_{name}"))
            return sum(int(float(line.rpartition(" ")[2])) for line in lines)

        return Usage(
            of('records_total{result="delivered"'), of("dropped_total"), of("queue_records"), of("spool_bytes")
        )

    async def ready(self) -> None:
        while True:
            if await self.usage() is not None:
                return
            await asyncio.sleep(0.05)


class Run:
    """The parts, and what happens to them."""

    def __init__(self, directory: Path, requests: int) -> None:
        self.directory = directory
        self.load = Load(requests)
        self.journal = directory / "journal"
        self._plane_port = free_port()
        self._engine_port = free_port()
        self._models = orjson.dumps({"models": [{"name": "m", "backends": [f"http://127.0.0.1:{self._engine_port}"]}]})
        self.plane = self._start_plane()
        catalogue = directory / "catalogue.json"
        catalogue.write_bytes(self._models)
        url = f"http://127.0.0.1:{self._plane_port}"
        self.routers = [Router(catalogue, directory / "spool", url, directory / f"router-{i}.log") for i in range(2)]
        # Of a router that was killed: what it said last, and at most what it may have had.
        self.dropped = self.queued = 0

    def _start_plane(self) -> "subprocess.Popen[bytes]":
        options = [str(self._plane_port), str(self.journal), self._models.decode()]
        return subprocess.Popen([sys.executable, "-m", "benchmarks.usage_plane", *options])

    async def __call__(self) -> list[str]:
        loop = asyncio.get_running_loop()
        Engine.answered = bytearray(self.load.requests)
        server = await loop.create_server(Engine, "127.0.0.1", self._engine_port)
        try:
            for router in self.routers:
                await router.ready()
            clients = [Client(self.load, router.port) for router in self.routers for _ in range(_CONNECTIONS)]
            for client in clients:
                self.load.spawn(client.connect())
            await self._mishaps()
            await self.load.done.wait()
            await self._drained()
            found = [await router.usage() for router in self.routers]
            for router in self.routers:
                router.process.send_signal(signal.SIGTERM)
            codes = [await asyncio.to_thread(router.process.wait, 60) for router in self.routers]
            return self._verdict([one for one in found if one is not None], codes)
        finally:
            server.close()
            for router in self.routers:
                router.kill()
            self.plane.kill()
            self.plane.wait()

    async def _mishaps(self) -> None:
        say, load, (first, second) = self._say, self.load, self.routers
        await load.reach(0.15)
        say("the control plane is killed, and starts again at once")
        self.plane.kill()
        self.plane.wait()
        self.plane = self._start_plane()
        await load.reach(0.3)
        say("the control plane is killed, and stays away")
        self.plane.kill()
        self.plane.wait()
        await load.reach(0.4)
        say(f"a router is killed by -9 after it said {await first.usage()}")
        self.dropped += (await self._usage(first)).dropped
        self.queued += 10_000 + _CONNECTIONS
        first.kill()
        first.start()
        await load.reach(0.5)
        say("the disk of the spools is full")
        for router in self.routers:
            router.limit_files(_FULL)
        await load.reach(0.65)
        say(f"the disk has room again; the routers said {[await router.usage() for router in self.routers]}")
        for router in self.routers:
            router.limit_files(resource.RLIM_INFINITY)
        await load.reach(0.75)
        say("the control plane is back")
        self.plane = self._start_plane()
        await load.reach(0.9)
        say("the other router is killed by -9, with a control plane that is there")
        self.dropped += (await self._usage(second)).dropped
        self.queued += 10_000 + _CONNECTIONS
        second.kill()
        second.start()

    async def _usage(self, router: Router) -> Usage:
        found = await router.usage()
        assert found is not None
        return found

    async def _drained(self) -> None:
        """All that waits has been sent; what a killed process left is looked for every 30 s."""
        quiet = 0
        while quiet < 40:
            found = [await router.usage() for router in self.routers]
            is_empty = all(one is not None and not one.waiting and not one.spooled for one in found)
            left = any((self.directory / "spool").glob("*.jsonl"))
            quiet = quiet + 1 if is_empty and not left else 0
            await asyncio.sleep(0.05)

    def _verdict(self, found: list[Usage], codes: list[int]) -> list[str]:
        answered, load = Engine.answered, self.load
        ids: Counter[str] = Counter()
        known = bytearray(load.requests)
        wrong = stored = 0
        for line in read(self.journal):
            ids[line.id] += 1
            stored += 1
            number = int(line.request_id[1:])
            if line.status == 200:
                known[number] += 1
                wrong += (line.input_tokens, line.output_tokens) != tokens_of(number)
        by_engines = sum(1 for count in answered if count)
        missing = sum(1 for number, count in enumerate(answered) if count and not known[number])
        dropped = self.dropped + sum(one.dropped for one in found)
        self._say(f"{load.sent} requests, statuses {dict(load.statuses)}; answered by engines: {by_engines}")
        self._say(f"records: {stored}; missing: {missing}, of which {dropped} were counted as dropped")
        unseen = missing - dropped
        checks: list[tuple[bool, str]] = [
            (max(ids.values(), default=0) <= 1, "a record is stored twice"),
            (max(known, default=0) <= 1, "a request has two records"),
            (wrong == 0, f"{wrong} records have other tokens than the engine's"),
            (unseen <= self.queued, f"{unseen} records are missing, more than {self.queued}"),
            (all(not known[number] or answered[number] for number in range(load.requests)), "a record of no answer"),
            (codes == [0, 0], f"the routers ended with {codes}"),
            (stored > 0, "there is no record"),
        ]
        self._say(f"lost with the killed processes: {max(unseen, 0)}")
        return [text for holds, text in checks if not holds]

    def _say(self, text: str) -> None:
        print(f"{time.strftime('%H:%M:%S')}  {self.load.sent:9,}  {text}", flush=True)


async def _run(directory: Path, requests: int) -> list[str]:
    return await Run(directory, requests)()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=1_000_000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        problems = uvloop.run(_run(Path(directory), options.requests))
    print("\n".join(problems) if problems else "PASS")
    return 1 if problems else 0


if __name__ == "__main__":
    raise SystemExit(main())
