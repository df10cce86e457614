"""`inference-api models`: what the catalogue lists, or what a running router serves."""

import argparse
import sys
from typing import Any

from inference_api.app import ENTRY
from inference_api.commands.configuration import settings_of, table
from inference_api.commands.router import NotReachable, ask
from inference_api.routing.catalogue import load_catalogue

Rows = list[tuple[str, ...]]


def run(arguments: argparse.Namespace) -> int:
    """0, or 3 if the router cannot be asked."""
    if arguments.url is None:
        print(table(_listed(arguments)))
        return 0
    try:
        cards = ask(arguments.url, "/v1/models")["data"]
    except NotReachable as exc:
        print(f"inference-api: {exc}", file=sys.stderr)
        return 3
    print(table(_served(cards)))
    return 0


def _listed(arguments: argparse.Namespace) -> Rows:
    rows: Rows = [("MODEL", "VERSION", "OWNER", "ENGINE", "BALANCING", "ALIASES", "BACKENDS")]
    for entry in load_catalogue(settings_of(arguments).catalogue, ENTRY).values():
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
