"""The processes of a demo: started, waited for, watched, and ended in order. Each demo adds which ones they are."""

import errno
import os
import random
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx

from inference_api.demo.child import Child

_POLL = 0.1
# Seconds: what still runs then is killed.
_PATIENCE = 10.0
# Beginnings of names, in the order in which their processes end: routers after those who ask, before all others.
_FIRST = ("traffic", "router")

Stopping = list[int]


class DemoError(Exception):
    """The demo cannot start or go on; the message says why and what to do."""


class Processes:
    """In the order of their start; `stopping` fills at SIGINT and SIGTERM."""

    def __init__(self, directory: Path, stopping: Stopping, ready_within: float = 120) -> None:
        self.directory = directory
        self.stopping = stopping
        self.children: list[Child] = []
        # Up to ten interpreters start on what may be two busy cores.
        self._ready_within = ready_within
        self._environment = _environment()

    def stop(self) -> None:
        """Those who ask, the routers so that streams may end well, then all the others at once."""
        left = list(self.children)
        for beginning in (*_FIRST, ""):
            group = [child for child in left if child.name.startswith(beginning)]
            left = [child for child in left if child not in group]
            for child in group:
                child.terminate()
            for child in group:
                child.wait(_PATIENCE)

    def start(self, name: str, *arguments: str, settings: Mapping[str, str] | None = None) -> None:
        """Start `python -m` with these arguments; `settings` are variables of its own."""
        if self.stopping:
            return
        path = self.directory / name.replace(" ", "-")
        environment = {**self._environment, **(settings or {})}
        script = self.script(path.name, *arguments, settings=settings) if settings else None
        self.children.append(Child(name, arguments, path.with_name(f"{path.name}.log"), environment, script))

    def script(self, name: str, *arguments: str, settings: Mapping[str, str]) -> Path:
        """A file for `sh` that runs the same, with what follows it as more arguments; it may hold secrets."""
        path = self.directory / f"{name}.sh"
        path.touch(mode=0o600)
        exports = "".join(f"export {name}={shlex.quote(value)}\n" for name, value in settings.items())
        path.write_text(f'{exports}exec {shlex.join([sys.executable, "-m", *arguments])} "$@"\n')
        return path

    def run(self, *arguments: str, settings: Mapping[str, str]) -> str:
        """Run `python -m` with these arguments to its end; its output. Raises DemoError."""
        process = subprocess.run(
            [sys.executable, "-m", *arguments],
            env={**self._environment, **settings},
            capture_output=True,
            text=True,
            check=False,
            # Ctrl-C goes to the demo alone.
            start_new_session=True,
        )
        if process.returncode:
            raise DemoError(f"{' '.join(arguments)}: {process.stderr.strip()}")
        return process.stdout

    def wait_for(self, urls: list[str]) -> None:
        deadline = time.monotonic() + self._ready_within
        with httpx.Client(trust_env=False, timeout=1) as client:
            while not self.stopping and (waiting := [url for url in urls if not _answers(client, url)]):
                for child in self.children:
                    if child.ended:
                        raise DemoError(f"{child}; the last lines of its output:\n{child.last_lines()}")
                if time.monotonic() > deadline:
                    raise DemoError(f"{waiting[0]} did not answer 200 within {self._ready_within:g} s.")
                time.sleep(_POLL)

    def watch(self) -> None:
        """Until told to stop: any process may end, that is the business of the others; but one router must be left."""
        missed: set[str] = set()
        while not self.stopping:
            routers = [child for child in self.children if child.name.startswith("router")]
            for child in self.children:
                if not child.ended or child.name in missed:
                    continue
                if all(router.ended for router in routers) and child in routers:
                    raise DemoError(f"{child}; the last lines of its output:\n{child.last_lines()}")
                missed.add(child.name)
                others = "the routers go on" if len(routers) > 1 else "the router goes on"
                left = "the other router goes on" if child in routers else others
                print(f"{child}; {left} without it. To start it again:\n\n{child.command}\n", flush=True)
            time.sleep(_POLL)


@contextmanager
def stop_signals() -> Iterator[Stopping]:
    """A list that fills at SIGINT and SIGTERM. Nothing is raised, so no child can be lost half-made."""
    stopping: Stopping = []
    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    previous = {number: signal.signal(number, lambda got, frame: stopping.append(got)) for number in numbers}
    try:
        yield stopping
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _environment(inherited: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Without this project's own variables: the demo is the same on every machine."""
    own = ("INFERENCE_API_", "REGISTRY_STUB_", "CONTROL_PLANE_")
    return {name: value for name, value in inherited.items() if not name.upper().startswith(own)}


def free_port(host: str, port: int) -> int:
    """`port` if it can be listened on, any free one for 0. Raises DemoError naming the fix."""
    if not 0 <= port <= 65535:
        raise DemoError(f"{port} is not a port; choose another one, say --port 8001")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.create_server((host, port), family=family):
            return port or free_ports(1, host)[0]
    except OSError as exc:
        # A negative number is a name that was not found, and strerror says it; otherwise it repeats the address.
        reason = os.strerror(exc.errno).lower() if exc.errno and exc.errno > 0 else exc.strerror
        if exc.errno in (errno.EADDRINUSE, errno.EACCES):
            other = port + 1 if 1024 <= port < 65535 else 8001
            raise DemoError(f"port {port} on {host}: {reason}; choose another one, say --port {other}") from None
        raise DemoError(f"cannot listen on {host!r}: {reason}; choose another, say --host 127.0.0.1") from None


def free_ports(count: int, host: str = "127.0.0.1", but: int = 0) -> list[int]:
    """Below the ports that the system gives to outgoing connections: those can be taken before a child listens."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    ports: list[int] = []
    for port in random.sample(range(10000, 32000), 1000):
        with suppress(OSError), socket.create_server((host, port), family=family):
            ports += [port] if port != but else []
        if len(ports) == count:
            return ports
    raise DemoError(f"no free port on {host!r}; end what listens there, or choose another, say --host 127.0.0.1")


def _answers(client: httpx.Client, url: str) -> bool:
    try:
        return client.get(url).status_code == 200
    except httpx.TransportError:
        return False
