"""The first platform admin: by a password in a file, a one-time URL in the log, or a command. Never by being first."""

import logging
from pathlib import Path

from sqlalchemy import insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from control_plane.data.tables import users
from control_plane.plane import Act, Plane
from control_plane.pure.names import name_from, problem_of_email, problem_of_name
from control_plane.pure.passwords import weakness
from control_plane.pure.roles import SYSTEM
from control_plane.services import audit, sessions, setups
from control_plane.services.accounts import set_password

log = logging.getLogger(__name__)


class BootstrapError(Exception):
    """The admin cannot be made as asked; the message is one sentence with the fix."""


async def prepare(plane: Plane) -> str | None:
    """At the start: make the admin that the settings name, if there is none. Returns a URL for one, if there must be.

    Raises BootstrapError.
    """
    settings = plane.settings
    async with plane.database.main.read() as connection:
        if await setups.has_admin(connection):
            return None
    if settings.admin_email is not None and settings.admin_password_file is not None:
        password = read_password(settings.admin_password_file)
        await make_admin(plane, settings.admin_email, None, password, only_first=True)
        return None
    if settings.password_login == "off":
        log.warning("there is no admin, and passwords are off: OIDC_ROLES must give a group the role admin")
        return None
    async with plane.database.main.write() as connection:
        return setups.url(plane, await setups.make(connection, None, plane.clock()))


async def make_admin(
    plane: Plane, email: str, name: str | None, password: str | None, reset: bool = False, only_first: bool = False
) -> str | None:
    """Make an admin with this e-mail address; returns a one-time URL if there is no password.

    `reset`: another password for an admin, whose sessions end. Raises BootstrapError.
    """
    email = email.strip().lower()
    name = name or name_from(email, "admin")
    if (problem := problem_of_email(email) or problem_of_name(name)) is not None:
        raise BootstrapError(f"the e-mail address or name {problem}")
    if password is not None and (problem := weakness(password, name, email)) is not None:
        raise BootstrapError(f"the password {problem}")
    hashed = None if password is None else await plane.passwords.hash(password)
    act = Act(SYSTEM, plane.clock())
    async with plane.database.main.write() as connection:
        if only_first:
            await setups.alone(connection)
            if await setups.has_admin(connection):
                return None
        user = await _admin(connection, act, email, name, reset)
        if hashed is None:
            secret = await setups.make(connection, user, act.at)
            return setups.url(plane, secret)
        await set_password(connection, user, hashed)
        await sessions.end_others(connection, act, user)
    return None


async def _admin(connection: AsyncConnection, act: Act, email: str, name: str, reset: bool) -> str:
    """The name of the user with this address, who is admin from now on."""
    row = (await connection.execute(select(users).where(users.c.email == email))).one_or_none()
    if reset:
        if row is None or row.platform_role != "admin" or row.ended_at is not None:
            raise BootstrapError(f"there is no admin with the e-mail address {email!r}; leave out --reset to make one")
        await connection.execute(update(users).where(users.c.name == row.name).values(disabled=False))
        what = audit.Object("user", row.name)
        await audit.record(connection, act, "user.update", what, after={"password": "reset", "disabled": False})
        return str(row.name)
    if row is not None and row.platform_role == "admin":
        raise BootstrapError(f"{row.name!r} is an admin with this e-mail address; --reset gives another password")
    after = {"platform_role": "admin"}
    if row is not None:
        await connection.execute(update(users).where(users.c.name == row.name).values(**after, disabled=False))
        before = {"platform_role": row.platform_role}
        await audit.record(connection, act, "user.update", audit.Object("user", row.name), before, after)
        return str(row.name)
    if (await connection.execute(select(users.c.name).where(users.c.name == name))).one_or_none() is not None:
        raise BootstrapError(f"the name {name!r} is taken; choose another with --name")
    values = {"name": name, "email": email, "disabled": False, "created_at": act.at}
    await connection.execute(insert(users).values(**values, **after))
    await audit.record(connection, act, "user.create", audit.Object("user", name), after=after)
    return name


def read_password(path: Path) -> str:
    """The first line of a file. Raises BootstrapError."""
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as exc:
        raise BootstrapError(f"the password file {str(path)!r} cannot be read: {exc}") from None
    return lines[0] if lines else ""
