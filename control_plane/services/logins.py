"""Logins by password: throttled by account and by address, the same answer for whatever is wrong.

Each try is a row before its password is looked at, and goes if that is right: tries at the same moment, here and in
other replicas, are counted.
"""

import hashlib
import math
from ipaddress import ip_address
from typing import Any, NamedTuple

from sqlalchemy import delete, func, insert, select, update

from control_plane.data.database import serialise
from control_plane.data.tables import login_failures, users
from control_plane.errors import Forbidden, Refused
from control_plane.plane import Act, Plane
from control_plane.services import audit, sessions

# Milliseconds
WINDOW = 15 * 60_000
_FREE = 5
_LONGEST_WAIT = 60


class InvalidLogin(Refused):
    """Of an unknown user, a wrong password and a disabled user: all look alike."""

    def __init__(self) -> None:
        super().__init__(401, "invalid_login", "E-mail or password is wrong.")


class TooManyAttempts(Refused):
    def __init__(self, seconds: int) -> None:
        message = f"Too many attempts to log in. Try again in {seconds} s."
        super().__init__(429, "too_many_attempts", message, headers={"Retry-After": str(seconds)})
        self.seconds = seconds


class _Try(NamedTuple):
    """A try that counts as failed until it is taken back."""

    id: int
    account: str


async def log_in(
    plane: Plane, act: Act, email: str, password: str, agent: str | None, replaces: str | None = None
) -> sessions.Begun:
    """Begin a session. Raises InvalidLogin, TooManyAttempts, Forbidden."""
    if plane.settings.password_login == "off":
        raise Forbidden("Logins by password are off; log in by OpenID.")
    email = email.strip().lower()
    made = await _begin_try(plane, act, email)
    async with plane.database.main.read() as connection:
        row = (await connection.execute(select(users).where(users.c.email == email))).one_or_none()
    right = await plane.passwords.verify(None if row is None else row.password_hash, password)
    if row is None or not right or row.disabled or row.ended_at is not None:
        await _note_failure(plane, act, made, None if row is None else row.name)
        raise InvalidLogin
    values: dict[str, Any] = {"last_login_at": act.at}
    if plane.passwords.is_outdated(row.password_hash):
        values["password_hash"] = await plane.passwords.hash(password)
    async with plane.database.main.write() as connection:
        # The user may have been disabled, or got another password, since.
        changed = await connection.execute(
            update(users)
            .where(
                users.c.name == row.name,
                users.c.password_hash == row.password_hash,
                users.c.disabled.is_(False),
                users.c.ended_at.is_(None),
            )
            .values(**values)
        )
        if changed.rowcount == 0:
            raise InvalidLogin
        await connection.execute(delete(login_failures).where(login_failures.c.id == made.id))
        return await sessions.begin(connection, act, row.name, agent, replaces)


async def confirm(plane: Plane, act: Act, email: str | None, stored: str | None, password: str) -> bool:
    """Whether it is the password of who acts, with the same throttle as a login. Raises TooManyAttempts."""
    made = await _begin_try(plane, act, email or f"user {act.principal.user}")
    if not await plane.passwords.verify(stored, password):
        return False
    async with plane.database.main.write() as connection:
        await connection.execute(delete(login_failures).where(login_failures.c.id == made.id))
    return True


async def _begin_try(plane: Plane, act: Act, email: str) -> _Try:
    account, address = hashlib.sha256(email.encode("utf-8", "replace")).hexdigest(), network(act.address)
    async with plane.database.main.write() as connection:
        # Nobody else counts the same until then.
        await serialise(connection, f"login {account}", f"login {address}")
        for column, value in ((login_failures.c.account, account), (login_failures.c.address, address)):
            query = select(func.count(), func.max(login_failures.c.at)).where(
                column == value, login_failures.c.at > act.at - WINDOW
            )
            count, last = (await connection.execute(query)).one()
            if (seconds := wait(count, last, act.at)) > 0:
                raise TooManyAttempts(seconds)
        made = insert(login_failures).values(account=account, address=address, at=act.at)
        id: int = (await connection.execute(made.returning(login_failures.c.id))).scalar_one()
    return _Try(id, account)


def wait(failures: int, last: int | None, now: int) -> int:
    """Seconds until the next try: none for the first ones, then 1, 2, 4 ... 60 after the last failure."""
    if last is None or failures < _FREE:
        return 0
    pause: int = min(_LONGEST_WAIT, 1 << min(failures - _FREE, 10))
    left: int = math.ceil((last + pause * 1000 - now) / 1000)
    return min(pause, left)


def network(address: str | None) -> str:
    """What is counted as one address: of IPv6 the /64, in which everybody has as many as they like."""
    try:
        found = ip_address((address or "").partition("%")[0])
    except ValueError:
        return (address or "")[:64]
    if found.version == 6:
        mapped = found.ipv4_mapped
        return str(mapped) if mapped else str(ip_address(int(found) >> 64 << 64))
    return str(found)


async def _note_failure(plane: Plane, act: Act, made: _Try, user: str | None) -> None:
    after = {"account": made.account[:16]}
    act = act._replace(principal=act.principal._replace(user=user))
    async with plane.database.main.write() as connection:
        await audit.record(connection, act, "session.login_failed", audit.Object("session", None), after=after)
