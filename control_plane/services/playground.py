"""The playground: keys for a quarter of an hour, in the organisation of whoever uses it, and what a router answers.

So what people try is counted, limited and budgeted like all traffic. The secret stays in this process: no browser has
it. There is one key for each user and organisation, which gets another secret again and again.
"""

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

from sqlalchemy import Row, insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from control_plane.clients.router import AT_ONCE, Answer, Router, RouterAway, TooManyAnswers
from control_plane.data.tables import keys, organisations
from control_plane.errors import Forbidden, NotFound, Refused
from control_plane.plane import Act, Plane
from control_plane.pure.chat import Problem, Transcript
from control_plane.pure.records import MINUTE
from control_plane.pure.times import shown
from control_plane.services import audit, models, policy, prices, requests
from control_plane.services.visibility import visible_models
from inference_api.policy.keys import NewKey, new_key
from inference_api.routing.references import virtual_key

NAME: Final = "playground"
# Milliseconds for which a key holds, and before its end in which it is not lent again
HOLDS, _LAST = 15 * MINUTE, MINUTE
# Seconds for which a form waits for its answer, and bytes of one that is no stream
PATIENCE, _MOST_BYTES = 120.0, 8 * 1024 * 1024


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


@asynccontextmanager
async def asked(
    plane: Plane, act: Act, router: Router | None, organisation: str | None, body: bytes, longest: float
) -> AsyncIterator[Answer]:
    """What the router answers; leaving the block ends the request. Raises Refused, and RouterAway within the block.

    `longest`: seconds for all of it.
    """
    if router is None:
        raise Refused(503, "no_router", "The console has no router to ask: set CONTROL_PLANE_ROUTER_URL.")
    began = False
    try:
        with router.turn(act.principal.user or ""):
            for again in (True, False):
                loan = await lend(plane, act, organisation)
                async with router.chat(loan.key, body, act.request_id, longest) as answer:
                    if not answer.unknown_key:
                        began = True
                        yield answer
                        return
                # It was ended, or another process has made its own.
                forget(plane, act, organisation)
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
    "playground_key_unknown",
    "The router does not know the key of the playground. It needs POLICY=registry, and this control plane as its "
    "REGISTRY_URL.",
)


@dataclass(frozen=True)
class Whole:
    """An answer from its begin to its end. `first`, `took`: milliseconds to its first text, and of all of it."""

    model: str
    status: int
    transcript: Transcript
    first: float | None
    took: float
    cost: "Cost | None" = None

    @property
    def tokens_per_second(self) -> float | None:
        """Of output, from the first one on."""
        made, rest = self.transcript.output_tokens, self.took - (self.first or 0)
        return None if self.first is None or not made or rest <= 0 else made * 1000 / rest


async def whole(
    plane: Plane, act: Act, router: Router | None, organisation: str | None, model: str, body: bytes
) -> Whole:
    """The answer, once it has ended; a refusal is its problem."""
    start, first, status, transcript, size = time.monotonic(), None, 0, Transcript(), 0
    try:
        async with asked(plane, act, router, organisation, body, PATIENCE) as answer:
            status, parts = answer.status, []
            streams = answer.headers.get("content-type", "").startswith("text/event-stream")
            async for data in answer.body:
                size += len(data)
                if not streams:
                    parts.append(data)
                elif transcript.feed(data) and first is None:
                    first = (time.monotonic() - start) * 1000
                if transcript.full or (not streams and size > _MOST_BYTES):
                    break
            if not streams:
                transcript.take(b"".join(parts))
    except Refused as exc:
        status, transcript.problem = exc.status, Problem(exc.message, exc.code)
    except RouterAway as exc:
        transcript.problem = Problem(f"The answer broke off: {exc}.", "router_away")
    if status >= 400 and transcript.problem is None:
        transcript.problem = Problem(f"The router answers {status}.")
    took = (time.monotonic() - start) * 1000
    found = None
    if status < 400 and transcript.input_tokens is not None:
        tokens = transcript.input_tokens, transcript.cached_tokens, transcript.output_tokens
        found = await cost(plane, act, act.request_id or "", model, transcript.model, *tokens)
    return Whole(model, status, transcript, first, took, found)


class Cost(NamedTuple):
    """`nanos`: None: not known. `recorded`: of the usage record; otherwise by the price that holds now."""

    nanos: int | None
    recorded: bool
    input_tokens: int | None
    output_tokens: int | None


async def cost(
    plane: Plane,
    act: Act,
    request_id: str,
    model: str,
    answered: str | None,
    input_tokens: int | None,
    cached: int | None,
    output_tokens: int | None,
) -> Cost:
    """Of an answer. `model`: which was asked; of a virtual one counts the one that `answered`, as far as is known."""
    try:
        record = await requests.one(plane, act, request_id)
        return Cost(record["cost_nanos"], True, record["input_tokens"], record["output_tokens"])
    except NotFound:
        catalogue = models.catalogue(plane)
        name = catalogue.owners.get(model, model)
        if name in catalogue.stored and virtual_key(catalogue.stored[name].entry) is not None:
            name = answered or name
        found = None
        # Of others it is not said whether there is such a model.
        if (await visible_models(plane, act))(name):
            found = prices.current(plane).cost(name, act.at, input_tokens, cached, output_tokens)
        return Cost(found, False, input_tokens, output_tokens)
