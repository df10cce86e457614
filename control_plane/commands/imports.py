"""`control-plane import FILE`: a catalogue or policy, or the database of a registry_stub."""

import argparse
import asyncio
import sqlite3
import sys
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from control_plane.commands.running import act, ready
from control_plane.errors import Refused
from control_plane.pure import values
from control_plane.services import imports
from inference_api.app import ENTRY
from inference_api.policy.document import SECTIONS
from inference_api.routing.catalogue import CatalogueError, describe, read_document
from inference_api.routing.entries import CatalogueEntry

_SQLITE = b"SQLite format 3\0"
_NAMED_BY = "the argument FILE"


def run(arguments: argparse.Namespace) -> int:
    try:
        changes = asyncio.run(_import(arguments.file, arguments.dry_run))
    except (imports.ImportRefused, CatalogueError, Refused) as exc:
        message = exc.message if isinstance(exc, Refused) else exc
        print(f"control-plane: {arguments.file}: {message}", file=sys.stderr)
        return 1
    for change in changes:
        print(change)
    return 0


async def _import(path: Path, dry_run: bool) -> Sequence[imports.Change]:
    entries, policy = await asyncio.to_thread(_read, path)
    async with ready() as plane:
        if policy is None:
            return await imports.catalogue(plane, act(plane), entries, dry_run)
        return await imports.whole_policy(plane, act(plane), policy, dry_run)


def _read(path: Path) -> tuple[Sequence[CatalogueEntry], dict[str, Any] | None]:
    """The entries of a catalogue, or a policy. Raises ImportRefused, CatalogueError."""
    try:
        with path.open("rb") as file:
            begin = file.read(len(_SQLITE))
    except OSError as exc:
        raise imports.ImportRefused(f"it cannot be read: {exc.strerror or exc}") from None
    if begin == _SQLITE:
        return _entries_of_stub(path), None
    document = read_document(path, _NAMED_BY)
    if isinstance(document, dict) and "models" in document:
        return _entries(document), None
    if isinstance(document, dict) and document.keys() & {*SECTIONS, "anonymous"}:
        return [], document
    known = ", ".join((*SECTIONS, "anonymous"))
    raise imports.ImportRefused(f"it is neither a catalogue (models) nor a policy ({known})")


def _entries(document: dict[str, Any]) -> Sequence[CatalogueEntry]:
    """The entries of a catalogue; not whether what they name is there: it may be stored already."""
    if document.keys() != {"models"} or not isinstance(document["models"], list):
        raise imports.ImportRefused("a catalogue is a mapping with a list under `models`, and nothing beside it")
    entries = []
    for place, raw in enumerate(document["models"]):
        try:
            values.check(raw)
            entries.append(ENTRY.model_validate(raw))
        except ValidationError as exc:
            name = raw.get("name") if isinstance(raw, dict) else None
            raise imports.ImportRefused(f"model {name or place + 1!r}: {describe(exc)}") from None
        except values.Unusable as exc:
            raise imports.ImportRefused(f"model number {place + 1}: {exc}") from None
    return entries


def _entries_of_stub(path: Path) -> Sequence[CatalogueEntry]:
    # Read-only, so that a stub which serves it is not disturbed.
    try:
        with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as connection:
            rows = connection.execute("SELECT name, entry FROM models ORDER BY position").fetchall()
    except sqlite3.Error as exc:
        raise imports.ImportRefused(f"it is no database of registry_stub: {exc}") from None
    entries = []
    for name, text in rows:
        try:
            entries.append(ENTRY.model_validate_json(text))
        except ValidationError as exc:
            raise imports.ImportRefused(f"model {name!r}: {describe(exc)}") from None
    return entries
