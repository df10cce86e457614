"""`control-plane export models|policy`: YAML that `import` and the router read; digests, no secrets."""

import argparse
import asyncio
import os
import sys
from pathlib import Path
from typing import Any

import orjson
import yaml

from control_plane.commands.running import ready
from control_plane.services import lending, models, policy

_Dumper: Any = getattr(yaml, "CSafeDumper", yaml.SafeDumper)


def run(arguments: argparse.Namespace) -> int:
    text = asyncio.run(_export(arguments.what))
    path: Path | None = arguments.output
    if path is None:
        print(text, end="")
        return 0
    try:
        # A file that is there stays as it was if the disk is full.
        new = path.with_name(f"{path.name}.new")
        with open(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8") as file:
            file.write(text)
        new.replace(path)
    except OSError as exc:
        print(f"control-plane: {path}: it cannot be written: {exc.strerror or exc}", file=sys.stderr)
        return 1
    return 0


async def _export(what: str) -> str:
    build = models.build if what == "models" else policy.build
    async with ready() as plane, plane.database.main.read(at_once=True) as connection:
        built = await build(connection, None, plane.clock())
        lent = await lending.ids(connection)
    document = orjson.loads(built.body)
    if what == "policy":
        _leave_out(document, lent)
        document = {section: items for section, items in document.items() if items}
    text: str = yaml.dump(
        document, Dumper=_Dumper, sort_keys=False, allow_unicode=True, default_flow_style=None, width=120
    )
    return text


def _leave_out(document: dict[str, Any], lent: frozenset[str]) -> None:
    """Keys that are lent: they hold for a quarter of an hour, and another control plane lends its own."""
    document["keys"] = [one for one in document["keys"] if one["id"] not in lent]
    for section in ("limits", "budgets"):
        document[section] = [one for one in document[section] if one["scope"] != "key" or one.get("name") not in lent]
