"""What an answer of the cache costs beside a relayed one: CPU time of the router, kernel included.

    .venv/bin/python -m benchmarks.cache    # a minute

A router process between an engine and a client on sockets of this machine. A stream has as many events as fit into the
cache's longest answer. Paced: an event every 10 ms on each of 50 streams, as engines send them; flood: as fast as the
router takes them, so that events share reads.
"""

import argparse
import asyncio
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

import uvloop

from benchmarks import wire
from benchmarks.cpu import cpu_ns, resident_bytes
from tests.ports import free_port

# 240 bytes each
EVENTS = 1000
_PACE = 0.01
_PLAIN, _CACHED = "plain", "cached"


class Load(NamedTuple):
    """So many requests over so many connections, one after the other on each."""

    name: str
    request: bytes
    connections: int
    requests: int


def loads(port: int, share: float) -> list[Load]:
    def stream(model: str, interval: float) -> bytes:
        return wire.request(port, EVENTS, interval, model=model)

    def times(count: int) -> int:
        return max(int(count * share), 1)

    return [
        Load("stream, relayed, paced", stream(_PLAIN, _PACE), 50, times(50)),
        Load("stream, relayed, flood", stream(_PLAIN, 0), 16, times(64)),
        Load("stream, from the cache", stream(_CACHED, 0), 200, times(4000)),
        Load("JSON, relayed", wire.request(port, model=_PLAIN), 16, times(8000)),
        Load("JSON, from the cache", wire.request(port, model=_CACHED), 16, times(8000)),
    ]


@contextmanager
def serving(directory: Path) -> Iterator[tuple[int, int]]:
    """The port and the pid of a router with an engine."""
    engine, port = free_port(), free_port()
    backends = [f"http://127.0.0.1:{engine}"]
    models = [
        {"name": _PLAIN, "backends": backends},
        {"name": _CACHED, "backends": backends, "cache": {"ttl": 3600, "temperature": 1}},
    ]
    (directory / "catalogue.json").write_text(json.dumps({"models": models}))
    more = {"CATALOGUE": str(directory / "catalogue.json"), "PORT": str(port), "HOST": "127.0.0.1"}
    variables = {**os.environ, **{f"INFERENCE_API_{name}": value for name, value in more.items()}}
    with ExitStack() as stack:
        log = stack.enter_context((directory / "log").open("w"))
        commands = [["benchmarks.engine", "--port", str(engine)], ["inference_api", "serve"]]
        started = [
            subprocess.Popen([sys.executable, "-m", *command], env=variables, stdout=log, stderr=log)
            for command in commands
        ]
        for process in started:
            stack.callback(process.wait)
            stack.callback(process.terminate)
        yield port, started[-1].pid


async def ask(port: int, request: bytes, count: int) -> int:
    """Send the request so many times on one connection. Returns the bytes of the last answer."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 20)
    size = 0
    for _ in range(count):
        writer.write(request)
        head = (await reader.readuntil(b"\r\n\r\n")).lower()
        if not head.startswith(b"http/1.1 200"):
            raise wire.BadAnswer(f"the answer is {head!r}")
        if b"\r\ntransfer-encoding: chunked" in head:
            size = 0
            while length := int(await reader.readline(), 16):
                await reader.readexactly(length + 2)
                size += length
            await reader.readline()
        else:
            at = head.index(b"\r\ncontent-length:") + 17
            size = int(head[at : head.index(b"\r\n", at)])
            await reader.readexactly(size)
    writer.close()
    return size


async def cost(port: int, pid: int, load: Load) -> tuple[float, int]:
    """Microseconds of CPU of the router for one request, and the bytes of an answer."""
    await ask(port, load.request if _CACHED.encode() in load.request else wire.request(port, model=_PLAIN), 1)
    connections = min(load.connections, load.requests)
    shares = [load.requests // connections + (n < load.requests % connections) for n in range(connections)]
    before = cpu_ns(frozenset({pid}))
    sizes = await asyncio.gather(*(ask(port, load.request, count) for count in shares))
    return (cpu_ns(frozenset({pid})) - before) / 1000 / load.requests, sizes[0]


async def held(port: int, pid: int, clients: int) -> float:
    """Bytes of memory for each client that asks for the stream and does not read it."""
    request, loop = wire.request(port, EVENTS, 0, model=_CACHED), asyncio.get_running_loop()
    before = resident_bytes(frozenset({pid}))
    with ExitStack() as stack:
        for _ in range(clients):
            client = stack.enter_context(socket.socket())
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.setblocking(False)
            await loop.sock_connect(client, ("127.0.0.1", port))
            await loop.sock_sendall(client, request)
            # The first byte is here: the router has written.
            await loop.sock_recv(client, 1)
        return (resident_bytes(frozenset({pid})) - before) / clients


async def until_ready(port: int) -> None:
    end = time.monotonic() + 30
    while True:
        try:
            await ask(port, wire.request(port, model=_PLAIN), 1)
            return
        except (OSError, wire.BadAnswer, asyncio.IncompleteReadError):
            if time.monotonic() > end:
                raise
            await asyncio.sleep(0.1)


async def measure(share: float) -> tuple[dict[str, tuple[float, int]], float]:
    with tempfile.TemporaryDirectory() as directory, serving(Path(directory)) as (port, pid):
        await until_ready(port)
        costs = {load.name: await cost(port, pid, load) for load in loads(port, share)}
        return costs, await held(port, pid, max(int(400 * share), 1))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--share", type=float, default=1.0, help="of the requests")
    costs, memory = uvloop.run(measure(parser.parse_args().share))
    for name, (us, size) in costs.items():
        print(f"{name:26}{us:12,.1f} us{size:10,} bytes")
    hit, paced, flood = (costs[f"stream, {name}"][0] for name in ("from the cache", "relayed, paced", "relayed, flood"))
    print(f"200 streams from the cache cost {200 * hit / paced:.1f} relayed ones, {200 * hit / flood:.1f} of a flood")
    print(f"a client that does not read a stream from the cache: {memory / 1024:.1f} KiB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
