"""`inference-api demo`: toy engines, a registry and the real router as processes of this machine, until Ctrl-C."""

import os
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import yaml

from inference_api.demo.child import Child
from inference_api.demo.guide import base_url, guide

# Six interpreters start on what may be two busy cores.
_READY_WITHIN = 60.0
_POLL = 0.1
# The router lets streams finish for this long, and everything has ended for sure after the second number.
_DRAIN, _PATIENCE = 2, 5.0

_ENGINES = ("llama-3-8b", "llama-3-8b", "mistral-7b", "gpt2")
_ALIASES = {"llama-3-8b": ["llama3"], "mistral-7b": ["mistral"]}

Stopping = list[int]


class DemoError(Exception):
    """The demo cannot start or go on; the message says why and what to do."""


def run_demo(host: str = "127.0.0.1", port: int = 8000, tokens_per_second: float = 40) -> int:
    """Run the demo until SIGINT or SIGTERM; 0 after that, 1 if it could not start or go on."""
    try:
        with _signals() as stopping, tempfile.TemporaryDirectory(prefix="inference-api-demo-") as directory:
            demo = Demo(Path(directory), stopping)
            try:
                demo.run(host, port, tokens_per_second)
            finally:
                demo.stop()
    except DemoError as exc:
        print(f"inference-api demo: {exc}", file=sys.stderr)
        return 1
    return 0


class Demo:
    """The processes of one demo, in the order of their start; `stopping` fills when it is told to stop."""

    def __init__(self, directory: Path, stopping: Stopping) -> None:
        self._directory = directory
        self._stopping = stopping
        self._children: list[Child] = []
        self._environment = _environment()

    def run(self, host: str, port: int, tokens_per_second: float) -> None:
        if not tokens_per_second > 0:
            raise DemoError(f"--tokens-per-second must be more than 0, not {tokens_per_second:g}")
        port = _free_port(host, port)
        registry, *engines = _free_ports(1 + len(_ENGINES))
        catalogue = self._write_catalogue(engines)
        urls = [f"http://127.0.0.1:{number}/health" for number in engines]
        for model, number in zip(_ENGINES, engines, strict=True):
            pace = f"{tokens_per_second:g}"
            arguments = ("--model", model, "--port", str(number), "--tokens-per-second", pace)
            self._start(f"{model} on port {number}", "inference_api.demo.engine", *arguments)
        database = str(self._directory / "registry.sqlite3")
        arguments = ("--port", str(registry), "--database", database, "--catalogue", str(catalogue))
        self._start("registry", "registry_stub", "serve", "--host", "127.0.0.1", *arguments)
        # The router is last: it finds the registry, and healthy engines, at its first look.
        self._wait_for([*urls, f"http://127.0.0.1:{registry}/healthz"])
        self._environment |= {
            "INFERENCE_API_HOST": host,
            "INFERENCE_API_PORT": str(port),
            "INFERENCE_API_REGISTRY_URL": f"http://127.0.0.1:{registry}",
            "INFERENCE_API_CATALOGUE": str(catalogue),
            "INFERENCE_API_DRAIN_TIMEOUT": str(_DRAIN),
        }
        self._start("router", "inference_api", "serve")
        url = base_url(host, port)
        self._wait_for([f"{url}/readyz"])
        if not self._stopping:
            print(guide(url, tokens_per_second, self._children[0].pid, str(self._directory)), flush=True)
        self._watch()

    def stop(self) -> None:
        """The router first, so that streams may end well; then all the others at once."""
        routers = [child for child in self._children if child.name == "router"]
        others = [child for child in self._children if child.name != "router"]
        for group in (routers, others):
            for child in group:
                child.terminate()
            for child in group:
                child.wait(_PATIENCE)

    def _start(self, name: str, *arguments: str) -> None:
        if not self._stopping:
            log = self._directory / f"{name.replace(' ', '-')}.log"
            self._children.append(Child(name, arguments, log, self._environment))

    def _wait_for(self, urls: list[str]) -> None:
        deadline = time.monotonic() + _READY_WITHIN
        with httpx.Client(trust_env=False, timeout=1) as client:
            while not self._stopping and (waiting := [url for url in urls if not _answers(client, url)]):
                for child in self._children:
                    if child.exit_code is not None:
                        raise DemoError(f"{_ended(child)} Its last lines:\n{child.last_lines()}")
                if time.monotonic() > deadline:
                    raise DemoError(f"{waiting[0]} did not answer 200 within {_READY_WITHIN:g} s.")
                time.sleep(_POLL)

    def _watch(self) -> None:
        """Until told to stop: an engine or the registry may end, that is the router's business; the router may not."""
        missed: set[str] = set()
        while not self._stopping:
            for child in self._children:
                if child.exit_code is None or child.name in missed:
                    continue
                if child.name == "router":
                    raise DemoError(f"{_ended(child)} Its last lines:\n{child.last_lines()}")
                missed.add(child.name)
                print(f"{_ended(child)} The router goes on without it.", flush=True)
            time.sleep(_POLL)

    def _write_catalogue(self, ports: list[int]) -> Path:
        """One file for both: the registry is filled from it, and the router falls back to it."""
        models = [
            {
                "name": name,
                "owner": "demo",
                "aliases": _ALIASES.get(name, []),
                "backends": [
                    {"url": f"http://127.0.0.1:{port}"}
                    for model, port in zip(_ENGINES, ports, strict=True)
                    if model == name
                ],
            }
            for name in dict.fromkeys(_ENGINES)
        ]
        path = self._directory / "catalogue.yaml"
        path.write_text(yaml.safe_dump({"models": models}, sort_keys=False))
        return path


@contextmanager
def _signals() -> Iterator[Stopping]:
    """A list that fills when the process is told to stop. Nothing is raised, so no child can be lost half-made."""
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
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.create_server((host, port), family=family) as listener:
            number: int = listener.getsockname()[1]
            return number
    except (OSError, OverflowError) as exc:
        reason = exc.strerror if isinstance(exc, OSError) else "a port is a number from 0 to 65535"
        fix = f"`inference-api demo --port {port + 1 if 1024 <= port < 65535 else 8001}`"
        raise DemoError(f"cannot listen on {host} port {port}: {reason}. Choose another port: {fix}") from None


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        # All are held until all are found, so that they differ.
        held = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [listener.getsockname()[1] for listener in held]


def _answers(client: httpx.Client, url: str) -> bool:
    try:
        return client.get(url).status_code == 200
    except httpx.TransportError:
        return False


def _ended(child: Child) -> str:
    return f"The process of {child.name} ended with code {child.exit_code}."
