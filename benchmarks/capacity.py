"""How many router pods for how many streams: what was measured, in one place, and what follows from it.

python -m benchmarks.capacity --write    # puts its tables into docs/capacity.md; without it, prints them
"""

import argparse
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path

from inference_api.settings import Settings

DOCUMENT = Path(__file__).parent.parent / "docs/capacity.md"
DEFAULTS = Settings()


@dataclass(frozen=True, slots=True)
class Measured:
    """What one router process costs on one core. Change these, then run this program with --write."""

    json_us: float = 70
    """CPU of a JSON request over connections that are kept."""
    event_us: float = 25
    """CPU of a streamed event, accepting the request included; the dear end of what was measured."""
    client_us: float = 85
    """CPU of a client's connection: accept, learn its head, close."""
    backend_us: float = 60
    """CPU of a connection to a backend that could not be reused."""
    idle_mb: float = 43
    stream_kb: float = 22
    own_files: int = 48
    """Kept for itself by `server/server.py`."""
    scrape_kb: float = 467
    """Of /metrics with 1,000 backends, by `benchmarks.fleet_size`."""


MEASURED = Measured()

# A core at 60 % still passes a burst; what is left when a pod dies may come to 90 %.
TARGET, LIMIT = 0.6, 0.9
# Linux: ip_local_port_range 32768-60999, and how long a port is not used again after a close.
PORTS, TIME_WAIT = 60_999 - 32_768 + 1, 60
BACKENDS = 1_000
# Names to look up with `discovery: dns`, and questions for each: Kubernetes tries its search list first (ndots 5).
NAMES, QUESTIONS = 100, 3
TOKENS_PER_ANSWER = 500


@dataclass(frozen=True, slots=True)
class Plan:
    """What so many streams need, each of `rate` tokens per second, an event each, and TOKENS_PER_ANSWER in all."""

    streams: int
    rate: float
    measured: Measured = MEASURED

    @property
    def events(self) -> float:
        """Per second."""
        return self.streams * self.rate

    @property
    def requests(self) -> float:
        """Per second, each over a new connection on both sides: the dearest way."""
        return self.events / TOKENS_PER_ANSWER

    @property
    def cores(self) -> float:
        """That are busy, if there were no other work."""
        connections = self.measured.client_us + self.measured.backend_us
        return (self.events * self.measured.event_us + self.requests * connections) / 1e6

    @property
    def pods(self) -> int:
        """Of one core each: at TARGET, and with one less below LIMIT."""
        return max(ceil(self.cores / TARGET), ceil(self.cores / LIMIT) + 1)

    @property
    def streams_per_pod(self) -> int:
        return ceil(self.streams / self.pods)

    @property
    def rss_mb(self) -> float:
        """Of a pod."""
        return self.measured.idle_mb + self.measured.stream_kb * self.streams_per_pod / 1e3

    @property
    def files(self) -> int:
        """Of a pod: two for each stream, and its own."""
        return 2 * self.streams_per_pod + self.measured.own_files

    @property
    def checks(self) -> float:
        """Health checks of a pod per second, each a connection of its own."""
        return BACKENDS / DEFAULTS.health_interval

    @property
    def connects(self) -> float:
        """To backends, per pod and second, if none is reused."""
        return self.requests / self.pods + self.checks

    @property
    def in_flight_per_backend(self) -> float:
        """That one router sees; balancing is worth what this is worth."""
        return self.streams / self.pods / BACKENDS


def after_rollout(waves: int) -> list[float]:
    """Connections of the pods of each wave over the mean, when none is closed by its client.

    Pods are replaced in so many equal waves, the new ones first; what a wave held is spread evenly over all others.
    """
    old, new = [1.0] * waves, list[float]()
    for _ in range(waves):
        moved = old.pop() / waves
        old, new = [held + moved for held in old], [held + moved for held in (*new, 0.0)]
    return new


PLANS = tuple(
    Plan(streams, rate)
    for streams, rate in (
        (1_000, 20), (10_000, 20), (10_000, 50), (30_000, 20), (100_000, 1), (100_000, 10), (100_000, 20), (100_000, 50)
    )
)  # fmt: skip
LARGE = Plan(100_000, 20)


def measured_table(measured: Measured = MEASURED) -> str:
    bench = "`scripts/bench --candidates nginx,vllm-router,ours`"
    streams = "`scripts/bench --loads slow-2000`, at 2,000 streams"
    connections = "`python -m benchmarks.connections`"
    rows = (
        ("CPU of a JSON request, connections kept", f"{measured.json_us:g} us", bench),
        ("CPU of a streamed event", f"{measured.event_us:g} us", "the same; its request included, over 100 events"),
        ("CPU of a new connection of a client", f"{measured.client_us:g} us", connections),
        ("CPU of a new connection to a backend", f"{measured.backend_us:g} us", "the same"),
        ("memory (RSS), idle", f"{measured.idle_mb:g} MB", bench),
        ("memory of an open stream", f"{measured.stream_kb:g} KB", streams),
        ("files kept for itself", f"{measured.own_files}", "`inference_api/server/server.py`"),
        ("a scrape of `/metrics`, 1,000 backends", f"{measured.scrape_kb:g} KB", "`python -m benchmarks.fleet_size`"),
    )
    return _table(("what", "figure", "by"), rows, ("---", "---:", "---"))


def derived_list(measured: Measured = MEASURED) -> str:
    events, requests = TARGET * 1e6 / measured.event_us, TARGET * 1e6 / measured.json_us
    per_core = events / 20
    in_512 = (512 * 1.048576 - measured.idle_mb) / measured.stream_kb * 1e3
    memory = measured.idle_mb + measured.stream_kb * per_core / 1e3
    quiet = measured.idle_mb + measured.stream_kb * 10
    rolled = after_rollout(4)
    restart = LARGE.streams_per_pod * (measured.client_us + measured.backend_us + measured.json_us) / 1e6
    lines = (
        f"a core at {_percent(TARGET)} passes {events:,.0f} events/s, or {requests:,.0f} JSON requests/s;",
        f"that is {per_core:,.0f} streams of 20 tokens/s, in {memory:,.0f} MB;",
        f"with the default MAX_IN_FLIGHT of {DEFAULTS.max_in_flight:,} the core is full only if a stream has "
        f"{events / DEFAULTS.max_in_flight:.0f} tokens/s or more; slower ones get 503 before;",
        f"512 MiB hold {in_512:,.0f} streams, so memory comes before the core below {events / in_512:.1f} events/s "
        "of each;",
        f"no row needs more than {max(plan.files for plan in PLANS):,} files in a pod;",
        f"a backend that makes 2,500 tokens/s costs {2500 * measured.event_us / 1e6 / TARGET:.2f} of a core here;",
        f"10,000 silent streams are {quiet:,.0f} MB in one process;",
        f"a microsecond per event more or less is {LARGE.events / 1e6 / TARGET:.1f} pods of the {LARGE.pods} for "
        f"{LARGE.streams:,} streams of {LARGE.rate:g} tokens/s;",
        f"these {LARGE.pods} pods ask {BACKENDS:,} backends for their health {LARGE.pods * LARGE.checks:,.0f} times a "
        f"second, {LARGE.pods / DEFAULTS.health_interval:.1f} times each, and show Prometheus "
        f"{LARGE.pods * measured.scrape_kb / 1e3:,.0f} MB per scrape;",
        f"each of them opens up to {LARGE.connects:,.0f} connections/s to backends, and has up to "
        f"{LARGE.connects * TIME_WAIT:,.0f} closed ones in TIME_WAIT, {LARGE.connects * TIME_WAIT / BACKENDS:.0f} of "
        f"{PORTS:,} ports per backend;",
        f"with `discovery: dns` and {NAMES} names of the form service.namespace.svc these pods ask for "
        f"{LARGE.pods * NAMES * QUESTIONS / DEFAULTS.discovery_interval:,.0f} addresses a second, each name tried "
        f"{QUESTIONS} times along the search list; with DISCOVERY=endpointslices for none, over one watch per pod and "
        "namespace;",
        f"if all its {LARGE.streams_per_pod:,} clients connect at once, it works {restart:.1f} s to take them;",
        f"after a rollout in four waves (25 % surge) the first pods hold {rolled[0]:.2f} times their share of the "
        f"clients that keep their connections, the last ones {rolled[-1]:.2f}: {_percent(TARGET)} of a core become "
        f"{_percent(TARGET * rolled[0])}.",
    )
    return "\n".join(f"- {line}" for line in lines)


def plans_table(plans: Sequence[Plan] = PLANS) -> str:
    headings = (
        "streams", "tokens/s each", "events/s", "cores busy", "pods", "streams per pod", "RSS per pod", "files per pod",
        "connects/s per pod", "in flight per pod and backend",
    )  # fmt: skip
    rows = (
        (
            f"{plan.streams:,}", f"{plan.rate:g}", f"{plan.events:,.0f}", f"{plan.cores:.1f}", f"{plan.pods}",
            f"{plan.streams_per_pod:,}", f"{plan.rss_mb:.0f} MB", f"{plan.files:,}", f"{plan.connects:.0f}",
            f"{plan.in_flight_per_backend:.1f}",
        )
        for plan in plans
    )  # fmt: skip
    return _table(headings, rows, ["---:"] * len(headings))


def _percent(share: float) -> str:
    return f"{share * 100:.0f} %"


def _table(headings: Sequence[str], rows: Iterable[Sequence[str]], rules: Sequence[str]) -> str:
    return "\n".join((_row(headings), f"|{'|'.join(rules)}|", *map(_row, rows)))


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


BLOCKS: dict[str, Callable[[], str]] = {"measured": measured_table, "derived": derived_list, "plans": plans_table}


def written(text: str) -> str:
    """The document with its generated parts as they should be."""
    for name, block in BLOCKS.items():
        begin, end = f"<!-- {name} -->\n", "<!-- end -->"
        if (count := text.count(begin)) != 1:
            raise ValueError(f"the document has {count} places for {name!r}, not one")
        before, _, rest = text.partition(begin)
        text = f"{before}{begin}\n{block()}\n\n{end}{rest.partition(end)[2]}"
    return text


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--write", action="store_true", help=f"into {DOCUMENT}")
    if parser.parse_args(argv).write:
        DOCUMENT.write_text(written(DOCUMENT.read_text()))
    else:
        print("\n\n".join(block() for block in BLOCKS.values()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
