"""`inference-api check`: validates settings, catalogue and policy, and warns of probable mistakes."""

import argparse
import sys
from collections.abc import Iterator, Mapping

from inference_api.app import build
from inference_api.commands.configuration import (
    PACKAGED,
    counted,
    environment,
    is_packaged,
    read_catalogue,
    settings_of,
    size_of,
)
from inference_api.commands.connect import connect
from inference_api.core import Outside
from inference_api.policy.source import Policies
from inference_api.routing.catalogue import Catalogue, read_document
from inference_api.routing.entries import RENAMED, CatalogueEntry, Credentials
from inference_api.routing.references import virtual_key
from inference_api.settings import Settings
from inference_api.upstream.credentials import read_token

ONLY_THE_FILE = (
    "--connect asks the backends of {}, the fallback; those of the registry are in the `inference-api status` of a "
    "running router"
)


def run(arguments: argparse.Namespace) -> int:
    """0: valid; 1: a backend failed `--connect`. Raises SettingsError or CatalogueError if they are not valid."""
    settings = settings_of(arguments)
    catalogue = read_catalogue(settings)
    # Features validate their settings, too.
    router = build(settings, Outside(environment()))
    of_features = [warning for one in router.features.values() if one.check for warning in one.check()]
    router.close()
    for warning in (*_warnings(settings, catalogue), *of_features):
        print(f"warning: {warning}", file=sys.stderr)
    if arguments.connect and settings.registry_url is not None:
        print(f"warning: {ONLY_THE_FILE.format(settings.catalogue)}", file=sys.stderr)
    if arguments.connect:
        return connect(settings, catalogue, environment())
    read = router.core.provided(Policies)
    if read is None or read.current is None:
        print(f"settings and catalogue are valid: {size_of(catalogue)} in {settings.catalogue}")
    else:
        sizes = f"{size_of(catalogue)} in {settings.catalogue}, {counted(read.current.keys, 'key')} in {read.source}"
        print(f"settings, catalogue and policy are valid: {sizes}")
    return 0


def _warnings(settings: Settings, catalogue: Catalogue) -> Iterator[str]:
    if is_packaged(settings) and settings.registry_url is None:
        yield PACKAGED
    if not catalogue:
        yield f"{settings.catalogue}: `models` is an empty list"
    yield from catalogue.warnings
    for entry in catalogue.values():
        yield from _warnings_of(entry, environment())
    document = read_document(settings.catalogue)
    for entry in document["models"]:
        for key in RENAMED.keys() & entry.keys():
            yield f"model {entry['name']!r}: the key {key!r} is now {RENAMED[key]!r}; the old name will be refused"
    for name, url in _urls(document):
        if url.rstrip("/").endswith("/v1"):
            yield f"model {name!r}: the url {url!r} ends in /v1, which is ignored: every route has its own /v1"


def _warnings_of(entry: CatalogueEntry, environ: Mapping[str, str]) -> Iterator[str]:
    if not entry.backends and virtual_key(entry) is None:
        yield f"model {entry.name!r} has no backends: every request for it gets 503"
    credentials = entry.credentials
    if not isinstance(credentials, Credentials):
        return
    if credentials.env is not None and not environ.get(credentials.env):
        yield f"model {entry.name!r}: the variable {credentials.env} of its credentials is not set; no token is sent"
    if credentials.file is not None:
        try:
            read_token(credentials.file)
        except (OSError, ValueError) as exc:
            reason = (exc.strerror if isinstance(exc, OSError) else None) or exc
            yield f"model {entry.name!r}: the token of {credentials.file} cannot be used: {reason}"


def _urls(document: dict[str, list[dict[str, object]]]) -> Iterator[tuple[str, str]]:
    """The URLs of a valid document, as written."""
    for entry in document["models"]:
        backends = entry.get("backends")
        for backend in backends if isinstance(backends, list) else ():
            yield str(entry["name"]), str(backend["url"] if isinstance(backend, dict) else backend)
