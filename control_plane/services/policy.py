"""GET /policy: what routers hold callers to. Only what has changed since the last one is read and rendered again.

Whatever is stored, the document is one that routers accept: they refuse it as a whole for a name that is not there, so
that limits, budgets and prompts of what has ended are left out.
"""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import orjson
from pydantic import BaseModel
from sqlalchemy import ColumnElement, Select, Text, cast, select, tuple_
from sqlalchemy.ext.asyncio import AsyncConnection

from control_plane.data import tables
from control_plane.data.tables import keys, organisations, prompt_labels, prompt_versions, prompts, revisions
from control_plane.documents import Built, Document
from control_plane.errors import Invalid, Problem, Refused
from control_plane.plane import Plane
from control_plane.pure.policy import Item, Shards, changed, document, key_item, listed
from inference_api.policy.document import Budget
from inference_api.policy.reading import MAX_BYTES, MAX_KEYS

DOCUMENT = "policy"
ANONYMOUS = "anonymous.limits"
# Keys that are read at a time: the event loop has others to serve.
_BATCH = 1000
# Bytes that are kept free in the document: for changes that others make at the same time
_SPARE = 4 * 1024 * 1024


class Parts(NamedTuple):
    """`organisations`: the names of those that have not ended. `prompts`: rendered, with their organisations."""

    organisations: frozenset[str]
    shards: Shards
    prompts: Mapping[str, Item]

    @property
    def keys(self) -> int:
        return sum(len(shard.items) for shard in self.shards.values())


_EMPTY = Parts(frozenset(), MappingProxyType({}), MappingProxyType({}))


async def build(connection: AsyncConnection, known: Document | None, now: int) -> Built:
    before: Parts = _EMPTY if known is None else known.parts
    since = -1 if known is None else known.revision
    teams = (await connection.execute(_ORGANISATIONS)).all()
    names = frozenset(row.name for row in teams)
    items = await _changed_keys(connection, since, names, names - before.organisations if known else frozenset())
    stored = await _changed_prompts(connection, since)
    limits = (await connection.execute(select(tables.limits.c.body).order_by(tables.limits.c.id))).scalars().all()
    budgets = (await connection.execute(select(tables.budgets.c.body).order_by(tables.budgets.c.id))).scalars().all()
    anonymous = await _anonymous(connection)
    return await asyncio.to_thread(_built, before, teams, items, stored, (limits, budgets), anonymous)


def _built(
    before: Parts,
    teams: Sequence[Any],
    items: Mapping[str, Item | None],
    stored: Mapping[str, Item | None],
    scoped: tuple[Sequence[Any], Sequence[Any]],
    anonymous: Sequence[Any],
) -> Built:
    names = frozenset(row.name for row in teams)
    shards = changed(before.shards, items, before.organisations - names)
    texts = {name: item for name, item in {**before.prompts, **stored}.items() if item is not None}
    parts = Parts(names, shards, MappingProxyType(dict(sorted(texts.items()))))
    own = {(row.name, *_unit_of(row.budget)) for row in teams if row.budget is not None}
    head: dict[str, Any] = {"organisations": [_organisation(row) for row in teams]}
    if anonymous:
        head["anonymous"] = {"limits": anonymous}
    tail = {
        "limits": [one for one in scoped[0] if _is_there(one, parts)],
        "budgets": [one for one in scoped[1] if _is_there(one, parts) and (one.get("name"), *_unit_of(one)) not in own],
        "prompts": listed(
            item.body for item in parts.prompts.values() if item.organisation is None or item.organisation in names
        ),
    }
    made = document(head, shards, tail)
    return Built(made.body, parts, compressed=made.compressed, identity=made.identity)


_ORGANISATIONS = (
    select(
        organisations.c.name,
        organisations.c.disabled,
        organisations.c.models,
        organisations.c.limits,
        organisations.c.budget,
    )
    .where(organisations.c.ended_at.is_(None))
    .order_by(organisations.c.created_at, organisations.c.name)
)
# JSON as text: it goes out as it is.
_KEYS = select(
    keys.c.id,
    keys.c.name,
    keys.c.digest,
    keys.c.previous_digest,
    keys.c.previous_until,
    keys.c.organisation,
    keys.c.user,
    cast(keys.c.models, Text).label("models"),
    cast(keys.c.limits, Text).label("limits"),
    cast(keys.c.budget, Text).label("budget"),
    keys.c.priority,
    keys.c.weight,
    keys.c.expires_at,
    keys.c.disabled,
    keys.c.ended_at,
    keys.c.revision,
)


async def _changed_keys(
    connection: AsyncConnection, since: int, live: frozenset[str], new: frozenset[str]
) -> Mapping[str, Item | None]:
    """Keys newer than a revision, and those of `new` organisations; None: not in the policy."""
    # By the index: in the order of ids, SQLite would look at every key.
    place = tuple_(keys.c.revision, keys.c.id)
    newer = _KEYS.order_by(keys.c.revision, keys.c.id)
    found = await _items(connection, newer, live, lambda last: place > last, (since + 1, ""))
    if new:
        of_new = _KEYS.where(keys.c.organisation.in_(new)).order_by(keys.c.id)
        found |= await _items(connection, of_new, live, lambda last: keys.c.id > last[1], (0, ""))
    return found


async def _items(
    connection: AsyncConnection,
    query: Select[Any],
    live: frozenset[str],
    behind: Callable[[tuple[int, str]], ColumnElement[bool]],
    last: tuple[int, str],
) -> dict[str, Item | None]:
    """The keys of a query behind a place (revision, id), in batches."""
    found: dict[str, Item | None] = {}
    while True:
        rows = (await connection.execute(query.where(behind(last)).limit(_BATCH))).all()
        for row in rows:
            holds = row.ended_at is None and (row.organisation is None or row.organisation in live)
            found[row.id] = Item(row.organisation, key_item(row)) if holds else None
        if len(rows) < _BATCH:
            return found
        last = rows[-1].revision, rows[-1].id
        await asyncio.sleep(0)


async def _changed_prompts(connection: AsyncConnection, since: int) -> Mapping[str, Item | None]:
    """Prompts newer than a revision; None: not in the policy, as it has ended or has no version."""
    newer = select(prompts.c.name).where(prompts.c.revision > since)
    rows = (await connection.execute(select(prompts).where(prompts.c.revision > since))).all()
    if not rows:
        return {}
    versions: dict[str, list[Any]] = {}
    query = select(prompt_versions).where(prompt_versions.c.prompt.in_(newer)).order_by(prompt_versions.c.version)
    for row in await connection.execute(query):
        versions.setdefault(row.prompt, []).append({"version": row.version, **row.body})
    labels: dict[str, dict[str, int]] = {}
    for row in await connection.execute(select(prompt_labels).where(prompt_labels.c.prompt.in_(newer))):
        labels.setdefault(row.prompt, {})[row.label] = row.version
    found: dict[str, Item | None] = {}
    for row in rows:
        if row.ended_at is not None or row.name not in versions:
            found[row.name] = None
            continue
        item: dict[str, Any] = {"name": row.name}
        if row.organisation is not None:
            item["organisation"] = row.organisation
        item |= {"labels": dict(sorted(labels.get(row.name, {}).items())), "versions": versions[row.name]}
        found[row.name] = Item(row.organisation, orjson.dumps(item))
    return found


async def _anonymous(connection: AsyncConnection) -> Sequence[Any]:
    query = select(tables.config_kv.c.value).where(tables.config_kv.c.key == ANONYMOUS)
    return (await connection.execute(query)).scalar_one_or_none() or ()


def _organisation(row: Any) -> dict[str, Any]:
    found: dict[str, Any] = {"name": row.name}
    if row.disabled:
        found["disabled"] = True
    if row.models is not None:
        found["models"] = row.models
    if row.limits:
        found["limits"] = row.limits
    if row.budget is not None:
        found["budget"] = row.budget
    return found


def _is_there(one: Mapping[str, Any], parts: Parts) -> bool:
    """Whether the organisation or key that a limit or budget names is in the policy."""
    name = one.get("name")
    if name is None or one["scope"] not in ("organisation", "key"):
        return True
    if one["scope"] == "organisation":
        return name in parts.organisations
    shard = parts.shards.get(name[:1])
    return shard is not None and name in shard.items


def _unit_of(budget: Mapping[str, Any]) -> tuple[str, str]:
    found = Budget.model_validate({name: budget[name] for name in Budget.model_fields if name in budget})
    return found.unit, found.per


# What changes of the policy have in common. All within a transaction that has raised its revision.


async def revision_of(connection: AsyncConnection) -> int:
    """The revision that this transaction makes, for the rows that it changes."""
    query = select(revisions.c.revision).where(revisions.c.document == DOCUMENT)
    found: int = (await connection.execute(query)).scalar_one()
    return found


def rendered(items: Sequence[BaseModel]) -> list[dict[str, Any]]:
    """Limits and budgets as they are stored and shown: only what was set."""
    return [one.model_dump(mode="json", exclude_unset=True) for one in items]


def refuse_without_room(plane: Plane, more: int, keys: int = 0) -> None:
    """Routers refuse a policy that is too large as a whole. `more`: bytes that a change may add."""
    current = plane.documents.get(DOCUMENT)
    if len(current.body) + more > MAX_BYTES - _SPARE:
        message = f"The policy would be too large: routers take at most {MAX_BYTES} bytes of it. End what is not used."
        raise Refused(422, "validation_error", message)
    if keys and current.parts.keys + keys > MAX_KEYS:
        raise Refused(422, "validation_error", f"There are {MAX_KEYS} keys, as many as routers take. End some first.")


async def refuse_unknown(connection: AsyncConnection, scope: str, name: str | None) -> None:
    """Raises Invalid if a limit or budget names an organisation or a key that is not there."""
    if name is None:
        return
    if scope == "organisation":
        query = select(organisations.c.name).where(organisations.c.name == name, organisations.c.ended_at.is_(None))
        if (await connection.execute(query)).first() is None:
            raise Invalid(Problem("name", f"{name!r} is not an organisation"))
    elif scope == "key":
        query = select(keys.c.id).where(keys.c.id == name, keys.c.ended_at.is_(None))
        if (await connection.execute(query)).first() is None:
            raise Invalid(Problem("name", f"{name!r} is not the id of a key"))


async def refuse_second_budget(
    connection: AsyncConnection, scope: str, name: str | None, budget: Budget, but: str | None = None
) -> None:
    """Raises Refused if this holder has another budget in this unit and period. `but`: id of the one that is replaced.

    For the budget of an organisation or key: `but` is "own".
    """
    known = tables.budgets
    query = select(known.c.id).where(
        known.c.scope == scope, known.c.name == (name or ""), known.c.unit == budget.unit, known.c.per == budget.per
    )
    if but is not None:
        query = query.where(known.c.id != but)
    taken = (await connection.execute(query)).first() is not None
    if not taken and but != "own" and name is not None and scope in ("organisation", "key"):
        table, column = (organisations, organisations.c.name) if scope == "organisation" else (keys, keys.c.id)
        own = (await connection.execute(select(table.c.budget).where(column == name))).scalar_one_or_none()
        taken = own is not None and _unit_of(own) == (budget.unit, budget.per)
    if taken:
        holder = scope if name is None else f"{scope} {name!r}"
        message = f"There is a budget of {holder} in {budget.unit} per {budget.per} already. Change that one."
        raise Refused(409, "name_taken", message, param="name")
