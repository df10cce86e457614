"""What a backend that answers with errors gets of the requests, and what bad requests do to backends: a simulation.

python -m benchmarks.failing --seeds 5

Policies, circuits, comparison and load are the router's own code (`inference_api.routing`), with a clock that jumps.
A good answer takes an exponential time with a mean of one service; an error a hundredth of it, but where it is said to
be slow. Clients wait for an answer and ask again at once, as workers of a batch job do, so that whoever answers quickly
is asked often. The first table has a backend that fails; its fair share of the requests is 1. The second one has
backends that are well, and requests that every one of them refuses.
"""

import argparse
import heapq
import logging
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from random import Random
from typing import Literal, NamedTuple, get_args

from benchmarks.samples import quantile
from inference_api.models import Outcome
from inference_api.routing.backend import Backend
from inference_api.routing.balance import make_balancer
from inference_api.routing.breaker import Breaker
from inference_api.routing.catalogue import parse_catalogue
from inference_api.routing.entries import BalancingName
from inference_api.routing.fleet import Fleet
from inference_api.routing.health import Health

Failing = Literal["500", "401", "404", "a mix", "slowly", "breaks off", "half", "recovers"]
Refused = Literal["a tenth", "a third", "nine of ten", "one session", "one place in turn"]

_QUICK = 0.01
_MIX = (500, 401, 404)
# Keys of the sessions that well-behaved clients have.
_SESSIONS = 1000


@dataclass(frozen=True, slots=True)
class Case:
    balancing: BalancingName
    failing: Failing | None = None
    refused: Refused | None = None
    backends: int = 3
    clients: int = 5
    """For each backend."""
    service: float = 1.0
    """Seconds of a good answer, mean."""
    lasts: float = 300.0
    """Services."""
    seed: int = 1


class Answer(NamedTuple):
    seconds: float
    status: int
    outcome: Outcome


@dataclass(slots=True)
class Result:
    case: Case
    share: float = 0.0
    """Requests of the first backend over the fair share; where it recovers, of the last quarter."""
    errors: float = 0.0
    """Errors over requests."""
    out: int = 0
    """Circuits that opened."""
    moved: float = 0.0
    """How much more than the fair share of the good requests one backend gets. One place in turn is another's turn."""


class Task:
    """The request that asks now, as a Health knows it."""

    def done(self) -> bool:
        return False


class Simulation:
    """One case."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.now = 0.0
        self.task = Task()
        self.random = Random(f"{case}")
        self.fleet = Fleet(lambda name: make_balancer(name, self.random.random))
        urls = [{"url": f"http://r{number}"} for number in range(case.backends)]
        self.fleet.update(parse_catalogue({"models": [{"name": "m", "balancing": case.balancing, "backends": urls}]}))
        self.model = self.fleet.models["m"]
        breaker = Breaker(rand=self.random.random)
        clock: Callable[[], float] = lambda: self.now  # noqa: E731
        self.health = Health(
            self.fleet, breaker, lambda url: self.now, clock=clock, owner=lambda: self.task, rand=self.random.random
        )
        self.asked: Counter[Backend] = Counter()
        self.late: Counter[Backend] = Counter()
        self.good: Counter[Backend] = Counter()
        self.errors = self.turn = self.out = 0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = count()
        self._end = case.lasts * case.service

    def run(self) -> Result:
        for _ in range(self.case.backends * self.case.clients):
            self._after(self.random.random() * self.case.service, self._ask)
        self._after(1.0, self._look)
        while self._events:
            self.now, _, act = heapq.heappop(self._events)
            if self.now < self._end:
                act()
        first = self.model.backends[0]
        asked = self.late if self.case.failing == "recovers" else self.asked
        return Result(
            self.case,
            share=asked[first] * self.case.backends / asked.total(),
            errors=self.errors / self.asked.total(),
            out=self.out,
            moved=max(self.good.values()) * self.case.backends / self.good.total() - 1,
        )

    def _after(self, seconds: float, act: Callable[[], None]) -> None:
        heapq.heappush(self._events, (self.now + seconds, next(self._numbers), act))

    def _look(self) -> None:
        self.health.poll()
        self._after(1.0, self._look)

    def _ask(self) -> None:
        self.turn += 1
        refused = self._is_refused()
        key = "bad" if refused and self.case.refused == "one session" else str(self.random.randrange(_SESSIONS))
        self.task = task = Task()
        backend = self.model.choose(key)
        assert backend is not None
        backend.origin.in_flight += 1
        self.asked[backend] += 1
        if not refused:
            self.good[backend] += 1
        if self.now > 0.75 * self._end:
            self.late[backend] += 1
        answer = self._answer(backend, refused)
        if answer.status != 200 or answer.outcome is not Outcome.OK:
            self.errors += 1

        def end() -> None:
            self.task = task
            before = len(self.model.open)
            self.health.answered(backend, answer.status)
            backend.origin.in_flight -= 1
            self.health.ended(backend, answer.outcome)
            self.out += len(self.model.open) > before
            self._ask()

        self._after(answer.seconds * self.case.service, end)

    def _is_refused(self) -> bool:
        match self.case.refused:
            case None:
                return False
            case "a tenth" | "one session":
                return self.random.random() < (0.1 if self.case.refused == "a tenth" else 0.3)
            case "a third":
                return self.random.random() < 1 / 3
            case "nine of ten":
                return self.random.random() < 0.9
            case "one place in turn":
                return self.turn % self.case.backends == 0

    def _answer(self, backend: Backend, refused: bool) -> Answer:
        good = Answer(self.random.expovariate(1.0), 200, Outcome.OK)
        if refused:
            return _error(400)
        if backend is not self.model.backends[0]:
            return good
        match self.case.failing:
            case "500" | "401" | "404" as status:
                return _error(int(status))
            case "a mix":
                return _error(self.random.choice(_MIX))
            case "slowly":
                return _error(500)._replace(seconds=good.seconds)
            case "breaks off":
                return Answer(_QUICK, 200, Outcome.TRUNCATED)
            case "half" if self.random.random() < 0.5:
                return _error(500)
            case "recovers" if self.now < self._end / 2:
                return _error(500)
        return good


def _error(status: int) -> Answer:
    return Answer(_QUICK, status, Outcome.of_status(status))


def simulate(case: Case) -> Result:
    return Simulation(case).run()


def table(title: str, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Lines of Markdown."""
    yield f"{title}:"
    yield ""
    yield "| " + " | ".join(headings) + " |"
    yield "|---" * 2 + "|---:" * (len(headings) - 2) + "|"
    for row in rows:
        yield "| " + " | ".join(row) + " |"
    yield ""


def _worst(cases: Sequence[Case]) -> tuple[str, ...]:
    """Of several seeds, the median and the worst."""
    results = [simulate(case) for case in cases]
    shares = sorted(result.share for result in results)
    errors = sorted(result.errors for result in results)
    return f"{quantile(shares, 0.5):.3f}", f"{shares[-1]:.3f}", f"{quantile(errors, 0.5):.1%}"


def _moved(cases: Sequence[Case]) -> tuple[str, ...]:
    results = [simulate(case) for case in cases]
    well = sorted(result.moved for result in (simulate(_with(case, refused=None)) for case in cases))
    moved = sorted(result.moved for result in results)
    return str(sum(result.out for result in results)), f"{quantile(moved, 0.5):.1%}", f"{quantile(well, 0.5):.1%}"


def _with(case: Case, refused: Refused | None) -> Case:
    return Case(case.balancing, None, refused, case.backends, case.clients, case.service, case.lasts, case.seed)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    for name, kind, default in (
        ("backends", int, 3), ("clients", int, 5), ("service", float, 1.0), ("lasts", float, 300.0), ("seeds", int, 5)
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=kind, default=default)
    given = parser.parse_args(argv)
    shape = (given.backends, given.clients, given.service, given.lasts)
    seeds = range(1, given.seeds + 1)
    policies: tuple[BalancingName, ...] = get_args(BalancingName)
    failing: tuple[Failing, ...] = get_args(Failing)
    refused: tuple[Refused, ...] = get_args(Refused)
    rows = [
        (kind, balancing, *_worst([Case(balancing, kind, None, *shape, seed) for seed in seeds]))
        for kind in failing
        for balancing in policies
    ]
    print("\n".join(table("One backend fails", ("how", "balancing", "its share", "worst seed", "errors"), rows)))
    rows = [
        (kind, balancing, *_moved([Case(balancing, None, kind, *shape, seed) for seed in seeds]))
        for kind in refused
        for balancing in policies
    ]
    headings = ("refused by all", "balancing", "circuits opened", "most asked", "most asked, nothing refused")
    print("\n".join(table("No backend fails", headings, rows)))
    return 0


if __name__ == "__main__":
    # Each of the thousands of changes would be a line.
    logging.getLogger("inference_api").setLevel(logging.ERROR)
    sys.exit(main())
