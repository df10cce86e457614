"""The routers under test: for each its name, how to get it, how to start it, and when it is ready."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks import wire
from benchmarks.processes import free_port
from benchmarks.setup import Setup

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "inference-api-bench"


class NotInstalled(Exception):
    """A candidate is not on this machine and could not be put there; the message says what was tried."""


@dataclass(frozen=True, slots=True)
class Start:
    """What it takes to start a candidate."""

    command: list[str]
    env: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Site:
    """Where a candidate is started: the engine's port, what is to be routed, and a directory for its files."""

    engine: int
    setup: Setup
    directory: Path

    @property
    def urls(self) -> list[str]:
        return [f"http://{origin}" for origin in self.setup.origins(self.engine)]


@dataclass(frozen=True, slots=True)
class Candidate:
    """A row of the table below."""

    name: str
    install: Callable[[], str]
    """Put it on this machine if it is not there, and return its version. Raises NotInstalled."""
    start: Callable[[int, Site], Start]
    """From its port."""
    ready: str
    """The path that answers 200 once it can serve."""
    scale: float = 1.0
    """Share of the load to run: the slow ones show their price on less."""
    many_backends: bool = True
    many_models: bool = False

    def can(self, setup: Setup) -> bool:
        return (setup.models == 1 or self.many_models) and (setup.backends == 1 or self.many_backends)


# nginx: what a C proxy costs that knows nothing of models.

_NGINX = """\
daemon off;
worker_processes 1;
user root;
pid {directory}/nginx.pid;
error_log {directory}/nginx.error.log warn;
events {{ worker_connections 8192; }}
http {{
    access_log {directory}/nginx.access.log;
    client_max_body_size 64m;
    client_body_buffer_size 2m;
    client_body_temp_path {directory}/nginx-body;
    proxy_temp_path {directory}/nginx-proxy;
    fastcgi_temp_path {directory}/nginx-fastcgi;
    uwsgi_temp_path {directory}/nginx-uwsgi;
    scgi_temp_path {directory}/nginx-scgi;
    keepalive_requests 100000000;
    upstream engine {{
        {servers}
        keepalive 1024;
        keepalive_requests 100000000;
    }}
    server {{
        listen 127.0.0.1:{port};
        location / {{
            proxy_pass http://engine;
            proxy_http_version 1.1;
            proxy_set_header Connection "";
            proxy_buffering off;
            proxy_read_timeout 600s;
        }}
    }}
}}
"""


def _install_nginx() -> str:
    if not _nginx_path() and os.geteuid() == 0 and shutil.which("apt-get"):
        _run(["apt-get", "install", "-y", "-qq", "--no-install-recommends", "nginx"])
    if not (path := _nginx_path()):
        raise NotInstalled("install the Debian package nginx")
    return _run([path, "-v"]).strip().rpartition("/")[2]


def _nginx_path() -> str:
    return shutil.which("nginx", path=os.environ.get("PATH", "") + ":/usr/sbin") or ""


def _start_nginx(port: int, site: Site) -> Start:
    directory = site.directory
    config = directory / "nginx.conf"
    servers = " ".join(f"server {origin};" for origin in site.setup.origins(site.engine))
    text = _NGINX.format(port=port, servers=servers, directory=directory)
    # Only a master that is root may, and must, say whose its worker is.
    config.write_text(text if os.geteuid() == 0 else text.replace("user root;\n", ""))
    return Start([_nginx_path(), "-e", str(directory / "nginx.error.log"), "-c", str(config)])


# Routers from PyPI, each in a venv of its own outside the source tree.


def venv(name: str) -> Path:
    return CACHE / name


def from_pypi(name: str, *requirements: str) -> Callable[[], str]:
    """An installer: the first requirement is the one whose version counts."""

    def install() -> str:
        stamp = venv(name) / "requirements"
        if not stamp.exists() or stamp.read_text() != " ".join(requirements):
            print(f"installing {' '.join(requirements)} into {venv(name)}", file=sys.stderr)
            _run([sys.executable, "-m", "venv", "--clear", str(venv(name))])
            _run([str(venv(name) / "bin/pip"), "install", "-q", "--disable-pip-version-check", *requirements])
            stamp.write_text(" ".join(requirements))
        return requirements[0].partition("==")[2]

    return install


def _start_vllm_router(balancing: str) -> Callable[[int, Site], Start]:
    def start(port: int, site: Site) -> Start:
        command = [str(venv("vllm-router") / "bin/vllm-router"), *_rust_options(port, site, balancing)]
        return Start(command)

    return start


def _start_sglang_router(port: int, site: Site) -> Start:
    command = [str(venv("sglang-router") / "bin/python"), "-m", "sglang_router.launch_router"]
    return Start([*command, *_rust_options(port, site, "round_robin")])


def _rust_options(port: int, site: Site, balancing: str) -> list[str]:
    options = ["--worker-urls", *site.urls, "--host", "127.0.0.1", "--port", str(port)]
    return [*options, "--policy", balancing, "--prometheus-port", str(free_port())]


_LITELLM = """\
model_list:
{models}litellm_settings:
  telemetry: false
"""
_LITELLM_MODEL = """\
- model_name: {name}
  litellm_params: {{model: hosted_vllm/{name}, api_base: "{url}/v1", api_key: none}}
"""


def _start_litellm(port: int, site: Site) -> Start:
    config = site.directory / f"litellm-{site.setup.label}.yaml"
    models = "".join(_LITELLM_MODEL.format(name=wire.MODEL, url=url) for url in site.urls)
    config.write_text(_LITELLM.format(models=models))
    command = [
        str(venv("litellm") / "bin/litellm"),
        "--config",
        str(config),
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
    ]
    # Its price list comes with it, or it would ask the Internet for a newer one; nobody else checks keys.
    wishes = ("LITELLM_LOCAL_MODEL_COST_MAP", "LITELLM_DANGEROUSLY_PERMIT_WEAK_OR_UNSET_MASTER_KEY")
    return Start(command, dict.fromkeys(wishes, "true"))


def _start_plain(port: int, site: Site) -> Start:
    server = [str(venv("starlette-httpx") / "bin/uvicorn"), "--app-dir", str(Path(__file__).parent), "plain:app"]
    options = ["--port", str(port), "--no-access-log"]
    return Start([*server, *options], {"ENGINE": site.urls[0]})


# ours


def _install_ours() -> str:
    command = Path(sys.executable).with_name("inference-api")
    if not command.exists():
        raise NotInstalled(f"there is no {command}; install the project with pip install -e .")
    _run([str(command), "serve", "--help"])
    version = _run([sys.executable, "-c", "import inference_api; print(inference_api.__version__)"]).strip()
    try:
        return f"{version} ({_run(['git', 'describe', '--always', '--dirty']).strip()})"
    except (NotInstalled, FileNotFoundError):
        return version


def _start_ours(port: int, site: Site) -> Start:
    catalogue = write_catalogue(site)
    env = {"HOST": "127.0.0.1", "PORT": str(port), "CATALOGUE": str(catalogue), "LOG_FORMAT": "json"}
    if site.setup.streams:
        env["MAX_IN_FLIGHT"] = str(site.setup.streams + 100)
    command = [str(Path(sys.executable).with_name("inference-api")), "serve"]
    return Start(command, {f"INFERENCE_API_{key}": value for key, value in env.items()})


def write_catalogue(site: Site) -> Path:
    """A catalogue of ours; the model that is asked for is in the middle."""
    backends = [{"url": url} for url in site.urls]
    served = {wire.MODEL, *site.setup.asked_names()}
    names = site.setup.other_names()
    names.insert(len(names) // 2, wire.MODEL)
    models = [{"name": name, "engine": "vllm", **({"backends": backends} if name in served else {})} for name in names]
    file = site.directory / f"catalogue-{site.setup.label}.json"
    file.write_text(json.dumps({"models": models}))
    return file


def _run(command: list[str]) -> str:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode:
        raise NotInstalled(f"{' '.join(command)} failed: {done.stdout.strip()[-500:]}")
    return done.stdout


_VLLM_ROUTER = from_pypi("vllm-router", "vllm-router==0.1.17")
_PLAIN = from_pypi("starlette-httpx", "starlette==1.3.1", "httpx==0.28.1", "uvicorn[standard]==0.54.0")

CANDIDATES = {
    candidate.name: candidate
    for candidate in (
        Candidate("nginx", _install_nginx, _start_nginx, "/health"),
        # Its cheapest policy, and its default one.
        Candidate("vllm-router", _VLLM_ROUTER, _start_vllm_router("round_robin"), "/readiness"),
        Candidate("vllm-router-default", _VLLM_ROUTER, _start_vllm_router("cache_aware"), "/readiness"),
        Candidate(
            "sglang-router", from_pypi("sglang-router", "sglang-router==0.3.2"), _start_sglang_router, "/readiness"
        ),
        # The newest whose requirements PyPI could fulfil; one worker, as by default.
        Candidate(
            "litellm", from_pypi("litellm", "litellm[proxy]==1.106.2"), _start_litellm, "/health/liveliness", 0.01
        ),
        Candidate("starlette-httpx", _PLAIN, _start_plain, "/health", 0.1, many_backends=False),
        Candidate("ours", _install_ours, _start_ours, "/readyz", many_models=True),
    )
}
