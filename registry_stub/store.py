"""The models: reads from memory, writes through to the database, one change at a time."""

import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Self

from pydantic import ValidationError

from inference_api.app import ENTRY
from inference_api.routing.catalogue import describe
from inference_api.routing.entries import CatalogueEntry
from registry_stub.conditional import etag_of
from registry_stub.database import Database

_UPSERT = "INSERT INTO models (name, entry) VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET entry = excluded.entry"


class NameTaken(Exception):
    """The name or an alias of an entry belongs to another entry already; `param` says which key has it."""

    def __init__(self, name: str, owner: str, param: str) -> None:
        super().__init__(f"the name {name!r} is taken by the model {owner!r}")
        self.param = param


@dataclass(frozen=True)
class Document:
    """JSON as it goes out, and the strong ETag of exactly these bytes."""

    body: bytes
    etag: str


@dataclass(frozen=True)
class Stored(Document):
    """One model: the checked entry and its document."""

    entry: CatalogueEntry


class Snapshot:
    """All models at one moment, in the order they were added. Never changes, so any thread may read it."""

    def __init__(self, models: Mapping[str, Stored]) -> None:
        self.models = models

    @cached_property
    def listing(self) -> Document:
        """Rendered by the first reader after a write, not by each of ten thousand PUTs."""
        body = b'{"models":[' + b",".join(stored.body for stored in self.models.values()) + b"]}"
        return Document(body, etag_of(body))


# Gets the stored model, and raises to refuse; nothing changes between the check and the write.
Check = Callable[[Stored | None], None]


class Store:
    """The models of one database file, which is locked for this process."""

    def __init__(self, path: Path, *, busy_timeout: float = 5.0) -> None:
        self.snapshot = Snapshot({})
        self.problems: list[str] = []
        self._owners: dict[str, str] = {}
        # One writer at a time, from the check to the new snapshot; readers never wait for it.
        self._writing = threading.Lock()
        self._database = Database(path, busy_timeout)
        self._load()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        with self._writing:
            self._database.close()

    def put(self, entry: CatalogueEntry, now: int, check: Check = lambda stored: None) -> tuple[Stored, bool]:
        """Create or replace a model; returns it and whether it is new. On disk when this returns."""
        with self._writing:
            models = self.snapshot.models
            old = models.get(entry.name)
            check(old)
            self._refuse_clash(entry)
            new = _render(entry, created=(old and old.entry.created) or now)
            # A repeated PUT costs no disk write, and keeps the cached list of readers.
            if old != new:
                self._database.write(_UPSERT, _row(new))
                self._forget(old)
                self._own(new)
                self.snapshot = Snapshot({**models, entry.name: new})
            return new, old is None

    def delete(self, name: str, check: Check = lambda stored: None) -> None:
        """Remove a model if it exists; `check` may raise."""
        with self._writing:
            models = self.snapshot.models
            old = models.get(name)
            check(old)
            self._database.write("DELETE FROM models WHERE name = ?", (name,))
            self._forget(old)
            self.snapshot = Snapshot({key: stored for key, stored in models.items() if key != name})

    def seed(self, entries: Iterable[CatalogueEntry], now: int) -> None:
        """Fill an empty store in one transaction; killed halfway, it is empty again. The names must be distinct."""
        with self._writing:
            new = [_render(entry, created=now) for entry in entries]
            self._database.write(_UPSERT, *map(_row, new))
            for stored in new:
                self._own(stored)
            self.snapshot = Snapshot({stored.entry.name: stored for stored in new})

    def _load(self) -> None:
        models: dict[str, Stored] = {}
        for name, text in self._database.read("SELECT name, entry FROM models ORDER BY position"):
            try:
                stored = _render(ENTRY.model_validate_json(text), created=0)
                self._refuse_clash(stored.entry)
            except (ValidationError, NameTaken) as exc:
                reason = describe(exc) if isinstance(exc, ValidationError) else exc
                # Stays in the file: another release may read it, and a PUT of the name replaces it.
                self.problems.append(f"model {name!r}: {reason}")
                continue
            self._own(stored)
            models[stored.entry.name] = stored
        self.snapshot = Snapshot(models)

    def _refuse_clash(self, entry: CatalogueEntry) -> None:
        for name in (entry.name, *entry.aliases):
            if (owner := self._owners.get(name, entry.name)) != entry.name:
                raise NameTaken(name, owner, "name" if name == entry.name else "aliases")

    def _own(self, stored: Stored) -> None:
        self._owners.update(dict.fromkeys((stored.entry.name, *stored.entry.aliases), stored.entry.name))

    def _forget(self, stored: Stored | None) -> None:
        for name in {stored.entry.name, *stored.entry.aliases} if stored else ():
            del self._owners[name]


def _render(entry: CatalogueEntry, created: int) -> Stored:
    if created and not entry.created:
        entry = entry.model_copy(update={"created": created})
    # Only what was set. A router of an older release refuses keys it does not know, so no key may appear
    # before somebody uses it; and what was set must not change when a release changes a default.
    body = entry.model_dump_json(exclude_unset=True).encode()
    return Stored(body, etag_of(body), entry)


def _row(stored: Stored) -> tuple[str, str]:
    return stored.entry.name, stored.body.decode()
