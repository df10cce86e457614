"""From samples to a table: medians over the clean slices, and ratios within each."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median


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


# What we promise: (load, the other one, our median ratio to it, at most).
BUDGETS = (("json", "vllm-router", 0.9), ("streams", "vllm-router", 0.9), ("streams", "nginx", 1.5))
IDLE_BUDGET_MB = 60
OPEN_BUDGET_KB = 30

# heading, width, field, factor, format
_COLUMNS = (
    ("kernel", 8, "kernel_share", 1, ".0%"),
    ("p50 ms", 9, "held_p50", 1e3, ".2f"),
    ("p99 ms", 9, "held_p99", 1e3, ".2f"),
    ("per s", 8, "per_second", 1, ".0f"),
    ("router", 8, "router_busy", 1, ".0%"),
    ("load", 6, "load_busy", 1, ".0%"),
    ("noise", 7, "noise", 1, ".0%"),
    ("ev/read", 9, "events_per_read", 1, ".2f"),
    ("idle MB", 9, "idle_mb", 1, ".1f"),
    ("KB/conn", 9, "open_kb", 1, ".1f"),
)


def quantile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))] if ordered else 0.0


def ratio(samples: Sequence[Sample], load: str, candidate: str, other: str) -> float | None:
    """The median of candidate / other over the slices where both are clean: measured within seconds of each other."""
    mine, theirs = ({(s.round, s.slice): s.cpu_us for s in _usable(samples, load, name)} for name in (candidate, other))
    if not any(mine.values()) or not any(theirs.values()):
        return None
    pairs = [mine[at] / theirs[at] for at in mine.keys() & theirs.keys()]
    return median(pairs) if pairs else median(mine.values()) / median(theirs.values())


def added(samples: Sequence[Sample], load: str, candidate: str, field: str) -> float | None:
    """Seconds that a latency is above that without a router: the median difference within a slice."""
    mine, direct = (
        {(s.round, s.slice): getattr(s, field) for s in _usable(samples, load, name)} for name in (candidate, "direct")
    )
    if not mine or not direct:
        return None
    pairs = [mine[at] - direct[at] for at in mine.keys() & direct.keys()]
    difference: float = median(pairs) if pairs else median(mine.values()) - median(direct.values())
    return difference


def _usable(samples: Sequence[Sample], load: str, candidate: str) -> list[Sample]:
    """The clean samples; all of them, when the machine was never quiet."""
    mine = [s for s in samples if s.load == load and s.candidate == candidate]
    return [s for s in mine if s.clean] or mine


def table(samples: Sequence[Sample], versions: dict[str, str], machine: dict[str, str]) -> str:
    lines = [f"{machine['cpu']}, Linux {machine['kernel']}, Python {machine['python']}"]
    lines += [", ".join(f"{name} {version}" for name, version in versions.items())]
    speeds = sorted(sample.yardstick_ms for sample in samples)
    lines += [f"yardstick: median {median(speeds):.1f} ms, fastest {speeds[0]:.1f}, slowest {speeds[-1]:.1f}"]
    for load in dict.fromkeys(sample.load for sample in samples):
        lines += ["", *_load_lines([s for s in samples if s.load == load])]
    return "\n".join([*lines, "", *_budget_lines(samples)]).rstrip()


def _load_lines(samples: Sequence[Sample]) -> list[str]:
    unit = "event; p50, p99: how long an event was on its way" if samples[0].streamed else "request"
    headings = "".join(f"{heading:>{width}}" for heading, width, *_ in _COLUMNS)
    return [
        f"{samples[0].load}: CPU per {unit}",
        f"{'':20}{'us':>8}{'(min - max)':>18}{'/nginx':>8}{'/vllm':>7}{'clean':>8}{headings}  bytes",
        *(_row(samples, name) for name in dict.fromkeys(s.candidate for s in samples)),
        *_latency_lines(samples),
    ]


def _latency_lines(samples: Sequence[Sample]) -> list[str]:
    """What each candidate adds to the latencies of no router, at the same fixed rate."""
    if not samples[0].open_loop or all(s.candidate != "direct" for s in samples):
        return []
    kinds = [("first token" if samples[0].streamed else "first byte", "first_byte")]
    kinds += [("an event" if samples[0].streamed else "the answer", "held")]
    lines = ["", f"{samples[0].load}: ms later than without a router, at the same rate"]
    for name in dict.fromkeys(s.candidate for s in samples if s.candidate != "direct"):
        cells = []
        for kind, field, share in [(*kind, share) for kind in kinds for share in ("p50", "p99")]:
            value = added(samples, samples[0].load, name, f"{field}_{share}")
            cells.append(f"{kind} {share} {'-' if value is None else f'{value * 1e3:+.2f}'}")
        lines.append(f"{name:20}{'   '.join(cells)}")
    return lines


def _row(samples: Sequence[Sample], name: str) -> str:
    load = samples[0].load
    mine, total = _usable(samples, load, name), sum(s.candidate == name for s in samples)
    clean = f"{sum(s.clean for s in mine)}/{total}"
    costs = [s.cpu_us for s in mine]
    span = f"({min(costs):.1f} - {max(costs):.1f})"
    ratios = [ratio(samples, load, name, other) for other in ("nginx", "vllm-router")]
    to_nginx, to_vllm = ("-" if value is None else f"{value:.2f}" for value in ratios)
    cells = "".join(
        f"{format(median(getattr(s, field) for s in mine) * factor, how):>{width}}"
        for _, width, field, factor, how in _COLUMNS
    )
    exact = "same" if all(s.exact for s in mine) else "CHANGED"
    return f"{name:20}{median(costs):8.1f}{span:>18}{to_nginx:>8}{to_vllm:>7}{clean:>8}{cells}  {exact}"


def _budget_lines(samples: Sequence[Sample]) -> list[str]:
    lines = []
    for load, other, limit in BUDGETS:
        if value := ratio(samples, load, "ours", other):
            lines.append(f"budget {load}: ours / {other} {value:.2f}, at most {limit}: {_verdict(value, limit)}")
    if idle := [s.idle_mb for s in samples if s.candidate == "ours"]:
        verdict = _verdict(median(idle), IDLE_BUDGET_MB)
        lines.append(f"budget memory: ours idle {median(idle):.1f} MB, at most {IDLE_BUDGET_MB}: {verdict}")
    if held := [s.open_kb for s in _usable(samples, "open", "ours")]:
        verdict = _verdict(median(held), OPEN_BUDGET_KB)
        lines.append(f"budget memory: ours {median(held):.1f} KB per open stream, at most {OPEN_BUDGET_KB}: {verdict}")
    return lines


def _verdict(value: float, limit: float) -> str:
    return "met" if value <= limit else "MISSED"
