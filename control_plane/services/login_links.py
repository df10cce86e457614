"""One-time URLs that log a user in, for a quarter of an hour. Only who has the database makes one, by a command.

They need no password, so that they are the way in where no provider answers, and in demos.
"""

import secrets
from typing import Any, NamedTuple

from sqlalchemy import ColumnElement, Select, delete, insert, select, update

from control_plane.data.tables import setups, users
from control_plane.errors import NotFound
from control_plane.plane import Act, Plane
from control_plane.services import audit, people, sessions
from control_plane.services.sessions import digest

# Milliseconds
LIFETIME = 15 * 60_000
_PURPOSE = "login"


class Guest(NamedTuple):
    """Whom a URL logs in."""

    name: str
    title: str | None


async def make(plane: Plane, act: Act, user: str) -> str:
    """The URL; earlier ones of the user no longer hold. Raises NotFound: no such user, or one who may not log in."""
    secret = secrets.token_urlsafe(32)
    async with plane.database.main.write() as connection:
        if await people.by_name(connection, user) is None:
            raise NotFound("user who may log in", user)
        await connection.execute(delete(setups).where(setups.c.user == user, setups.c.purpose == _PURPOSE))
        row = {"digest": digest(secret), "user": user, "created_at": act.at, "expires_at": act.at + LIFETIME}
        await connection.execute(insert(setups).values(purpose=_PURPOSE, **row))
        await audit.record(connection, act, "login_link.create", audit.Object("user", user))
    return f"{plane.settings.public}/console/login?token={secret}"


async def find(plane: Plane, secret: str) -> Guest:
    """Look whom it logs in, and leave it as it is. Raises NotFound: used, too old, or never made."""
    async with plane.database.main.read() as connection:
        row = (await connection.execute(_user(secret, plane.clock()))).one_or_none()
    if row is None:
        raise NotFound("one-time URL", "")
    return Guest(row.name, row.title)


async def log_in(plane: Plane, act: Act, secret: str, agent: str | None, replaces: str | None = None) -> sessions.Begun:
    """Use it up, and begin a session. Raises NotFound."""
    async with plane.database.main.write() as connection:
        # Locked first, as by who disables the user: no session begins after that.
        user: str | None = (
            await connection.execute(_user(secret, act.at).with_for_update(of=users))
        ).scalar_one_or_none()
        # One statement: of two at the same moment one gets it.
        claimed = await connection.execute(update(setups).where(_holds(secret, act.at)).values(used_at=act.at))
        if user is None or claimed.rowcount == 0:
            raise NotFound("one-time URL", "")
        await connection.execute(update(users).where(users.c.name == user).values(last_login_at=act.at))
        act = act._replace(principal=act.principal._replace(user=user))
        await audit.record(connection, act, "login_link.use", audit.Object("user", user))
        return await sessions.begin(connection, act, user, agent, replaces)


def _user(secret: str, now: int) -> Select[Any]:
    return (
        select(users.c.name, users.c.title)
        .join_from(setups, users, users.c.name == setups.c.user)
        .where(_holds(secret, now), users.c.ended_at.is_(None), users.c.disabled.is_(False))
    )


def _holds(secret: str, now: int) -> ColumnElement[bool]:
    found: Any = (
        (setups.c.digest == digest(secret))
        & (setups.c.purpose == _PURPOSE)
        & setups.c.used_at.is_(None)
        & (setups.c.expires_at > now)
    )
    return found  # type: ignore[no-any-return]
