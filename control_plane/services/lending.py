"""Keys that this control plane lends itself, for a quarter of an hour, to ask a router with.

So what it asks is counted, limited and budgeted like all traffic. The secret stays in this process: no browser has it.
There is one key for each name, user and organisation, which gets another secret again and again.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from sqlalchemy import Row, insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from control_plane.clients.router import AT_ONCE, CHAT, Answer, Router, RouterAway, TooManyAnswers
from control_plane.data.tables import keys, organisations
from control_plane.errors import Forbidden, NotFound, Refused
from control_plane.plane import Act, Plane
from control_plane.pure.records import MINUTE
from control_plane.pure.times import shown
from control_plane.services import audit, policy
from inference_api.policy.document import Budget
from inference_api.policy.keys import NewKey, new_key

# Milliseconds for which a key holds, and before its end in which it is not lent again
HOLDS, _LAST = 15 * MINUTE, MINUTE


@dataclass(frozen=True)
class Loan:
    """`key`: the secret, for requests to a router alone. `expires`: Unix milliseconds."""

    id: str
    key: str = field(repr=False)
    expires: int


class Borrower(NamedTuple):
    """What a key is for, as its name says: `playground`, `system:tests`. `organisation` None: the platform.

    `daily_tokens`: the budget that a new key begins with; who may change keys may change it.
    """

    name: str
    organisation: str | None = None
    daily_tokens: int | None = None


async def lend(plane: Plane, act: Act, borrower: Borrower) -> Loan:
    """A key that holds for a minute or more, of the user who acts; the system has its own. Raises Refused.

    Who may have it is for the caller to say. Routers that wait for changes know a new one within a second.
    """

    async def made() -> Loan:
        return await _made(plane, act, borrower)

    return await plane.loans.get((borrower, act.principal.user), act.at, HOLDS - _LAST, made)


def forget(plane: Plane, act: Act, borrower: Borrower) -> None:
    """Lend another one: routers do not accept the last one, as it was ended, or another process has made its own."""
    plane.loans.drop((borrower, act.principal.user))


async def ids(connection: AsyncConnection, name: str | None = None) -> frozenset[str]:
    """Of all keys that were ever lent, or of those with this name."""
    query = select(keys.c.id).where(keys.c.playground)
    if name is not None:
        query = query.where(keys.c.name == name)
    return frozenset((await connection.execute(query)).scalars())


async def _made(plane: Plane, act: Act, borrower: Borrower) -> Loan:
    pepper = plane.settings.peppers[0] if plane.settings.peppers else None
    expires = act.at + HOLDS
    user, name, organisation = act.principal.user, borrower.name, borrower.organisation
    async with plane.change(policy.DOCUMENT) as connection:
        await _refuse_organisation(connection, organisation)
        row = await _known(connection, user, borrower)
        if row is not None and row.disabled:
            raise Forbidden(f"The key {row.id} ({name}) is disabled for you; ask an owner or admin.")
        new = new_key(pepper, id=None if row is None else row.id)
        values = {"digest": new.digest, "expires_at": expires, "revision": await policy.revision_of(connection)}
        if row is None:
            await _insert(plane, connection, act, new, borrower, values)
        else:
            # Another process may have lent that one.
            holds = row.expires_at is not None and row.expires_at > act.at
            values["previous_digest"] = row.digest if holds else None
            values["previous_until"] = row.expires_at if holds else None
            await connection.execute(update(keys).where(keys.c.id == row.id).values(**values))
        verb, after = "create" if row is None else "rotate", {"name": name, "user": user, "expires": shown(expires)}
        await audit.record(connection, act, f"key.{verb}", audit.Object("key", new.id, organisation), None, after)
    return Loan(new.id, new.key, expires)


async def _insert(
    plane: Plane, connection: AsyncConnection, act: Act, new: NewKey, borrower: Borrower, values: dict[str, Any]
) -> None:
    user, tokens = act.principal.user, borrower.daily_tokens
    made: dict[str, Any] = {"id": new.id, "name": borrower.name, "organisation": borrower.organisation, "user": user}
    if tokens is not None:
        made["budget"] = policy.rendered([Budget(tokens=tokens, per="day")])[0]
    policy.refuse_without_room(plane, len(str({**made, **values})), keys=1)
    by = {"limits": [], "playground": True, "created_at": act.at, "created_by": user}
    await connection.execute(insert(keys).values(**made, **by, **values))


async def _known(connection: AsyncConnection, user: str | None, borrower: Borrower) -> Row[Any] | None:
    query = select(keys).where(
        keys.c.playground,
        keys.c.name == borrower.name,
        keys.c.user.is_not_distinct_from(user),
        keys.c.organisation.is_not_distinct_from(borrower.organisation),
        keys.c.ended_at.is_(None),
    )
    return (await connection.execute(query.order_by(keys.c.created_at.desc()).limit(1))).one_or_none()


async def _refuse_organisation(connection: AsyncConnection, name: str | None) -> None:
    if name is not None:
        query = select(organisations.c.name).where(organisations.c.name == name, organisations.c.ended_at.is_(None))
        if (await connection.execute(query)).first() is None:
            raise NotFound("organisation", name)


@asynccontextmanager
async def asked(
    plane: Plane,
    act: Act,
    router: Router | None,
    borrower: Borrower,
    body: bytes | None,
    longest: float,
    path: str = CHAT,
) -> AsyncIterator[Answer]:
    """What the router answers; leaving the block ends the request. Raises Refused, and RouterAway within the block.

    `body` None: a GET. `longest`: seconds for all of it.
    """
    if router is None:
        raise Refused(503, "no_router", "The console has no router to ask: set CONTROL_PLANE_ROUTER_URL.")
    began = False
    try:
        with router.turn(f"{borrower.name} {act.principal.user or ''}"):
            for again in (True, False):
                loan = await lend(plane, act, borrower)
                async with router.ask(loan.key, body, act.request_id, longest, path) as answer:
                    if not answer.unknown_key:
                        began = True
                        yield answer
                        return
                # It was ended, or another process has made its own.
                forget(plane, act, borrower)
                if not again:
                    raise _UNKNOWN
    except TooManyAnswers:
        message = f"You have {AT_ONCE} answers at once. Wait for one to end, or stop it."
        raise Refused(429, "too_many_answers", message, headers={"Retry-After": "5"}) from None
    except RouterAway as exc:
        if began:
            raise
        message = f"No answer: {exc}. The console asks the router of CONTROL_PLANE_ROUTER_URL."
        raise Refused(502, "router_away", message) from None


_UNKNOWN = Refused(
    502,
    "lent_key_unknown",
    "The router does not know the key that the control plane has made for it. It needs POLICY=registry, and this "
    "control plane as its REGISTRY_URL.",
)
