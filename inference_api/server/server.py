"""Configures and runs uvicorn: own sockets and log, no proxy headers, no WebSockets; probes on a separate thread."""

import asyncio
import contextlib
import errno
import gc
import logging
import math
import resource
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from types import FrameType
from typing import Any, Protocol, cast

import uvicorn
from starlette.types import ASGIApp

from inference_api.errors import RouterError
from inference_api.server.connection import OnRejection, State, connection_factory
from inference_api.server.flow import Deadlines
from inference_api.settings import PREFIX, Settings, SettingsError

logger = logging.getLogger(__name__)


class Served(Protocol):
    """The application: `app` serves clients, `ops` serves OPS_PORT.

    SIGTERM and SIGINT call `drain`, SIGHUP calls `reload`.
    """

    app: ASGIApp
    ops: ASGIApp

    def drain(self) -> None: ...
    def reload(self) -> None: ...
    def rejected(self, error: RouterError, request_id: str, size: int, client: tuple[str, int] | None) -> None: ...


Handler = Callable[[int, FrameType | None], Any] | signal.Handlers
# Connections that may wait while the event loop is busy.
_BACKLOG = 2048
# Seconds for requests to end after a second signal.
_FORCED = 1.0
# File descriptors beside traffic: log, listeners, two event loops, registry, probes, a scrape: about 25.
_OWN_FILES = 48


def run_server(served: Served, settings: Settings, on_listen: Callable[[str], None] = lambda address: None) -> None:
    """Serve until SIGTERM or SIGINT, then drain. Raises SettingsError if it cannot listen on a port.

    `on_listen` gets host and port, as in a URL, once the sockets listen.
    """
    raise_file_limit()
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(contextlib.closing(listen(settings.host, settings.port, "PORT")))
        if settings.ops_port is not None:
            ops_listener = stack.enter_context(contextlib.closing(listen(settings.host, settings.ops_port, "OPS_PORT")))
            stack.enter_context(ops_thread(served.ops, ops_listener, _deadlines(settings)))
        config = server_config(served.app, settings, served.rejected)
        server = Server(config, settings.drain_delay, served.drain, served.reload)
        on_listen(_authority(*listener.getsockname()[:2]))
        # Objects of the start are permanent: exclude them from garbage collection.
        gc.collect()
        gc.freeze()
        server.run(sockets=[listener])


class Server(uvicorn.Server):
    """uvicorn's server, but SIGTERM and SIGINT drain, and the exit code is 0.

    `on_stop` is called at the signal; `delay`: seconds to keep accepting after it. Meanwhile each answer closes its
    connection, so that clients reconnect elsewhere. `on_reload` is called at SIGHUP.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        delay: float = 0.0,
        on_stop: Callable[[], None] = lambda: None,
        on_reload: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__(config)
        self.server_state: State = State()
        self._delay = delay
        self._on_stop = on_stop
        self._on_reload = on_reload

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._on_stop()
        # A second signal skips the drain.
        self.force_exit = self.server_state.draining
        self.server_state.draining = True
        if not self.force_exit:
            # In a turn of the loop: the signal may interrupt a log call.
            asyncio.get_running_loop().call_soon_threadsafe(self._tell_waiting)
        if self._delay and not self.force_exit:
            asyncio.get_running_loop().call_later(self._delay, self._stop)
        else:
            self._stop()

    def handle_hangup(self, sig: int, frame: FrameType | None) -> None:
        # In a turn of the loop: the signal may arrive anywhere, also before or after the loop.
        with contextlib.suppress(RuntimeError):
            asyncio.get_running_loop().call_soon_threadsafe(self._on_reload)

    def _tell_waiting(self) -> None:
        if not (requests := len(self.server_state.tasks)):
            return
        seconds = (self.config.timeout_graceful_shutdown or 0) + math.ceil(self._delay)
        noun = "request" if requests == 1 else "requests"
        logger.info("waiting for %d %s, at most %d s; Ctrl-C again ends now", requests, noun, seconds)

    def _stop(self) -> None:
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await super().shutdown(sockets)
        if self.force_exit:
            # uvicorn leaves requests and lifespan to the end of the loop, which cancels them in any order.
            tasks = list(self.server_state.tasks)
            for task in tasks:
                task.cancel()
            if tasks:
                await asyncio.wait(tasks, timeout=_FORCED)
            await self.lifespan.shutdown()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        handlers = {
            signal.SIGTERM: self.handle_exit,
            signal.SIGINT: self.handle_exit,
            signal.SIGHUP: self.handle_hangup,
        }
        with handling(handlers):
            yield


@contextlib.contextmanager
def handling(handlers: Mapping[signal.Signals, Handler]) -> Iterator[None]:
    """Install signal handlers, and restore the previous ones; only in the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, before in previous.items():
            signal.signal(number, before)


def server_config(
    app: ASGIApp, settings: Settings, on_rejection: OnRejection = lambda *_: None, linger: float = 2.0
) -> uvicorn.Config:
    protocol = connection_factory(
        _deadlines(settings)._replace(linger=linger), on_rejection, connection_limit(settings.max_in_flight)
    )
    timeout = math.ceil(settings.drain_timeout)
    return _config(app, protocol, loop="uvloop", lifespan="on", timeout_graceful_shutdown=timeout)


def _deadlines(settings: Settings) -> Deadlines:
    return Deadlines(
        settings.header_timeout,
        settings.body_timeout,
        settings.keepalive_timeout,
        settings.write_stall_timeout,
        settings.max_connection_age,
    )


def _config(app: ASGIApp, protocol: Callable[..., asyncio.Protocol], **more: Any) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        http=cast(Any, protocol),
        ws="none",
        interface="asgi3",
        log_config=None,
        access_log=False,
        server_header=False,
        # Any client could forge proxy headers; the router does not use them.
        proxy_headers=False,
        backlog=_BACKLOG,
        **more,
    )


def raise_file_limit() -> None:
    """Raise the soft limit to the hard one: its usual 1024 only protects users of `select`."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    # Without permission, the soft limit stays.
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def connection_limit(max_in_flight: int) -> int:
    """The limit of client connections, which leaves a file descriptor for each request's backend.

    Running out of descriptors is worse than a refusal: the process could not look up a name or open a certificate.
    """
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if files == resource.RLIM_INFINITY:
        return sys.maxsize
    free = max(2, files - _OWN_FILES)
    return free - min(max_in_flight, free // 2)


def _authority(host: str, port: int) -> str:
    """Host and port, as in a URL."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def listen(host: str, port: int, variable: str) -> socket.socket:
    """A bound socket. Raises SettingsError naming the variable and what to do."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio sets TCP_NODELAY only with an explicit protocol number; without it, successive probes take 40 ms each.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as exc:
        listener.close()
        reason = exc.strerror or str(exc)
        name, value, fix = PREFIX + variable, str(port), "a free port"
        if exc.errno not in (errno.EADDRINUSE, errno.EACCES):
            name, value, fix = PREFIX + "HOST", host, "an address of this machine"
        message = f"{name}={value}: cannot listen on {_authority(host, port)} ({reason}); set {name} to {fix}"
        raise SettingsError(message) from None
    listener.listen(_BACKLOG)
    listener.setblocking(False)
    return listener


@contextlib.contextmanager
def ops_thread(ops: ASGIApp, listener: socket.socket, deadlines: Deadlines | None = None) -> Iterator[None]:
    """Serve probes and metrics on a thread with its own event loop, so that they never wait behind traffic."""
    # Rejections are not counted here: metrics and log belong to the other loop.
    protocol = connection_factory(deadlines or Deadlines(), lambda *_: None)
    server = Server(_config(ops, protocol, loop="asyncio", lifespan="off"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, name="ops", daemon=True)
    thread.start()
    try:
        yield
    finally:
        server.should_exit = True
        thread.join(timeout=5)
