"""Sessions of people: 32 random bytes in a cookie, their digest in the database, where each request looks for it.

A session ends by its idleness, by its age, by its user or by an admin. It gets another secret when the rights of its
user have changed.
"""

import hashlib
import secrets
from collections.abc import Collection
from contextlib import suppress
from typing import Any, NamedTuple

import orjson
from sqlalchemy import Row, delete, insert, or_, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from control_plane.data.tables import sessions
from control_plane.errors import StorageUnavailable
from control_plane.plane import Act, Plane
from control_plane.pure.ids import new_id
from control_plane.pure.roles import Principal
from control_plane.services import audit, people

# Milliseconds
IDLE = 8 * 3_600_000
LONGEST, LONGEST_OF_ADMINS = 7 * 86_400_000, 24 * 3_600_000
_SEEN = 60_000
# How long the secret before the present one holds, for requests that were under way
_OVERLAP = 10_000


class Found(NamedTuple):
    """`renewed`: the secret that the browser must have from now on, if it is another one."""

    principal: Principal
    renewed: str | None = None


class Begun(NamedTuple):
    """A session of this user, and the secret of its cookie."""

    principal: Principal
    secret: str


def digest(secret: str) -> str:
    return hashlib.sha256(secret.encode("latin-1", "replace")).hexdigest()


async def find(plane: Plane, secret: str) -> Found | None:
    """Whose session it is; None: of nobody, or it has ended, or its user may no longer log in."""
    given, now = digest(secret), plane.clock()
    async with plane.database.main.read() as connection:
        earlier = (sessions.c.previous_digest == given) & (sessions.c.previous_until > now)
        row = (await connection.execute(select(sessions).where(or_(sessions.c.digest == given, earlier)))).one_or_none()
        if row is None or row.expires_at <= now or row.seen_at + IDLE <= now:
            return None
        principal = await people.by_name(connection, row.user)
    if principal is None:
        return None
    principal = principal._replace(session=row.id)
    if row.digest == given and row.rights != _rights(principal):
        return await _renewed(plane, row, principal, now)
    if now - row.seen_at >= _SEEN:
        # A disk that is full stops changes, not what can be read.
        with suppress(StorageUnavailable):
            async with plane.database.main.write() as connection:
                await connection.execute(update(sessions).where(sessions.c.id == row.id).values(seen_at=now))
    return Found(principal)


async def begin(
    connection: AsyncConnection, act: Act, user: str, agent: str | None, replaces: str | None = None
) -> Begun:
    """Make a session, and end the one that the browser has: no secret is known from before a login.

    `replaces`: the secret in the browser's cookie.
    """
    principal = await people.by_name(connection, user)
    assert principal is not None, "who logs in is neither disabled nor ended"
    if replaces is not None:
        await connection.execute(delete(sessions).where(sessions.c.digest == digest(replaces)))
    secret, id = secrets.token_urlsafe(32), new_id("ses", act.at)
    await connection.execute(
        insert(sessions).values(
            digest=digest(secret),
            rights=_rights(principal),
            id=id,
            user=user,
            created_at=act.at,
            seen_at=act.at,
            expires_at=act.at + _longest(principal),
            address=act.address,
            agent=agent and agent[:256],
        )
    )
    principal = principal._replace(session=id)
    await audit.record(connection, act._replace(principal=principal), "session.login", audit.Object("session", id))
    return Begun(principal, secret)


async def end(connection: AsyncConnection, act: Act, *conditions: Any) -> Collection[str]:
    """End the sessions that meet the conditions; returns their ids."""
    query = delete(sessions).where(*conditions).returning(sessions.c.id)
    ended = [row.id for row in await connection.execute(query)]
    for id in ended:
        await audit.record(connection, act, "session.end", audit.Object("session", id))
    return ended


async def end_others(connection: AsyncConnection, act: Act, user: str) -> None:
    """End the sessions of a user, but the one that acts."""
    conditions = [sessions.c.user == user]
    if act.principal.session is not None:
        conditions.append(sessions.c.id != act.principal.session)
    await end(connection, act, *conditions)


async def renew(connection: AsyncConnection, principal: Principal) -> str | None:
    """Give the session that acts another secret at once; None: no session acts."""
    if principal.session is None:
        return None
    secret = secrets.token_urlsafe(32)
    await connection.execute(
        update(sessions)
        .where(sessions.c.id == principal.session)
        .values(digest=digest(secret), previous_digest=None, previous_until=None, rights=_rights(principal))
    )
    return secret


async def _renewed(plane: Plane, row: Row[Any], principal: Principal, now: int) -> Found | None:
    """The rights have changed: one of the requests under way gets another secret, and the others still pass."""
    secret = secrets.token_urlsafe(32)
    expires_at = min(row.expires_at, row.created_at + _longest(principal))
    if expires_at <= now:
        return None
    async with plane.database.main.write() as connection:
        changed = await connection.execute(
            update(sessions)
            .where(sessions.c.digest == row.digest)
            .values(
                digest=digest(secret),
                previous_digest=row.digest,
                previous_until=now + _OVERLAP,
                rights=_rights(principal),
                expires_at=expires_at,
                seen_at=now,
            )
        )
    return Found(principal, secret if changed.rowcount else None)


def _rights(principal: Principal) -> str:
    rights = [principal.platform_role, sorted(principal.roles.items())]
    return hashlib.sha256(orjson.dumps(rights)).hexdigest()


def _longest(principal: Principal) -> int:
    return LONGEST_OF_ADMINS if principal.platform_role == "admin" else LONGEST
