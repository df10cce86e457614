"""A pytest plugin for vLLM's own server tests: their engines run on the CPU, and the tests may reach them by a router.

Loaded with `-p plugin` by the Python that has vLLM. Environment: `ROUTER`: the command of a router that is started in
front of each engine; unset: the tests talk to the engine. Nothing else of the tests is changed.
"""

import importlib
import json
import os
import shlex
import signal
import socket
import subprocess
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

ON_CPU = {
    "VLLM_TARGET_DEVICE": "cpu",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "TORCHDYNAMO_DISABLE": "1",
}
# Of an option that is given twice the last counts: float32, as the tiny models are, or a random answer may vary.
OPTIONS = ["--dtype", "float32", "--enforce-eager"]


class Router:
    """A router in front of one engine, which it knows by each of `names`."""

    def __init__(self, command: str, names: list[str], engine: str) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        catalogue = Path(tempfile.mkdtemp(prefix="vllm-tests-")) / "catalogue.json"
        catalogue.write_text(json.dumps({"models": [{"name": n, "backends": [{"url": engine}]} for n in names]}))
        environ = {
            "INFERENCE_API_PORT": str(self.port),
            "INFERENCE_API_CATALOGUE": str(catalogue),
            "INFERENCE_API_HEALTH_INTERVAL": "3600",
        }
        self._process = subprocess.Popen(
            shlex.split(command),
            env={name: value for name, value in os.environ.items() if not name.startswith("PYTHON")} | environ,
            stdout=subprocess.DEVNULL,
        )
        self._wait()

    def _wait(self) -> None:
        for _ in range(600):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{self.port}/readyz", timeout=5).read()
            except OSError:
                time.sleep(0.05)
            else:
                return
        raise RuntimeError("the router did not become ready")

    def stop(self) -> None:
        self._process.send_signal(signal.SIGTERM)
        self._process.wait(30)


def names_of(model: str, arguments: list[str]) -> list[str]:
    """The names under which an engine with these arguments serves: its own, and those of its adapters."""
    names: list[str] = []
    adapters: list[str] = []
    into: list[str] | None = None
    for argument in arguments:
        if argument.startswith("--"):
            into = {"--served-model-name": names, "--lora-modules": adapters}.get(argument)
        elif into is not None:
            into.append(argument.partition("=")[0])
    return (names or [model]) + adapters


def pytest_configure(config: Any) -> None:
    utils = importlib.import_module("tests.utils")
    server: Any = utils.RemoteOpenAIServer
    make, start, shut_down = server.__init__, server._start_server, server._shutdown

    def start_on_cpu(self: Any, model: str, arguments: list[str], environ: dict[str, str] | None) -> None:
        start(self, model, [*arguments, *OPTIONS], ON_CPU | (environ or {}))

    def start_behind_router(self: Any, model: str, arguments: list[str], **keywords: Any) -> None:
        self.router = None
        make(self, model, arguments, **keywords)
        if (command := os.environ.get("ROUTER")) and not self.uds:
            self.router = Router(command, names_of(model, arguments), f"http://{self.host}:{self.port}")
            self.host, self.port = "127.0.0.1", self.router.port

    def shut_down_both(self: Any) -> None:
        if self.router is not None:
            self.router.stop()
        shut_down(self)

    server._start_server = start_on_cpu
    server.__init__ = start_behind_router
    server._shutdown = shut_down_both
