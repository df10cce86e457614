"""`inference-api demo`: fake engines, a registry and the real router as processes of this machine, until Ctrl-C."""

import errno
import os
import random
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import yaml

from inference_api.demo.child import Child
from inference_api.demo.guide import base_url, guide
from inference_api.demo.policy import PRICES, Keys

_POLL = 0.1
# Seconds: the router lets open streams finish for _DRAIN, and whatever still runs after _PATIENCE is killed.
_DRAIN, _PATIENCE = 2, 10.0

_ENGINES = ("llama-3-8b", "llama-3-8b", "mistral-7b", "gpt2")
_ALIASES = {"llama-3-8b": ["llama3"]}

Stopping = list[int]


class DemoError(Exception):
    """The demo cannot start or go on; the message says why and what to do."""


def run_demo(host: str = "127.0.0.1", port: int = 8000, tokens_per_second: float = 40, keys: bool = False) -> int:
    """Run the demo until SIGINT or SIGTERM; 0 after that, 1 if it could not start or go on."""
    try:
        with stop_signals() as stopping, tempfile.TemporaryDirectory(prefix="inference-api-demo-") as directory:
            demo = Demo(Path(directory), stopping)
            try:
                demo.run(host, port, tokens_per_second, Keys.new() if keys else None)
            finally:
                demo.stop()
    except DemoError as exc:
        print(f"inference-api demo: {exc}", file=sys.stderr)
        return 1
    return 0


class Demo:
    """The processes of one demo, in the order of their start; `stopping` fills at SIGINT and SIGTERM."""

    def __init__(self, directory: Path, stopping: Stopping, ready_within: float = 60) -> None:
        self._directory = directory
        self._stopping = stopping
        self._children: list[Child] = []
        # Six interpreters start on what may be two busy cores.
        self._ready_within = ready_within
        self._environment = _environment()

    def run(self, host: str, port: int, tokens_per_second: float, keys: Keys | None = None) -> None:
        if not tokens_per_second > 0:
            raise DemoError(f"--tokens-per-second must be more than 0, not {tokens_per_second:g}")
        port = _free_port(host, port)
        url = base_url(host, port)
        registry, *engines = _free_ports(1 + len(_ENGINES))
        catalogue = self._write_catalogue(engines, PRICES if keys else {})
        for model, own in zip(_ENGINES, engines, strict=True):
            options = ("--model", model, "--port", str(own), "--tokens-per-second", f"{tokens_per_second:g}")
            self.start(f"{model} on port {own}", "inference_api.demo.engine", *options)
        database = str(self._directory / "registry.sqlite3")
        files = ("--database", database, "--catalogue", str(catalogue))
        self.start("registry", "registry_stub", "serve", "--host", "127.0.0.1", "--port", str(registry), *files)
        # The router is last: it finds the registry, and healthy engines, at its first look.
        self.wait_for([f"http://127.0.0.1:{registry}/healthz", *(f"http://127.0.0.1:{n}/health" for n in engines)])
        self._environment |= {
            "INFERENCE_API_HOST": host,
            "INFERENCE_API_PORT": str(port),
            "INFERENCE_API_REGISTRY_URL": f"http://127.0.0.1:{registry}",
            "INFERENCE_API_CATALOGUE": str(catalogue),
            "INFERENCE_API_DRAIN_TIMEOUT": str(_DRAIN),
        }
        if keys:
            self._environment |= self._with_keys(keys)
        self.start("router", "inference_api", "serve")
        self.wait_for([f"{url}/readyz"])
        if not self._stopping:
            print(guide(url, tokens_per_second, self._children[0].pid, str(self._directory), keys), flush=True)
        self.watch()

    def stop(self) -> None:
        """The router first, so that streams may end well; then all the others at once."""
        routers = [child for child in self._children if child.name == "router"]
        others = [child for child in self._children if child.name != "router"]
        for group in (routers, others):
            for child in group:
                child.terminate()
            for child in group:
                child.wait(_PATIENCE)

    def start(self, name: str, *arguments: str) -> None:
        if not self._stopping:
            log = self._directory / f"{name.replace(' ', '-')}.log"
            self._children.append(Child(name, arguments, log, self._environment))

    def wait_for(self, urls: list[str]) -> None:
        deadline = time.monotonic() + self._ready_within
        with httpx.Client(trust_env=False, timeout=1) as client:
            while not self._stopping and (waiting := [url for url in urls if not _answers(client, url)]):
                for child in self._children:
                    if child.ended:
                        raise DemoError(f"{child}; the last lines of its output:\n{child.last_lines()}")
                if time.monotonic() > deadline:
                    raise DemoError(f"{waiting[0]} did not answer 200 within {self._ready_within:g} s.")
                time.sleep(_POLL)

    def watch(self) -> None:
        """Until told to stop: an engine or the registry may end, that is the router's business; the router may not."""
        missed: set[str] = set()
        while not self._stopping:
            for child in self._children:
                if not child.ended or child.name in missed:
                    continue
                if child.name == "router":
                    raise DemoError(f"{child}; the last lines of its output:\n{child.last_lines()}")
                missed.add(child.name)
                print(f"{child}; the router goes on without it. To start it again:\n\n{child.command}\n", flush=True)
            time.sleep(_POLL)

    def _with_keys(self, keys: Keys) -> dict[str, str]:
        """Write the policy; the router's settings with it."""
        path = self._directory / "policy.yaml"
        path.touch(mode=0o600)
        path.write_text(keys.policy())
        return {"INFERENCE_API_AUTH": "keys", "INFERENCE_API_POLICY": str(path), "INFERENCE_API_USAGE": "log"}

    def _write_catalogue(self, ports: list[int], prices: Mapping[str, Mapping[str, float]]) -> Path:
        """One file for both: the registry is filled from it, and the router falls back to it."""
        urls: dict[str, list[str]] = {}
        for model, port in zip(_ENGINES, ports, strict=True):
            urls.setdefault(model, []).append(f"http://127.0.0.1:{port}")
        models = [
            {
                "name": name,
                "owner": "demo",
                "aliases": _ALIASES.get(name, []),
                "backends": [{"url": url} for url in found],
                **({"price": dict(prices[name])} if name in prices else {}),
            }
            for name, found in urls.items()
        ]
        path = self._directory / "catalogue.yaml"
        path.write_text(yaml.safe_dump({"models": models}, sort_keys=False))
        return path


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
    own = ("INFERENCE_API_", "REGISTRY_STUB_")
    return {name: value for name, value in inherited.items() if not name.upper().startswith(own)}


def _free_port(host: str, port: int) -> int:
    """`port` if it can be listened on, any free one for 0. Raises DemoError naming the fix."""
    if not 0 <= port <= 65535:
        raise DemoError(f"{port} is not a port; choose another one, say --port 8001")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.create_server((host, port), family=family):
            return port or _free_ports(1, host)[0]
    except OSError as exc:
        # A negative number is a name that was not found, and strerror says it; otherwise it repeats the address.
        reason = os.strerror(exc.errno).lower() if exc.errno and exc.errno > 0 else exc.strerror
        if exc.errno in (errno.EADDRINUSE, errno.EACCES):
            other = port + 1 if 1024 <= port < 65535 else 8001
            raise DemoError(f"port {port} on {host}: {reason}; choose another one, say --port {other}") from None
        raise DemoError(f"cannot listen on {host!r}: {reason}; choose another, say --host 127.0.0.1") from None


def _free_ports(count: int, host: str = "127.0.0.1") -> list[int]:
    """Below the ports that the system gives to outgoing connections: those can be taken before a child listens."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    ports: list[int] = []
    for port in random.sample(range(10000, 32000), 1000):
        with suppress(OSError), socket.create_server((host, port), family=family):
            ports.append(port)
        if len(ports) == count:
            return ports
    raise DemoError(f"no free port on {host!r}; end what listens there, or choose another, say --host 127.0.0.1")


def _answers(client: httpx.Client, url: str) -> bool:
    try:
        return client.get(url).status_code == 200
    except httpx.TransportError:
        return False
