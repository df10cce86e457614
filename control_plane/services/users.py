"""Users as admins of the platform see them: made, changed, ended."""

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

from sqlalchemy import Row, delete, insert, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection

from control_plane.data.tables import memberships, organisations, sessions, setups, tokens, users
from control_plane.errors import Refused
from control_plane.plane import Act, Plane
from control_plane.pure.times import shown
from control_plane.services import audit
from control_plane.services import setups as urls
from control_plane.services.accounts import read
from control_plane.services.sessions import end

# What is changed; the e-mail address is a person's, and the audit log is for ever.
FIELDS = ("email", "title", "platform_role", "disabled")
# Makes the new fields of a user as it is now, or raises to refuse; or only looks at it
Decide = Callable[[dict[str, Any]], dict[str, Any]]
Check = Callable[[dict[str, Any]], None]
_AUDITED = ("title", "platform_role", "disabled")


async def page_of(plane: Plane, limit: int, after: str | None) -> list[dict[str, Any]]:
    """Users who are not ended, by name; one more than `limit`."""
    query = select(users).where(users.c.ended_at.is_(None))
    if after is not None:
        query = query.where(users.c.name > after)
    async with plane.database.main.read() as connection:
        rows = list(await connection.execute(query.order_by(users.c.name).limit(limit + 1)))
        return await _shown(connection, rows)


async def one(plane: Plane, name: str) -> dict[str, Any]:
    """Raises NotFound."""
    async with plane.database.main.read() as connection:
        return await _one(connection, name)


async def create(
    plane: Plane, act: Act, name: str, email: str, title: str | None, platform_role: str | None
) -> tuple[dict[str, Any], str | None]:
    """A user, and the one-time URL for the password. Raises Refused."""
    values = {"name": name, "email": email, "title": title, "platform_role": platform_role, "disabled": False}
    try:
        async with plane.database.main.write() as connection:
            if (await connection.execute(select(users.c.name).where(users.c.name == name))).first() is not None:
                raise Refused(
                    409, "name_taken", f"The name {name!r} is taken; names are never used again.", param="name"
                )
            await connection.execute(insert(users).values(**values, created_at=act.at, created_by=act.principal.user))
            after = {field: values[field] for field in _AUDITED}
            await audit.record(connection, act, "user.create", audit.Object("user", name), after=after)
            return await _one(connection, name), await _setup_url(plane, connection, name, act.at)
    except IntegrityError:
        raise _email_taken() from None


async def change(plane: Plane, act: Act, name: str, decide: Decide) -> dict[str, Any]:
    """Write the fields that `decide` makes of the present ones. Raises NotFound, Refused."""
    try:
        async with plane.database.main.write() as connection, keeping_an_admin(connection):
            before = await _one(connection, name, locked=True)
            after = decide(before)
            values = {field: after[field] for field in FIELDS if after[field] != before[field]}
            if values:
                await _write(connection, act, name, before, values)
            return await _one(connection, name)
    except IntegrityError:
        raise _email_taken() from None


async def _write(
    connection: AsyncConnection, act: Act, name: str, before: dict[str, Any], values: dict[str, Any]
) -> None:
    await connection.execute(update(users).where(users.c.name == name).values(**values))
    if values.get("disabled"):
        await end(connection, act, sessions.c.user == name)
        await connection.execute(delete(setups).where(setups.c.user == name))
    old = {field: before[field] for field in _AUDITED if field in values}
    new = {field: values[field] for field in _AUDITED if field in values}
    if "email" in values:
        new["email"] = "changed"
    await audit.record(connection, act, "user.update", audit.Object("user", name), old, new)


async def end_user(plane: Plane, act: Act, name: str, check: Check) -> None:
    """End a user: no login, token or role is left, and the name is never used again. Raises NotFound, Refused."""
    # Not the subject at an OpenID provider: the next login there would make a new user.
    erased = dict.fromkeys(("email", "title", "password_hash", "platform_role"))
    async with plane.database.main.write() as connection, keeping_an_admin(connection):
        check(await _one(connection, name, locked=True))
        await connection.execute(update(users).where(users.c.name == name).values(**erased, ended_at=act.at))
        await end(connection, act, sessions.c.user == name)
        await connection.execute(delete(setups).where(setups.c.user == name))
        await connection.execute(delete(memberships).where(memberships.c.user == name))
        await connection.execute(
            update(tokens).where(tokens.c.user == name, tokens.c.ended_at.is_(None)).values(ended_at=act.at)
        )
        await audit.record(connection, act, "user.end", audit.Object("user", name))


async def end_sessions(plane: Plane, act: Act, name: str) -> None:
    """Raises NotFound."""
    async with plane.database.main.write() as connection:
        await read(connection, name)
        await end(connection, act, sessions.c.user == name)


async def set_up_again(plane: Plane, act: Act, name: str) -> str | None:
    """Another one-time URL, for who has lost the password. Raises NotFound."""
    async with plane.database.main.write() as connection:
        await read(connection, name)
        what = audit.Object("user", name)
        await audit.record(connection, act, "user.update", what, after={"password": "one-time URL made"})
        return await _setup_url(plane, connection, name, act.at)


@asynccontextmanager
async def keeping_an_admin(connection: AsyncConnection) -> AsyncIterator[None]:
    """Raises Refused if the block leaves the platform without an admin.

    It begins with a lock of all admins, in one order: two who take the role from each other wait for each other.
    """
    admins = select(users.c.name).where(
        users.c.platform_role == "admin", users.c.ended_at.is_(None), users.c.disabled.is_(False)
    )
    before = (await connection.execute(admins.order_by(users.c.name).with_for_update())).all()
    yield
    if before and (await connection.execute(admins)).first() is None:
        message = "That is the last admin of the platform. Make another one first."
        raise Refused(409, "last_admin", message)


async def _setup_url(plane: Plane, connection: AsyncConnection, name: str, now: int) -> str | None:
    """None where nobody has a password."""
    if plane.settings.password_login == "off":
        return None
    return urls.url(plane, await urls.make(connection, name, now))


async def _one(connection: AsyncConnection, name: str, locked: bool = False) -> dict[str, Any]:
    return (await _shown(connection, [await read(connection, name, locked)]))[0]


async def _shown(connection: AsyncConnection, rows: Sequence[Row[Any]]) -> list[dict[str, Any]]:
    query = (
        select(memberships)
        .join(organisations, organisations.c.name == memberships.c.organisation)
        .where(memberships.c.user.in_([row.name for row in rows]), organisations.c.ended_at.is_(None))
        .order_by(memberships.c.organisation)
    )
    roles: dict[str, list[dict[str, str]]] = {row.name: [] for row in rows}
    for member in await connection.execute(query):
        roles[member.user].append({"organisation": member.organisation, "role": member.role})
    return [
        {
            **{field: getattr(row, field) for field in ("name", *FIELDS)},
            "memberships": roles[row.name],
            "created_at": shown(row.created_at),
            "created_by": row.created_by,
            "last_login_at": shown(row.last_login_at),
        }
        for row in rows
    ]


def _email_taken() -> Refused:
    return Refused(409, "name_taken", "Another user has this e-mail address.", param="email")
