"""Who people are: the rights of a user, and of a management token that acts for one."""

from contextlib import suppress

from sqlalchemy import select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from control_plane.data.tables import memberships, organisations, tokens, users
from control_plane.errors import StorageUnavailable
from control_plane.plane import Plane
from control_plane.pure.roles import ORGANISATION_ROLES, PLATFORM_ROLES, Principal, lower
from control_plane.services.tokens import is_management
from inference_api.policy.keys import sha256

# Milliseconds between two notes of the last use of a token
_USED = 60_000


async def by_token(plane: Plane, given: str) -> Principal | None:
    """Whose management token it is; None: of nobody, or it no longer holds."""
    if not is_management(given):
        return None
    digest, now = f"sha256:{sha256(given.encode()).hex()}", plane.clock()
    async with plane.database.main.read() as connection:
        query = select(tokens).where(
            (tokens.c.digest == digest) | ((tokens.c.previous_digest == digest) & (tokens.c.previous_until > now)),
            tokens.c.kind == "management",
            tokens.c.ended_at.is_(None),
            tokens.c.disabled.is_(False),
        )
        row = (await connection.execute(query)).one_or_none()
        if row is None or (row.expires_at is not None and row.expires_at <= now):
            return None
        maker = await by_name(connection, row.user)
    if maker is None:
        return None
    if row.last_used_at is None or now - row.last_used_at >= _USED:
        # A disk that is full stops changes, not what can be read.
        with suppress(StorageUnavailable):
            async with plane.database.main.write() as connection:
                await connection.execute(update(tokens).where(tokens.c.id == row.id).values(last_used_at=now))
    return limited(maker, row.organisation, row.role)._replace(kind="token", token=row.id)


async def by_name(connection: AsyncConnection, name: str) -> Principal | None:
    """A user with the present rights; None if there is none, disabled or ended ones included."""
    query = select(users.c.name, users.c.platform_role).where(
        users.c.name == name, users.c.ended_at.is_(None), users.c.disabled.is_(False)
    )
    row = (await connection.execute(query)).one_or_none()
    if row is None:
        return None
    query = (
        select(memberships.c.organisation, memberships.c.role)
        .join(organisations, organisations.c.name == memberships.c.organisation)
        .where(memberships.c.user == name, organisations.c.ended_at.is_(None))
    )
    found = await connection.execute(query)
    return Principal("user", name, row.platform_role, {row.organisation: row.role for row in found})


def limited(maker: Principal, organisation: str | None, role: str | None) -> Principal:
    """The rights of a token, at most those of its maker now.

    With an organisation: a role there alone. With a role only: that one on the platform alone. With neither: all.
    """
    if organisation is None:
        if role is None:
            return maker
        own = maker.platform_role
        return maker._replace(platform_role=own and lower(PLATFORM_ROLES, own, role), roles={})
    own = "owner" if maker.platform_role == "admin" else maker.roles.get(organisation)
    roles = {} if own is None else {organisation: lower(ORGANISATION_ROLES, own, role or own)}
    return maker._replace(platform_role=None, roles=roles)
