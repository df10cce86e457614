"""Members of a virtual model at work for one request: each runs in a task of its own, and has a leg of its own.

One answer, or one error, is returned, and its leg becomes the request's own. Every other one that reached a backend
gets a Record. Whatever happens, no task, Reply or count is left.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, Sequence
from types import TracebackType
from typing import Any, Self

import httpx

from inference_api.core import Core
from inference_api.errors import NoBackend, RouterError
from inference_api.members import leg_of, take_over
from inference_api.models import CLIENT_GONE, LOST, RAN, Call, Outcome, Reply, of_status
from inference_api.observe.account import NO_COUNTS
from inference_api.relay.relay import unusable
from inference_api.relay.usage import Counts
from inference_api.routing.fleet import Model
from inference_api.upstream.failures import outcome_of

logger = logging.getLogger(__name__)

# Under which the state of a leg has that its own legs have all been recorded: it has nothing of its own.
_RECORDED = "recorded"


class Run:
    """One member at work. `place`: in the list of members; `answered`: it has a good answer.

    `outcome`, once it is known; `tokens`: as its engine reports them.
    """

    __slots__ = (
        "answered",
        "began",
        "error",
        "leg",
        "model",
        "outcome",
        "place",
        "recorded",
        "reply",
        "task",
        "tokens",
    )

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

    @property
    def is_open(self) -> bool:
        return self.task is not None and not self.task.done()


# Returns whether the answer is a good one
Work = Callable[[Run, Reply], Awaitable[bool]]


class Runs:
    """The runs of one request to the virtual model `model`. Use `async with`: at its end all of them have ended.

    `kind`: of the Records of those whose answer is not returned; `lost`: how their attempts end. `work`: what is done
    with each Reply, in the task of its run; it may replace `run.reply`.
    """

    def __init__(self, core: Core, kind: str, lost: Outcome, call: Call, model: Model, work: Work) -> None:
        self._core = core
        self._kind = kind
        self._lost = lost
        self.call = call
        self.model = model
        self._work = work
        # Of the request: the members share it.
        self._deadline = call.deadline or core.prepare.deadline(call, model)
        self._all: list[Run] = []
        self._open: dict[asyncio.Task[None], Run] = {}
        self._kept: Run | None = None

    def start(self, model: Model) -> None:
        leg = leg_of(self.call)
        leg = leg._replace(deadline=min(self._deadline, self._core.prepare.deadline(leg._replace(deadline=0.0), model)))
        run = Run(len(self._all), leg, model, self._core.legs.clock())
        self._all.append(run)
        run.task = task = asyncio.create_task(self._run(run))
        self._open[task] = run

    @property
    def are_open(self) -> bool:
        return bool(self._open)

    @property
    def all(self) -> Sequence[Run]:
        """In the order of their start, which is that of the members."""
        return self._all

    async def next(self, patience: float | None = None) -> list[Run]:
        """Those that have ended since the last time, at least one of them, or none after so many seconds."""
        done, _ = await asyncio.wait(self._open, timeout=patience, return_when=asyncio.FIRST_COMPLETED)
        return sorted((self._open.pop(task) for task in done), key=lambda run: run.place)

    async def keep(self, run: Run) -> Reply:
        """Make the answer of `run` that of the request, and cancel the others. Raises its error, if it has one."""
        self._kept = run
        take_over(self.call, run.leg, run.model)
        await self._end(self._lost.value)
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
        message = exc.args[0] if isinstance(exc, asyncio.CancelledError) and exc.args else ""
        kept = self._kept
        if kept is None:
            self._note_tried()
        elif kept.reply is not None:
            await kept.reply.aclose(LOST.get(message, CLIENT_GONE))
        await self._end(message)

    async def _run(self, run: Run) -> None:
        """The task of a run: never raises but CancelledError, and then there is no open Reply."""
        try:
            run.reply = reply = await self._core.members.send(run.leg, run.model)
            run.answered = await self._work(run, reply)
        except BaseException as exc:
            run.error, run.outcome = exc, exc.outcome if isinstance(exc, RouterError) else outcome_of(exc)
            if run.reply is not None:
                await run.reply.aclose(run.outcome)
            if isinstance(exc, httpx.TransportError):
                run.error = unusable(run.outcome)
            elif not isinstance(exc, Exception):
                raise
            elif not isinstance(exc, RouterError):
                fields = {"request_id": run.leg.request_id}
                logger.exception("a member of a virtual model failed", extra={"fields": fields})

    async def _end(self, message: str) -> None:
        """End all runs but the one that is kept; `message`: of their cancellation."""
        others = [run for run in self._all if run is not self._kept and not run.recorded]
        working: list[asyncio.Task[None]] = []
        for run in others:
            assert run.task is not None
            if run.is_open:
                run.task.cancel(message)
                # Not after the wait, which may be cancelled.
                run.task.add_done_callback(lambda task, run=run: self._record(run))  # type: ignore[misc]
                working.append(run.task)
                continue
            reply = run.reply
            if run.error is None and reply is not None:
                if run.outcome is None:
                    run.outcome = LOST.get(message, CLIENT_GONE) if run.answered else of_status(reply.status)
                await reply.aclose(run.outcome)
            self._record(run)
        if working:
            await asyncio.wait(working)

    def _record(self, run: Run) -> None:
        if run.recorded:
            return
        run.recorded = True
        if not run.leg.tried or _RECORDED in run.leg.state:
            # It never reached a backend, or was itself a virtual model.
            return
        error = run.error if isinstance(run.error, RouterError) else None
        outcome = run.outcome or CLIENT_GONE
        self._core.legs.end(self._kind, run.leg, run.model, run.began, outcome, run.reply, error, tokens=run.tokens)

    def _note_tried(self) -> None:
        """No answer is returned: all legs have Records, and the request shows that a backend was asked."""
        first = next((run for run in self._all if run.leg.tried), None)
        if first is not None:
            state: dict[str, Any] = self.call.state  # type: ignore[assignment]
            self.call.tried.extend(first.leg.tried)
            state[RAN] = first.leg.state.get(RAN, first.model)
            state[_RECORDED] = True


def present(core: Core, names: Iterable[str], model: Model) -> list[Model]:
    """The members of these names. Raises NoBackend if there is none: the catalogue may have changed."""
    found = [member for name in names if (member := core.fleet.by_name.get(name)) is not None]
    if not found:
        raise NoBackend(model.name, none=True)
    return found
