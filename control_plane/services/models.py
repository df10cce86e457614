"""The catalogue: entries as registry_stub has them, in memory for readers and in a table."""

import json
from collections.abc import Callable, Mapping
from typing import NamedTuple

from pydantic import ValidationError
from sqlalchemy import delete as delete_rows
from sqlalchemy import insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from control_plane.data.tables import models
from control_plane.documents import Built, Document
from control_plane.errors import Refused
from control_plane.plane import Act, Plane
from control_plane.services import audit
from inference_api.app import ENTRY
from inference_api.routing.catalogue import describe
from inference_api.routing.entries import CatalogueEntry
from inference_api.routing.references import members_of
from registry_stub.conditional import etag_of
from registry_stub.store import Snapshot, Stored

DOCUMENT = "models"
# Gets the stored model, and raises to refuse.
Check = Callable[[Stored | None], None]


class Catalogue(NamedTuple):
    """`stored`: valid entries by name, in the order they were added. `problems`: why others are not served."""

    stored: Mapping[str, Stored]
    problems: Mapping[str, str]

    @property
    def owners(self) -> dict[str, str]:
        """Names and aliases, with the model that has them."""
        return {name: one.entry.name for one in self.stored.values() for name in (one.entry.name, *one.entry.aliases)}


class _Unchanged(Exception):
    """Ends a transaction that would write what is there already."""

    def __init__(self, stored: Stored) -> None:
        super().__init__()
        self.stored = stored


async def build(connection: AsyncConnection, known: Document | None, now: int) -> Built:
    """GET /models. Entries that have not changed are not read again."""
    before: Mapping[str, Stored] = {} if known is None else known.parts.stored
    stored: dict[str, Stored] = {}
    problems: dict[str, str] = {}
    for name, text in (
        await connection.execute(select(models.c.name, models.c.entry).order_by(models.c.position))
    ).all():
        body = text.encode()
        old = before.get(name)
        try:
            stored[name] = old if old is not None and old.body == body else _stored(body)
        except ValidationError as exc:
            # Stays in the table: another release may read it, and a PUT of the name replaces it.
            problems[name] = describe(exc)
    return Built(Snapshot(stored).listing.body, Catalogue(stored, problems))


def catalogue(plane: Plane) -> Catalogue:
    """The models in memory. Raises StorageUnavailable before the first reading."""
    found: Catalogue = plane.documents.get(DOCUMENT).parts
    return found


async def put(plane: Plane, act: Act, entry: CatalogueEntry, check: Check = lambda stored: None) -> tuple[Stored, bool]:
    """Create or replace a model; returns it and whether it is new. Stored when this returns. Raises Refused."""
    name = entry.name
    try:
        async with plane.change(DOCUMENT) as connection:
            current = (await build(connection, plane.documents.get(DOCUMENT), act.at)).parts
            old: Stored | None = current.stored.get(name)
            check(old)
            _refuse_clash(entry, current.owners)
            new = _render(entry, created=(old and old.entry.created) or act.at // 1000)
            if old is not None and old == new:
                raise _Unchanged(old)
            values = {"entry": new.body.decode(), "updated_at": act.at, "updated_by": act.principal.user}
            known = old is not None or name in current.problems
            if known:
                await connection.execute(update(models).where(models.c.name == name).values(**values))
            else:
                await connection.execute(insert(models).values(name=name, **values))
            verb = "update" if known else "create"
            before = None if old is None else json.loads(old.body)
            what = audit.Object("model", name)
            await audit.record(connection, act, f"model.{verb}", what, before, json.loads(new.body))
    except _Unchanged as exc:
        return exc.stored, False
    return new, old is None


async def delete(plane: Plane, act: Act, name: str, check: Check = lambda stored: None) -> None:
    """Remove a model; `check` raises if it does not exist. Raises Refused, too, if a virtual model names it."""
    async with plane.change(DOCUMENT) as connection:
        current: Catalogue = (await build(connection, plane.documents.get(DOCUMENT), act.at)).parts
        old = current.stored.get(name)
        check(old)
        user = next((one.entry.name for one in current.stored.values() if name in members_of(one.entry)), None)
        if user is not None and user != name:
            message = f"The model {name!r} is a member of the virtual model {user!r}. Change or delete that one first."
            raise Refused(409, "in_use", message, param="name")
        await connection.execute(delete_rows(models).where(models.c.name == name))
        before = None if old is None else json.loads(old.body)
        await audit.record(connection, act, "model.delete", audit.Object("model", name), before)


def _stored(body: bytes) -> Stored:
    return Stored(body, etag_of(body), ENTRY.model_validate_json(body))


def _render(entry: CatalogueEntry, created: int) -> Stored:
    if created and not entry.created:
        entry = entry.model_copy(update={"created": created})
    # Only what was set: no key appears before somebody uses it, and no default is frozen.
    body = entry.model_dump_json(exclude_unset=True).encode()
    return Stored(body, etag_of(body), entry)


def _refuse_clash(entry: CatalogueEntry, owners: Mapping[str, str]) -> None:
    for name in (entry.name, *entry.aliases):
        if (owner := owners.get(name, entry.name)) != entry.name:
            message = (
                f"The model {entry.name!r} is not stored: the name {name!r} is taken by the model {owner!r}. "
                "Choose another name, or change that model first."
            )
            raise Refused(409, "name_taken", message, param="name" if name == entry.name else "aliases")
