"""Is the router as cheap as it was? Its CPU in process, in units of a fixed piece of Python that is timed beside it.

scripts/bench --check

No second is compared with one of another day or machine. A case and the yardstick take turns, and of each the cheapest
turn counts: what neighbours do only ever adds. A budget is what was measured when it was set, plus `HEADROOM`.
"""

import asyncio
import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from benchmarks import wire
from benchmarks.inprocess import STREAM_EVENTS, Client, Loop, running
from benchmarks.setup import Setup, allow_files

HEADROOM = 1.25
GROWTH = 1.15
_TURNS = 25
# Seconds of CPU in one turn, about: short enough to find a quiet moment, long enough for the clock.
_TURN = 0.02


@dataclass(frozen=True, slots=True)
class Case:
    """A request, how many units of work it holds, and what one of them may cost, in yardsticks."""

    name: str
    unit: str
    request: bytes
    end: bytes
    check: Callable[[bytes], wire.Checked]
    usual: float
    """Measured with Python 3.11 on an AMD EPYC when it was set; to set it anew, take what `--check` prints."""
    units: int = 1

    @property
    def budget(self) -> float:
        return self.usual * HEADROOM


def _whole(answer: bytes) -> wire.Checked:
    return wire.check(answer, 0)


CASES = (
    Case("json", "request", wire.request(0), wire.JSON_END, _whole, 1.0),
    Case(
        "stream",
        "event",
        wire.request(0, STREAM_EVENTS),
        wire.STREAM_END[-5:],
        lambda answer: wire.check(answer, STREAM_EVENTS),
        1.0,
        STREAM_EVENTS,
    ),
    Case("prompt-100k", "request", wire.request(0, prompt=100_000), wire.JSON_END, _whole, 1.0),
    Case("embeddings-1m", "request", wire.embeddings_request(0), wire.JSON_END, wire.check_embeddings, 1.0),
)
# What a JSON request must not pay for.
GROWTHS = (
    ("10,000 models, over 3", Setup(models=3), Setup(models=10_000)),
    ("256 backends, over 2", Setup(backends=2), Setup(backends=256)),
    ("1,000 silent streams, over none", Setup(), Setup(streams=1000)),
)


class _Record:
    __slots__ = ("fields", "size")

    def __init__(self, fields: dict[bytes, bytes], size: int) -> None:
        self.fields = fields
        self.size = size


def yardstick(rounds: int = 50) -> int:
    """What a router's Python is made of: calls, objects, small dictionaries, bytes. About 100 us in all."""
    kept: list[_Record] = []
    for number in range(rounds):
        line = b"content-length: %d" % number
        name, _, value = line.partition(b": ")
        record = _Record({name: value, b"host": b"127.0.0.1"}, len(line))
        if record.fields.get(b"host") is not None and record.size:
            kept.append(record)
    return len(b"".join([record.fields[b"content-length"] for record in kept]))


def seconds(work: Callable[[], object]) -> float:
    """CPU time of this process."""
    start = time.process_time()
    work()
    return time.process_time() - start


def cheapest(works: Sequence[Callable[[], object]], turns: int = _TURNS) -> list[float]:
    """The least CPU seconds of each, which take turns: what a busy machine does to one it does to all."""
    least = [float("inf")] * len(works)
    for turn in range(turns):
        for at in range(len(works)):
            # Another one first each time: after a pause a core is slower, or faster.
            number = (at + turn) % len(works)
            least[number] = min(least[number], seconds(works[number]))
    return least


def _times(loop: Loop, client: Client, case: Case) -> tuple[Callable[[], None], int]:
    """Work of about a turn, once the answer is known to be right and the short cuts are learnt; and its requests."""

    def run(count: int) -> None:
        loop.run_until_complete(client.run(case.request, count, case.end))

    run(20)
    checked = case.check(client.answer)
    if not checked.exact:
        raise wire.BadAnswer(f"the answer to {case.name} is not the engine's")
    count = max(1, round(_TURN / (seconds(lambda: run(10)) / 10)))
    return lambda: run(count), count


def _standard(count: int) -> Callable[[], None]:
    def run() -> None:
        for _ in range(count):
            yardstick()

    return run


def costs(loop: Loop, client: Client, cases: Sequence[Case] = CASES, turns: int = _TURNS) -> list[float]:
    """CPU of one unit of each case, in yardsticks."""
    works = [_times(loop, client, case) for case in cases]
    standards = max(1, round(_TURN / min(seconds(yardstick) for _ in range(10))))
    _settle()
    standard, *least = cheapest([_standard(standards), *(work for work, _ in works)], turns)
    return [
        cost / (count * case.units) / (standard / standards)
        for case, cost, (_, count) in zip(cases, least, works, strict=True)
    ]


def growth(few: Setup, many: Setup, turns: int = _TURNS) -> float:
    """CPU of a JSON request with many of something, over that with few: both routers in this process, in turns."""
    with running(few, many) as (loop, clients):
        loop.run_until_complete(_hold(clients, (few, many)))
        works = [_times(loop, client, CASES[0]) for client in clients]
        _settle()
        least = cheapest([work for work, _ in works], turns)
        small, large = (cost / count for cost, (_, count) in zip(least, works, strict=True))
        return large / small


async def _hold(clients: Sequence[Client], setups: Sequence[Setup]) -> None:
    for client, setup in zip(clients, setups, strict=True):
        await client.hold(setup.streams)
    # The first questions to the engines are asked and answered.
    await asyncio.sleep(0.2)


def _settle() -> None:
    """As the server does before it serves: what is there to stay is not looked at again."""
    gc.collect()
    gc.freeze()


def main() -> int:
    """One line per budget; 1 if one is missed."""
    allow_files(4000)
    missed = 0
    with running(Setup(backends=2)) as (loop, (client,)):
        for case, cost in zip(CASES, costs(loop, client), strict=True):
            missed += cost > case.budget
            what = f"{case.name}: CPU of one {case.unit}"
            print(f"{what:48}{cost:8.3f} yardsticks, at most {case.budget:.3f}: {_verdict(cost, case.budget)}")
    for name, few, many in GROWTHS:
        value = growth(few, many)
        missed += value > GROWTH
        print(f"{f'json: {name}':48}{value:8.3f} times the CPU,   at most {GROWTH:.3f}: {_verdict(value, GROWTH)}")
    return 1 if missed else 0


def _verdict(value: float, limit: float) -> str:
    return "met" if value <= limit else "MISSED"
