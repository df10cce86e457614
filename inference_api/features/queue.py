"""The catalogue key `queue`: at the model's `max_in_flight` requests wait for a place, rather than be refused.

A place that becomes free goes at once to the request whose turn it is, see `queueing.fair`: nothing polls, and one
request wakes for one place. The place is kept for it: no request that arrives meanwhile can take it.
"""

import asyncio
from collections.abc import Hashable, Iterator
from time import monotonic
from typing import NamedTuple

from pydantic import BaseModel, ConfigDict, Field

from inference_api.core import Core
from inference_api.errors import Overloaded
from inference_api.feature import Feature, Switch
from inference_api.features.limiting.amounts import FIELDS, Estimates
from inference_api.features.limiting.plans import address_of
from inference_api.features.queueing.fair import FairQueue, Full, Turn
from inference_api.features.queueing.waits import Kind, Rate, Waits
from inference_api.models import Call, Caller, Reply, Send
from inference_api.observe.exposition import Family
from inference_api.routing.entries import CatalogueEntry, EntryKey
from inference_api.routing.fleet import Model
from inference_api.settings import Settings
from inference_api.upstream.admission import Process
from inference_api.upstream.prepare import Prepare

_KIND: Kind = "queue"
# Of `size`, for one caller
_PART = 4


class Bounds(BaseModel):
    """`timeout`: seconds. `size`: requests of all callers; `per_caller`: default a quarter of it."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    timeout: float = Field(gt=0, allow_inf_nan=False, strict=True)
    size: int = Field(ge=1, le=100_000, strict=True)
    per_caller: int | None = Field(default=None, ge=1, strict=True)

    @property
    def of_caller(self) -> int:
        return max(self.size // _PART, 1) if self.per_caller is None else self.per_caller


KEY: EntryKey[Bounds | None] = EntryKey("queue", Bounds | None, None)


class Wanted(NamedTuple):
    """What decides on the turn of a request."""

    caller: Hashable
    priority: int
    weight: float
    cost: int


def build(core: Core, settings: Settings) -> Feature:
    """Always built, and only on the way of models with the key."""
    queues = Queues(core.admission, Estimates.shared(core), Waits.shared(core), core.prepare)
    return Feature(
        "queue", fields=FIELDS, send=queues.send, member=queues.send, for_model=has_queue, collect=queues.collect
    )


def has_queue(entry: CatalogueEntry) -> bool:
    return KEY.of(entry) is not None


def refuse(entry: CatalogueEntry) -> str | None:
    if has_queue(entry) and entry.max_in_flight is None:
        return "`queue` needs `max_in_flight`: at that many requests others wait"
    return None


class Queues:
    """The queue of each model. `process`: its limit is no reason to wait. `prepare`: how long a request may take."""

    def __init__(self, process: Process, estimates: Estimates, waits: Waits, prepare: Prepare) -> None:
        self._process = process
        self._estimates = estimates
        self._waits = waits
        self._prepare = prepare
        # Those with requests in them
        self._lines: dict[Model, Line] = {}

    def send(self, send: Send) -> Send:
        """The layer, directly around admission. Raises Overloaded."""
        process = self._process

        # A coroutine: what it finds must still hold when admission looks.
        async def queued(call: Call, model: Model) -> Reply:
            limit = model.entry.max_in_flight
            if limit is None or model.in_flight < limit or process.in_flight > process.max_in_flight:
                return await send(call, model)
            return await self._wait(send, call, model)

        return queued

    def collect(self) -> Iterator[Family]:
        """Of holding, too."""
        return self._waits.collect()

    async def _wait(self, send: Send, call: Call, model: Model) -> Reply:
        bounds = KEY.of(model.entry)
        if bounds is None:
            # The entry has changed since the layers were composed.
            return await send(call, model)
        # Adapters have the places of their model.
        owner = model.parent or model
        line = self._lines.get(owner)
        if line is None:
            line = self._lines[owner] = Line(owner)
        wanted = self._wanted(call, model)
        line.check(wanted.caller, bounds)
        if not call.deadline:
            # The wait is a part of the time of the request.
            call = call._replace(deadline=self._prepare.deadline(call, model))
        began = monotonic()
        end = min(began + bounds.timeout, call.deadline)
        self._waits.began(owner.name, _KIND)
        try:
            await line.place(wanted, end)
        finally:
            self._waits.ended(owner.name, _KIND, call, monotonic() - began)
            if not line.queue:
                self._lines.pop(owner, None)
        # Admission takes it in this very turn of the loop.
        model.in_flight -= 1
        try:
            return await send(call, model)
        except BaseException:
            # Admission may have refused it: the process is full.
            line.fill()
            raise

    def _wanted(self, call: Call, model: Model) -> Wanted:
        caller = call.caller
        cost = sum(self._estimates.of(call, model))
        return Wanted(caller_of(call, caller), getattr(caller, "priority", 0), getattr(caller, "weight", 1.0), cost)


def caller_of(call: Call, caller: Caller | None) -> Hashable:
    """Who waits: a key, else a client address."""
    if caller is not None and caller.id is not None:
        return caller.id
    return ("" if call.client is None else address_of(call.client[0]),)


class Line:
    """The requests that wait for a place of one model."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self.queue: FairQueue[asyncio.Future[bool]] = FairQueue()
        self._rate = Rate()

    def check(self, caller: Hashable, bounds: Bounds) -> None:
        """Raises Overloaded if there is no room for one more request of this caller."""
        full = self.queue.full(caller, bounds.size, bounds.of_caller)
        if full is not None:
            raise self._overloaded(_FULL[full], "queue_full")

    async def place(self, wanted: Wanted, end: float) -> None:
        """Wait for a place until `end`, in loop time; it is then counted in the model. Raises Overloaded."""
        began, model = monotonic(), self._model
        while await self._turn(wanted, end - monotonic()):
            limit = model.entry.max_in_flight
            if limit is None or model.in_flight <= limit:
                return
            # The limit was lowered since the place was given.
            model.in_flight -= 1
        text = f"No place of {{}} became free within {round(end - began, 3):g} s."
        raise self._overloaded(text, "queue_timeout")

    async def _turn(self, wanted: Wanted, seconds: float) -> bool:
        """Whether it has got a place."""
        loop = asyncio.get_running_loop()
        if not self.queue:
            self._rate.begin(monotonic())
            self._model.subscribe(self.fill)
        turn = self.queue.add(*wanted, loop.create_future())
        timer = loop.call_later(seconds, self._expire, turn)
        try:
            return await turn.item
        except BaseException:
            # The client has left, or the time of the drain is over; perhaps just after it got its place.
            if not self.queue.remove(turn) and turn.item.done() and not turn.item.cancelled() and turn.item.result():
                self._model.in_flight -= 1
                self.fill()
            raise
        finally:
            timer.cancel()
            self._end()

    def fill(self) -> None:
        """Give the places that are free to those whose turn it is."""
        model, queue = self._model, self.queue
        limit = model.entry.max_in_flight
        while queue and (limit is None or model.in_flight < limit):
            turn = queue.next()
            if turn is not None and not turn.item.done():
                model.in_flight += 1
                self._rate.went_on(monotonic())
                turn.item.set_result(True)
        self._end()

    def _expire(self, turn: Turn[asyncio.Future[bool]]) -> None:
        if self.queue.remove(turn) and not turn.item.done():
            turn.item.set_result(False)

    def _end(self) -> None:
        if not self.queue:
            self._model.unsubscribe(self.fill)

    def _overloaded(self, text: str, reason: str) -> Overloaded:
        wait = self._rate.seconds_for(len(self.queue) + 1, monotonic())
        return Overloaded(text.format(f"the model {self._model.name!r}"), wait, reason)


_FULL: dict[Full, str] = {
    "all": "The queue of {} is full.",
    "caller": "The queue of {} is full for this caller: it has as many requests there as it may.",
}

FEATURE = Switch(build, keys=(KEY,), refuse=lambda settings: refuse)
