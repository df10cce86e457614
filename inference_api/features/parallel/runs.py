"""Several runs for one request: each is in a task of its own, and has a leg of its own.

One answer, or one error, is returned, and its leg becomes the request's own. Every other one that reached a backend
gets a Record. Whatever happens, no task, Reply or count is left.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from types import TracebackType
from typing import Any, Self

import httpx

from inference_api.core import Core
from inference_api.errors import RouterError
from inference_api.members import is_shadow, take_over
from inference_api.models import CLIENT_GONE, LOST, RAN, Call, Outcome, Reply, of_status
from inference_api.observe.account import NO_COUNTS
from inference_api.relay.answers import first_bytes
from inference_api.relay.usage import Counts
from inference_api.routing.fleet import Model
from inference_api.upstream.failures import outcome_of

logger = logging.getLogger(__name__)

# Under which the state of a leg has that its own legs have all been recorded: it has nothing of its own.
_RECORDED = "recorded"


class Run:
    """One of them. `place`: from 0, in the order of their start; `answered`: it has a good answer.

    `outcome`, once it is known; `tokens`: as its engine reports them.
    """

    __slots__ = (
        "answered", "began", "error", "leg", "model", "outcome", "place", "recorded", "reply", "task", "tokens",
    )  # fmt: skip

    def __init__(self, place: int, leg: Call, model: Model, began: float) -> None:
        self.place = place
        self.leg = leg
        self.model = model
        self.began = began
        self.task: asyncio.Task[None] | None = None
        self.reply: Reply | None = None
        self.error: BaseException | None = None
        self.outcome: Outcome | None = None
        self.tokens: Counts = NO_COUNTS
        self.answered = False
        self.recorded = False


Sending = Callable[[Call], Awaitable[Reply]]
# Returns whether the answer is a good one
Work = Callable[[Run, Reply], Awaitable[bool]]


class Runs:
    """The runs of one request. Use `async with`: at its end all of them have ended, but the answer that is kept.

    `kind`: of the Records of those whose answer is not returned; `lost`: how their attempts end. `work`: what is done
    with each Reply, in the task of its run; it may replace `run.reply`.
    """

    def __init__(self, core: Core, kind: str, lost: Outcome, call: Call, work: Work) -> None:
        self.core = core
        # What a shadow runs is a part of it: nobody pays for that.
        self._kind = "shadow" if is_shadow(call.state) else kind
        self._lost = lost
        self.call = call
        self._work = work
        self._all: list[Run] = []
        self._open: dict[asyncio.Task[None], Run] = {}
        self._kept: Run | None = None

    def start(self, model: Model, leg: Call, sending: Sending) -> Run:
        run = Run(len(self._all), leg, model, self.core.legs.clock())
        self._all.append(run)
        run.task = task = asyncio.create_task(self._run(run, sending))
        self._open[task] = run
        return run

    @property
    def are_open(self) -> bool:
        return bool(self._open)

    @property
    def all(self) -> Sequence[Run]:
        """In the order of their start."""
        return self._all

    async def next(self, patience: float | None = None) -> list[Run]:
        """Those that have ended since the last time, at least one of them, or none after so many seconds."""
        done, _ = await asyncio.wait(self._open, timeout=patience, return_when=asyncio.FIRST_COMPLETED)
        return sorted((self._open.pop(task) for task in done), key=lambda run: run.place)

    async def keep(self, run: Run) -> Reply:
        """Make the answer of `run` that of the request, and cancel the others. Raises its error, if it has one."""
        self._kept = run
        take_over(self.call, run.leg, run.model)
        await self.end(self._lost.value)
        if run.error is not None:
            raise run.error
        assert run.reply is not None
        return run.reply

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        if exc is None:
            return
        message = message_of(exc)
        kept = self._kept
        if kept is None:
            self._without_answer()
        elif kept.reply is not None:
            await kept.reply.aclose(LOST.get(message, CLIENT_GONE))
        await self.end(message)

    async def _run(self, run: Run, sending: Sending) -> None:
        """The task of a run: raises only what cancels it, and then there is no open Reply."""
        try:
            run.reply = reply = await sending(run.leg)
            run.answered = await self._work(run, reply)
        except BaseException as exc:
            run.error, run.outcome = exc, exc.outcome if isinstance(exc, RouterError) else outcome_of(exc)
            if run.reply is not None:
                await run.reply.aclose(run.outcome)
            if not isinstance(exc, Exception):
                raise
            if not isinstance(exc, RouterError | httpx.TransportError):
                fields = {"request_id": run.leg.request_id}
                logger.exception("one of several runs of a request failed", extra={"fields": fields})

    async def end(self, message: str) -> None:
        """End all runs but the one that is kept; `message`: of their cancellation."""
        working: list[asyncio.Task[None]] = []
        for run in self._all:
            assert run.task is not None
            if not run.task.done():
                run.task.cancel(message)
                # Not after the wait, which may be cancelled.
                run.task.add_done_callback(lambda task, run=run: self._record(run))  # type: ignore[misc]
                working.append(run.task)
                continue
            reply = run.reply
            if run is not self._kept and run.error is None and reply is not None:
                if run.outcome is None:
                    run.outcome = LOST.get(message, CLIENT_GONE) if run.answered else of_status(reply.status)
                await reply.aclose(run.outcome)
            self._record(run)
        if working:
            await asyncio.wait(working)

    def _record(self, run: Run) -> None:
        if run.recorded or run is self._kept:
            return
        run.recorded = True
        leg = run.leg
        if _RECORDED in leg.state:
            # Its own legs have the attempts.
            leg = leg._replace(tried=[])
        error = run.error if isinstance(run.error, RouterError) else None
        outcome = run.outcome or CLIENT_GONE
        self.core.legs.end(self._kind, leg, run.model, run.began, outcome, run.reply, error, tokens=run.tokens)

    def _without_answer(self) -> None:
        """No answer is returned: all legs have Records, and the request shows that a backend was asked."""
        first = next((run for run in self._all if run.leg.tried), None)
        if first is not None:
            state: dict[str, Any] = self.call.state  # type: ignore[assignment]
            self.call.tried.extend(first.leg.tried)
            state[RAN] = first.leg.state.get(RAN, first.model)
            state[_RECORDED] = True


def message_of(exc: BaseException) -> str:
    """What a task was cancelled with; "" without it."""
    return str(exc.args[0]) if isinstance(exc, asyncio.CancelledError) and exc.args else ""


async def until_first_byte(run: Run, reply: Reply) -> bool:
    """A Work: wait for the first byte of a good answer, or for its end."""
    if not 200 <= reply.status < 300:
        return False
    await first_bytes(reply)
    return True
