"""GitOps, inwards: a catalogue or a policy is taken over as a whole or not at all. What it does not name stays."""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from types import MappingProxyType
from typing import Any, NamedTuple

from sqlalchemy import Table, insert, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection

from control_plane.data import tables
from control_plane.data.tables import config_kv, keys, organisations, prompt_labels, prompt_versions, prompts
from control_plane.plane import Act, Plane
from control_plane.pure import values
from control_plane.pure.ids import new_id
from control_plane.services import audit, models, policy, prices
from inference_api.policy.document import (
    SECTIONS,
    Anonymous,
    Key,
    Organisation,
    ScopedBudget,
    ScopedLimit,
    StoredPrompt,
)
from inference_api.policy.reading import PolicyError, read, run
from inference_api.routing.entries import CatalogueEntry

_BATCH = 500


class ImportRefused(Exception):
    """Nothing was changed; the message is one line."""


class Change(NamedTuple):
    """`kind` and `id` of an object, and what is done with it: create or update."""

    kind: str
    id: str
    verb: str

    def __str__(self) -> str:
        return f"{self.kind} {self.id}: {self.verb}d"


class _DryRun(Exception):
    """Ends the transaction that was only tried."""


async def catalogue(plane: Plane, act: Act, entries: Iterable[CatalogueEntry], dry_run: bool = False) -> list[Change]:
    """Raises Refused."""
    changes: list[Change] = []
    with suppress(_DryRun):
        async with plane.change(models.DOCUMENT) as connection:
            found: models.Catalogue = (await models.build(connection, None, act.at)).parts
            stored = dict(found.stored)
            listed = await prices.read(connection)
            for entry in entries:
                current = found._replace(stored=MappingProxyType(stored))
                made = await models.put_in(connection, act, entry, current, listed)
                stored[entry.name] = made.stored
                if made.verb:
                    changes.append(Change("model", entry.name, made.verb))
            if dry_run or not changes:
                raise _DryRun
    return changes


async def whole_policy(plane: Plane, act: Act, document: dict[str, Any], dry_run: bool = False) -> list[Change]:
    """Raises ImportRefused: the document is not valid, or would not be together with what is stored."""
    peppered = bool(plane.settings.peppers)
    try:
        values.check(document)
        run(read(document, peppered=peppered))
    except (PolicyError, values.Unusable) as exc:
        raise ImportRefused(_ours(exc)) from None
    taken = _Taken(act)
    try:
        with suppress(_DryRun):
            async with plane.change(policy.DOCUMENT) as connection:
                taken.revision = await policy.revision_of(connection)
                await taken.take(connection, document)
                # What is stored and what comes must be a policy together.
                built = await policy.build(connection, None, act.at)
                run(read(built.body.decode(), peppered=peppered))
                if dry_run or not taken.changes:
                    raise _DryRun
    except PolicyError as exc:
        raise ImportRefused(f"with what is stored the policy would not be valid: {_ours(exc)}") from None
    except IntegrityError:
        raise ImportRefused("a digest or a name is taken by what is stored") from None
    return taken.changes


def _ours(error: Exception) -> str:
    return str(error).replace("INFERENCE_API_KEY_PEPPER", "CONTROL_PLANE_KEY_PEPPER")


class _Taken:
    """What one import changes."""

    def __init__(self, act: Act) -> None:
        self._act = act
        self.revision = 0
        self.changes: list[Change] = []

    async def take(self, connection: AsyncConnection, document: Mapping[str, Any]) -> None:
        items = {
            section: [kind.model_validate(raw) for raw in document.get(section) or ()]
            for section, kind in SECTIONS.items()
        }
        await self._organisations(connection, items["organisations"])  # type: ignore[arg-type]
        await self._keys(connection, items["keys"])  # type: ignore[arg-type]
        await self._limits(connection, items["limits"])  # type: ignore[arg-type]
        await self._budgets(connection, items["budgets"])  # type: ignore[arg-type]
        for prompt in items["prompts"]:
            await self._prompt(connection, prompt)  # type: ignore[arg-type]
        if "anonymous" in document:
            await self._anonymous(connection, Anonymous.model_validate(document["anonymous"]))

    async def _organisations(self, connection: AsyncConnection, items: Sequence[Organisation]) -> None:
        known = {row.name: row for row in await connection.execute(select(organisations))}
        for place, one in enumerate(items):
            wanted = {
                "disabled": one.disabled,
                "models": None if one.models is None else list(one.models),
                "limits": policy.rendered(one.limits),
                "budget": None if one.budget is None else policy.rendered([one.budget])[0],
            }
            # One after the other, so that their order stays.
            made = {"name": one.name, "created_at": self._act.at + place}
            await self._put(connection, "organisation", organisations, one.name, known.get(one.name), wanted, made)

    async def _keys(self, connection: AsyncConnection, items: Sequence[Key]) -> None:
        for start in range(0, len(items), _BATCH):
            batch = items[start : start + _BATCH]
            query = select(keys).where(keys.c.id.in_([one.id for one in batch]))
            known = {row.id: row for row in await connection.execute(query)}
            for one in batch:
                made = {"id": one.id, "created_at": self._act.at}
                await self._put(connection, "key", keys, one.id, known.get(one.id), _key_values(one), made)

    async def _limits(self, connection: AsyncConnection, items: Sequence[ScopedLimit]) -> None:
        """A limit without an id is the one of its counter: of the same scope, name, unit, time and models."""
        table = tables.limits
        rows = list(await connection.execute(select(table).order_by(table.c.id)))
        wanted = [(one, policy.rendered([one])[0]) for one in items]
        same = {place: row for place, (_, body) in enumerate(wanted) if (row := _pop(rows, body.__eq__)) is not None}
        for place, (one, body) in enumerate(wanted):
            if place in same:
                continue
            row = _pop(rows, lambda found, one=one: _counter(ScopedLimit.model_validate(found)) == _counter(one))
            id = new_id("lim", self._act.at + place) if row is None else row.id
            made = {"id": id, "created_at": self._act.at}
            await self._put(connection, "limit", table, id, row, {"body": body}, made)

    async def _budgets(self, connection: AsyncConnection, items: Sequence[ScopedBudget]) -> None:
        table = tables.budgets
        known = {(row.scope, row.name, row.unit, row.per): row for row in await connection.execute(select(table))}
        for place, one in enumerate(items):
            identity = {"scope": one.scope, "name": one.name or "", "unit": one.unit, "per": one.per}
            row = known.get((one.scope, one.name or "", one.unit, one.per))
            id = new_id("bud", self._act.at + place) if row is None else row.id
            made = {"id": id, "created_at": self._act.at, **identity}
            await self._put(connection, "budget", table, id, row, {"body": policy.rendered([one])[0]}, made)

    async def _prompt(self, connection: AsyncConnection, one: StoredPrompt) -> None:
        row = (await connection.execute(select(prompts).where(prompts.c.name == one.name))).one_or_none()
        made = {"name": one.name, "created_at": self._act.at}
        before = len(self.changes)
        await self._put(connection, "prompt", prompts, one.name, row, {"organisation": one.organisation}, made)
        query = select(prompt_versions).where(prompt_versions.c.prompt == one.name)
        known = {found.version: found.body for found in await connection.execute(query)}
        changed = False
        for version in one.versions:
            body = version.model_dump(mode="json", exclude_unset=True, exclude={"version"})
            if version.version not in known:
                place = {"prompt": one.name, "version": version.version, "created_at": self._act.at}
                await connection.execute(insert(prompt_versions).values(body=body, **place))
                changed = True
            elif known[version.version] != body:
                message = f"version {version.version} of the prompt {one.name!r} is another one; versions never change"
                raise ImportRefused(message)
        changed = await self._labels(connection, one) or changed
        if changed:
            await connection.execute(update(prompts).where(prompts.c.name == one.name).values(revision=self.revision))
            if len(self.changes) == before:
                await self._note(connection, Change("prompt", one.name, "update"), None, {"labels": one.labels})

    async def _labels(self, connection: AsyncConnection, one: StoredPrompt) -> bool:
        query = select(prompt_labels).where(prompt_labels.c.prompt == one.name)
        known = {found.label: found.version for found in await connection.execute(query)}
        changed = {label: number for label, number in one.labels.items() if known.get(label) != number}
        for label, number in changed.items():
            moved = {"version": number, "moved_at": self._act.at}
            where = (prompt_labels.c.prompt == one.name) & (prompt_labels.c.label == label)
            if label in known:
                await connection.execute(update(prompt_labels).where(where).values(**moved))
            else:
                await connection.execute(insert(prompt_labels).values(prompt=one.name, label=label, **moved))
        return bool(changed)

    async def _anonymous(self, connection: AsyncConnection, one: Anonymous) -> None:
        query = select(config_kv).where(config_kv.c.key == policy.ANONYMOUS)
        row = (await connection.execute(query)).one_or_none()
        wanted = {"value": policy.rendered(one.limits)}
        made = {"key": policy.ANONYMOUS, "updated_at": self._act.at}
        await self._put(connection, "setting", config_kv, policy.ANONYMOUS, row, wanted, made)

    async def _put(
        self,
        connection: AsyncConnection,
        kind: str,
        table: Table,
        id: str,
        row: Any,
        wanted: Mapping[str, Any],
        made: Mapping[str, Any],
    ) -> None:
        """Make the row, or change it to what is wanted. Raises ImportRefused if its object has ended."""
        before = None if row is None else {name: getattr(row, name) for name in wanted}
        if before == wanted:
            return
        if row is not None and getattr(row, "ended_at", None) is not None:
            raise ImportRefused(f"the {kind} {id!r} has ended; what has ended does not come back")
        noted = {"revision": self.revision} if "revision" in table.c else {}
        if row is None:
            await connection.execute(insert(table).values(**wanted, **made, **noted))
        else:
            place = next(iter(table.primary_key))
            await connection.execute(update(table).where(place == id).values(**wanted, **noted))
        await self._note(connection, Change(kind, id, "create" if row is None else "update"), before, dict(wanted))

    async def _note(self, connection: AsyncConnection, change: Change, before: Any, after: Any) -> None:
        self.changes.append(change)
        organisation = after.get("organisation") if change.kind in ("key", "prompt") else None
        if change.kind == "organisation":
            organisation = change.id
        what = audit.Object(change.kind, change.id, organisation)
        await audit.record(
            connection,
            self._act,
            f"{change.kind}.{change.verb}",
            what,
            _without_digests(before),
            _without_digests(after),
        )


def _key_values(one: Key) -> dict[str, Any]:
    return {
        "name": one.name,
        "digest": one.digest,
        "previous_digest": None if one.previous is None else one.previous.digest,
        "previous_until": None if one.previous is None else round(one.previous.until * 1000),
        "organisation": one.organisation,
        "user": one.user,
        "models": None if one.models is None else list(one.models),
        "limits": policy.rendered(one.limits),
        "budget": None if one.budget is None else policy.rendered([one.budget])[0],
        "priority": one.priority,
        "weight": one.weight,
        "expires_at": None if one.expires is None else round(one.expires * 1000),
        "disabled": one.disabled,
    }


def _without_digests(values: Any) -> Any:
    if values is None:
        return None
    return {name: value for name, value in values.items() if name not in ("digest", "previous_digest")}


def _counter(one: ScopedLimit) -> tuple[Any, ...]:
    return one.scope, one.name, one.unit, one.per, one.models


def _pop(rows: list[Any], matches: Any) -> Any:
    """Take the first row whose body matches; None: there is none."""
    for place, row in enumerate(rows):
        if matches(row.body):
            return rows.pop(place)
    return None
