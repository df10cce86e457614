"""The command line: serve, check, models, demo."""

import argparse
import logging
import os
import signal
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING

from inference_api import __version__
from inference_api.app import Router
from inference_api.discovery.cluster import Cluster, ClusterError, in_cluster
from inference_api.observe.log import configure_logging, dropped_lines, log_unhandled
from inference_api.routing.catalogue import CatalogueError, load_catalogue
from inference_api.server.server import handling, run_server
from inference_api.settings import PREFIX, Settings, SettingsError, load_settings, wants_traces

if TYPE_CHECKING:
    from inference_api.features.tracing import Tracing

_ABOUT = """\
A thin OpenAI-compatible inference router: a client names a model, the router finds it in a registry or in a
static catalogue, chooses a backend, and relays the answer byte for byte.
"""

_EXAMPLE = """\
try it without a GPU:
  inference-api demo

serve your own engines (catalogue.yaml lists models and their URLs, see the README):
  INFERENCE_API_CATALOGUE=catalogue.yaml inference-api serve
  curl http://127.0.0.1:8000/v1/models
"""


def main(argv: list[str] | None = None) -> int:
    """Run a command; 0 on success, 2 when the configuration cannot be used."""
    arguments = _parser().parse_args(argv)
    try:
        code: int = arguments.run(arguments)
    except (SettingsError, CatalogueError) as exc:
        for line in str(exc).splitlines():
            print(f"inference-api: {line}", file=sys.stderr)
        return 2
    return code


def serve(arguments: argparse.Namespace) -> int:
    # While there is nothing to read again, before the server and after it, the signal must not end the process either.
    with handling({signal.SIGHUP: signal.SIG_IGN}):
        return _serve(arguments)


def _serve(arguments: argparse.Namespace) -> int:
    settings = _settings(arguments)
    access_log = configure_logging(settings.log_level, settings.log_format)
    log_unhandled()
    cluster, tracing = _cluster(settings), _tracing()
    # Set by the Dockerfile, and no setting: nobody is to have an opinion of what was built.
    built = os.environ.get("IMAGE_REVISION", "")
    try:
        router = Router(
            settings,
            tokens=os.environ,
            access_log=access_log,
            dropped_lines=dropped_lines,
            cluster=cluster,
            tracing=tracing,
            revision=built,
        )
        run_server(router, settings)
    finally:
        if tracing is not None:
            tracing.close()
    logging.getLogger(__name__).info("stopped")
    return 0


def check(arguments: argparse.Namespace) -> int:
    settings = _settings(arguments)
    catalogue = load_catalogue(settings.catalogue)
    if (tracing := _tracing()) is not None:
        tracing.close()
    for problem in catalogue.problems:
        print(f"inference-api: {settings.catalogue}: {problem}", file=sys.stderr)
    if catalogue.problems:
        return 2
    print(f"settings and catalogue are valid: {len(catalogue)} models in {settings.catalogue}")
    return 0


def models(arguments: argparse.Namespace) -> int:
    catalogue = load_catalogue(_settings(arguments).catalogue)
    rows = [("MODEL", "VERSION", "OWNER", "ENGINE", "BALANCING", "BACKENDS")]
    for entry in catalogue.values():
        backends = " ".join(backend.url for backend in entry.backends) or "none"
        rows.append((entry.name, entry.version, entry.owner, entry.engine, entry.balancing, backends))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]) - 1)]
    for row in rows:
        print("  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[-1]]))
    return 0


def demo(arguments: argparse.Namespace) -> int:
    from inference_api.demo.run import run_demo

    return run_demo(arguments.host, arguments.port, arguments.tokens_per_second)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "inference-api",
        description=_ABOUT,
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"inference-api {__version__}")
    commands = parser.add_subparsers(required=True, metavar="command")
    variables = "environment variables:\n" + "\n".join(
        f"  {PREFIX + name.upper():<36} {field.description} (default: {_shown(field.default)})"
        for name, field in Settings.model_fields.items()
    )
    for run, text in (
        (serve, "serve requests until SIGTERM; SIGHUP reads catalogue and credentials again"),
        (check, "validate settings and catalogue without starting; exit 2 if they are not valid"),
        (models, "list the models of the catalogue"),
    ):
        command = commands.add_parser(
            run.__name__,
            help=text,
            description=f"{text[0].upper()}{text[1:]}. An option stands for the variable of the same name.",
            epilog=variables,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.set_defaults(run=run)
        command.add_argument("--catalogue", metavar="FILE", help="the static catalogue, YAML or JSON")
        if run is serve:
            command.add_argument("--host", help="listen address")
            command.add_argument("--port", help="listen port")
            command.add_argument("--registry-url", metavar="URL", help="base URL of the model registry")
    text = "start fake engines, a registry and the router in front of them, on this machine"
    command = commands.add_parser("demo", help=text, description=f"{text[0].upper()}{text[1:]}. Ctrl-C stops it all.")
    command.set_defaults(run=demo)
    command.add_argument("--host", default="127.0.0.1", help="address of the router")
    command.add_argument("--port", type=int, default=8000, help="port of the router")
    command.add_argument("--tokens-per-second", type=float, default=40, help="speed of an engine, per request")
    return parser


def _settings(arguments: argparse.Namespace) -> Settings:
    environ: dict[str, str] = dict(os.environ)
    options: Mapping[str, object] = vars(arguments)
    for name in ("host", "port", "catalogue", "registry_url"):
        value = options.get(name)
        if value is not None:
            environ[PREFIX + name.upper()] = str(value)
    return load_settings(environ)


def _cluster(settings: Settings) -> Cluster | None:
    if settings.discovery == "dns":
        return None
    try:
        return in_cluster(os.environ)
    except ClusterError as exc:
        raise SettingsError(f"{PREFIX}DISCOVERY={settings.discovery}: {exc}") from None


def _tracing() -> "Tracing | None":
    if not wants_traces(os.environ):
        return None
    try:
        from inference_api.features.tracing import otlp_tracing
    except ModuleNotFoundError as exc:
        raise SettingsError(
            f"OTEL_EXPORTER_OTLP_ENDPOINT asks for traces, but OpenTelemetry is not installed ({exc}); "
            "pip install 'inference-api[otel]', or unset it"
        ) from None
    try:
        return otlp_tracing()
    except ValueError as exc:
        raise SettingsError(f"OpenTelemetry does not take one of its variables (OTEL_...): {exc}") from None


def _shown(default: object) -> str:
    if default is None:
        return "unset"
    if isinstance(default, frozenset):
        return ",".join(map(str, sorted(default))) or "none"
    return f"packaged {os.path.basename(default)}" if isinstance(default, os.PathLike) else str(default)
