"""Hedging by the catalogue key `hedge`: a request that is late is sent to a second backend, and the first byte wins.

Only the model's own attempts change: all around them, its admission, retries and limits, see one attempt.
"""

from collections.abc import Iterator, Mapping
from time import perf_counter
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from inference_api.core import Core
from inference_api.feature import Feature, Switch
from inference_api.features.hedging.allowance import Allowance
from inference_api.features.hedging.first_bytes import FirstBytes
from inference_api.features.parallel.runs import Run, Runs, until_first_byte
from inference_api.members import leg_of
from inference_api.models import Outcome, Reply, Send
from inference_api.observe.exposition import Family
from inference_api.observe.families import counter
from inference_api.observe.series import Count, Series
from inference_api.relay.answers import first_bytes as wait_for_first
from inference_api.routing.backend import Backend
from inference_api.routing.entries import CatalogueEntry, EntryKey
from inference_api.settings import Settings
from inference_api.upstream.attempt import Attempt, SendAttempt
from inference_api.upstream.failures import outcome_of

# Seconds: what is faster is not late.
_SOONEST = 0.05
# Share of `max_in_flight` above which a model is too busy for a second attempt
_BUSY = 0.7


class Lateness(BaseModel):
    """When a request is late: after so many milliseconds, or later than 95 of 100. `budget`: share of the requests."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    after: Literal["p95"] | Annotated[float, Field(ge=50, allow_inf_nan=False)] = "p95"
    budget: float = Field(default=0.05, gt=0, le=0.5, allow_inf_nan=False)


HEDGE: EntryKey[Lateness | None] = EntryKey("hedge", Lateness | None, None)


def build(core: Core, settings: Settings) -> Feature:
    """Always built: the key turns it on for its model."""
    hedges = Hedges(core)
    return Feature("hedge", ask=hedges.ask, for_model=has_hedge, collect=hedges.collect)


def has_hedge(entry: CatalogueEntry) -> bool:
    return HEDGE.of(entry) is not None


class _Pace:
    """What is known of one model. Streams begin early, whole answers end late: each kind of request has its own."""

    __slots__ = ("_first_bytes", "allowance")

    def __init__(self) -> None:
        self.allowance = Allowance()
        self._first_bytes: dict[tuple[str, bool], FirstBytes] = {}

    def of(self, route: str, stream: bool) -> FirstBytes:
        found = self._first_bytes.get((route, stream))
        if found is None:
            found = self._first_bytes[route, stream] = FirstBytes()
        return found


class Hedges:
    """Hedges attempts, and counts the results."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self._paces: Series[str, _Pace] = Series(lambda model: _Pace(), lambda model: model in core.fleet.served)
        self._results: Series[tuple[str, str], Count] = Series(
            lambda key: Count(), lambda key: key[0] in core.fleet.served
        )

    def ask(self, send: Send) -> Send:
        """In place of `send`, which is the attempt loop: the same one, with attempts that are hedged."""
        return self._core.forward_through(self.attempts)

    def attempts(self, send: SendAttempt) -> SendAttempt:
        async def hedged(attempt: Attempt) -> Reply:
            call, model, _, tried, _, _ = attempt
            lateness = HEDGE.of(model.entry)
            if tried or lateness is None:
                # A repeat was late already.
                return await send(attempt)
            pace = self._paces[model.name]
            pace.allowance.earn(lateness.budget)
            if not call.route.repeatable:
                return await send(attempt)
            times = pace.of(call.route.label, call.stream)
            after = times.p95 if lateness.after == "p95" else lateness.after / 1000
            # A probe of a circuit belongs to the task of its request.
            if after is None or model.guard is not None or len(model.available) < 2:
                return await _timed(send, attempt, times)
            return await self._run(send, attempt, max(after, _SOONEST), times, pace.allowance)

        return hedged

    async def _run(
        self, send: SendAttempt, attempt: Attempt, after: float, times: FirstBytes, allowance: Allowance
    ) -> Reply:
        call, model, backend, _, _, _ = attempt
        began, hedged = perf_counter(), False
        async with Runs(self._core, "hedge", Outcome.HEDGE_LOST, call, until_first_byte, first_is_own=True) as runs:
            first = runs.start(model, leg_of(call), lambda leg: send(attempt._replace(call=leg)))
            ended = await runs.next(after)
            if not ended and (other := self._other(attempt, allowance)) is not None:
                hedged, second = True, attempt._replace(backend=other, tried=(backend,))
                runs.start(model, leg_of(call), lambda leg: send(second._replace(call=leg)))
            winner = _winner(ended)
            while winner is None and runs.are_open:
                winner = _winner(await runs.next())
            if winner is not None:
                # Of a first one that lost it is known that it takes longer than this.
                times.add(perf_counter() - began)
            if hedged:
                self._count(model.name, "lost" if winner in (None, first) else "won")
            # If both fail, what follows is decided by the first one.
            return await runs.keep(winner or first)

    def _other(self, attempt: Attempt, allowance: Allowance) -> Backend | None:
        """Another backend for a second attempt, if there may be one."""
        model, backend = attempt.model, attempt.backend
        limit = model.entry.max_in_flight
        if model.guard is not None or (limit is not None and model.in_flight > _BUSY * limit):
            return None
        other = self._core.retry_policy.rested(model, attempt.prepared.key, (backend,), only=True)
        if other is None or other.origin is backend.origin:
            return None
        if not allowance.spend():
            self._count(model.name, "no_budget")
            return None
        return other

    def _count(self, model: str, result: str) -> None:
        self._results[model, result].count += 1

    def collect(self) -> Iterator[Family]:
        if self._results:
            yield from families({labels: cell.count for labels, cell in self._results.snapshot().items()})


def families(results: Mapping[tuple[str, str], int]) -> Iterator[Family]:
    """`results`: by model and result."""
    text = "Late requests: the second backend won, or lost, or the budget left no second attempt."
    series = [(labels, float(count)) for labels, count in results.items()]
    yield counter("hedges", text, ("model_name", "result"), series)


def _winner(ended: list[Run]) -> Run | None:
    return next((run for run in ended if run.answered), None)


async def _timed(send: SendAttempt, attempt: Attempt, times: FirstBytes) -> Reply:
    """The attempt alone; its first byte is waited for, so that its time is known."""
    began = perf_counter()
    reply = await send(attempt)
    if 200 <= reply.status < 300:
        try:
            await wait_for_first(reply)
        except BaseException as exc:
            await reply.aclose(outcome_of(exc))
            raise
        times.add(perf_counter() - began)
    return reply


FEATURE = Switch(build, keys=(HEDGE,))
