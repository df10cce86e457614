"""Hedging by the catalogue key `hedge`: a request that is late is sent to a second backend, and the first byte wins.

Only the model's own attempts change: all around them, its admission, retries and limits, see one attempt.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Mapping
from time import monotonic
from typing import Annotated, Any, Literal

import httpx
from pydantic import BaseModel, ConfigDict, Field

from inference_api.core import Core
from inference_api.feature import Feature, Switch
from inference_api.features.hedging.allowance import Allowance
from inference_api.features.hedging.due_dates import DueDates
from inference_api.features.hedging.first_bytes import FirstBytes
from inference_api.features.parallel.runs import Run, Runs, message_of, until_first_byte
from inference_api.members import leg_of
from inference_api.models import Outcome, Reply, Send, of_status
from inference_api.observe.exposition import Family
from inference_api.observe.families import counter
from inference_api.observe.series import Count, Series
from inference_api.relay.answers import first_bytes
from inference_api.routing.backend import Backend
from inference_api.routing.entries import CatalogueEntry, EntryKey
from inference_api.settings import Settings
from inference_api.upstream.attempt import Attempt, SendAttempt
from inference_api.upstream.failures import outcome_of
from inference_api.upstream.response import ResponseStream

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


class _First:
    """A first attempt, until its first byte."""

    __slots__ = (
        "attempt", "began", "cancelling", "due", "over", "pace", "reply", "runs", "second", "send", "task", "won",
    )  # fmt: skip

    def __init__(
        self,
        send: SendAttempt,
        attempt: Attempt,
        pace: "_Pace",
        began: float,
        due: float,
        task: "asyncio.Task[Any] | None",
    ) -> None:
        self.send = send
        self.attempt = attempt
        self.pace = pace
        self.began = began
        self.due = due
        self.over = False
        self.task = task
        self.reply: Reply | None = None
        # The second attempt; whether it has cancelled this one, and how many others had by then
        self.runs: Runs | None = None
        self.second: Run | None = None
        self.won = False
        self.cancelling = 0


class _Pace:
    """What is known of one model. Streams begin early, whole answers end late: each kind of request has its own."""

    __slots__ = ("_kinds", "_late", "allowance")

    def __init__(self, late: Callable[[_First], None]) -> None:
        self.allowance = Allowance()
        self._late = late
        self._kinds: dict[tuple[str, bool], tuple[FirstBytes, DueDates[_First]]] = {}

    def of(self, kind: tuple[str, bool]) -> tuple[FirstBytes, DueDates[_First]]:
        """`kind`: the label of a route, and whether it is a stream."""
        found = self._kinds.get(kind)
        if found is None:
            found = self._kinds[kind] = FirstBytes(), DueDates(self._late)
        return found


class Hedges:
    """Hedges attempts, and counts the results.

    The first attempt runs in the task of its request, as without a hedge. Only one that is late gets a second one, in a
    task of its own, which cancels the first one if it wins.
    """

    def __init__(self, core: Core) -> None:
        self._core = core
        self._loop: asyncio.AbstractEventLoop | None = None
        self._paces: Series[str, _Pace] = Series(
            lambda model: _Pace(self._late), lambda model: model in core.fleet.served
        )
        self._results: Series[tuple[str, str], Count] = Series(
            lambda key: Count(), lambda key: key[0] in core.fleet.served
        )

    def ask(self, send: Send) -> Send:
        """In place of `send`, which is the attempt loop: the same one, with attempts that are hedged."""
        return self._core.forward_through(self.attempts)

    def attempts(self, send: SendAttempt) -> SendAttempt:
        paces, started, watched = self._paces, self._started, self._watched

        # No coroutine of its own: it runs for every request of the model.
        def hedged(attempt: Attempt) -> Awaitable[Reply]:
            call, model, _, tried, _, _ = attempt
            lateness: Lateness | None = model.entry.hedge  # type: ignore[attr-defined]
            # A repeat was late already.
            if lateness is None or tried:
                return send(attempt)
            pace = paces[model.name]
            pace.allowance.earn(lateness.budget)
            route = call[0]
            if not route.repeatable:
                return send(attempt)
            times, watch = pace.of((route.label, call[2]))
            after = times.p95 if lateness.after == "p95" else lateness.after / 1000
            if after is None or len(model.available) < 2:
                return _timed(send, attempt, times)
            return watched(started(send, attempt, pace, after), watch, times)

        return hedged

    def _started(self, send: SendAttempt, attempt: Attempt, pace: "_Pace", after: float) -> _First:
        loop = self._loop
        if loop is None:
            loop = self._loop = asyncio.get_running_loop()
        # Without the loop, which stays the same, it would cost a system call.
        task, now = asyncio.current_task(loop), monotonic()
        return _First(send, attempt, pace, now, now + (after if after > _SOONEST else _SOONEST), task)

    async def _watched(self, first: _First, watch: DueDates[_First], times: FirstBytes) -> Reply:
        """The answer of the attempt that wins, if there is a second one."""
        watch.add(first)
        try:
            first.reply = reply = await first.send(first.attempt)
            if 200 <= reply.status < 300 and not _has_begun(reply.stream):
                await _first_byte(reply)
        except BaseException as exc:
            first.over = True
            watch.done()
            if first.second is None:
                raise
            reply = await self._failed(first, exc)
        else:
            first.over = True
            watch.done()
            if first.second is not None:
                reply = await self._answered(first, reply)
        if times.skipped:
            times.skipped -= 1
        elif 200 <= reply.status < 300:
            # Of a first one that lost it is known that it takes longer than this.
            times.add(monotonic() - first.began)
        return reply

    def _late(self, first: _First) -> None:
        """Start a second attempt, if there may be one."""
        attempt = first.attempt
        other = self._other(first)
        if other is None:
            return
        second, send = attempt._replace(backend=other, tried=(attempt.backend,)), first.send
        first.runs = runs = Runs(self._core, "hedge", Outcome.HEDGE_LOST, attempt.call, until_first_byte)
        first.second = run = runs.start(
            attempt.model, leg_of(attempt.call), lambda leg: send(second._replace(call=leg))
        )

        def ended(task: "asyncio.Task[None]") -> None:
            if run.answered and not first.over and first.task is not None:
                first.won, first.cancelling = True, first.task.cancelling()
                first.task.cancel(Outcome.HEDGE_LOST.value)

        assert run.task is not None
        run.task.add_done_callback(ended)

    async def _failed(self, first: _First, exc: BaseException) -> Reply:
        """The first attempt has raised. Raises the same if the second one has no answer either."""
        runs, run = first.runs, first.second
        assert runs is not None
        assert run is not None
        lost = first.won and _only_by_us(first) and isinstance(exc, asyncio.CancelledError)
        if not lost and not isinstance(exc, Exception):
            await runs.end(message_of(exc))
            raise exc
        await self._wait(first)
        if run.answered:
            return await self._second_won(first, run, outcome_of(exc))
        self._count(first, "lost")
        await runs.end("")
        raise exc

    async def _answered(self, first: _First, reply: Reply) -> Reply:
        """The first attempt has an answer. Returns that of the second one, if only that is good."""
        runs, run = first.runs, first.second
        assert runs is not None
        assert run is not None
        if 200 <= reply.status < 300:
            self._count(first, "lost")
            try:
                await runs.end(Outcome.HEDGE_LOST.value)
            except BaseException as exc:
                await reply.aclose(outcome_of(exc))
                raise
            return reply
        await self._wait(first)
        if run.answered:
            return await self._second_won(first, run, of_status(reply.status))
        self._count(first, "lost")
        await runs.end("")
        return reply

    async def _wait(self, first: _First) -> None:
        """Wait for the second attempt. If that is cancelled, nothing is left of either."""
        run, runs = first.second, first.runs
        assert run is not None
        assert run.task is not None
        assert runs is not None
        try:
            if not run.task.done():
                await asyncio.wait((run.task,))
        except BaseException as exc:
            if first.reply is not None:
                await first.reply.aclose(outcome_of(exc))
            await runs.end(message_of(exc))
            raise

    async def _second_won(self, first: _First, run: Run, outcome: Outcome) -> Reply:
        """The attempt of the request is the second one; the first one gets a Record. `outcome`: of the first one."""
        self._count(first, "won")
        call, model, reply = first.attempt.call, first.attempt.model, run.reply
        assert reply is not None
        try:
            if first.reply is not None:
                await first.reply.aclose(outcome)
        except BaseException as exc:
            await reply.aclose(outcome_of(exc))
            raise
        leg, legs = leg_of(call), self._core.legs
        # Its own attempt was noted last.
        leg.tried.append(call.tried.pop())
        call.tried.extend(run.leg.tried)
        legs.end("hedge", leg, model, legs.clock() - (monotonic() - first.began), outcome, first.reply)
        return reply

    def _other(self, first: _First) -> Backend | None:
        """Another backend for a second attempt, if there may be one."""
        attempt = first.attempt
        model, backend = attempt.model, attempt.backend
        limit = model.entry.max_in_flight
        if model.guard is not None or (limit is not None and model.in_flight > _BUSY * limit):
            return None
        other = self._core.retry_policy.rested(model, attempt.prepared.key, (backend,), only=True)
        if other is None or other.origin is backend.origin:
            return None
        if not first.pace.allowance.spend():
            self._count(first, "no_budget")
            return None
        return other

    def _count(self, first: _First, result: str) -> None:
        self._results[first.attempt.model.name, result].count += 1

    def collect(self) -> Iterator[Family]:
        if self._results:
            yield from families({labels: cell.count for labels, cell in self._results.snapshot().items()})


def families(results: Mapping[tuple[str, str], int]) -> Iterator[Family]:
    """`results`: by model and result."""
    text = "Late requests: the second backend won, or lost, or the budget left no second attempt."
    series = [(labels, float(count)) for labels, count in results.items()]
    yield counter("hedges", text, ("model_name", "result"), series)


async def _timed(send: SendAttempt, attempt: Attempt, times: FirstBytes) -> Reply:
    """The attempt alone; its first byte is waited for, so that its time is known."""
    began = monotonic()
    reply = await send(attempt)
    if 200 <= reply.status < 300:
        if not _has_begun(reply.stream):
            await _first_byte(reply)
        if times.skipped:
            times.skipped -= 1
        else:
            times.add(monotonic() - began)
    return reply


def _has_begun(stream: httpx.AsyncByteStream) -> bool:
    """Whether the first byte of a body, or its end, is there: nearly always, without a coroutine to wait for it."""
    return isinstance(stream, ResponseStream) and (stream.complete or bool(stream.pieces))


async def _first_byte(reply: Reply) -> None:
    """Wait for the first byte of the body. Closes the Reply if that raises."""
    try:
        await first_bytes(reply)
    except BaseException as exc:
        await reply.aclose(outcome_of(exc))
        raise


def _only_by_us(first: _First) -> bool:
    """Take our cancellation of the task back. Whether nobody else has cancelled it, too."""
    assert first.task is not None
    return first.task.uncancel() == first.cancelling == 0


FEATURE = Switch(build, keys=(HEDGE,))
