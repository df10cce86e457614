"""Tokens: made, changed, rotated and ended. A management token acts for its maker, with at most the maker's rights."""

from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StringConstraints
from sqlalchemy import ColumnElement, Row, and_, case, false, insert, or_, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from control_plane.data.tables import organisations, tokens
from control_plane.errors import Forbidden, Invalid, NotFound, Problem
from control_plane.plane import Act, Plane
from control_plane.pure.roles import ORGANISATION_ROLES, PLATFORM_ROLES, Principal, is_within
from control_plane.pure.times import Moment, shown
from control_plane.services import audit, people
from control_plane.services.tokens import DOCUMENT
from inference_api.policy.keys import MANAGEMENT, SERVICE, new_key

Kind = Literal["management", "service"]
State = Literal["ok", "expired", "disabled", "ended"]
TokenScope = Literal["snapshots", "ingest", "report", "activate"]
Role = Literal["admin", "operator", "viewer", "owner", "member"]
FIELDS = ("name", "scopes", "organisation", "role", "expires", "disabled")
# Gets the token as it is shown; returns the new fields, or only raises to refuse.
Decide = Callable[[dict[str, Any]], "TokenFields"]
Check = Callable[[dict[str, Any]], None]


class TokenFields(BaseModel):
    """What can be changed.

    `scopes`: of a service token. `organisation`, `role`: of a management token, which has all rights of its maker
    without them; with an organisation it acts there alone, with a role only on the platform alone.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    name: Annotated[str, StringConstraints(min_length=1, max_length=128)] = Field(examples=["ci"])
    scopes: tuple[TokenScope, ...] | None = None
    organisation: Annotated[str, StringConstraints(max_length=128)] | None = Field(default=None, examples=["team-a"])
    role: Role | None = Field(default=None, examples=["member"])
    expires: Moment | None = Field(default=None, examples=["2027-01-31T00:00:00Z"])
    disabled: StrictBool = False


class Filters(NamedTuple):
    organisation: str | None = None
    user: str | None = None
    state: State | None = None


async def listed(
    plane: Plane, act: Act, limit: int, after: Sequence[Any] | None, filters: Filters
) -> list[dict[str, Any]]:
    """The own tokens, and for who may settings the service tokens: the newest first, one more than `limit`."""
    query = _query(act.at).where(_visible(act.principal))
    for column, value in ((tokens.c.organisation, filters.organisation), (tokens.c.user, filters.user)):
        if value is not None:
            query = query.where(column == value)
    if filters.state is not None:
        query = query.where(_state(act.at) == filters.state)
    if after is not None:
        at, id = after
        query = query.where(or_(tokens.c.created_at < at, and_(tokens.c.created_at == at, tokens.c.id > id)))
    query = query.order_by(tokens.c.created_at.desc(), tokens.c.id).limit(limit + 1)
    async with plane.database.main.read() as connection:
        return [_shown(row) for row in await connection.execute(query)]


async def one(plane: Plane, act: Act, id: str) -> dict[str, Any]:
    """Raises NotFound."""
    async with plane.database.main.read() as connection:
        return _shown(await _find(connection, act, id))


async def create(plane: Plane, act: Act, kind: Kind, fields: TokenFields) -> tuple[dict[str, Any], str]:
    """A token, and the token itself, which is stored nowhere. Raises Refused."""
    made = new_key(prefix=MANAGEMENT if kind == "management" else SERVICE)
    async with plane.change(DOCUMENT) as connection:
        await _check(connection, act, kind, fields)
        values = {**_values(fields), "user": act.principal.user if kind == "management" else None}
        values |= {"created_at": act.at, "created_by": act.principal.user}
        await connection.execute(insert(tokens).values(id=made.id, kind=kind, digest=made.digest, **values))
        token = _shown(await _find(connection, act, made.id))
        await _record(connection, act, "create", token, None)
    return token, made.key


async def change(plane: Plane, act: Act, id: str, decide: Decide) -> dict[str, Any]:
    """Raises Refused."""
    async with plane.change(DOCUMENT) as connection:
        before = _shown(await _writable(connection, act, id))
        fields = decide(before)
        await _check(connection, act, before["kind"], fields)
        await connection.execute(update(tokens).where(tokens.c.id == id).values(**_values(fields)))
        after = _shown(await _find(connection, act, id))
        await _record(connection, act, "update", after, before)
    return after


async def rotate(plane: Plane, act: Act, id: str, overlap: int) -> tuple[dict[str, Any], str]:
    """Another secret; the one before it holds for `overlap` seconds more. Raises Refused."""
    async with plane.change(DOCUMENT) as connection:
        row = await _writable(connection, act, id)
        made = new_key(prefix=MANAGEMENT if row.kind == "management" else SERVICE, id=id)
        values = {
            "digest": made.digest,
            "previous_digest": row.digest if overlap else None,
            "previous_until": act.at + overlap * 1000 if overlap else None,
        }
        await connection.execute(update(tokens).where(tokens.c.id == id).values(**values))
        after = _shown(await _find(connection, act, id))
        await _record(connection, act, "rotate", after, _shown(row))
    return after, made.key


async def end(plane: Plane, act: Act, id: str, check: Check) -> None:
    """Raises Refused."""
    async with plane.change(DOCUMENT) as connection:
        row = await _find(connection, act, id)
        check(_shown(row))
        # Whoever finds a token may end that one.
        if id != act.principal.token:
            await _refuse_more(connection, act, row)
        if row.ended_at is None:
            await connection.execute(update(tokens).where(tokens.c.id == id).values(ended_at=act.at))
            await _record(connection, act, "end", _shown(await _find(connection, act, id)), _shown(row))


def tag_of(token: dict[str, Any]) -> dict[str, Any]:
    """What the ETag is made of: not what changes without anybody changing the token."""
    return {name: value for name, value in token.items() if name not in ("state", "last_used_at")}


async def _check(connection: AsyncConnection, act: Act, kind: str, fields: TokenFields) -> None:
    """Raises Invalid, Forbidden."""
    if kind == "service":
        if not act.principal.may("settings.write"):
            raise Forbidden("Service tokens need the role admin on the platform.")
        if not fields.scopes:
            raise Invalid(Problem("scopes", "must name one or more of snapshots, ingest, report, activate"))
        for name in ("organisation", "role"):
            if getattr(fields, name) is not None:
                raise Invalid(Problem(name, "is of management tokens; a service token has scopes"))
        return
    if fields.scopes:
        raise Invalid(Problem("scopes", "are of service tokens; a management token has a role"))
    maker = await people.by_name(connection, act.principal.user or "")
    if maker is None:
        raise NotFound("user", act.principal.user or "")
    problem = await _problem(connection, maker, fields.organisation, fields.role)
    if problem is not None:
        raise Invalid(problem)
    if not is_within(people.limited(maker, fields.organisation, fields.role), act.principal):
        raise Forbidden("A token makes no token that may do more than itself.")


async def _problem(
    connection: AsyncConnection, maker: Principal, organisation: str | None, role: str | None
) -> Problem | None:
    """What is wrong with the rights of a token."""
    own: str | None
    ranking: Sequence[str]
    if organisation is None:
        if role is None:
            return None
        own, ranking = maker.platform_role, PLATFORM_ROLES
        if own is None:
            return Problem("role", "needs an organisation: you have no role on the platform")
    else:
        query = select(organisations.c.name).where(
            organisations.c.name == organisation, organisations.c.ended_at.is_(None)
        )
        known = (await connection.execute(query)).first() is not None
        own = "owner" if maker.platform_role == "admin" else maker.roles.get(organisation)
        ranking = ORGANISATION_ROLES
        if own is None or not known:
            return Problem("organisation", f"{organisation!r} is not one of yours")
    if role is not None and role not in ranking:
        return Problem("role", f"must be one of {', '.join(ranking)}")
    if role is not None and ranking.index(role) < ranking.index(own):
        return Problem("role", f"must be at most yours, {own}")
    return None


def _query(now: int) -> Any:
    return select(tokens, _state(now).label("state"))


def _state(now: int) -> ColumnElement[str]:
    return case(
        (tokens.c.ended_at.is_not(None), "ended"),
        (tokens.c.expires_at <= now, "expired"),
        (tokens.c.disabled, "disabled"),
        else_="ok",
    )


def _visible(principal: Principal) -> ColumnElement[bool]:
    own = and_(tokens.c.kind == "management", tokens.c.user == principal.user)
    return or_(own, tokens.c.kind == "service" if principal.may("settings.write") else false())


async def _find(connection: AsyncConnection, act: Act, id: str) -> Row[Any]:
    query = _query(act.at).where(tokens.c.id == id, _visible(act.principal))
    row: Row[Any] | None = (await connection.execute(query)).one_or_none()
    if row is None:
        raise NotFound("token", id)
    return row


async def _writable(connection: AsyncConnection, act: Act, id: str) -> Row[Any]:
    """A token that the caller may change: none with more rights than the one that asks. Raises Refused."""
    row = await _find(connection, act, id)
    if row.ended_at is not None:
        raise Invalid(Problem("id", f"the token {id!r} has ended; make a new one"))
    await _refuse_more(connection, act, row)
    return row


async def _refuse_more(connection: AsyncConnection, act: Act, row: Row[Any]) -> None:
    """Raises Forbidden if the token of the row may do more than the one that asks."""
    if row.kind == "management":
        maker = await people.by_name(connection, row.user)
        if maker is not None and not is_within(people.limited(maker, row.organisation, row.role), act.principal):
            raise Forbidden("A token changes no token that may do more than itself.")


def _values(fields: TokenFields) -> dict[str, Any]:
    return {
        "name": fields.name,
        "scopes": None if fields.scopes is None else list(fields.scopes),
        "organisation": fields.organisation,
        "role": fields.role,
        "expires_at": fields.expires,
        "disabled": fields.disabled,
    }


def _shown(row: Row[Any]) -> dict[str, Any]:
    return {
        **{name: getattr(row, name) for name in ("id", "name", "kind", "scopes", "organisation", "role", "user")},
        "expires": shown(row.expires_at),
        "disabled": row.disabled,
        "state": row.state,
        "previous_until": shown(row.previous_until),
        "created_at": shown(row.created_at),
        "created_by": row.created_by,
        "last_used_at": shown(row.last_used_at),
    }


async def _record(
    connection: AsyncConnection, act: Act, verb: str, token: dict[str, Any], before: dict[str, Any] | None
) -> None:
    names = [name for name in token if before is None or before[name] != token[name]]
    was = None if before is None else {name: before[name] for name in names}
    what = audit.Object("token", token["id"], token["organisation"])
    await audit.record(connection, act, f"token.{verb}", what, was, {name: token[name] for name in names})
