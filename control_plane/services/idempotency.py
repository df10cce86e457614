"""Answers to POSTs with an Idempotency-Key, kept for a day: a request that is sent again is not done again."""

from typing import NamedTuple

from sqlalchemy import delete, insert, select, update
from sqlalchemy.exc import IntegrityError

from control_plane.data.database import Store
from control_plane.data.tables import idempotency

# Milliseconds that an answer is kept; after which a request without an answer is one of a process that died
KEPT, _ABANDONED = 86_400_000, 60_000
_RUNS = 0


class Claim(NamedTuple):
    """A key of an actor, and the digest of the request that it is for."""

    actor: str
    key: str
    request: str


class Kept(NamedTuple):
    """The first answer, without its secrets. Status 0: the request still runs."""

    request: str
    status: int
    headers: dict[str, str]
    body: str

    @property
    def runs(self) -> bool:
        return self.status == _RUNS


async def begin(store: Store, claim: Claim, now: int) -> Kept | None:
    """None: the caller runs the request, and says how it ended; others get what is kept of it."""
    table = idempotency.c
    mine = (table.actor == claim.actor) & (table.key == claim.key)
    over = (table.at <= now - KEPT) | ((table.status == _RUNS) & (table.at <= now - _ABANDONED))
    async with store.read() as connection:
        row = (await connection.execute(select(idempotency).where(mine, ~over))).one_or_none()
    if row is not None:
        return Kept(row.request, row.status, row.headers, row.body)
    values = {"request": claim.request, "status": _RUNS, "headers": {}, "body": "", "at": now}
    try:
        async with store.write() as connection:
            await connection.execute(delete(idempotency).where(mine, over))
            await connection.execute(insert(idempotency).values(actor=claim.actor, key=claim.key, **values))
    except IntegrityError:
        # Another one was first.
        return Kept(claim.request, _RUNS, {}, "")
    return None


async def keep(store: Store, claim: Claim, status: int, headers: dict[str, str], body: str) -> None:
    """Keep the answer of a request that the caller has run."""
    table = idempotency.c
    async with store.write() as connection:
        await connection.execute(
            update(idempotency)
            .where(table.actor == claim.actor, table.key == claim.key)
            .values(status=status, headers=headers, body=body)
        )


async def forget(store: Store, claim: Claim) -> None:
    """Let the request be sent again: nothing was done."""
    table = idempotency.c
    async with store.write() as connection:
        await connection.execute(
            delete(idempotency).where(table.actor == claim.actor, table.key == claim.key, table.status == _RUNS)
        )
