"""uvicorn, set up for a router: our sockets and log, no proxy headers, no WebSockets; probes on their own thread."""

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
    """What is served: `app` to clients, `ops` on OPS_PORT.

    `drain` is called when the process is asked to stop, `reload` when it is asked to read its configuration again.
    """

    app: ASGIApp
    ops: ASGIApp

    def drain(self) -> None: ...
    def reload(self) -> None: ...
    def rejected(self, error: RouterError, request_id: str, size: int, client: tuple[str, int] | None) -> None: ...


Handler = Callable[[int, FrameType | None], Any] | signal.Handlers
# As many connections as may wait while the loop is busy with a burst.
_BACKLOG = 2048
# Seconds for requests to say that they are over, when nobody wants to wait.
_FORCED = 1.0
# Log, sockets that listen, two event loops, the registry, the probes' clients, a scrape: about 25.
_OWN_FILES = 48


def run_server(served: Served, settings: Settings, on_listen: Callable[[str], None] = lambda address: None) -> None:
    """Serve until SIGTERM or SIGINT, then wait for what is in flight. Raises SettingsError if a port cannot be had.

    `on_listen` gets the address, as a URL has it, once there are sockets.
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
        # What is there now stays for good: the collector need not look at it again, request after request.
        gc.collect()
        gc.freeze()
        server.run(sockets=[listener])


class Server(uvicorn.Server):
    """uvicorn's server, but SIGTERM and SIGINT are requests to stop, not a way to die: the exit code is 0.

    `on_stop` is called at the signal; `delay`: seconds to go on accepting after it, until nobody sends any more. During
    these each answer says that its connection is closed, so that clients go elsewhere, and none is idle in the end.
    `on_reload` is called at SIGHUP, which ends nothing.
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
        # Who asks a second time does not want to wait, for whatever it is.
        self.force_exit = self.server_state.draining
        self.server_state.draining = True
        if not self.force_exit:
            # By a turn of the loop: the signal may have come in the middle of a line of the log.
            asyncio.get_running_loop().call_soon_threadsafe(self._tell_waiting)
        if self._delay and not self.force_exit:
            asyncio.get_running_loop().call_later(self._delay, self._stop)
        else:
            self._stop()

    def handle_hangup(self, sig: int, frame: FrameType | None) -> None:
        # By a turn of the loop: the signal may come anywhere, and before or after there is a loop.
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
            # uvicorn leaves requests and lifespan to the end of the loop, where they fail in any order.
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
    """Handle signals so for a while; only the main thread may."""
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
        # Whoever can reach the port could claim any address; nothing here trusts one.
        proxy_headers=False,
        backlog=_BACKLOG,
        **more,
    )


def raise_file_limit() -> None:
    """The soft limit is often 1024, from a time when more could break `select`; nothing here uses that."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    # Where there is no permission for the hard one, the soft one will do.
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def connection_limit(max_in_flight: int) -> int:
    """How many clients may be connected, so that there is a file descriptor left for each request's backend.

    To run out of them is worse than to refuse: the process could not even look up a name or open a certificate.
    """
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if files == resource.RLIM_INFINITY:
        return sys.maxsize
    free = max(2, files - _OWN_FILES)
    return free - min(max_in_flight, free // 2)


def _authority(host: str, port: int) -> str:
    """Host and port as a URL has them."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def listen(host: str, port: int, variable: str) -> socket.socket:
    """A bound socket. Raises SettingsError naming the variable and what to do."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio sets TCP_NODELAY only on connections whose protocol is named; without it probes in a row take 40 ms each.
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
    """Serve probes and metrics from a thread with an event loop of its own, so that they never wait behind traffic."""
    # What is refused here is not counted: metrics and log belong to the other loop.
    protocol = connection_factory(deadlines or Deadlines(), lambda *_: None)
    server = Server(_config(ops, protocol, loop="asyncio", lifespan="off"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, name="ops", daemon=True)
    thread.start()
    try:
        yield
    finally:
        server.should_exit = True
        thread.join(timeout=5)
