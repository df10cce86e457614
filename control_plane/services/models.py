"""The catalogue: entries as registry_stub has them, in memory for readers and in a table."""

import asyncio
import json
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from pydantic import ValidationError
from sqlalchemy import delete as delete_rows
from sqlalchemy import insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from control_plane.data.tables import models
from control_plane.documents import Built, Document
from control_plane.errors import Refused
from control_plane.plane import Act, Plane
from control_plane.pure.prices import PriceList, PriceRow
from control_plane.services import audit, prices
from inference_api.app import ENTRY
from inference_api.features.cost import PRICE, EntryPrice
from inference_api.features.fallback import FALLBACKS
from inference_api.routing.catalogue import describe
from inference_api.routing.entries import CatalogueEntry
from inference_api.routing.references import members_of
from registry_stub.conditional import etag_of
from registry_stub.store import Snapshot, Stored

DOCUMENT = "models"
# Gets the stored model, and raises to refuse.
Check = Callable[[Stored | None], None]


class Catalogue(NamedTuple):
    """`stored`: valid entries by name, in the order they were added. `problems`: why others are not served.

    `sources`: what each stored one was made of: its row, and its price.
    """

    stored: Mapping[str, Stored]
    problems: Mapping[str, str]
    sources: Mapping[str, tuple[str, PriceRow | None]]

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
    """GET /models, each with the price that holds now. Entries that have not changed are not read again."""
    before: Catalogue = Catalogue({}, {}, {}) if known is None else known.parts
    stored: dict[str, Stored] = {}
    problems: dict[str, str] = {}
    sources: dict[str, tuple[str, PriceRow | None]] = {}
    listed = await prices.read(connection)
    for name, text in (
        await connection.execute(select(models.c.name, models.c.entry).order_by(models.c.position))
    ).all():
        source = sources[name] = text, listed.at(name, now)
        is_new = before.sources.get(name) != source
        if is_new:
            # Others are served between two that have to be checked.
            await asyncio.sleep(0)
        try:
            stored[name] = _stored(*source) if is_new else before.stored[name]
        except ValidationError as exc:
            # Stays in the table: another release may read it, and a PUT of the name replaces it.
            problems[name] = describe(exc)
            del sources[name]
    body = Snapshot(stored).listing.body
    return Built(body, Catalogue(stored, problems, sources), listed.next_after(now))


def catalogue(plane: Plane) -> Catalogue:
    """The models in memory. Raises StorageUnavailable before the first reading."""
    found: Catalogue = plane.documents.get(DOCUMENT).parts
    return found


def preview(old: Stored | None, entry: CatalogueEntry) -> Any:
    """The JSON that `put` would store."""
    return json.loads(_render(entry, created=old.entry.created if old else 0).body)


async def unreadable(plane: Plane, name: str) -> str | None:
    """The text of an entry that is stored, and not served; None if there is none."""
    if name not in catalogue(plane).problems:
        return None
    async with plane.database.main.read() as connection:
        query = select(models.c.entry).where(models.c.name == name)
        found: str | None = (await connection.execute(query)).scalar_one_or_none()
        return found


def naming(plane: Plane, name: str) -> tuple[list[str], list[str]]:
    """The virtual models that a model is a member of, and the models whose fallback it is."""
    entries = [one.entry for one in catalogue(plane).stored.values() if one.entry.name != name]
    members = [one.name for one in entries if name in members_of(one)]
    return members, [one.name for one in entries if name in (FALLBACKS.of(one) or ())]


class Put(NamedTuple):
    """`verb`: create, update, or "" if that is there already. `adds_price`: then the prices are made anew, too."""

    stored: Stored
    verb: str
    adds_price: bool = False


async def put(plane: Plane, act: Act, entry: CatalogueEntry, check: Check = lambda stored: None) -> tuple[Stored, bool]:
    """Create or replace a model; returns it and whether it is new. Stored when this returns. Raises Refused.

    Another price than the one that holds is added to the prices, from now; without a price that one stays.
    """
    try:
        async with plane.change(DOCUMENT) as connection:
            current: Catalogue = (await build(connection, plane.documents.get(DOCUMENT), act.at)).parts
            old = current.stored.get(entry.name)
            check(old)
            made = await put_in(connection, act, entry, current, await prices.read(connection))
            if not made.verb:
                raise _Unchanged(made.stored)
    except _Unchanged as exc:
        return exc.stored, False
    if made.adds_price:
        await prices.refresh(plane)
    return made.stored, old is None


async def put_in(
    connection: AsyncConnection, act: Act, entry: CatalogueEntry, current: Catalogue, listed: PriceList
) -> Put:
    """`put` within a transaction of the catalogue. Raises Refused."""
    old = current.stored.get(entry.name)
    _refuse_clash(entry, current.owners)
    held = listed.at(entry.name, act.at)
    given = PRICE.of(entry)
    adds = given is not None and (held is None or held.price != given)
    new = _render(_priced(entry, None if adds else held), created=(old and old.entry.created) or act.at // 1000)
    if old is not None and old == new and not adds:
        return Put(old, "")
    if adds and isinstance(given, EntryPrice):
        await prices.add_from_entry(connection, act, entry.name, given, "cached_input" in given.written)
    await _write(connection, act, current, new)
    known = old is not None or entry.name in current.problems
    return Put(new, "update" if known else "create", adds)


async def _write(connection: AsyncConnection, act: Act, current: Catalogue, new: Stored) -> None:
    name, old = new.entry.name, current.stored.get(new.entry.name)
    values = {"entry": new.body.decode(), "updated_at": act.at, "updated_by": act.principal.user}
    known = old is not None or name in current.problems
    if known:
        await connection.execute(update(models).where(models.c.name == name).values(**values))
    else:
        await connection.execute(insert(models).values(name=name, **values))
    verb = "update" if known else "create"
    before = None if old is None else json.loads(old.body)
    await audit.record(connection, act, f"model.{verb}", audit.Object("model", name), before, json.loads(new.body))


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


def _stored(text: str, price: PriceRow | None) -> Stored:
    body = text.encode()
    entry = ENTRY.model_validate_json(body)
    shown = _priced(entry, price)
    return Stored(body, etag_of(body), entry) if shown is entry else _render(shown, created=0)


def _priced(entry: CatalogueEntry, price: PriceRow | None) -> CatalogueEntry:
    """The entry with this price; itself if it has that, or there is none."""
    if price is None or PRICE.of(entry) == price.price:
        return entry
    return entry.model_copy(update={"price": price.entry_price()})


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
