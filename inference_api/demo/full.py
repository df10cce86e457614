"""The demo as a whole: engines, a control plane with its console, two routers, and callers of theirs.

Tests and the script that takes pictures use it, too: `begin`, look at `console`, `routers`, `links` and `keys`, `stop`.
"""

import json
import secrets
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import yaml

from inference_api.core import instance_name
from inference_api.demo.guide import base_url
from inference_api.demo.history import IssuedKey, history
from inference_api.demo.plain import DRAIN
from inference_api.demo.processes import DemoError, Processes, free_port, free_ports
from inference_api.demo.seed import ADMIN, ADMIN_EMAIL, ENGINES, OWNER, SLEEPER, VIEWER, catalogue, remember, seed
from inference_api.demo.tour import tour

# Seconds: what people do in the console is to be seen at once, and an open circuit to be half-open before they leave.
_SOON = {
    "INFERENCE_API_REPORT_INTERVAL": "1",
    "INFERENCE_API_REGISTRY_REFRESH": "5",
    "INFERENCE_API_HEALTH_INTERVAL": "3",
    # Queue and cache of the engines
    "INFERENCE_API_LOAD_SIGNAL_INTERVAL": "3",
    "INFERENCE_API_BREAKER_COOLDOWN": "20",
    "INFERENCE_API_DRAIN_TIMEOUT": str(DRAIN),
}
_CONSOLE_PORT = 8081
# Requests a second of the sample traffic
_RATE = 2.0


class Full(Processes):
    """`console` and `routers` are URLs; `links`: one-time logins by user; `keys`: API keys by name."""

    console: str = ""
    routers: Sequence[str] = ()
    links: Mapping[str, str] = {}
    keys: Mapping[str, IssuedKey] = {}

    def begin(self, host: str, port: int, tokens_per_second: float, rate: float = _RATE, yesterday: bool = True) -> str:
        """Start everything, and return what to do with it.

        `rate`: of the sample traffic, 0: there is none. `yesterday`: with usage of the day before.
        """
        first = free_port(host, port)
        second, console = _beside(port, first, host)
        self.routers = [base_url(host, first), base_url(host, second)]
        self.console = f"http://127.0.0.1:{console}"
        token = secrets.token_urlsafe(32)
        (sleeper,) = free_ports(1)
        self._write_processes(sleeper, tokens_per_second)
        # It takes longest to start.
        plane = self._start_plane(console, token)
        engines = self._start_engines(tokens_per_second)
        models = catalogue(engines, sleeper)
        fallback = self.directory / "catalogue.yaml"
        fallback.write_text(yaml.safe_dump({"models": models}, sort_keys=False, allow_unicode=True))
        self.wait_for([f"{self.console}/readyz"])
        if not self.stopping:
            self.keys = seed(self.console, (self.directory / "password").read_text(), models)
        if yesterday and not self.stopping:
            self._remember(token, (first, second), engines)
        self.wait_for([f"http://127.0.0.1:{own}/health" for own in engines])
        for own in (first, second):
            self._start_router(host, own, token, fallback)
        if self.stopping:
            return ""
        # While the routers start
        users = (ADMIN, OWNER, VIEWER)
        printed = self.run("control_plane", "users", "login-link", *users, settings=plane)
        self.links = dict(zip(users, printed.split(), strict=True))
        self.wait_for([f"{url}/readyz" for url in self.routers])
        if rate:
            self._start_traffic(rate)
        login = self.script("login", "control_plane", "users", "login-link", settings=plane)
        backends = {engine.role: child.pid for engine, child in zip(ENGINES, self.children[1:], strict=False)}
        return tour(self.console, self.routers, self.links, self.keys["yours"].secret, backends, login)

    def _write_processes(self, port: int, tokens_per_second: float) -> None:
        """The engine that the control plane starts itself."""
        speed = f"{tokens_per_second:g}"
        command = [sys.executable, "-m", "inference_api.demo.engine", "--model", SLEEPER, "--port", str(port)]
        one = {"name": SLEEPER, "command": [*command, "--tokens-per-second", speed], "stop_after": DRAIN}
        one["health"] = f"http://127.0.0.1:{port}/health"
        path = self.directory / "processes.yaml"
        # The control plane takes no file that others may write, and warns of one that they may read.
        path.touch(mode=0o600)
        path.write_text(yaml.safe_dump({"processes": [one]}, sort_keys=False))

    def _start_plane(self, port: int, token: str) -> Mapping[str, str]:
        """Its settings."""
        password = self.directory / "password"
        password.touch(mode=0o600)
        password.write_text(secrets.token_urlsafe(16))
        settings = {
            "CONTROL_PLANE_PORT": str(port),
            "CONTROL_PLANE_PUBLIC_URL": self.console,
            "CONTROL_PLANE_DATABASE_URL": f"sqlite:///{self.directory}/control-plane.sqlite3",
            "CONTROL_PLANE_SERVICE_TOKEN": token,
            "CONTROL_PLANE_ADMIN_EMAIL": ADMIN_EMAIL,
            "CONTROL_PLANE_ADMIN_PASSWORD_FILE": str(password),
            "CONTROL_PLANE_PROCESSES": str(self.directory / "processes.yaml"),
            "CONTROL_PLANE_ROUTER_URL": self.routers[0],
            "CONTROL_PLANE_ROUTER_PUBLIC_URL": self.routers[0],
        }
        self.start("control plane", "control_plane", "serve", settings=settings)
        return settings

    def _start_engines(self, tokens_per_second: float) -> Sequence[int]:
        """Their ports."""
        ports = free_ports(len(ENGINES))
        for engine, port in zip(ENGINES, ports, strict=True):
            options = ("--model", engine.model, "--port", str(port), "--tokens-per-second", f"{tokens_per_second:g}")
            self.start(f"{engine.model} on port {port}", "inference_api.demo.engine", *options, *engine.options)
        return ports

    def _start_router(self, host: str, port: int, token: str, fallback: Path) -> None:
        """It goes on, and starts again, without the control plane."""
        settings = {
            "INFERENCE_API_HOST": host,
            "INFERENCE_API_PORT": str(port),
            "INFERENCE_API_REGISTRY_URL": self.console,
            "INFERENCE_API_REGISTRY_TOKEN": token,
            "INFERENCE_API_CATALOGUE": str(fallback),
            "INFERENCE_API_AUTH": "keys",
            "INFERENCE_API_POLICY": "registry",
            "INFERENCE_API_POLICY_CACHE": str(self.directory / f"policy-{port}.json"),
            "INFERENCE_API_USAGE": "registry",
            "INFERENCE_API_USAGE_SPOOL": str(self.directory / f"usage-{port}"),
            **_SOON,
        }
        self.start(f"router on port {port}", "inference_api", "serve", settings=settings)

    def _remember(self, token: str, ports: Sequence[int], engines: Sequence[int]) -> None:
        backends: dict[str, list[str]] = {}
        for engine, port in zip(ENGINES, engines, strict=True):
            backends.setdefault(engine.model, []).append(f"127.0.0.1:{port}")
        routers = [instance_name(port) for port in ports]
        remember(self.console, token, list(history(time.time_ns() // 1_000_000, self.keys, routers, backends)))

    def _start_traffic(self, rate: float) -> None:
        path = self.directory / "traffic.json"
        path.touch(mode=0o600)
        keys = {name: key.secret for name, key in self.keys.items()}
        path.write_text(json.dumps({"routers": self.routers, "keys": keys, "seed": 1, "rate": rate}))
        self.start("traffic", "inference_api.demo.traffic", str(path))


def _beside(asked: int, port: int, host: str) -> tuple[int, int]:
    """Free ports for the second router and the console: its usual one, unless any will do or it is taken."""
    second, console = free_ports(2, host, but=port)
    if asked and port != _CONSOLE_PORT:
        with suppress(DemoError):
            console = free_port("127.0.0.1", _CONSOLE_PORT)
    return second, console
