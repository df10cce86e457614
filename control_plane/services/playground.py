"""Keys of the playground: for a quarter of an hour, in the organisation of whoever uses it.

So what people try is counted, limited and budgeted like all traffic. The secret stays in this process: no browser has
it. There is one key for each user and organisation, which gets another secret again and again.
"""

from dataclasses import dataclass, field
from typing import Any, Final

from sqlalchemy import Row, insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from control_plane.data.tables import keys, organisations
from control_plane.errors import Forbidden, NotFound
from control_plane.plane import Act, Plane
from control_plane.pure.records import MINUTE
from control_plane.pure.times import shown
from control_plane.services import audit, policy
from inference_api.policy.keys import NewKey, new_key

NAME: Final = "playground"
# Milliseconds for which a key holds, and before its end in which it is not lent again
HOLDS, _LAST = 15 * MINUTE, MINUTE


@dataclass(frozen=True)
class Loan:
    """`key`: the secret, for requests to a router alone. `expires`: Unix milliseconds."""

    id: str
    key: str = field(repr=False)
    expires: int


async def lend(plane: Plane, act: Act, organisation: str | None) -> Loan:
    """A key that holds for a minute or more. None: the platform's, for those who may use prompts there. Raises Refused.

    Routers that wait for changes know a new one within a second.
    """
    user = act.principal.user
    if user is None or not act.principal.may("prompts.use", organisation):
        if organisation is not None and organisation not in act.principal.roles:
            raise NotFound("organisation", organisation)
        raise Forbidden("The playground needs a role that may use prompts here.")

    async def made() -> Loan:
        return await _made(plane, act, user, organisation)

    return await plane.loans.get((user, organisation), act.at, HOLDS - _LAST, made)


def forget(plane: Plane, act: Act, organisation: str | None) -> None:
    """Lend another one: routers do not accept the last one, as it was ended, or another process has made its own."""
    plane.loans.drop((act.principal.user, organisation))


async def ids(connection: AsyncConnection) -> frozenset[str]:
    """Of all keys that were ever lent."""
    return frozenset((await connection.execute(select(keys.c.id).where(keys.c.playground))).scalars())


async def _made(plane: Plane, act: Act, user: str, organisation: str | None) -> Loan:
    pepper = plane.settings.peppers[0] if plane.settings.peppers else None
    expires = act.at + HOLDS
    async with plane.change(policy.DOCUMENT) as connection:
        await _refuse_organisation(connection, organisation)
        row = await _known(connection, user, organisation)
        if row is not None and row.disabled:
            raise Forbidden("The key of the playground is disabled for you; ask an owner or admin.")
        new = new_key(pepper, id=None if row is None else row.id)
        values = {"digest": new.digest, "expires_at": expires, "revision": await policy.revision_of(connection)}
        if row is None:
            await _insert(plane, connection, act, new, {**values, "user": user, "organisation": organisation})
        else:
            # Another process may have lent that one.
            holds = row.expires_at is not None and row.expires_at > act.at
            values["previous_digest"] = row.digest if holds else None
            values["previous_until"] = row.expires_at if holds else None
            await connection.execute(update(keys).where(keys.c.id == row.id).values(**values))
        verb, after = "create" if row is None else "rotate", {"name": NAME, "user": user, "expires": shown(expires)}
        await audit.record(connection, act, f"key.{verb}", audit.Object("key", new.id, organisation), None, after)
    return Loan(new.id, new.key, expires)


async def _insert(plane: Plane, connection: AsyncConnection, act: Act, new: NewKey, values: dict[str, Any]) -> None:
    policy.refuse_without_room(plane, len(str(values)), keys=1)
    made = {"id": new.id, "name": NAME, "limits": [], "playground": True}
    by = {"created_at": act.at, "created_by": act.principal.user}
    await connection.execute(insert(keys).values(**made, **by, **values))


async def _known(connection: AsyncConnection, user: str, organisation: str | None) -> Row[Any] | None:
    query = select(keys).where(
        keys.c.playground,
        keys.c.user == user,
        keys.c.organisation.is_not_distinct_from(organisation),
        keys.c.ended_at.is_(None),
    )
    return (await connection.execute(query.order_by(keys.c.created_at.desc()).limit(1))).one_or_none()


async def _refuse_organisation(connection: AsyncConnection, name: str | None) -> None:
    if name is not None:
        query = select(organisations.c.name).where(organisations.c.name == name, organisations.c.ended_at.is_(None))
        if (await connection.execute(query)).first() is None:
            raise NotFound("organisation", name)
