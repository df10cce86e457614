"""`inference-api serve`: the router, until SIGTERM."""

import argparse
import logging
import signal

from inference_api.app import build
from inference_api.commands.configuration import catalogue_of, environment, is_packaged, settings_of, takes_colours
from inference_api.commands.summary import Summary
from inference_api.core import Outside
from inference_api.discovery.cluster import Cluster, ClusterError, in_cluster
from inference_api.observe.log import configure_logging, dropped_lines, log_unhandled, usage_log
from inference_api.server.server import handling, run_server
from inference_api.settings import PREFIX, Settings, SettingsError

logger = logging.getLogger(__name__)


def run(arguments: argparse.Namespace) -> int:
    """0 after SIGTERM or SIGINT. Raises SettingsError or CatalogueError if it cannot start."""
    # Before and after the server, there is nothing to reload, and SIGHUP must not end the process.
    with handling({signal.SIGHUP: signal.SIG_IGN}):
        return _serve(arguments)


def _serve(arguments: argparse.Namespace) -> int:
    settings = settings_of(arguments)
    given = catalogue_of(arguments.backend) if arguments.backend else None
    access_log = configure_logging(settings.log_level, settings.log_format, colours=takes_colours())
    log_unhandled()
    # Set by the Dockerfile; not a setting, since it describes the build.
    built = environment().get("IMAGE_REVISION", "")
    outside = Outside(
        environment(),
        catalogue=given,
        write_line=access_log,
        dropped_lines=dropped_lines,
        cluster=_cluster(settings),
        revision=built,
        write_usage=usage_log(),
    )
    application = build(settings, outside)
    try:
        source = _source(settings, given is not None)
        run_server(application, settings, Summary(settings, application, source).tell)
    finally:
        application.close()
    logger.info("stopped")
    return 0


def _source(settings: Settings, given: bool) -> str:
    if given:
        return "--backend"
    return "packaged" if is_packaged(settings) else str(settings.catalogue)


def _cluster(settings: Settings) -> Cluster | None:
    if settings.discovery == "dns":
        return None
    try:
        return in_cluster(environment())
    except ClusterError as exc:
        raise SettingsError(f"{PREFIX}DISCOVERY={settings.discovery}: {exc}; or use `dns`") from None
