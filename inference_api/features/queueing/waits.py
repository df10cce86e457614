"""What is counted of requests that wait: how many, for how long, and how fast they go on."""

from collections import deque
from collections.abc import Iterator
from math import ceil
from typing import Final, Literal

from inference_api.core import Core
from inference_api.models import Call, note
from inference_api.observe.exposition import Family
from inference_api.observe.families import gauge, seconds
from inference_api.observe.series import Count, Histogram, Series
from inference_api.routing.entries import CatalogueEntry

Kind = Literal["queue", "hold"]
# Seconds
BUCKETS: Final = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_LABELS = ("model_name", "kind")
# The field of the access line and the usage record
_NOTE: Final = "queued_ms"
# Requests that went on by which the rate is measured, and Retry-After before there is one
_MEASURED = 64
_UNKNOWN = 5
# Under which the state of a request has the milliseconds that it has waited
_WAITED = "waited_ms"


class Waits:
    """The numbers of all models; shared by the features whose requests wait."""

    def __init__(self, core: Core) -> None:
        self._fleet = fleet = core.fleet
        self._version = fleet.version
        self._depths: Series[tuple[str, Kind], Count] = Series(lambda labels: Count())
        self._seconds: Series[tuple[str, Kind], Histogram] = Series(
            lambda labels: Histogram(BUCKETS), lambda labels: labels[0] in fleet.models
        )

    @classmethod
    def shared(cls, core: Core) -> "Waits":
        """The one of this router."""
        found = core.provided(cls)
        if found is None:
            core.provide(found := cls(core))
        return found

    def began(self, model: str, kind: Kind) -> None:
        self._depths[model, kind].count += 1

    def ended(self, model: str, kind: Kind, call: Call, waited: float) -> None:
        """Note the end of a wait, however it ended; `waited`: seconds."""
        labels = model, kind
        depth = self._depths[labels]
        depth.count -= 1
        if not depth.count:
            # At 0 only models of the catalogue are shown.
            del self._depths[labels]
        if self._version != self._fleet.version:
            # Models may have left.
            self._version = self._fleet.version
            self._seconds.forget()
        self._seconds[labels].observe(waited)
        # A request may wait more than once.
        state = call.state
        total = state.get(_WAITED, 0.0) + waited * 1000
        state[_WAITED] = total  # type: ignore[index]
        note(state, _NOTE, round(total, 2))

    def depth(self, model: str, kind: Kind) -> int:
        cell = self._depths.get((model, kind))
        return 0 if cell is None else cell.count

    def collect(self) -> Iterator[Family]:
        depths, waits = self._shown(), self._seconds.snapshot()
        if depths or waits:
            yield from families(depths, waits)

    def _shown(self) -> dict[tuple[str, Kind], int]:
        """A model that may have requests waiting has a series at 0, too: autoscalers take none for a fault."""
        shown: dict[tuple[str, Kind], int] = {}
        for name, model in dict(self._fleet.models).items():
            shown |= {(name, kind): 0 for kind in kinds(model.entry)}
        return shown | {labels: cell.count for labels, cell in self._depths.snapshot().items()}


def kinds(entry: CatalogueEntry) -> Iterator[Kind]:
    """How requests for this model may wait."""
    if getattr(entry, "queue", None) is not None:
        yield "queue"
    if getattr(entry, "hold", None) is not None:
        yield "hold"


def families(depths: dict[tuple[str, Kind], int], waits: dict[tuple[str, Kind], Histogram]) -> Iterator[Family]:
    text = "Requests that wait: for a place below max_in_flight (queue), or for a backend (hold)."
    yield gauge("queue_depth", text, _LABELS, [(labels, float(depth)) for labels, depth in depths.items()])
    text = "Seconds that requests have waited, whether they went on or not."
    yield seconds("queue_wait", text, _LABELS, waits.items())


class Rate:
    """How many requests go on per second, while some wait; times in seconds."""

    def __init__(self) -> None:
        self._times: deque[float] = deque(maxlen=_MEASURED)

    def begin(self, now: float) -> None:
        """The first request waits."""
        self._times.clear()
        self._times.append(now)

    def went_on(self, now: float) -> None:
        self._times.append(now)

    def seconds_for(self, requests: int, now: float) -> int:
        """After how many seconds so many requests will have gone on, rounded up."""
        went = len(self._times) - 1
        if went < 1:
            return _UNKNOWN
        # Rounded first: 4.0000001 is 4.
        return max(1, ceil(round(requests * (now - self._times[0]) / went, 3)))
