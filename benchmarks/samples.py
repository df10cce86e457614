"""What was measured, and what it comes to: medians over the clean slices, and ratios within each."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from benchmarks.chart import Point

# Shares of a core from which on it is what sets the pace
_ROUTER_FULL, _LOAD_FULL = 0.9, 0.95
# Whom the ratios are to
OTHERS = ("nginx", "vllm-router")
# Fields of a sample whose difference to no router means something under a fixed rate
LATENCIES = ("first_byte_p50", "first_byte_p99", "held_p50", "held_p99")
_FIELDS = (
    *("cpu_us", "kernel_share", "per_second", "router_busy", "load_busy", "noise"),
    *("events_per_read", "idle_mb", "open_kb", *LATENCIES),
)


@dataclass(slots=True)
class Sample:
    """One candidate under one load, once. Times in seconds, unless the name says otherwise."""

    candidate: str
    load: str
    streamed: bool
    units: int
    cpu_us: float
    """Of the router, per unit: a request, or an event of a stream."""
    kernel_share: float
    router_busy: float
    load_busy: float
    """Of the core that engine and client share: near 1, they set the pace, not the router."""
    noise: float
    """The share of a core that others used meanwhile, on the busier of the two."""
    clean: bool
    """The noise was within the limit."""
    per_second: float
    open_loop: bool
    """Requests came at a fixed rate, so that latencies can be compared."""
    first_byte_p50: float
    """From a request to the first byte of its answer, which in a stream is the first token."""
    first_byte_p99: float
    held_p50: float
    """JSON: from request to answer. Streams: from the engine's write of an event to the client's read."""
    held_p99: float
    events_per_read: float
    exact: bool
    open_kb: float
    """Growth of the router's memory per connection, from before they came to the middle of the load."""
    yardstick_ms: float = 0.0
    """CPU time of a fixed loop on the router's core, just before: how fast the machine was."""
    idle_mb: float = 0.0
    round: int = 0
    slice: int = 0

    def __str__(self) -> str:
        return (
            f"{self.load:12} {self.candidate:20} {self.cpu_us:8.1f} us CPU {self.per_second:8.0f}/s"
            f"  noise {self.noise:4.0%}  yardstick {self.yardstick_ms:.1f} ms"
        )


def quantile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))] if ordered else 0.0


def ratio(samples: Sequence[Sample], load: str, candidate: str, other: str) -> float | None:
    """The median of candidate / other over the slices where both are clean: measured within seconds of each other."""
    mine, theirs = ({(s.round, s.slice): s.cpu_us for s in usable(samples, load, name)} for name in (candidate, other))
    if not any(mine.values()) or not any(theirs.values()):
        return None
    pairs = [mine[at] / theirs[at] for at in mine.keys() & theirs.keys()]
    return median(pairs) if pairs else median(mine.values()) / median(theirs.values())


def added(samples: Sequence[Sample], load: str, candidate: str, field: str) -> float | None:
    """Seconds that a latency is above that without a router: the median difference within a slice."""
    found = differences(samples, load, candidate, field)
    return median(found) if found else None


def differences(samples: Sequence[Sample], load: str, candidate: str, field: str) -> list[float]:
    """One for each slice where both are clean; one of the medians if there is no such slice."""
    mine, direct = (
        {(s.round, s.slice): getattr(s, field) for s in usable(samples, load, name)} for name in (candidate, "direct")
    )
    if not mine or not direct:
        return []
    pairs = [mine[at] - direct[at] for at in sorted(mine.keys() & direct.keys())]
    return pairs or [median(mine.values()) - median(direct.values())]


def _is(sample: Sample, load: str, candidate: str) -> bool:
    return sample.load == load and sample.candidate == candidate


def usable(samples: Sequence[Sample], load: str, candidate: str) -> list[Sample]:
    """The clean samples; all of them, when the machine was never quiet."""
    mine = [s for s in samples if _is(s, load, candidate)]
    return [s for s in mine if s.clean] or mine


def medians(samples: Sequence[Sample], load: str, name: str) -> dict[str, Any]:
    """What the table says of a candidate under a load."""
    mine = usable(samples, load, name)
    row: dict[str, Any] = {"load": load, "candidate": name, "samples": sum(_is(s, load, name) for s in samples)}
    row["clean"] = sum(s.clean for s in mine)
    for field in _FIELDS:
        row[field] = median(getattr(s, field) for s in mine)
    row["cpu_us_min"], row["cpu_us_max"] = min(s.cpu_us for s in mine), max(s.cpu_us for s in mine)
    row["ratio"] = {other: ratio(samples, load, name, other) for other in OTHERS}
    row["added"] = {field: added(samples, load, name, field) for field in LATENCIES} if mine[0].open_loop else {}
    row["exact"] = all(s.exact for s in mine)
    row["limit"] = _limit(row["router_busy"], row["load_busy"])
    return row


def _limit(router: float, load: float) -> str:
    """What set the pace: the core of engine and client, the router's, or neither. In doubt it was not the router."""
    if load >= _LOAD_FULL:
        return "load"
    return "router" if router >= _ROUTER_FULL else "-"


def all_medians(samples: Sequence[Sample]) -> list[dict[str, Any]]:
    return [medians(samples, *pair) for pair in dict.fromkeys((s.load, s.candidate) for s in samples)]


def routers(samples: Sequence[Sample], load: str) -> list[str]:
    """The candidates that are one."""
    return list(dict.fromkeys(s.candidate for s in samples if s.load == load and s.candidate != "direct"))


def points(samples: Sequence[Sample], load: str, names: Sequence[str], field: str) -> list[Point]:
    """A field of each candidate, for a chart."""
    values = {name: [getattr(s, field) for s in usable(samples, load, name)] for name in names}
    return [Point(name, median(found), min(found), max(found)) for name, found in values.items() if found]
