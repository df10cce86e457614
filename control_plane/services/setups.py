"""One-time URLs: for the first admin, and for users who choose their password. They hold for a day."""

import secrets
from typing import Any, NamedTuple

from sqlalchemy import Row, and_, delete, exists, insert, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection

from control_plane.data.database import serialise
from control_plane.data.tables import setups, users
from control_plane.errors import Invalid, NotFound, Problem
from control_plane.plane import Act, Plane
from control_plane.pure.names import problem_of_email, problem_of_name
from control_plane.pure.passwords import weakness
from control_plane.services import audit
from control_plane.services.accounts import set_password
from control_plane.services.sessions import digest

# Milliseconds
LIFETIME = 86_400_000
_PURPOSE = "password"
_IS_ADMIN = and_(users.c.platform_role == "admin", users.c.ended_at.is_(None), users.c.disabled.is_(False))


class Choice(NamedTuple):
    """What somebody enters. `name` and `email`: of the first admin only; others have theirs."""

    name: str
    email: str
    password: str
    confirmation: str


def url(plane: Plane, secret: str) -> str:
    return f"{plane.settings.public}/console/setup?token={secret}"


async def has_admin(connection: AsyncConnection) -> bool:
    found: bool = (await connection.execute(select(exists().where(_IS_ADMIN)))).scalar_one()
    return found


async def alone(connection: AsyncConnection) -> None:
    """Nobody else makes the first admin until the transaction ends: each URL, and each replica, could."""
    await serialise(connection, "first admin")


async def make(connection: AsyncConnection, user: str | None, now: int) -> str:
    """A secret with which a user chooses a password, and earlier ones no longer hold; None: the first admin."""
    secret = secrets.token_urlsafe(32)
    if user is not None:
        await connection.execute(delete(setups).where(setups.c.user == user, setups.c.purpose == _PURPOSE))
    row = {"digest": digest(secret), "user": user, "created_at": now, "expires_at": now + LIFETIME}
    await connection.execute(insert(setups).values(purpose=_PURPOSE, **row))
    return secret


async def find(plane: Plane, secret: str) -> Row[Any]:
    """The row, with name and e-mail of its user. Raises NotFound: used, too old, or never made."""
    query = (
        select(setups, users.c.name, users.c.email, users.c.title)
        .join_from(setups, users, users.c.name == setups.c.user, isouter=True)
        .where(setups.c.digest == digest(secret), _holds(plane.clock()))
    )
    async with plane.database.main.read() as connection:
        row = (await connection.execute(query)).one_or_none()
    if row is None:
        raise NotFound("one-time URL", "")
    return row


async def finish(plane: Plane, act: Act, secret: str, choice: Choice) -> None:
    """Use it up. Raises NotFound, Invalid."""
    row = await find(plane, secret)
    first = row.user is None
    name, email = (choice.name.strip(), choice.email.strip().lower()) if first else (row.name, row.email)
    _check(choice, first, name, email, row.title)
    hashed = await plane.passwords.hash(choice.password)
    try:
        async with plane.database.main.write() as connection:
            if first:
                await alone(connection)
            # One statement: of two at the same moment one gets it.
            claimed = await connection.execute(
                update(setups)
                .where(setups.c.digest == digest(secret), _holds(act.at))
                .values(used_at=act.at)
                .returning(setups.c.digest)
            )
            if claimed.one_or_none() is None:
                raise NotFound("one-time URL", "")
            if first:
                values = {"name": name, "email": email, "platform_role": "admin", "created_at": act.at}
                await connection.execute(insert(users).values(**values, disabled=False))
            await set_password(connection, name, hashed)
            act = act._replace(principal=act.principal._replace(user=name))
            verb, after = ("create", {"platform_role": "admin"}) if first else ("update", {"password": "changed"})
            await audit.record(connection, act, f"user.{verb}", audit.Object("user", name), after=after)
    except IntegrityError:
        raise Invalid(Problem("name", "name or e-mail is taken; choose another")) from None


def _holds(now: int) -> Any:
    """The first admin's no longer do once there is one: nobody becomes admin by an old log."""
    no_admin = ~exists().where(_IS_ADMIN).correlate(None)
    of_user = (
        exists()
        .where(users.c.name == setups.c.user, users.c.ended_at.is_(None), users.c.disabled.is_(False))
        .correlate(setups)
    )
    return and_(
        setups.c.purpose == _PURPOSE,
        setups.c.used_at.is_(None),
        setups.c.expires_at > now,
        (setups.c.user.is_(None) & no_admin) | (setups.c.user.is_not(None) & of_user),
    )


def _check(choice: Choice, first: bool, name: str, email: str | None, title: str | None) -> None:
    found = [
        ("name", problem_of_name(name) if first else None),
        ("email", problem_of_email(email or "") if first else None),
        ("password", weakness(choice.password, name, email, title)),
        ("password_confirm", None if choice.password == choice.confirmation else "is not the same password"),
    ]
    problems = [Problem(param, problem) for param, problem in found if problem is not None]
    if problems:
        raise Invalid(*problems)
