"""The catalogue key `hold`: while a model has no backend to try, requests wait for one, rather than be refused.

So a model that is scaled to zero starts for its first request. Overload is no reason to hold a request, and a backend
that refuses connections is one to try. When a backend is there, it does not get all requests at once: two for each
backend go on, and the next one when one of them has an answer.
"""

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Iterator
from functools import partial
from time import monotonic
from typing import Annotated, Literal

from pydantic import Field

from inference_api.core import Core
from inference_api.errors import ModelLoading, NoBackend, ShuttingDown
from inference_api.feature import Feature, Switch
from inference_api.features.queueing.activation import Activations
from inference_api.features.queueing.waits import Kind, Waits
from inference_api.http.admission import Admission
from inference_api.models import Call, Reply, Send
from inference_api.observe.exposition import Family
from inference_api.routing.entries import CatalogueEntry, EntryKey
from inference_api.routing.fleet import Fleet, Model
from inference_api.settings import Settings
from inference_api.upstream.prepare import Prepare

_KIND: Kind = "hold"
# Requests held for one model, and those that go on at once for each of its backends
MOST = 100
_AT_ONCE = 2
_ABSENT = object()
# How a wait ended: it goes on, it has waited long enough, the router stops.
End = Literal["on", "late", "draining"]

KEY: EntryKey[float | None] = EntryKey("hold", Annotated[float, Field(gt=0, le=3600, strict=True)] | None, None)


def build(core: Core, settings: Settings) -> Feature:
    """Always built, and only on the way of models with the key."""
    client = core.registry_client
    activations = None if client is None else Activations(client, core.fleet, core.instance)
    holds = Holds(core.fleet, core.admission, Waits.shared(core), core.prepare, activations)
    core.on_drain(holds.drain)
    return Feature(
        "hold",
        send=holds.send,
        member=holds.send,
        for_model=has_hold,
        collect=holds.collect,
        check=partial(_warnings, core, settings),
    )


def _warnings(core: Core, settings: Settings) -> Iterator[str]:
    for model in core.fleet.models.values():
        hold, total = KEY.of(model.entry), model.entry.timeouts.total or settings.total_timeout
        if hold is not None and hold > total:
            yield f"model {model.name!r}: its hold of {hold:g} s is longer than {total:g} s, after which a request ends"


def has_hold(entry: CatalogueEntry) -> bool:
    return KEY.of(entry) is not None


class Holds:
    """The requests that are held, of all models. `admission`: the bytes that they may have. `most`: for each model."""

    def __init__(
        self,
        fleet: Fleet,
        admission: Admission,
        waits: Waits,
        prepare: Prepare,
        activations: Activations | None = None,
        most: int = MOST,
    ) -> None:
        self._fleet = fleet
        self._admission = admission
        self._waits = waits
        self._prepare = prepare
        self._activations = activations
        self._most = most
        # Those in which a request is, or from which one has gone on and has no answer yet
        self._rooms: dict[Model, Room] = {}
        self._is_draining = False

    def send(self, send: Send) -> Send:
        """The layer. Raises ModelLoading, ShuttingDown."""
        rooms = self._rooms

        async def held(call: Call, model: Model) -> Reply:
            if model.available and model not in rooms:
                tried = len(call.tried)
                try:
                    return await send(call, model)
                except NoBackend as exc:
                    # They went while it waited for a place, or were taken out while it waited for an answer.
                    if not self._may_hold(call, model, tried, exc):
                        raise
                    call = _within(call, exc)
            return await self._hold(send, call, model)

        return held

    def drain(self) -> None:
        """The router stops: no backend is waited for any more."""
        self._is_draining = True
        for room in list(self._rooms.values()):
            room.close()

    def collect(self) -> Iterator[Family]:
        return iter(()) if self._activations is None else self._activations.collect()

    async def _hold(self, send: Send, call: Call, model: Model) -> Reply:
        seconds = KEY.of(model.entry)
        if seconds is None:
            # The entry has changed since the layers were composed.
            return await send(call, model)
        if not call.deadline:
            # The wait is a part of the time of the request.
            call = call._replace(deadline=self._prepare.deadline(call, model))
        began = monotonic()
        end = min(call.deadline, began + seconds)
        while True:
            room = await self._wait(call, model, end, end - began)
            tried = len(call.tried)
            try:
                return await send(call, model)
            except NoBackend as exc:
                if not self._may_hold(call, model, tried, exc):
                    raise
                call = _within(call, exc)
            finally:
                if room is not None:
                    room.answered()
                    self._tidy(room)

    def _may_hold(self, call: Call, model: Model, tried: int, error: NoBackend) -> bool:
        """Whether it failed for want of any backend to try, before anything was sent, or by order of an operator."""
        if model.available or not has_hold(model.entry) or self._is_gone(model):
            return False
        return error.deadline is not None or len(call.tried) == tried

    def _is_gone(self, model: Model) -> bool:
        return self._fleet.served.get(model.name) is not model

    async def _wait(self, call: Call, model: Model, end: float, seconds: float) -> "Room | None":
        """Wait for a backend, if there is none, and for those before it. The room: it must know of the answer."""
        room = self._rooms.get(model)
        if model.available and (room is None or not room.waiting):
            return None
        size, admission = len(call.body), self._admission
        if admission.in_flight > admission.max_in_flight:
            # The process is full: admission refuses it.
            return None
        if self._is_draining and not model.available:
            raise ShuttingDown
        if (room and len(room.waiting) >= self._most) or admission.buffered + size > admission.max_buffered:
            if model.available:
                return None
            raise ModelLoading(f"The model {model.name!r} is starting, and no more requests can wait.", "hold_full")
        if room is None:
            room = self._rooms[model] = Room(model, lambda: self._is_gone(model))
        # For those who start models an adapter is a part of one.
        began, owner = monotonic(), (model.parent or model).name
        self._waits.began(owner, _KIND)
        if self._activations is not None:
            self._activations.start(owner, lambda: self._waits.depth(owner, _KIND))
        admission.buffered += size
        try:
            end_of_wait = await room.wait(end - began)
        finally:
            admission.buffered -= size
            self._waits.ended(owner, _KIND, call, monotonic() - began)
            if self._activations is not None and not self._waits.depth(owner, _KIND):
                self._activations.stop(owner)
            self._tidy(room)
        if end_of_wait == "late":
            text = f"The model {model.name!r} is starting; no backend was ready within {round(seconds, 3):g} s."
            raise ModelLoading(text, "hold_timeout")
        if end_of_wait == "draining":
            raise ShuttingDown
        return room

    def _tidy(self, room: "Room") -> None:
        if not room.waiting and not room.out and self._rooms.get(room.model) is room:
            del self._rooms[room.model]
            room.model.unsubscribe(room.fill)


def _within(call: Call, error: NoBackend) -> Call:
    """The time of a request goes on from its first attempt."""
    return call if call.deadline or error.deadline is None else call._replace(deadline=error.deadline)


class Room:
    """The requests that wait for a backend of one model, first come, first served."""

    def __init__(self, model: Model, is_gone: Callable[[], bool]) -> None:
        self.model = model
        self._is_gone = is_gone
        self.waiting: OrderedDict[asyncio.Future[End], None] = OrderedDict()
        # Went on, and have no answer yet
        self.out = 0
        model.subscribe(self.fill)

    async def wait(self, seconds: float) -> End:
        """Until it may go on (the caller must then call `answered`), or how else the wait ended."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[End] = loop.create_future()
        self.waiting[future] = None
        timer = loop.call_later(seconds, self._expire, future)
        try:
            return await future
        except BaseException:
            # The client has left, perhaps just after it was let out.
            if future.done() and not future.cancelled() and future.result() == "on":
                self.answered()
            raise
        finally:
            timer.cancel()
            self.waiting.pop(future, None)

    def fill(self) -> None:
        """Let out as many as the backends may have, in order; all, if nothing is to be waited for any more."""
        model = self.model
        ends = not has_hold(model.entry) or self._is_gone()
        while self.waiting and (ends or self.out < _AT_ONCE * len(model.available)):
            self._let_out(self.waiting.popitem(last=False)[0])

    def answered(self) -> None:
        """One that was let out has an answer, or has failed."""
        self.out -= 1
        self.fill()

    def close(self) -> None:
        """Those for which there is a backend go on, the others end."""
        while self.waiting:
            future, _ = self.waiting.popitem(last=False)
            if self.model.available:
                self._let_out(future)
            elif not future.done():
                future.set_result("draining")

    def _let_out(self, future: asyncio.Future[End]) -> None:
        if not future.done():
            self.out += 1
            future.set_result("on")

    def _expire(self, future: asyncio.Future[End]) -> None:
        if self.waiting.pop(future, _ABSENT) is _ABSENT:
            return
        if self.model.available:
            # There is a backend, and others were before it.
            self._let_out(future)
        elif not future.done():
            future.set_result("late")


FEATURE = Switch(build, keys=(KEY,))
