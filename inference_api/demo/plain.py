"""`inference-api demo --plain`: engines, a registry and the router; with `--keys` it asks for API keys."""

from collections.abc import Mapping
from pathlib import Path

import yaml

from inference_api.demo.guide import base_url, guide
from inference_api.demo.policy import PRICES, Keys
from inference_api.demo.processes import Processes, free_port, free_ports

# Seconds: the router lets open streams finish for so long.
DRAIN = 2

_ENGINES = ("llama-3-8b", "llama-3-8b", "mistral-7b", "gpt2")
_ALIASES = {"llama-3-8b": ["llama3"]}


class Plain(Processes):
    def begin(self, host: str, port: int, tokens_per_second: float, keys: Keys | None = None) -> str:
        """Start everything, and return the guide."""
        port = free_port(host, port)
        url = base_url(host, port)
        registry, *engines = free_ports(1 + len(_ENGINES))
        catalogue = self._write_catalogue(engines, PRICES if keys else {})
        for model, own in zip(_ENGINES, engines, strict=True):
            options = ("--model", model, "--port", str(own), "--tokens-per-second", f"{tokens_per_second:g}")
            self.start(f"{model} on port {own}", "inference_api.demo.engine", *options)
        database = str(self.directory / "registry.sqlite3")
        files = ("--database", database, "--catalogue", str(catalogue))
        self.start("registry", "registry_stub", "serve", "--host", "127.0.0.1", "--port", str(registry), *files)
        # The router is last: it finds the registry, and healthy engines, at its first look.
        self.wait_for([f"http://127.0.0.1:{registry}/healthz", *(f"http://127.0.0.1:{n}/health" for n in engines)])
        settings = {
            "INFERENCE_API_HOST": host,
            "INFERENCE_API_PORT": str(port),
            "INFERENCE_API_REGISTRY_URL": f"http://127.0.0.1:{registry}",
            "INFERENCE_API_CATALOGUE": str(catalogue),
            "INFERENCE_API_DRAIN_TIMEOUT": str(DRAIN),
            **(self._with_keys(keys) if keys else {}),
        }
        self.start("router", "inference_api", "serve", settings=settings)
        self.wait_for([f"{url}/readyz"])
        return guide(url, tokens_per_second, self.children[0].pid, str(self.directory), keys) if self.children else ""

    def _with_keys(self, keys: Keys) -> dict[str, str]:
        """Write the policy; the router's settings with it."""
        path = self.directory / "policy.yaml"
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
        path = self.directory / "catalogue.yaml"
        path.write_text(yaml.safe_dump({"models": models}, sort_keys=False))
        return path
