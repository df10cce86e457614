"""The router without sockets: what a client writes goes straight to its protocol, an engine's bytes to its connections.

All that is ours runs as it is served, from the first byte of a request to its log line; the kernel's part and the event
loop's reading and writing are missing. Without them the cost of a request varies little enough to be held to a budget.

    with running(Setup(models=10_000)) as (loop, client):
        loop.run_until_complete(client.run(wire.request(0), 1_000, wire.JSON_END))
"""

import asyncio
import json
import logging
import os
import re
import tempfile
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import uvicorn
import uvloop
import yaml
from starlette.types import ASGIApp

from benchmarks import wire
from benchmarks.candidates import Site, write_catalogue
from benchmarks.engine import NOT_FOUND, PAGES, page_of, response
from benchmarks.setup import Setup
from inference_api.app import GROUPS, build
from inference_api.core import Outside
from inference_api.observe.log import configure_logging, usage_log
from inference_api.server.connection import ClientConnection, State
from inference_api.server.server import server_config
from inference_api.settings import make_settings

STREAM_EVENTS = 100
# How much one read of a socket brings at most, as uvloop does it.
_READ = 256 * 1024
_NEVER = 1e6
_LONG = 3600.0
_SLOWER = 10_000
_JSON = response(b"200 OK", b"application/json", wire.ANSWER)
_EVENT = wire.stamped_frame(0)
_MAX_TOKENS = re.compile(rb'"max_tokens":([0-9]+)')


class Ends(asyncio.Transport):
    """A transport that has no other side: what is written to it is given to a function."""

    def __init__(self, on_write: Callable[[bytes], None]) -> None:
        super().__init__()
        self.on_write = on_write
        self.closing = False

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return ("127.0.0.1", 50_000) if name.endswith("name") else default

    def write(self, data: Any) -> None:
        self.on_write(data)

    def writelines(self, list_of_data: Iterable[Any]) -> None:
        self.on_write(b"".join(list_of_data))

    def get_write_buffer_size(self) -> int:
        return 0

    def is_closing(self) -> bool:
        return self.closing

    def close(self) -> None:
        self.closing = True

    abort = close

    def pause_reading(self) -> None: ...
    def resume_reading(self) -> None: ...


class Loop(uvloop.Loop):
    """Every connection that the router makes leads to an engine of ours, and its clock all but stands still.

    What goes by the clock would be in one count and not in the next.
    """

    def call_later(self, delay: float, callback: Any, *args: Any, context: Any = None) -> Any:  # type: ignore[override]
        return super().call_later(delay * _SLOWER, callback, *args, context=context)

    async def create_connection(self, factory: Any, *_: Any, **__: Any) -> Any:  # type: ignore[override]
        protocol = factory()
        transport = Ends(Engine(self, protocol).asked)
        protocol.connection_made(transport)
        return transport, protocol


class Engine:
    """One connection of an engine: each write is a request, answered in later turns of the loop."""

    def __init__(self, loop: Loop, protocol: asyncio.Protocol) -> None:
        self.loop = loop
        self.protocol = protocol

    def asked(self, request: bytes) -> None:
        if request.startswith(b"GET "):
            self._send(PAGES.get(page_of(request), NOT_FOUND))
        elif b'"stream":true' in request[-200:]:
            found = _MAX_TOKENS.search(request)
            events = int(found[1]) if found else STREAM_EVENTS
            self.loop.call_soon(self._stream, 0, b'"seed":0' in request[-200:], events)
        elif wire.EMBEDDINGS_PATH.encode() in request[:64]:
            self._send(response(b"200 OK", b"application/json", wire.EMBEDDINGS))
        else:
            self.loop.call_soon(self.protocol.data_received, _JSON)

    def _send(self, answer: bytes) -> None:
        for at in range(0, len(answer), _READ):
            self.loop.call_soon(self.protocol.data_received, answer[at : at + _READ])

    def _stream(self, sent: int, ends: bool, events: int) -> None:
        """One event in each turn of the loop; a stream that does not end is silent after the first."""
        if not sent:
            self.protocol.data_received(wire.STREAM_HEAD + wire.frame(wire.FIRST_EVENT))
        elif sent <= events:
            self.protocol.data_received(_EVENT)
        else:
            self.protocol.data_received(wire.STREAM_END)
            return
        if ends:
            self.loop.call_soon(self._stream, sent + 1, ends, events)


class Client:
    """Keep-alive connections to one router."""

    def __init__(self, loop: Loop, connect: Callable[[], ClientConnection], app: ASGIApp) -> None:
        self.app = app
        self._loop = loop
        self._connect = connect
        self._reads: list[bytes] = []
        self._end = b""
        self._finished: asyncio.Future[None] = loop.create_future()
        self._protocol = self._open(self._read)

    async def run(self, request: bytes, count: int, end: bytes) -> None:
        """Send `request` so many times, one after the other; `end`: the last bytes of an answer."""
        self._end = end
        for _ in range(count):
            self._reads = []
            self._finished = self._loop.create_future()
            self._protocol.data_received(request)
            await self._finished

    @property
    def answer(self) -> bytes:
        """The last one, whole."""
        return b"".join(self._reads)

    async def hold(self, count: int) -> None:
        """Open so many streams, each on a connection of its own, that are silent after their first event."""
        request = wire.request(0, STREAM_EVENTS, _NEVER)
        for _ in range(count):
            reads: asyncio.Queue[bytes] = asyncio.Queue()
            self._open(reads.put_nowait).data_received(request)
            if b" 200 " not in (head := await reads.get()):
                raise wire.BadAnswer(f"a stream was answered {head!r}")

    def _open(self, on_write: Callable[[bytes], Any]) -> ClientConnection:
        protocol = self._connect()
        protocol.connection_made(Ends(on_write))
        return protocol

    def _read(self, data: bytes) -> None:
        self._reads.append(data)
        if data.endswith(self._end):
            # In a turn of its own: the router has then done all that it does after the last byte.
            self._loop.call_soon(self._finished.set_result, None)


@contextmanager
def running(*setups: Setup) -> Iterator[tuple[Loop, list[Client]]]:
    """A router of each setup, all on one loop, with the defaults of `inference-api serve`."""
    loop = Loop()
    asyncio.set_event_loop(loop)
    stops: list[Callable[[], Awaitable[None]]] = []
    level, handlers = (logging.root.level, logging.root.manager.disable), logging.root.handlers[:]
    logging.disable()
    try:
        with tempfile.TemporaryDirectory() as directory, Path(os.devnull).open("w") as nowhere:
            clients = []
            for setup in setups:
                catalogue = write_catalogue(Site(9, setup, Path(directory)))
                _add(catalogue, setup)
                values = {
                    "catalogue": catalogue,
                    "max_in_flight": setup.streams + 1000,
                    # Under valgrind a second is short, and a connection that came of age would be made again.
                    "upstream_keepalive": _LONG,
                    **dict(setup.settings),
                }
                settings = make_settings(values, GROUPS)
                write_line = configure_logging("info", "json", nowhere)
                router = build(settings, Outside(write_line=write_line, write_usage=usage_log()))
                config = server_config(router.app, settings, router.rejected)
                client, stop = loop.run_until_complete(_start(loop, config))
                clients.append(client)
                stops.append(stop)
            yield loop, clients
    finally:
        for stop in stops:
            loop.run_until_complete(stop())
        loop.close()
        asyncio.set_event_loop(None)
        for handler in logging.root.handlers:
            handler.close()
        logging.root.handlers[:] = handlers
        logging.root.setLevel(level[0])
        logging.disable(level[1])


def _add(catalogue: Path, setup: Setup) -> None:
    """Add what only `ours` has to a catalogue."""
    document = yaml.safe_load(catalogue.read_text())
    for entry in document["models"]:
        entry.update(json.loads(setup.keys or "{}"))
    document["models"] += json.loads(setup.further or "[]")
    catalogue.write_text(json.dumps(document))


async def _start(loop: Loop, config: uvicorn.Config) -> tuple[Client, Callable[[], Awaitable[None]]]:
    config.load()
    lifespan = config.lifespan_class(config)
    await lifespan.startup()
    make: Any = config.http_protocol_class
    state = State()
    client = Client(loop, lambda: make(config=config, server_state=state, app_state=lifespan.state), config.loaded_app)
    return client, lifespan.shutdown
