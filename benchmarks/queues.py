"""The model behind `simulation`: backends with slots, queues and prefix caches, and routers that share no state."""

import heapq
import math
from collections import OrderedDict, deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from itertools import count
from random import Random
from typing import Any, Literal

from inference_api.app import GROUPS
from inference_api.features import engine_load
from inference_api.routing.affinity import affinity_key
from inference_api.routing.balance import BALANCERS
from inference_api.routing.balancer import Balancer
from inference_api.routing.entries import BalancingName
from inference_api.settings import make_settings

Event = Literal["none", "slow", "dies"]

# INFERENCE_API_BREAKER_FAILURES, its default.
_BREAKER_FAILURES = 5
# Of a cell's requests, those at the beginning that are not counted: queues and caches are empty then, and at a load of
# 0.8 with 4 slots they take some 60 mean services to fill.
_WARM_UP = 0.5
# By whether engines report their load.
_BALANCERS = {
    reported: {**BALANCERS, **engine_load.balancers(make_settings({"load_signal_interval": float(reported)}, GROUPS))}
    for reported in (False, True)
}
# How often the loads of the backends are compared.
_LOOKS = 200


@dataclass(frozen=True, slots=True)
class Case:
    """One cell of the table. Times are in mean services."""

    balancing: BalancingName
    routers: int
    utilisation: float
    event: Event = "none"
    """To one backend: half speed all the time, or death in the middle."""
    backends: int = 100
    slots: int = 4
    """Requests that a backend works on at once."""
    requests: int = 40_000
    sigma: float = 1.0
    """Of the log-normal service times: 0 all equal, 0.83 as varied as exponential ones, more: a heavier tail."""
    turns: float = 5.0
    """Requests of a session, mean."""
    pause: float = 3.0
    """Between two requests of a session, mean."""
    saving: float = 0.3
    """Share of the service that a cached prefix saves."""
    cached: int = 32
    """Sessions whose prefix a backend remembers, the last ones used."""
    signal: float = 0.0
    """Between two times that a router asks the backends for their load; 0: never."""
    seed: int = 1

    def __post_init__(self) -> None:
        """Raises ValueError for what cannot be simulated."""
        least = {
            "routers": 1,
            "backends": 1,
            "slots": 1,
            "requests": 10,
            "turns": 1,
            "sigma": 0,
            "pause": 0,
            "signal": 0,
        }
        for name, value in least.items():
            if not value <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be {value} at least")
        if not self.utilisation > 0 or not 0 <= self.saving < 1 or self.cached < 0:
            raise ValueError("utilisation must be above 0, saving from 0 to below 1, cached 0 at least")
        if self.event == "dies" and self.backends < 2:
            raise ValueError("backends must be 2 at least where one dies")


@dataclass(frozen=True, slots=True)
class Result:
    """What came of a case. Waits are in mean services, from arrival to the first moment of service, sorted."""

    case: Case
    waits: Sequence[float]
    queues: Sequence[int]
    """Requests that wait at a backend, for each backend and moment, sorted."""
    imbalance: float
    """Requests at the fullest backend over the mean of all, averaged over moments."""
    hit_rate: float
    busy: float
    """Share of the slots that were taken, averaged over the same moments."""
    completed: int
    cut: int
    """Requests that the dead backend was working on."""
    repeats: int
    """Attempts that the dead backend refused, or took along from its queue; each was repeated elsewhere."""
    odd_share: float
    """Requests that the slow or dying backend served, over the mean of all."""
    odd_waits: Sequence[float]


@dataclass(slots=True, eq=False)
class Job:
    """A request on its way."""

    arrived: float
    work: float
    key: str
    router: "Router"
    counted: bool
    view: "View"


@dataclass(slots=True, eq=False)
class Server:
    """A backend: slots, a queue, a cache of prefixes."""

    url: str
    slots: int
    cached: int
    speed: float = 1.0
    alive: bool = True
    running: set[Job] = field(default_factory=set)
    queue: deque[Job] = field(default_factory=deque)
    served: int = 0
    prefixes: OrderedDict[str, None] = field(default_factory=OrderedDict)

    @property
    def load(self) -> int:
        return len(self.running) + len(self.queue)

    def recall(self, key: str) -> bool:
        """Whether the prefix is cached; it is from now on."""
        hit = key in self.prefixes
        self.prefixes[key] = None
        self.prefixes.move_to_end(key)
        if len(self.prefixes) > self.cached:
            self.prefixes.popitem(last=False)
        return hit


class View:
    """A backend as one router sees it; what a balancing is handed."""

    __slots__ = ("extra", "failures", "in_flight", "origin", "reported", "server", "url", "weight")

    def __init__(self, server: Server) -> None:
        self.server = server
        self.url = server.url
        self.weight = 1.0
        self.in_flight = 0
        self.reported = 0.0
        self.failures = 0
        self.extra = 0
        # No other model is served there.
        self.origin = self


class Router:
    """A balancer, and what it knows of the backends: its own requests."""

    def __init__(self, case: Case, servers: Sequence[Server], number: int) -> None:
        random = Random(f"{case.seed} router {number}").random
        self._balancer: Balancer[View] = _BALANCERS[case.signal > 0][case.balancing](random)
        # All, and those whose circuit is closed: replaced as a whole, so that a balancer may cache by identity.
        self.known = self.views = tuple(View(server) for server in servers)

    def choose(self, key: str, tried: Collection[View] = ()) -> View:
        view = self._balancer.choose(self.views, key, tried)
        assert view is not None, "a model's last backend does not die here"
        return view

    def failed(self, view: View) -> None:
        """Its circuit opens after so many; each router finds out for itself."""
        view.failures += 1
        if view.failures == _BREAKER_FAILURES:
            self.views = tuple(other for other in self.views if other is not view)

    def ask(self) -> None:
        """What the backends have of others, as `discovery.load` reckons it."""
        for view in self.views:
            view.reported = max(0.0, view.server.load - view.in_flight)


class Sessions:
    """Those that live, and the affinity key of each; one that ends makes place for a new one."""

    def __init__(self, alive: int, turns: float, random: Random) -> None:
        self._end = 1 / turns
        self._random = random.random
        self._numbers = count()
        self._keys = [self._new() for _ in range(alive)]

    def _new(self) -> str:
        return affinity_key("model", {}, f"session-{next(self._numbers)}")

    def turn(self) -> str:
        place = int(self._random() * len(self._keys))
        key = self._keys[place]
        if self._random() < self._end:
            self._keys[place] = self._new()
        return key


class Simulation:
    """One case, from the first arrival to the last completion."""

    def __init__(self, case: Case) -> None:
        # Configuration
        self._case = case
        self._rate = case.utilisation * case.backends * case.slots
        self._warm = int(case.requests * _WARM_UP)
        self._mu = -(case.sigma**2) / 2
        # What is simulated
        self._random = Random(f"{case.seed} requests")
        self.servers = [Server(f"http://r{n}:8000", case.slots, case.cached) for n in range(case.backends)]
        self._odd = self.servers[0]
        self.routers = [Router(case, self.servers, number) for number in range(case.routers)]
        self._sessions = Sessions(max(1, round(self._rate * case.pause)), case.turns, self._random)
        # The clock, and what is to come: (when, number, act, on what)
        self._now = 0.0
        self._events: list[tuple[float, int, Callable[[Any], None], Any]] = []
        self._numbers = count()
        # What is counted
        self._arrived = self._completed = self._cut = self._repeats = self._hits = 0
        self._waits: list[float] = []
        self._queues: list[int] = []
        self._odd_waits: list[float] = []
        self._ratios: list[float] = []
        self._busy: list[float] = []

    def run(self) -> Result:
        self._schedule()
        while self._events:
            self._now, _, act, subject = heapq.heappop(self._events)
            act(subject)
        self._waits.sort()
        self._queues.sort()
        self._odd_waits.sort()
        served = sum(server.served for server in self.servers) / len(self.servers)
        return Result(
            case=self._case,
            waits=self._waits,
            queues=self._queues,
            imbalance=sum(self._ratios) / max(1, len(self._ratios)),
            hit_rate=self._hits / max(1, len(self._waits)),
            busy=sum(self._busy) / max(1, len(self._busy)),
            completed=self._completed,
            cut=self._cut,
            repeats=self._repeats,
            odd_share=self._odd.served / max(1.0, served),
            odd_waits=self._odd_waits,
        )

    def _schedule(self) -> None:
        case, lasts = self._case, self._case.requests / self._rate
        self._after(self._random.expovariate(self._rate), self._arrive, None)
        begin = lasts * _WARM_UP
        for look in range(_LOOKS):
            self._after(begin + (lasts - begin) * look / _LOOKS, self._look, None)
        if case.event == "slow":
            self._odd.speed = 0.5
        elif case.event == "dies":
            self._after(lasts / 2, self._die, self._odd)
        if case.signal:
            for number, router in enumerate(self.routers):
                self._after(case.signal * number / case.routers, self._ask, router)

    def _after(self, delay: float, act: Callable[[Any], None], subject: Any) -> None:
        heapq.heappush(self._events, (self._now + delay, next(self._numbers), act, subject))

    # Events

    def _arrive(self, _: None) -> None:
        random = self._random
        self._arrived += 1
        if self._arrived < self._case.requests:
            self._after(random.expovariate(self._rate), self._arrive, None)
        router = self.routers[int(random.random() * len(self.routers))]
        work, key = math.exp(random.gauss(self._mu, self._case.sigma)), self._sessions.turn()
        self._send(Job(self._now, work, key, router, self._arrived > self._warm, router.views[0]))

    def _send(self, job: Job, tried: tuple[View, ...] = ()) -> None:
        view = job.router.choose(job.key, tried)
        server = view.server
        if not server.alive:
            self._repeat(job, view)
            return
        job.view = view
        view.in_flight += 1
        if len(server.running) < server.slots:
            self._serve(job, server)
        else:
            server.queue.append(job)

    def _repeat(self, job: Job, view: View) -> None:
        self._repeats += 1
        job.router.failed(view)
        self._send(job, (view,))

    def _serve(self, job: Job, server: Server) -> None:
        hit = server.recall(job.key)
        server.running.add(job)
        if job.counted:
            wait = self._now - job.arrived
            self._hits += hit
            server.served += 1
            self._waits.append(wait)
            if server is self._odd:
                self._odd_waits.append(wait)
        work = job.work * (1 - self._case.saving) if hit else job.work
        self._after(work / server.speed, self._complete, job)

    def _complete(self, job: Job) -> None:
        server = job.view.server
        # The backend died over it, it has ended already.
        if job not in server.running:
            return
        server.running.remove(job)
        job.view.in_flight -= 1
        self._completed += 1
        if server.queue:
            self._serve(server.queue.popleft(), server)

    def _die(self, server: Server) -> None:
        server.alive = False
        waiting = list(server.queue)
        for job in (*server.running, *waiting):
            job.view.in_flight -= 1
        self._cut += len(server.running)
        for job in sorted(server.running, key=lambda job: job.arrived):
            job.router.failed(job.view)
        server.running.clear()
        server.queue.clear()
        for job in waiting:
            self._repeat(job, job.view)

    def _look(self, _: None) -> None:
        alive = [server for server in self.servers if server.alive]
        self._queues += [len(server.queue) for server in alive]
        loads = [server.load for server in alive]
        if any(loads):
            self._ratios.append(max(loads) * len(loads) / sum(loads))
        self._busy.append(sum(len(server.running) for server in alive) / (len(alive) * self._case.slots))

    def _ask(self, router: Router) -> None:
        router.ask()
        if self._arrived < self._case.requests:
            self._after(self._case.signal, self._ask, router)


def simulate(case: Case) -> Result:
    return Simulation(case).run()
