"""Shadowing by the catalogue key `shadow`: a share of a model's requests is copied to another model, unseen.

The copy is a request of its own, in a task of its own: it neither delays nor changes the request, and its answer is
read and dropped. It takes nothing from limits and budgets. Under load copies are left out first.
"""

import asyncio
import logging
import math
from collections.abc import Awaitable, Iterator, Mapping

import httpx
from pydantic import BaseModel, ConfigDict, Field

from inference_api.core import Core
from inference_api.errors import RouterError
from inference_api.feature import Feature, Switch
from inference_api.members import SHADOW, is_shadow, may_get
from inference_api.models import Call, Outcome, Reply, Send
from inference_api.observe.account import NO_COUNTS
from inference_api.observe.exposition import Family
from inference_api.observe.families import counter
from inference_api.observe.series import Count, Series
from inference_api.relay.drained import Drained, drain
from inference_api.routing.entries import CatalogueEntry, EntryKey, ModelName
from inference_api.routing.fleet import Model
from inference_api.routing.references import Refers
from inference_api.settings import Settings
from inference_api.upstream.failures import outcome_of

logger = logging.getLogger(__name__)

# Share of the target's `max_in_flight` from which on it gets no copies
_BUSY = 0.7


class Copies(BaseModel):
    """To which model, which share of the requests, and how many at once."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    to: ModelName
    sample: float = Field(gt=0, le=1, allow_inf_nan=False)
    max_in_flight: int = Field(default=20, ge=1, strict=True)


KEY: EntryKey[Copies | None] = EntryKey(
    "shadow", Copies | None, None, Refers(lambda copies: (copies.to,), "shadow.to", follows=True)
)


def build(core: Core, settings: Settings) -> Feature:
    """Always built: the key turns it on for its model."""
    shadows = Shadows(core)
    core.on_drain(shadows.cancel)
    return Feature(
        "shadow",
        fields=("store",),
        ask=shadows.ask,
        for_model=has_shadow,
        collect=shadows.collect,
        tasks=(shadows.run,),
    )


def has_shadow(entry: CatalogueEntry) -> bool:
    return KEY.of(entry) is not None


class Shadows:
    """Starts copies, and counts them."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self._random = core.rand.random
        # By the model that they are copied from; only those that have any
        self._running: dict[str, int] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._results: Series[tuple[str, str, str], Count] = Series(
            lambda key: Count(), lambda key: key[0] in core.fleet.served
        )

    def ask(self, send: Send) -> Send:
        """The layer, inside of admission: what is refused is not copied."""

        def shadowed(call: Call, model: Model) -> Awaitable[Reply]:
            copies = KEY.of(model.entry)
            if copies is not None and self._random() < copies.sample and _may_be_copied(call):
                self._start(call, model, copies)
            return send(call, model)

        return shadowed

    async def run(self) -> None:
        """Until it is cancelled; then no copy is left."""
        try:
            await asyncio.get_running_loop().create_future()
        finally:
            self.cancel()
            if self._tasks:
                await asyncio.wait(self._tasks)

    def cancel(self) -> None:
        """End all copies."""
        for task in self._tasks:
            task.cancel()

    def collect(self) -> Iterator[Family]:
        if self._results:
            yield from families({labels: cell.count for labels, cell in self._results.snapshot().items()})

    def _start(self, call: Call, model: Model, copies: Copies) -> None:
        """Start a copy, unless it would be in the way."""
        target, running = self._core.fleet.by_name.get(copies.to), self._running.get(model.name, 0)
        may = target is not None and may_get(call, target) and not _is_busy(target)
        if target is None or not may or running >= copies.max_in_flight or self._is_draining:
            self._count(model.name, copies.to, "skipped")
            return
        # A request of its own, with a state of its own: it outlives the one that it is a copy of.
        copy = call._replace(tried=[], state={SHADOW: True}, answer_headers=[], deadline=0.0)
        self._running[model.name] = running + 1
        task = asyncio.create_task(self._copy(copy, target, model.name))
        self._tasks.add(task)
        task.add_done_callback(lambda task: self._ended(task, model.name))

    @property
    def _is_draining(self) -> bool:
        return self._core.seconds_left() < math.inf

    def _ended(self, task: "asyncio.Task[None]", source: str) -> None:
        self._tasks.discard(task)
        self._running[source] -= 1
        if not self._running[source]:
            del self._running[source]

    async def _copy(self, call: Call, target: Model, source: str) -> None:
        legs, reply, error = self._core.legs, None, None
        # Of one that is cancelled: only a drain does that.
        began, drained = legs.clock(), Drained(Outcome.DRAIN_TIMEOUT, NO_COUNTS, 0)
        try:
            reply = await self._core.members.send(call, target)
            drained = await drain(reply, call.route)
        except RouterError as exc:
            error, drained = exc, Drained(exc.outcome, NO_COUNTS, 0)
        except httpx.TransportError as exc:
            drained = Drained(outcome_of(exc), NO_COUNTS, 0)
        except Exception:
            drained = Drained(Outcome.INTERNAL_ERROR, NO_COUNTS, 0)
            logger.exception("a shadow failed", extra={"fields": {"request_id": call.request_id}})
        finally:
            outcome, tokens, events = drained
            if reply is not None:
                await reply.aclose(outcome)
            self._count(source, target.name, "ok" if outcome is Outcome.OK else "error")
            legs.end("shadow", call, target, began, outcome, reply, error, tokens, events)

    def _count(self, source: str, target: str, result: str) -> None:
        self._results[source, target, result].count += 1


def families(results: Mapping[tuple[str, str, str], int]) -> Iterator[Family]:
    """`results`: by model, target and result."""
    text = "Copies of requests by what became of them; skipped: too many at once, or the target is busy or gone."
    series = [(labels, float(count)) for labels, count in results.items()]
    yield counter("shadow_requests", text, ("model_name", "to", "result"), series)


def _may_be_copied(call: Call) -> bool:
    """Not what may be stored, and no copy of a copy."""
    store = call.fields.get("store")
    stores = store is True if call.route.repeatable else store is not False
    return not stores and not is_shadow(call.state)


def _is_busy(model: Model) -> bool:
    limit = model.entry.max_in_flight
    return limit is not None and model.in_flight >= _BUSY * limit


FEATURE = Switch(build, keys=(KEY,))
