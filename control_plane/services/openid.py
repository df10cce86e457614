"""Logins by an OpenID provider: the code flow with PKCE, for the browser that began it, once.

Users are known by issuer and subject, never by an e-mail address. A new one may do nothing, whoever is first: roles on
the platform come from groups, those in organisations from their owners.
"""

import base64
import hashlib
import hmac
import secrets
from collections.abc import Mapping
from typing import Any, NamedTuple

from sqlalchemy import Row, delete, insert, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection

from control_plane.clients.openid import OpenIdError, Provider
from control_plane.data.tables import login_states, users
from control_plane.plane import Act, Plane
from control_plane.pure.names import name_from, problem_of_email
from control_plane.pure.roles import PLATFORM_ROLES, SYSTEM
from control_plane.services import audit, sessions
from control_plane.services.logins import InvalidLogin
from control_plane.services.sessions import digest

# Milliseconds
LIFETIME = 600_000


class Answer(NamedTuple):
    """What the provider has sent the browser back with."""

    state: str
    code: str
    error: str
    issuer: str | None


async def begin(plane: Plane, provider: Provider, browser: str, target: str) -> str:
    """The URL of the provider's login. `browser`: the secret of a cookie. `target`: page to go to afterwards.

    The database has digests only: the verifier is made of what the browser alone has. Raises ProviderAway.
    """
    state, nonce, now = secrets.token_urlsafe(32), secrets.token_urlsafe(32), plane.clock()
    challenge = _encoded(hashlib.sha256(_verifier(browser, state).encode()).digest())
    url = await provider.login_url(state, nonce, challenge, redirect(plane))
    row = {"state": digest(state), "browser": digest(browser), "nonce": digest(nonce), "next": target}
    async with plane.database.main.write() as connection:
        await connection.execute(delete(login_states).where(login_states.c.expires_at <= now))
        await connection.execute(insert(login_states).values(**row, expires_at=now + LIFETIME))
    return url


async def finish(
    plane: Plane, act: Act, provider: Provider, browser: str, answer: Answer, agent: str | None, replaces: str | None
) -> tuple[sessions.Begun, str]:
    """Begin a session; returns the page to go to, too. Raises InvalidLogin, ProviderAway."""
    try:
        row = await _used_up(plane, browser, answer)
        if answer.issuer is not None and answer.issuer != provider.issuer:
            # RFC 9207: of another provider, which was given this one's state.
            raise OpenIdError("issuer")
        claims = await provider.claims(answer.code, _verifier(browser, answer.state), redirect(plane))
        if not hmac.compare_digest(digest(str(claims.get("nonce"))), row.nonce):
            raise OpenIdError("nonce")
        try:
            begun = await _logged_in(plane, act, provider.issuer, claims, agent, replaces)
        except IntegrityError:
            # Another login has made the same user, or taken the same name.
            begun = await _logged_in(plane, act, provider.issuer, claims, agent, replaces)
    except OpenIdError as exc:
        what = audit.Object("session", None)
        async with plane.database.main.write() as connection:
            await audit.record(connection, act, "session.login_failed", what, after={"openid": exc.reason})
        raise InvalidLogin from None
    return begun, row.next or ""


async def _logged_in(
    plane: Plane, act: Act, issuer: str, claims: Mapping[str, Any], agent: str | None, replaces: str | None
) -> sessions.Begun:
    async with plane.database.main.write() as connection:
        user = await _user(plane, connection, act, issuer, claims)
        await connection.execute(update(users).where(users.c.name == user).values(last_login_at=act.at))
        return await sessions.begin(connection, act, user, agent, replaces)


def redirect(plane: Plane) -> str:
    return f"{plane.settings.public}/console/oidc/callback"


async def _used_up(plane: Plane, browser: str, answer: Answer) -> Row[Any]:
    """What the login began with; one statement, so that it is used once. Raises OpenIdError."""
    query = (
        delete(login_states)
        .where(
            login_states.c.state == digest(answer.state),
            login_states.c.browser == digest(browser),
            login_states.c.expires_at > plane.clock(),
        )
        .returning(login_states)
    )
    async with plane.database.main.write() as connection:
        row = (await connection.execute(query)).one_or_none()
    if row is None:
        raise OpenIdError("state")
    if answer.error or not answer.code:
        raise OpenIdError("refused")
    return row


async def _user(plane: Plane, connection: AsyncConnection, act: Act, issuer: str, claims: Mapping[str, Any]) -> str:
    """The name of the user, who is made if missing. Raises OpenIdError."""
    subject = str(claims["sub"])
    known = select(users).where(users.c.oidc_issuer == issuer, users.c.oidc_subject == subject)
    row = (await connection.execute(known.with_for_update())).one_or_none()
    if row is not None and (row.disabled or row.ended_at is not None):
        raise OpenIdError("disabled")
    settings = plane.settings
    role = _role(claims.get(settings.oidc_groups_claim), settings.oidc_roles)
    act = act._replace(principal=SYSTEM)
    if row is None:
        name = await _free_name(connection, claims)
        values = {"platform_role": role, "title": _text(claims.get("name"))}
        who = {"name": name, "oidc_issuer": issuer, "oidc_subject": subject, "created_at": act.at, "disabled": False}
        email = await _email(connection, claims)
        await connection.execute(insert(users).values(**who, **values, email=email))
        await audit.record(connection, act, "user.create", audit.Object("user", name), after=values)
        return name
    if settings.oidc_roles and row.platform_role != role:
        before, after = {"platform_role": row.platform_role}, {"platform_role": role}
        await connection.execute(update(users).where(users.c.name == row.name).values(**after))
        await audit.record(connection, act, "user.update", audit.Object("user", row.name), before, after)
    return str(row.name)


def _role(groups: Any, roles: Mapping[str, str]) -> str | None:
    """The role on the platform that may do most, of those that the groups have."""
    given = [groups] if isinstance(groups, str) else groups if isinstance(groups, list) else []
    found = {roles[group] for group in given if isinstance(group, str) and group in roles}
    return next((role for role in PLATFORM_ROLES if role in found), None)


async def _free_name(connection: AsyncConnection, claims: Mapping[str, Any]) -> str:
    given = next((claims[name] for name in ("preferred_username", "email") if claims.get(name)), "")
    base = name_from(str(given), "user")
    for name in (base, *(f"{base}-{number}" for number in range(2, 100))):
        if (await connection.execute(select(users.c.name).where(users.c.name == name))).first() is None:
            return name
    return f"{base}-{secrets.token_hex(8)}"


async def _email(connection: AsyncConnection, claims: Mapping[str, Any]) -> str | None:
    """A verified address that no other user has: it is shown, and nobody is known by it."""
    email = str(claims.get("email", "")).lower()
    if claims.get("email_verified") is not True or problem_of_email(email) is not None:
        return None
    taken = (await connection.execute(select(users.c.name).where(users.c.email == email))).first() is not None
    return None if taken else email


def _text(value: Any) -> str | None:
    return value[:256] if isinstance(value, str) and value and "\0" not in value else None


def _verifier(browser: str, state: str) -> str:
    return _encoded(hmac.digest(browser.encode(), state.encode(), "sha256"))


def _encoded(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()
