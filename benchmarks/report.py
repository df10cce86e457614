"""What is printed and drawn of a run."""

from collections.abc import Sequence
from statistics import median

from benchmarks.chart import Panel, Point
from benchmarks.samples import LATENCIES, OTHERS, Sample, added, differences, medians, points, ratio, routers, usable

# What we promise: (load, the other one, our median ratio to it, at most).
BUDGETS = (
    ("json", "vllm-router", 0.9),
    ("streams", "vllm-router", 0.9),
    ("streams", "nginx", 1.5),
    ("json", "starlette-httpx", 1 / 20),
    ("json", "litellm", 1 / 100),
)
# (field of a sample, milliseconds over direct at 1,000 requests/s)
LATENCY_BUDGETS_MS = (("held_p50", 0.3), ("held_p99", 2.0))
IDLE_BUDGET_MB = 60
OPEN_BUDGET_KB = 30
OPEN_LOAD = "slow-2000"
# Closed loops that fill a router, and what they count
SATURATED = {"json": "requests", "flood": "events"}
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
        f"{'':20}{'us':>8}{'(min - max)':>22}{'/nginx':>8}{'/vllm':>7}{'clean':>8}{headings}{'limit':>8}  bytes",
        *(_row(samples, name) for name in dict.fromkeys(s.candidate for s in samples)),
        *_latency_lines(samples),
    ]


def _latency_lines(samples: Sequence[Sample]) -> list[str]:
    """What each candidate adds to the latencies of no router, at the same fixed rate."""
    load, streamed = samples[0].load, samples[0].streamed
    if not samples[0].open_loop or all(s.candidate != "direct" for s in samples):
        return []
    lines = ["", f"{load}: ms later than without a router, at the same rate"]
    for name in routers(samples, load):
        cells = []
        for field in LATENCIES:
            value = added(samples, load, name, field)
            cells.append(f"{_said(field, streamed)} {'-' if value is None else f'{value * 1e3:+.2f}'}")
        lines.append(f"{name:20}{'   '.join(cells)}")
    return lines


def _said(field: str, streamed: bool) -> str:
    kind, _, share = field.rpartition("_")
    names = ("first token", "an event") if streamed else ("first byte", "the answer")
    return f"{names[kind == 'held']} {share}"


def _row(samples: Sequence[Sample], name: str) -> str:
    row = medians(samples, samples[0].load, name)
    span = f"({row['cpu_us_min']:.1f} - {row['cpu_us_max']:.1f})"
    to_nginx, to_vllm = ("-" if row["ratio"][other] is None else f"{row['ratio'][other]:.2f}" for other in OTHERS)
    cells = "".join(f"{format(row[field] * factor, how):>{width}}" for _, width, field, factor, how in _COLUMNS)
    exact = "same" if row["exact"] else "CHANGED"
    clean = f"{row['clean']}/{row['samples']}"
    return (
        f"{name:20}{row['cpu_us']:8.1f}{span:>22}{to_nginx:>8}{to_vllm:>7}{clean:>8}{cells}{row['limit']:>8}  {exact}"
    )


def _budget_lines(samples: Sequence[Sample]) -> list[str]:
    lines = []
    for load, other, limit in BUDGETS:
        if value := ratio(samples, load, "ours", other):
            lines.append(f"budget {load}: ours / {other} {value:.3f}, at most {limit}: {_verdict(value, limit)}")
    for field, most in LATENCY_BUDGETS_MS:
        if (later := added(samples, "rate-1000", "ours", field)) is not None:
            what = f"budget rate-1000: ours {later * 1e3:+.2f} ms to {_said(field, streamed=False)}"
            lines.append(f"{what}, at most {most}: {_verdict(later * 1e3, most)}")
    if idle := [s.idle_mb for s in samples if s.candidate == "ours"]:
        verdict = _verdict(median(idle), IDLE_BUDGET_MB)
        lines.append(f"budget memory: ours idle {median(idle):.1f} MB, at most {IDLE_BUDGET_MB}: {verdict}")
    if held := [s.open_kb for s in usable(samples, OPEN_LOAD, "ours")]:
        verdict = _verdict(median(held), OPEN_BUDGET_KB)
        lines.append(f"budget memory: ours {median(held):.1f} KB per open stream, at most {OPEN_BUDGET_KB}: {verdict}")
    return lines


def _verdict(value: float, limit: float) -> str:
    return "met" if value <= limit else "MISSED"


def panels(samples: Sequence[Sample]) -> list[Panel]:
    """The charts of a run: the cost of each load, what a fixed rate shows, saturation, memory."""
    loads = dict.fromkeys((s.load, s.streamed, s.open_loop) for s in samples)
    out = []
    for load, streamed, _ in loads:
        unit = "event" if streamed else "request"
        out.append(_panel(samples, load, "cpu_us", f"{load}: CPU per {unit}", f"us per {unit}"))
    for load, streamed, open_loop in loads:
        # A JSON answer comes in one piece: its first byte is its last.
        for field in (LATENCIES if streamed else LATENCIES[2:]) if open_loop else ():
            title = f"{load}: {_said(field, streamed)}"
            out.append(Panel(title, "ms later than without a router", _later(samples, load, field)))
    for load in (load for load, *_ in loads if load in SATURATED):
        title, unit = f"{load}: at saturation", f"{SATURATED[load]} per second, one core"
        out.append(_panel(samples, load, "per_second", title, unit, "direct"))
    if any(load == OPEN_LOAD for load, *_ in loads):
        out.append(_panel(samples, OPEN_LOAD, "open_kb", "memory per open stream", f"KB, under {OPEN_LOAD}"))
    out.append(_panel(samples, samples[0].load, "idle_mb", "memory when idle", "MB"))
    return [panel for panel in out if panel.points]


def _panel(samples: Sequence[Sample], load: str, field: str, title: str, unit: str, *more: str) -> Panel:
    return Panel(title, unit, points(samples, load, [*more, *routers(samples, load)], field))


def _later(samples: Sequence[Sample], load: str, field: str) -> list[Point]:
    found = {name: differences(samples, load, name, field) for name in routers(samples, load)}
    ms = {name: [value * 1e3 for value in values] for name, values in found.items() if values}
    return [Point(name, median(values), min(values), max(values)) for name, values in ms.items()]
