"""`inference-api models`: lists the models of the catalogue, or of a running router."""

import argparse
import sys
from typing import Any

from inference_api.app import entry_of
from inference_api.commands.configuration import PACKAGED, is_packaged, settings_of, table
from inference_api.commands.router import NotReachable, ask
from inference_api.routing.catalogue import load_catalogue
from inference_api.settings import Settings

Rows = list[tuple[str, ...]]


def run(arguments: argparse.Namespace) -> int:
    """Returns 0, or 3 if the router does not answer."""
    if arguments.url is None:
        settings = settings_of(arguments)
        if is_packaged(settings):
            print(f"warning: {PACKAGED}", file=sys.stderr)
        print(table(_listed(settings)))
        return 0
    try:
        cards = ask(arguments.url, "/v1/models")["data"]
    except NotReachable as exc:
        print(f"inference-api: {exc}", file=sys.stderr)
        return 3
    print(table(_served(cards)))
    return 0


def _listed(settings: Settings) -> Rows:
    rows: Rows = [("MODEL", "VERSION", "OWNER", "ENGINE", "BALANCING", "ALIASES", "BACKENDS")]
    for entry in load_catalogue(settings.catalogue, entry_of(settings)).values():
        backends = " ".join(backend.url for backend in entry.backends) or "none"
        aliases = ",".join(entry.aliases) or "none"
        rows.append((entry.name, entry.version, entry.owner, entry.engine, entry.balancing, aliases, backends))
    return rows


def _served(cards: list[Any]) -> Rows:
    rows: Rows = [("MODEL", "VERSION", "OWNER", "CONTEXT", "ALIASES")]
    for card in cards:
        aliases = ",".join(card.get("aliases") or ()) or "none"
        context = str(card.get("max_model_len") or "unknown")
        rows.append((card["id"], str(card.get("version", "")), str(card.get("owned_by", "")), context, aliases))
    return rows
