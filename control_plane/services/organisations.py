"""Organisations and their members. Names are never used again; what is ended leaves the policy with its keys."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from sqlalchemy import Row, delete, func, insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from control_plane.data.tables import budgets, keys, limits, memberships, organisations, tokens, users
from control_plane.errors import Forbidden, Invalid, NotFound, Problem, Refused
from control_plane.plane import Act, Plane
from control_plane.pure.bounds import beyond
from control_plane.pure.roles import Permission, Scope
from control_plane.pure.times import shown
from control_plane.services import accounts, audit, policy
from inference_api.policy.document import Budget

# Makes the new fields of an object as it is now, or raises to refuse; or only looks at it
Decide = Callable[[dict[str, Any]], dict[str, Any]]
Check = Callable[[dict[str, Any]], None]
FIELDS = ("title", "disabled", "models", "limits", "budget")
# Who may change a field; an owner's limits and budget are below the platform's.
NEEDS: Mapping[str, Permission] = {
    "title": "organisations.rename",
    "limits": "limits.write",
    "budget": "limits.write",
    "models": "organisations.write",
    "disabled": "organisations.write",
}


async def page_of(plane: Plane, scope: Scope, limit: int, after: str | None) -> list[dict[str, Any]]:
    """Organisations that are not ended, by name; one more than `limit`."""
    query = select(organisations).where(organisations.c.ended_at.is_(None))
    if not scope.everything:
        query = query.where(organisations.c.name.in_(scope.organisations | scope.own))
    if after is not None:
        query = query.where(organisations.c.name > after)
    async with plane.database.main.read() as connection:
        return [_shown(row) for row in await connection.execute(query.order_by(organisations.c.name).limit(limit + 1))]


async def one(plane: Plane, name: str) -> dict[str, Any]:
    """Raises NotFound."""
    async with plane.database.main.read() as connection:
        return _shown(await read(connection, name))


async def read(connection: AsyncConnection, name: str, locked: bool = False) -> Row[Any]:
    """Raises NotFound: there is none, or it has ended."""
    query = select(organisations).where(organisations.c.name == name, organisations.c.ended_at.is_(None))
    row = (await connection.execute(query.with_for_update() if locked else query)).one_or_none()
    if row is None:
        raise NotFound("organisation", name)
    return row


class Size(NamedTuple):
    """`keys`: that have not ended."""

    members: int = 0
    keys: int = 0


async def sizes(plane: Plane, names: Sequence[str]) -> dict[str, Size]:
    """By name."""
    people = select(memberships.c.organisation, func.count().label("number"))
    people = people.where(memberships.c.organisation.in_(names)).group_by(memberships.c.organisation)
    having = select(keys.c.organisation, func.count().label("number"))
    having = having.where(keys.c.organisation.in_(names), keys.c.ended_at.is_(None), ~keys.c.playground)
    having = having.group_by(keys.c.organisation)
    async with plane.database.main.read() as connection:
        members = {row.organisation: row.number for row in await connection.execute(people)}
        of_keys = {row.organisation: row.number for row in await connection.execute(having)}
    return {name: Size(members.get(name, 0), of_keys.get(name, 0)) for name in names}


async def create(plane: Plane, act: Act, name: str, fields: dict[str, Any]) -> dict[str, Any]:
    """Raises Refused."""
    async with plane.change(policy.DOCUMENT) as connection:
        known = select(organisations.c.name).where(organisations.c.name == name)
        if (await connection.execute(known)).first() is not None:
            raise Refused(409, "name_taken", f"The name {name!r} is taken; names are never used again.", param="name")
        await _refuse_policy(plane, connection, name, fields)
        values = {**fields, "created_at": act.at, "created_by": act.principal.user}
        await connection.execute(insert(organisations).values(name=name, **values))
        what = audit.Object("organisation", name, name)
        await audit.record(connection, act, "organisation.create", what, after={"name": name, **fields})
        return _shown(await read(connection, name))


async def change(plane: Plane, act: Act, name: str, decide: Decide) -> dict[str, Any]:
    """Write the fields that `decide` makes of the present ones. Raises NotFound, Forbidden, Invalid."""
    async with plane.change(policy.DOCUMENT) as connection:
        before = _shown(await read(connection, name, locked=True))
        after = decide(before)
        values = {field: after[field] for field in FIELDS if after[field] != before[field]}
        for field in values:
            if not act.principal.may(NEEDS[field], name):
                raise Forbidden(f"Changing {field!r} of an organisation needs the permission {NEEDS[field]}.")
        if not act.principal.may("organisations.write"):
            await _refuse_beyond(connection, name, values)
        if values:
            await _refuse_policy(plane, connection, name, values)
            await connection.execute(update(organisations).where(organisations.c.name == name).values(**values))
            old = {field: before[field] for field in values}
            what = audit.Object("organisation", name, name)
            await audit.record(connection, act, "organisation.update", what, old, values)
        return _shown(await read(connection, name))


async def end(plane: Plane, act: Act, name: str, check: Check) -> None:
    """End an organisation and its tokens; its keys and prompts leave the policy with it. Raises NotFound."""
    async with plane.change(policy.DOCUMENT) as connection:
        check(_shown(await read(connection, name, locked=True)))
        await connection.execute(update(organisations).where(organisations.c.name == name).values(ended_at=act.at))
        of_it = (tokens.c.organisation == name) & tokens.c.ended_at.is_(None)
        await connection.execute(update(tokens).where(of_it).values(ended_at=act.at))
        await audit.record(connection, act, "organisation.end", audit.Object("organisation", name, name))


async def members(plane: Plane, name: str, limit: int, after: str | None) -> list[dict[str, Any]]:
    """Members by name; one more than `limit`. Raises NotFound."""
    query = _members(name)
    if after is not None:
        query = query.where(memberships.c.user > after)
    async with plane.database.main.read() as connection:
        await read(connection, name)
        rows = await connection.execute(query.order_by(memberships.c.user).limit(limit + 1))
        return [_member(row) for row in rows]


async def member(plane: Plane, name: str, user: str) -> dict[str, Any] | None:
    """None: no member. Raises NotFound."""
    async with plane.database.main.read() as connection:
        await read(connection, name)
        return await _read_member(connection, name, user)


async def set_member(
    plane: Plane, act: Act, name: str, user: str, role: str, check: Callable[[dict[str, Any] | None], None]
) -> tuple[dict[str, Any], bool]:
    """Make somebody a member, or change the role; returns whether it is a new member.

    Raises NotFound, Forbidden, Refused.
    """
    async with plane.database.main.write() as connection:
        await read(connection, name, locked=True)
        await accounts.read(connection, user)
        old = await _read_member(connection, name, user)
        check(old)
        before = None if old is None else {"role": old["role"]}
        _refuse_owner(act, name, role, *(before or {}).values())
        if before is None:
            row = {"organisation": name, "user": user, "role": role, "created_at": act.at}
            await connection.execute(insert(memberships).values(**row))
        else:
            await connection.execute(update(memberships).where(_is(name, user)).values(role=role))
            await _keep_an_owner(connection, act, name, before["role"])
        if before != {"role": role}:
            verb = "create" if before is None else "update"
            await audit.record(connection, act, f"member.{verb}", _object(name, user), before, {"role": role})
        made = await _read_member(connection, name, user)
    assert made is not None
    return made, before is None


async def end_member(plane: Plane, act: Act, name: str, user: str, check: Check) -> None:
    """Raises NotFound, Forbidden, Refused."""
    async with plane.database.main.write() as connection:
        await read(connection, name, locked=True)
        old = await _read_member(connection, name, user)
        if old is None:
            raise NotFound("member", user)
        check(old)
        _refuse_owner(act, name, old["role"])
        await connection.execute(delete(memberships).where(_is(name, user)))
        await _keep_an_owner(connection, act, name, old["role"])
        await audit.record(connection, act, "member.end", _object(name, user), {"role": old["role"]})


async def _read_member(connection: AsyncConnection, name: str, user: str) -> dict[str, Any] | None:
    row = (await connection.execute(_members(name).where(memberships.c.user == user))).one_or_none()
    return None if row is None else _member(row)


def _refuse_owner(act: Act, name: str, *roles: str | None) -> None:
    """Owners are made and changed by owners, and by admins of the platform."""
    principal = act.principal
    if "owner" in roles and not (principal.may("organisations.write") or principal.roles.get(name) == "owner"):
        raise Forbidden("An admin of an organisation makes and changes no owner.")


async def _keep_an_owner(connection: AsyncConnection, act: Act, name: str, lost: str) -> None:
    """The last owner cannot leave the others without one; an admin of the platform can mend that."""
    if lost != "owner" or act.principal.may("organisations.write"):
        return
    query = select(func.count()).select_from(memberships)
    owners = query.where(memberships.c.organisation == name, memberships.c.role == "owner")
    if (await connection.execute(owners)).scalar_one() == 0:
        raise Refused(409, "last_admin", f"That is the last owner of {name!r}. Make another one first.")


async def _refuse_beyond(connection: AsyncConnection, name: str, values: dict[str, Any]) -> None:
    """Raises Invalid if a limit or budget is above one of the platform for this organisation."""
    platform_limits = [row.body for row in await connection.execute(select(limits.c.body))]
    platform_budgets = [row.body for row in await connection.execute(select(budgets.c.body))]
    found = beyond(name, values.get("limits") or [], values.get("budget"), platform_limits, platform_budgets)
    if found:
        raise Invalid(*(Problem(param, message) for param, message in found))


async def _refuse_policy(plane: Plane, connection: AsyncConnection, name: str, values: Mapping[str, Any]) -> None:
    """Raises Refused for what routers would not take."""
    policy.refuse_without_room(plane, len(str(values)))
    if values.get("budget") is not None:
        budget = Budget.model_validate(values["budget"])
        await policy.refuse_second_budget(connection, "organisation", name, budget, "own")


def _members(name: str) -> Any:
    query = select(memberships, users.c.title).join(users, users.c.name == memberships.c.user)
    return query.where(memberships.c.organisation == name)


def _is(name: str, user: str) -> Any:
    return (memberships.c.organisation == name) & (memberships.c.user == user)


def _object(name: str, user: str) -> audit.Object:
    return audit.Object("member", f"{name}/{user}", name)


def _member(row: Row[Any]) -> dict[str, Any]:
    return {"user": row.user, "title": row.title, "role": row.role, "created_at": shown(row.created_at)}


def _shown(row: Row[Any]) -> dict[str, Any]:
    return {
        "name": row.name,
        **{field: getattr(row, field) for field in FIELDS},
        "created_at": shown(row.created_at),
        "created_by": row.created_by,
    }
