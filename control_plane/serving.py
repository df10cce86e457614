"""`serve`: checks or upgrades the schema, binds the ports, and serves until SIGTERM."""

import asyncio
import logging
import os
import signal
import socket
import threading
from contextlib import ExitStack
from pathlib import Path
from types import FrameType

import uvicorn

from control_plane.app import Application
from control_plane.data import schema
from control_plane.data.database import DatabaseError
from control_plane.http.cookies import Cookies
from control_plane.plane import offline
from control_plane.services import bootstrap
from control_plane.settings import PREFIX, Settings, SettingsError
from inference_api.observe.log import configure_logging, log_unhandled

log = logging.getLogger(__name__)

# Seconds after which a process that was told to stop ends in any case: more than requests may take to end
_PATIENCE = 18.0


def serve(settings: Settings) -> int:
    """Raises SettingsError, DatabaseError."""
    configure_logging(settings.log_level, settings.log_format)
    log_unhandled()
    # They say at info what each connection begins with, and at debug what each statement is given.
    for name in ("alembic", "aiosqlite", "sqlalchemy"):
        logging.getLogger(name).setLevel(logging.WARNING)
    with ExitStack() as stack:
        if settings.url.get_backend_name() == "sqlite":
            stack.enter_context(schema.file_lock(Path(settings.url.database or "")))
        try:
            asyncio.run(_prepare(settings))
        except DatabaseError as exc:
            raise DatabaseError(f"{PREFIX}DATABASE_URL: {exc}") from None
        listeners = [stack.enter_context(_listen("PORT", settings.host, settings.port))]
        if settings.api_port is not None:
            listeners.append(stack.enter_context(_listen("API_PORT", settings.host, settings.api_port)))
        # The origin of the console has its port, which may be one that was free.
        ports = dict(zip(("port", "api_port"), (listener.getsockname()[1] for listener in listeners), strict=False))
        settings = settings.model_copy(update=ports)
        application = Application(settings)
        application.api_port = ports.get("api_port")
        asyncio.run(_begin(settings))
        server = Server(application, _PATIENCE)
        # uvicorn raises the signal again at its end, and the default action is not exit code 0.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, server.handle_exit)
        urls = ", ".join(map(_url, listeners))
        log.info("listening", extra={"fields": {"url": urls, "database": settings.url.get_backend_name()}})
        server.run(sockets=listeners)
    return 0


class Server(uvicorn.Server):
    """Answers long polls, and ends answers of the playground, when it is told to stop: they would hold it.

    `patience`: seconds after which the process ends then, whatever still runs.
    """

    def __init__(self, application: Application, patience: float | None = None) -> None:
        super().__init__(
            uvicorn.Config(
                application,
                log_config=None,
                access_log=False,
                server_header=False,
                # Whose x-forwarded-for is believed is TRUSTED_PROXIES alone; uvicorn believes everybody on loopback.
                proxy_headers=False,
                lifespan="on",
                ws="none",
                # Longer than the routers' refresh interval, so that they keep their connection.
                timeout_keep_alive=75,
                timeout_graceful_shutdown=10,
            )
        )
        self._patience = patience
        self._documents = application.plane.documents
        self._end_answers = application.end_answers
        self._stopping: asyncio.Task[None] | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        super().handle_exit(sig, frame)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._end_answers()
        await self._documents.stop()
        if self._patience is not None:
            # A statement that was cancelled may leave a task of the driver without an end.
            guard = threading.Timer(self._patience, _end)
            guard.daemon = True
            guard.start()
        await super().shutdown(sockets)


def _end() -> None:
    """What was acknowledged is on disk."""
    log.error("a statement did not end; the process ends without it")
    os._exit(0)


async def _prepare(settings: Settings) -> None:
    if settings.upgrades:
        await schema.migrate(settings.url)
    else:
        schema.check(await schema.standings(settings.url))


async def _begin(settings: Settings) -> None:
    """Say how people get in."""
    if not Cookies(settings.origin).usable:
        name, text = (
            f"{PREFIX}PUBLIC_URL",
            "is neither https:// nor on loopback: no browser keeps the cookie of a login",
        )
        log.warning(f"{name}={settings.origin!r} {text}")
    async with offline(settings) as plane:
        try:
            url = await bootstrap.prepare(plane)
        except bootstrap.BootstrapError as exc:
            raise SettingsError(f"{PREFIX}ADMIN_EMAIL={settings.admin_email!r}: {exc}") from None
    if url is not None:
        # Also where only warnings are logged: without it nobody gets in.
        log.warning(f"first admin: {url}")


def _listen(setting: str, host: str, port: int) -> socket.socket:
    try:
        # Resolved first, for the address family, and because bind() leaks a socket with a malformed name.
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        return socket.create_server(address, family=family)
    except (OSError, UnicodeError) as exc:
        # Without the "(while attempting to bind on address ...)" that Python adds.
        reason = (getattr(exc, "strerror", None) or "that is no host name").partition(" (")[0]
        raise SettingsError(
            f"{PREFIX}{setting}='{port}': cannot listen on {host!r} port {port}: {reason}; choose another host or port"
        ) from None


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
