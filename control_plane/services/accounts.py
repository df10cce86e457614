"""What people see and change of themselves: their name and rights, password, sessions."""

from typing import Any

from sqlalchemy import Row, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from control_plane.data.tables import memberships, organisations, sessions, setups, users
from control_plane.errors import Forbidden, Invalid, NotFound, Problem
from control_plane.plane import Act, Plane
from control_plane.pure.passwords import weakness
from control_plane.pure.roles import is_within
from control_plane.services import audit, logins, people
from control_plane.services.sessions import IDLE, end, end_others, renew


async def read(connection: AsyncConnection, name: str, locked: bool = False) -> Row[Any]:
    """A user who is not ended. Raises NotFound."""
    query = select(users).where(users.c.name == name, users.c.ended_at.is_(None))
    row = (await connection.execute(query.with_for_update() if locked else query)).one_or_none()
    if row is None:
        raise NotFound("user", name)
    return row


async def roles(connection: AsyncConnection, name: str) -> list[dict[str, str]]:
    """The roles of a user in organisations that are not ended."""
    query = (
        select(memberships.c.organisation, memberships.c.role)
        .join(organisations, organisations.c.name == memberships.c.organisation)
        .where(memberships.c.user == name, organisations.c.ended_at.is_(None))
        .order_by(memberships.c.organisation)
    )
    return [{"organisation": row.organisation, "role": row.role} for row in await connection.execute(query)]


async def me(plane: Plane, act: Act) -> dict[str, Any]:
    """Who acts, with the rights of now: those of a token may be fewer than its maker's."""
    principal = act.principal
    async with plane.database.main.read() as connection:
        row = await read(connection, principal.user or "")
    return {
        "name": row.name,
        "email": row.email,
        "title": row.title,
        "platform_role": principal.platform_role,
        "memberships": [
            {"organisation": organisation, "role": role} for organisation, role in sorted(principal.roles.items())
        ],
    }


async def retitle(plane: Plane, act: Act, title: str | None) -> None:
    user = act.principal.user or ""
    async with plane.database.main.write() as connection:
        row = await read(connection, user)
        await connection.execute(update(users).where(users.c.name == user).values(title=title))
        before, after = {"title": row.title}, {"title": title}
        await audit.record(connection, act, "user.update", audit.Object("user", user), before, after)


async def change_password(plane: Plane, act: Act, current: str, new: str) -> str | None:
    """Set another password and end all other sessions; returns the new secret of this one. Raises Refused."""
    user = act.principal.user or ""
    async with plane.database.main.read() as connection:
        row = await read(connection, user)
    if not await logins.confirm(plane, act, row.email, row.password_hash, current):
        raise Invalid(Problem("password.current", "is not your password"))
    problem = weakness(new, row.name, row.email, row.title)
    if problem is not None:
        raise Invalid(Problem("password.new", problem))
    hashed = await plane.passwords.hash(new)
    async with plane.database.main.write() as connection:
        await set_password(connection, user, hashed)
        await audit.record(connection, act, "user.update", audit.Object("user", user), after={"password": "changed"})
        await end_others(connection, act, user)
        return await renew(connection, act.principal)


async def set_password(connection: AsyncConnection, user: str, hashed: str) -> None:
    """One-time URLs of the user no longer hold."""
    await connection.execute(update(users).where(users.c.name == user).values(password_hash=hashed))
    await connection.execute(setups.delete().where(setups.c.user == user))


async def list_sessions(plane: Plane, user: str, limit: int, after: str | None = None) -> list[Row[Any]]:
    """The sessions of a user that have not ended, the newest first; one more than `limit`."""
    now = plane.clock()
    query = select(sessions).where(
        sessions.c.user == user, sessions.c.expires_at > now, sessions.c.seen_at > now - IDLE
    )
    if after is not None:
        query = query.where(sessions.c.id < after)
    async with plane.database.main.read() as connection:
        return list(await connection.execute(query.order_by(sessions.c.id.desc()).limit(limit + 1)))


async def read_session(plane: Plane, user: str, id: str) -> Row[Any]:
    """Raises NotFound."""
    now = plane.clock()
    query = select(sessions).where(
        sessions.c.user == user, sessions.c.id == id, sessions.c.expires_at > now, sessions.c.seen_at > now - IDLE
    )
    async with plane.database.main.read() as connection:
        row = (await connection.execute(query)).one_or_none()
    if row is None:
        raise NotFound("session", id)
    return row


async def end_session(plane: Plane, act: Act, id: str) -> None:
    """End one of the own sessions. Raises NotFound."""
    async with plane.database.main.write() as connection:
        await _refuse_limited(connection, act)
        if not await end(connection, act, sessions.c.user == act.principal.user, sessions.c.id == id):
            raise NotFound("session", id)


async def end_other_sessions(plane: Plane, act: Act) -> None:
    async with plane.database.main.write() as connection:
        await _refuse_limited(connection, act)
        await end_others(connection, act, act.principal.user or "")


async def _refuse_limited(connection: AsyncConnection, act: Act) -> None:
    """Raises Forbidden for a token with fewer rights than the sessions of its maker have."""
    maker = await people.by_name(connection, act.principal.user or "")
    if act.principal.kind == "token" and maker is not None and not is_within(maker, act.principal):
        raise Forbidden("A token ends no session that may do more than itself.")
