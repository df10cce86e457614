"""What a queue at a model's limit does for callers, beside refusing: a simulation.

python -m benchmarks.fairness --seed 1

Ten callers share one model. The queue is the router's own code (`inference_api.features.queueing.fair`), the rest is
a model: the backends work on `places` requests at once, each as fast as if it were alone. A request makes a log-normal
number of tokens, 50 a second, and reserves twice as many. Requests are a Poisson stream for each caller. With `refuse`,
one that finds no place is sent away, and its client tries again after 1 s and after 2 s, as OpenAI's SDK does with
Retry-After: 1, and then gives up. `fifo` is a queue that knows no callers. Equal arguments give equal tables.

Fairness is Jain's index of the callers' satisfaction: what a caller was served of what was its own, which is all that
it asked for, or its max-min fair share. 1: all callers got the same part; 0.1: one of ten got everything. `least` is
the part that the worst served caller got. Refusals and waits are those of the callers that are not greedy.
"""

import argparse
import heapq
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from math import exp
from random import Random
from typing import Literal, get_args

from benchmarks.samples import quantile
from inference_api.features.queueing.fair import FairQueue

Way = Literal["refuse", "fifo", "fair"]
WAYS: tuple[Way, ...] = get_args(Way)
# Tokens per second of one request
_SPEED = 50.0
# Of the log-normal numbers of tokens
_SIGMA = 0.8
# Seconds after which a client tries again
_RETRIES = (1.0, 2.0)
# Part of the time at the beginning that is not counted
_WARM_UP = 0.1


@dataclass(frozen=True, slots=True)
class Case:
    """One row of a table. Times in seconds; loads in what the backends can do."""

    way: Way
    load: float = 0.5
    """Of all callers but the greedy one together."""
    greedy: float = 1.5
    """Of the greedy one; 0: it asks for as much as each of the others."""
    callers: int = 10
    places: int = 20
    size: int = 100
    timeout: float = 30.0
    tokens: float = 250.0
    """Mean of a request."""
    seconds: float = 4000.0
    seed: int = 1


@dataclass(slots=True)
class Served:
    """What became of the requests of one caller."""

    asked: int = 0
    served: int = 0
    work: float = 0.0
    """Tokens that were served."""
    wanted: float = 0.0
    """Tokens that were asked for."""
    waits: list[float] = field(default_factory=list)
    """From the first try to the place."""


@dataclass(slots=True, eq=False)
class Request:
    caller: int
    at: float
    tokens: float
    tries: int = 0


Happens = Literal["arrives", "ends", "expires"]


class Simulation:
    """Runs one case; `callers` is the result, the greedy one first."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.callers = [Served() for _ in range(case.callers)]
        self._random = Random(case.seed)
        self._queue: FairQueue[Request] = FairQueue()
        self._busy = 0
        self._events: list[tuple[float, int, Happens, Request]] = []
        self._numbers = count()
        self._turns: dict[Request, object] = {}

    def run(self) -> list[Served]:
        case, random = self.case, self._random
        for caller in range(case.callers):
            for request in self._arrivals(caller, random):
                self._at(request.at, "arrives", request)
        while self._events:
            now, _, happens, request = heapq.heappop(self._events)
            if happens == "arrives":
                self._arrives(request, now)
            elif happens == "ends":
                self._busy -= 1
                self._fill(now)
            elif (turn := self._turns.pop(request, None)) is not None:
                self._queue.remove(turn)  # type: ignore[arg-type]
        return self.callers

    def _arrivals(self, caller: int, random: Random) -> Iterator[Request]:
        case = self.case
        load = case.greedy if caller == 0 and case.greedy else case.load / (case.callers - bool(case.greedy))
        rate = load * case.places * _SPEED / case.tokens
        now = random.expovariate(rate)
        while now < case.seconds:
            tokens = case.tokens * exp(random.gauss(-(_SIGMA**2) / 2, _SIGMA))
            request = Request(caller, now, tokens)
            if self._counts(request):
                self.callers[caller].asked += 1
                self.callers[caller].wanted += tokens
            yield request
            now += random.expovariate(rate)

    def _arrives(self, request: Request, now: float) -> None:
        case = self.case
        if self._busy < case.places:
            self._begin(request, now)
        elif case.way == "refuse":
            if request.tries < len(_RETRIES):
                self._at(now + _RETRIES[request.tries], "arrives", request)
                request.tries += 1
        else:
            fair = case.way == "fair"
            caller = request.caller if fair else 0
            if self._queue.full(caller, case.size, case.size // 4 if fair else case.size) is None:
                cost = round(request.tokens * 2) if fair else 1
                self._turns[request] = self._queue.add(caller, 0, 1.0, cost, request)
                self._at(now + case.timeout, "expires", request)

    def _fill(self, now: float) -> None:
        turn = self._queue.next()
        if turn is not None:
            del self._turns[turn.item]
            self._begin(turn.item, now)

    def _begin(self, request: Request, now: float) -> None:
        self._busy += 1
        self._at(now + request.tokens / _SPEED, "ends", request)
        if self._counts(request):
            caller = self.callers[request.caller]
            caller.served += 1
            caller.work += request.tokens
            caller.waits.append(now - request.at)

    def _counts(self, request: Request) -> bool:
        return request.at >= _WARM_UP * self.case.seconds

    def _at(self, time: float, happens: Happens, request: Request) -> None:
        heapq.heappush(self._events, (time, next(self._numbers), happens, request))


def simulate(case: Case) -> list[Served]:
    return Simulation(case).run()


def satisfaction(callers: Sequence[Served], capacity: float) -> list[float]:
    """What part of its own each caller was served; `capacity`: tokens that could be served."""
    own = shares([caller.wanted for caller in callers], capacity)
    return [min(caller.work / share, 1.0) for caller, share in zip(callers, own, strict=True) if share]


def jain(parts: Sequence[float]) -> float:
    return sum(parts) ** 2 / (len(parts) * sum(part**2 for part in parts))


def shares(wanted: Sequence[float], capacity: float) -> list[float]:
    """The max-min fair shares: nobody gets more than it wants, and the others have what it leaves, in equal parts."""
    given = [0.0] * len(wanted)
    left, open_ = capacity, sorted(range(len(wanted)), key=wanted.__getitem__)
    while open_:
        part = left / len(open_)
        first, *open_ = open_
        given[first] = min(wanted[first], part)
        left -= given[first]
    return given


def row(case: Case) -> tuple[str, ...]:
    callers = simulate(case)
    counted = (1 - _WARM_UP) * case.seconds
    parts = satisfaction(callers, case.places * _SPEED * counted)
    greedy, others = callers[:1], callers[1:]
    if not case.greedy:
        greedy, others = [], callers
    waits = [wait for caller in others for wait in caller.waits]
    cells = [f"{jain(parts):.3f}", f"{min(parts):.0%}", _refused(others)]
    cells += [f"{quantile(waits, share):.1f} s" for share in (0.5, 0.9, 0.99)]
    return case.way, *cells, *([_refused(greedy)] if greedy else [])


def _refused(callers: Sequence[Served]) -> str:
    asked = sum(caller.asked for caller in callers)
    return f"{1 - sum(caller.served for caller in callers) / asked:.1%}"


_HEADINGS = ("at the limit", "fairness", "least", "refused", "wait p50", "p90", "p99")


def table(title: str, case: Case) -> Iterator[str]:
    """Lines of Markdown."""
    headings = (*_HEADINGS, "greedy refused") if case.greedy else _HEADINGS
    yield f"{title}:"
    yield ""
    yield "| " + " | ".join(headings) + " |"
    yield "|---" + "|---:" * (len(headings) - 1) + "|"
    for way in WAYS:
        yield "| " + " | ".join(row(replace(case, way=way))) + " |"
    yield ""


def main(argv: Sequence[str] | None = None) -> int:
    arguments = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    arguments.add_argument("--seed", type=int, default=1)
    arguments.add_argument("--seconds", type=float, default=4000.0)
    given = arguments.parse_args(argv)
    case = Case("fair", seed=given.seed, seconds=given.seconds)
    tables = {
        "One greedy caller asks for 1.5 times what the backends can do, nine others for half of it together": case,
        "Ten equal callers at a load of 0.9": replace(case, load=0.9, greedy=0.0),
        "Ten equal callers at a load of 1.1": replace(case, load=1.1, greedy=0.0),
    }
    for title, one in tables.items():
        for line in table(title, one):
            print(line, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
