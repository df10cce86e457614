"""API keys: made, changed, rotated and ended. Of a secret only the digest is stored; the secret is shown once."""

from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StringConstraints, ValidationError
from sqlalchemy import ColumnElement, Row, Select, and_, case, false, insert, or_, select, true, update
from sqlalchemy.ext.asyncio import AsyncConnection

from control_plane.data.tables import keys, organisations
from control_plane.errors import Forbidden, Invalid, NotFound, Problem, problems_of
from control_plane.plane import Act, Plane
from control_plane.pure.patch import merged
from control_plane.pure.roles import Permission, Principal
from control_plane.pure.times import Moment, shown
from control_plane.services import audit, policy
from inference_api.policy.document import Budget, Limit, Name, Patterns
from inference_api.policy.keys import new_key

State = Literal["ok", "expired", "disabled", "ended"]
# Gets the key as it is shown, and raises to refuse.
Check = Callable[[Mapping[str, Any]], None]


class KeyBody(BaseModel):
    """What people say of a new key."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    name: Annotated[str, StringConstraints(min_length=1, max_length=128)] = Field(
        description="any text", examples=["batch"]
    )
    organisation: Name | None = Field(default=None, description="its models and limits hold, too", examples=["team-a"])
    user: Name | None = Field(
        default=None, description="whose key it is: who may see it as the own one", examples=["ana"]
    )
    models: Patterns = Field(
        default=None, description="names it may use, `*` for any characters; null: all", examples=[["llama-*"]]
    )
    limits: tuple[Limit, ...] = Field(default=(), examples=[[{"requests": 60, "per": 60}]])
    budget: Budget | None = Field(default=None, examples=[{"cost": 50, "per": "month"}])
    priority: Annotated[int, Field(strict=True, ge=-100, le=100)] = Field(default=0, description="lower ones go first")
    weight: Annotated[float, Field(strict=True, ge=0.01, le=100)] = Field(
        default=1.0, description="share among waiting keys"
    )
    expires: Moment | None = Field(default=None, examples=["2027-01-31T00:00:00Z"])


class KeyFields(KeyBody):
    """All that can be changed."""

    disabled: StrictBool = False


class Found(NamedTuple):
    """A row of `keys`, and its organisation's state."""

    row: Row[Any]
    state: State

    def shown(self) -> dict[str, Any]:
        row = self.row
        return {
            "id": row.id,
            "name": row.name,
            "organisation": row.organisation,
            "user": row.user,
            "models": row.models,
            "limits": row.limits,
            "budget": row.budget,
            "priority": row.priority,
            "weight": int(row.weight) if row.weight == int(row.weight) else row.weight,
            "expires": shown(row.expires_at),
            "disabled": row.disabled,
            "state": self.state,
            "previous_until": shown(row.previous_until),
            "created_at": shown(row.created_at),
            "created_by": row.created_by,
            "last_used_at": shown(row.last_used_at),
        }


def is_shown(act: Act, key: Found) -> bool:
    """Whether the caller sees more of it than its id, which is all that a viewer of the platform sees."""
    return act.principal.may("keys.write", key.row.organisation, key.row.user)


def tag_of(shown: Mapping[str, Any]) -> dict[str, Any]:
    """What the ETag of a key is made of: not what changes without anybody changing the key."""
    return {name: value for name, value in shown.items() if name not in ("state", "last_used_at")}


class Filters(NamedTuple):
    """`playground`: whether those that the playground lends are listed, or (None) all. `name`: a part of the name."""

    organisation: str | None = None
    user: str | None = None
    state: State | None = None
    playground: bool | None = False
    name: str | None = None


_NO_FILTERS = Filters()


async def listed(
    plane: Plane, act: Act, limit: int, after: tuple[int, str] | None, filters: Filters = _NO_FILTERS
) -> list[Found]:
    """The keys that the caller may see, the newest first: one more than `limit`, behind `after` (time, id)."""
    query = _query(act.at).where(_visible(act.principal, "keys.see"))
    if filters.organisation is not None:
        query = query.where(keys.c.organisation == filters.organisation)
    if filters.user is not None:
        query = query.where(keys.c.user == filters.user)
    if filters.state is not None:
        query = query.where(_state(act.at) == filters.state)
    if filters.name is not None:
        # Who sees ids only must not find out names by asking for them.
        readable = _visible(act.principal, "keys.write")
        query = query.where(keys.c.name.icontains(filters.name, autoescape=True), readable)
    if filters.playground is not None:
        query = query.where(keys.c.playground.is_(filters.playground))
    if after is not None:
        at, id = after
        query = query.where(or_(keys.c.created_at < at, and_(keys.c.created_at == at, keys.c.id > id)))
    query = query.order_by(keys.c.created_at.desc(), keys.c.id).limit(limit + 1)
    async with plane.database.main.read() as connection:
        return [Found(row, row.state) for row in await connection.execute(query)]


async def names(plane: Plane, act: Act, ids: Iterable[str]) -> dict[str, str]:
    """By id, of the keys of which the caller may see more than the id."""
    query = select(keys.c.id, keys.c.name).where(keys.c.id.in_(sorted(ids)), _visible(act.principal, "keys.write"))
    async with plane.database.main.read() as connection:
        return {row.id: row.name for row in await connection.execute(query)}


async def found(plane: Plane, act: Act, id: str) -> Found:
    """Raises NotFound."""
    async with plane.database.main.read() as connection:
        return await _find(connection, act, id)


async def create(plane: Plane, act: Act, body: KeyBody) -> tuple[Found, str]:
    """A new key, and its secret. Raises Refused."""
    fields = KeyFields.model_validate({**body.model_dump(exclude_unset=True, round_trip=True), "disabled": False})
    fields = _own(act.principal, fields)
    made = new_key(_pepper(plane))
    async with plane.change(policy.DOCUMENT) as connection:
        await _refuse_organisation(connection, act.principal, fields.organisation)
        _refuse_rights(act.principal, fields, KeyFields(name=fields.name))
        values = {**_values(fields), "revision": await policy.revision_of(connection)}
        policy.refuse_without_room(plane, len(str(values)), keys=1)
        await connection.execute(
            insert(keys).values(
                id=made.id, digest=made.digest, created_at=act.at, created_by=act.principal.user, **values
            )
        )
        key = await _find(connection, act, made.id)
        await _record(connection, act, "create", key, None)
    return key, made.key


async def change(plane: Plane, act: Act, id: str, patch: Any, check: Check) -> Found:
    """Change a key by a merge patch. Raises Refused."""
    async with plane.change(policy.DOCUMENT) as connection:
        old = await _writable(connection, act, id, check)
        before = {name: value for name, value in old.shown().items() if name in KeyFields.model_fields}
        try:
            fields = KeyFields.model_validate(merged(before, patch))
        except ValidationError as exc:
            raise Invalid(*problems_of(exc)) from None
        if fields.organisation != old.row.organisation:
            await _refuse_organisation(connection, act.principal, fields.organisation)
        _refuse_rights(act.principal, fields, KeyFields.model_validate(before))
        if fields.budget is not None:
            await policy.refuse_second_budget(connection, "key", id, fields.budget, "own")
        values = {**_values(fields), "revision": await policy.revision_of(connection)}
        policy.refuse_without_room(plane, len(str(values)))
        await connection.execute(update(keys).where(keys.c.id == id).values(**values))
        key = await _find(connection, act, id)
        await _record(connection, act, "update", key, old)
    return key


async def rotate(plane: Plane, act: Act, id: str, overlap: int) -> tuple[Found, str]:
    """A new secret for a key; the one before it is valid for `overlap` seconds more. Raises Refused."""
    pepper = _pepper(plane)
    made = new_key(pepper, id=id)
    async with plane.change(policy.DOCUMENT) as connection:
        old = await _writable(connection, act, id)
        values = {
            "digest": made.digest,
            "previous_digest": old.row.digest if overlap else None,
            "previous_until": act.at + overlap * 1000 if overlap else None,
            "revision": await policy.revision_of(connection),
        }
        await connection.execute(update(keys).where(keys.c.id == id).values(**values))
        key = await _find(connection, act, id)
        await _record(connection, act, "rotate", key, old)
    return key, made.key


async def end(plane: Plane, act: Act, id: str, check: Check, reason: str | None = None) -> None:
    """Take a key out of the policy, for ever. Raises Refused."""
    async with plane.change(policy.DOCUMENT) as connection:
        old = await _find(connection, act, id)
        _refuse_write(act.principal, old)
        check(old.shown())
        if old.row.ended_at is None:
            values = {"ended_at": act.at, "revision": await policy.revision_of(connection)}
            await connection.execute(update(keys).where(keys.c.id == id).values(**values))
            await _record(connection, act, "end", await _find(connection, act, id), old, reason)


def _pepper(plane: Plane) -> str | None:
    return plane.settings.peppers[0] if plane.settings.peppers else None


def _state(now: int) -> ColumnElement[str]:
    """As routers see it: what comes first is what they say."""
    return case(
        (or_(keys.c.ended_at.is_not(None), organisations.c.ended_at.is_not(None)), "ended"),
        (keys.c.expires_at <= now, "expired"),
        (or_(keys.c.disabled, organisations.c.disabled), "disabled"),
        else_="ok",
    )


def _query(now: int) -> Select[Any]:
    joined = keys.outerjoin(organisations, organisations.c.name == keys.c.organisation)
    return select(keys, _state(now).label("state")).select_from(joined)


def _visible(principal: Principal, permission: Permission) -> ColumnElement[bool]:
    scope = principal.scope(permission)
    if scope.everything:
        return true()
    whole = keys.c.organisation.in_(scope.organisations) if scope.organisations else false()
    own = and_(keys.c.organisation.in_(scope.own), keys.c.user == principal.user) if scope.own else false()
    return or_(whole, own)


async def _find(connection: AsyncConnection, act: Act, id: str) -> Found:
    row = (await connection.execute(_query(act.at).where(keys.c.id == id))).one_or_none()
    if row is None or not act.principal.may("keys.see", row.organisation, row.user):
        raise NotFound("key", id)
    return Found(row, row.state)


async def _writable(connection: AsyncConnection, act: Act, id: str, check: Check = lambda shown: None) -> Found:
    """A key that the caller may change. Raises Refused."""
    key = await _find(connection, act, id)
    _refuse_write(act.principal, key)
    check(key.shown())
    if key.state == "ended":
        raise Invalid(Problem("id", f"the key {id!r} has ended; make a new one"))
    return key


def _refuse_write(principal: Principal, key: Found) -> None:
    if not principal.may("keys.write", key.row.organisation, key.row.user):
        raise Forbidden("You may see this key and not change it.")


def _own(principal: Principal, fields: KeyFields) -> KeyFields:
    """A member's key is the member's own one, unless it says otherwise."""
    mine = principal.scope("keys.write").own
    if fields.user is None and fields.organisation in mine:
        return fields.model_copy(update={"user": principal.user})
    return fields


async def _refuse_organisation(connection: AsyncConnection, principal: Principal, name: str | None) -> None:
    """Raises NotFound unless there is this organisation, and the caller may know it."""
    if name is None:
        if not principal.scope("keys.write").everything:
            raise Invalid(Problem("organisation", "is required: keys of no organisation are the platform's"))
        return
    query = select(organisations.c.name).where(organisations.c.name == name, organisations.c.ended_at.is_(None))
    known = (await connection.execute(query)).first() is not None
    if not known or not (principal.scope("organisations.see").everything or name in principal.roles):
        raise NotFound("organisation", name)


def _refuse_rights(principal: Principal, fields: KeyFields, before: KeyFields) -> None:
    """Raises Forbidden if the key would be none of the caller's, or goes before those of others."""
    if not principal.may("keys.write", fields.organisation, fields.user):
        raise Forbidden("You may make keys for yourself only, in organisations where you are a member or more.")
    ranked = (fields.priority, fields.weight) != (before.priority, before.weight)
    if ranked and not principal.may("limits.write", fields.organisation):
        raise Forbidden("Priority and weight of a key need the role owner or admin in its organisation.")


def _values(fields: KeyFields) -> dict[str, Any]:
    return {
        "name": fields.name,
        "organisation": fields.organisation,
        "user": fields.user,
        "models": None if fields.models is None else list(fields.models),
        "limits": policy.rendered(fields.limits),
        "budget": None if fields.budget is None else policy.rendered([fields.budget])[0],
        "priority": fields.priority,
        "weight": fields.weight,
        "expires_at": fields.expires,
        "disabled": fields.disabled,
    }


async def _record(
    connection: AsyncConnection, act: Act, verb: str, key: Found, before: Found | None, reason: str | None = None
) -> None:
    """The audit row: what has changed."""
    new, old = key.shown(), {} if before is None else before.shown()
    names = [name for name in new if name not in old or old[name] != new[name]]
    what = audit.Object("key", key.row.id, key.row.organisation)
    was = {name: old[name] for name in names} if old else None
    await audit.record(connection, act, f"key.{verb}", what, was, {name: new[name] for name in names}, reason)
