"""`inference-api status`: the state of each backend, as a running router sees it."""

import argparse
import json
import sys
import time
from typing import Any

from inference_api.commands.configuration import table
from inference_api.commands.router import NotReachable, ask


def run(arguments: argparse.Namespace) -> int:
    """Returns 0 if all backends are ready, 1 if one is not, 3 if the router does not answer."""
    try:
        document = ask(arguments.url, "/backends")
    except NotReachable as exc:
        print(f"inference-api: {exc}", file=sys.stderr)
        return 3
    backends = document["data"]
    if arguments.json:
        print(json.dumps(document))
    else:
        print(table(_rows(backends, time.time())))
    return 0 if all(backend["state"] == "ready" for backend in backends) else 1


def _rows(backends: list[Any], now: float) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = [("MODEL", "BACKEND", "STATE", "SINCE", "IN FLIGHT", "REASON")]
    for backend in backends:
        since = backend.get("since")
        ago = "-" if since is None else age(now - since / 1000)
        reason = backend.get("reason") or "-"
        rows.append((backend["model"], backend["backend"], backend["state"], ago, str(backend["in_flight"]), reason))
    return rows


def age(seconds: float) -> str:
    """Elapsed time, in the largest unit with at least two."""
    whole = max(0, int(seconds))
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if whole >= 2 * size:
            return f"{whole // size} {unit}"
    return f"{whole} s"
