"""The command line: opens the store, seeds it, binds the port, and serves until SIGTERM."""

import argparse
import ipaddress
import logging
import os
import signal
import socket
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import uvicorn
from starlette.types import ASGIApp

from inference_api import __version__
from inference_api.app import ENTRY
from inference_api.observe.log import LogHandler
from inference_api.observe.writer import LogWriter
from inference_api.routing.catalogue import CatalogueError, load_catalogue
from registry_stub.app import create_app
from registry_stub.database import StoreError
from registry_stub.store import Store

log = logging.getLogger("registry_stub")

TOKEN_VARIABLE = "REGISTRY_STUB_TOKEN"

_EXAMPLES = f"""\
examples:
  registry-stub serve
      an empty registry on http://127.0.0.1:8081, kept in ./registry.sqlite3

  {TOKEN_VARIABLE}=... registry-stub serve --host 0.0.0.0 --database /data/registry.sqlite3 --catalogue seed.yaml
      in a container: filled from seed.yaml at the first start; PUT and DELETE need the token

  curl localhost:8081/models
  curl -X PUT localhost:8081/models/gpt2 -H 'Content-Type: application/json' \\
       -d '{{"name": "gpt2", "backends": [{{"url": "http://gpt2:8000"}}]}}'
  curl -X DELETE localhost:8081/models/gpt2

The routers find it by INFERENCE_API_REGISTRY_URL=http://HOST:PORT. SIGTERM stops it once open requests are answered.
"""


class _Stop(Exception):
    """The registry cannot start; the message is one sentence with the fix."""


def main(argv: list[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    try:
        return _serve(arguments)
    except (_Stop, StoreError, CatalogueError) as exc:
        print(f"registry-stub: {exc}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="registry-stub", description="The model registry of the inference routers.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    description = "Store the catalogue of models in a SQLite file and serve it over HTTP: GET /models, "
    description += "GET, PUT and DELETE /models/{name}, GET /healthz, GET /metrics."
    serve = commands.add_parser(
        "serve", help="serve the catalogue over HTTP", description=description, epilog=_EXAMPLES, formatter_class=raw
    )
    add = serve.add_argument
    add("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 for all (default: %(default)s)")
    add("--port", type=_port, default=8081, help="port to listen on; 0 picks a free one (default: %(default)s)")
    add("--ops-port", type=_port, metavar="PORT", help=_OPS_PORT_HELP)
    add("--database", type=Path, default=Path("registry.sqlite3"), metavar="FILE", help=_DATABASE_HELP)
    add("--catalogue", type=Path, metavar="FILE", help="YAML or JSON catalogue to fill an empty database from")
    add("--token-env", metavar="NAME", help=_TOKEN_HELP)
    add("--log-level", choices=["debug", "info", "warning", "error"], default="info", help="(default: %(default)s)")
    return parser


_DATABASE_HELP = "SQLite file, made if missing; one process per file (default: %(default)s)"
_TOKEN_HELP = (
    "environment variable with the bearer token that PUT and DELETE need "
    f"(default: {TOKEN_VARIABLE}; if that is unset, writes are open to this machine, and refused beyond it)"
)
_OPS_PORT_HELP = "serve /metrics, and /healthz too, on a port of its own, where no model can be changed"


def _port(text: str) -> int:
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port; give a number from 0 to 65535")
    return int(text)


def _serve(arguments: argparse.Namespace) -> int:
    lines = logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s")
    # Clients cause log lines; a log that nobody reads must not block the registry.
    logging.basicConfig(level=arguments.log_level.upper(), handlers=[LogHandler(LogWriter(sys.stderr), lines)])
    token = _token(arguments.token_env)
    with Store(arguments.database) as store:
        for problem in store.problems:
            _print_refused(f"database {str(arguments.database)!r}", problem)
        if arguments.catalogue:
            _seed(store, arguments.catalogue)
        with ExitStack() as stack:
            listener = stack.enter_context(_listen("--port", arguments.host, arguments.port))
            listeners, ops_port = [listener], None
            if arguments.ops_port is not None:
                listeners.append(stack.enter_context(_listen("--ops-port", arguments.host, arguments.ops_port)))
                ops_port = listeners[1].getsockname()[1]
            read_only = token is None and not _is_loopback(listener)
            server = _server(create_app(store, token, read_only=read_only, ops_port=ops_port))
            # uvicorn raises the signal again at its end, and the default action is not exit code 0.
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, server.handle_exit)
            _announce(listeners, arguments.database, store, read_only)
            server.run(sockets=listeners)
    return 0


def _server(app: ASGIApp) -> uvicorn.Server:
    return uvicorn.Server(
        uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            server_header=False,
            lifespan="off",
            ws="none",
            # Longer than the routers' refresh interval, so that they keep their connection.
            timeout_keep_alive=75,
            timeout_graceful_shutdown=10,
        )
    )


def _token(variable: str | None) -> str | None:
    name = variable or TOKEN_VARIABLE
    value = os.environ.get(name)
    if value is None and variable is None:
        return None
    # strip: a secret made from a file often ends in a newline, which is not valid in a header.
    token = (value or "").strip()
    if not token:
        fix = "set it to the token" if variable else "set it to a token, or unset it to go without"
        raise _Stop(f"the environment variable {name} is {'empty' if value is not None else 'not set'}; {fix}")
    return token


def _seed(store: Store, path: Path) -> None:
    if store.snapshot.models or store.problems:
        log.info("the database has models already; the catalogue %s is not read", path)
        return
    catalogue = load_catalogue(path, ENTRY, "--catalogue")
    for problem in catalogue.problems:
        _print_refused(f"catalogue {str(path)!r}", problem)
    store.seed(catalogue.values(), int(time.time()))


def _print_refused(source: str, problem: str) -> None:
    # One line each: keys in the file may contain line breaks.
    print(f"registry-stub: {source}: refused {' '.join(problem.split())}", file=sys.stderr)


def _listen(option: str, host: str, port: int) -> socket.socket:
    try:
        # Resolved first, for the address family, and because bind() leaks a socket with a malformed name.
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        return socket.create_server(address, family=family)
    except (OSError, UnicodeError) as exc:
        # Without the "(while attempting to bind on address ...)" that Python adds.
        reason = (getattr(exc, "strerror", None) or "that is no host name").partition(" (")[0]
        raise _Stop(f"cannot listen on {host!r} port {port}: {reason}; choose another --host or {option}") from None


def _is_loopback(listener: socket.socket) -> bool:
    return ipaddress.ip_address(listener.getsockname()[0].partition("%")[0]).is_loopback


def _announce(listeners: list[socket.socket], database: Path, store: Store, read_only: bool) -> None:
    url, *ops = map(_url, listeners)
    metrics = f", metrics on {ops[0]}" if ops else ""
    if read_only:
        log.info("%s has no token, so it takes no changes; set %s to allow them with it", url, TOKEN_VARIABLE)
    # Last line of the start: readers that wait for it have seen all others.
    log.info("listening on %s, database %s, %d models%s", url, database, len(store.snapshot.models), metrics)


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
