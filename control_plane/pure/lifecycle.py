"""The life of a model's engine: what a driver sees of it, and the state that follows.

A driver knows objects: Deployments of a cluster, or processes of this machine. Each has instances: pods, or the one
process. A state is derived from what is there, each time, and never stored.
"""

from collections.abc import AsyncGenerator, Sequence
from typing import Literal, NamedTuple, Protocol, get_args

State = Literal["stopped", "waiting", "pulling", "loading", "ready", "failing", "stopping", "unknown"]
STATES: tuple[State, ...] = get_args(State)
# Of instances that are on their way, those first that are nearest to an answer
_COMING: tuple[State, ...] = ("loading", "pulling", "waiting", "unknown")
DriverName = Literal["kubernetes", "processes"]
# Lines of a log at most, and of the one that is shown where nobody asked for a number
MOST_LINES, LINES = 2_000, 500


class Exit(NamedTuple):
    """How an instance ended last, without having been asked.

    `code`: 137 is SIGKILL. `reason`: `OOMKilled`. `at`: Unix milliseconds.
    """

    code: int | None
    reason: str | None = None
    at: int | None = None


class Instance(NamedTuple):
    """A pod, or a process. `reason`: a clause. `since`: Unix milliseconds of its state. `restarts`: of its container.

    `containers`: whose logs can be read. `tail`: last lines of the log before the last exit, while it is failing.
    """

    name: str
    state: State
    reason: str | None = None
    since: int | None = None
    restarts: int = 0
    last_exit: Exit | None = None
    containers: tuple[str, ...] = ()
    address: str | None = None
    tail: tuple[str, ...] = ()


class Event(NamedTuple):
    """What the cluster or the driver says of an object or instance. `at`: Unix milliseconds. `times`: how often."""

    at: int
    warns: bool
    reason: str
    message: str
    of: str
    times: int = 1


class Observed(NamedTuple):
    """An object as its driver sees it. `wanted`: instances that there should be; None: the object does not exist.

    `owner`: who else sets that number: `ScaledObject gpt2`. `events`: the newest first. `problem`: what keeps it from
    making instances, such as a quota.
    """

    wanted: int | None
    instances: tuple[Instance, ...] = ()
    events: tuple[Event, ...] = ()
    owner: str | None = None
    problem: str | None = None


class Standing(NamedTuple):
    """The state of an object, by its instances. `reason`: a sentence; None: there is nothing to say."""

    state: State
    ready: int
    wanted: int
    reason: str | None = None
    since: int | None = None


class LogQuery(NamedTuple):
    """Which lines of which instance: the last `lines`, at most MOST_LINES, then those that come, if it `follows`.

    `previous`: of the container or process before this one.
    """

    instance: str
    container: str | None = None
    lines: int = LINES
    previous: bool = False
    follows: bool = False


class DriverError(Exception):
    """What a driver is asked for cannot be had. The message is a sentence without addresses of the cluster.

    `reason`: not_found, forbidden, conflict, gone (the log or instance was there), invalid, garbage (what was
    answered), away, slow.
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class Driver(Protocol):
    """Starts, stops and looks at engines. All methods raise DriverError.

    `scales`, `reads_logs`: whether it may. `largest`: instances of one object at most. `namespace`: of its objects.
    """

    name: DriverName
    namespace: str | None
    scales: bool
    reads_logs: bool
    largest: int

    async def objects(self) -> Sequence[str]:
        """Names of all objects that it knows, sorted."""

    async def look(self, object: str) -> Observed:
        """May be up to two seconds old, but for what this driver has changed itself."""

    async def scale(self, object: str, instances: int) -> None:
        """Returns when that is accepted; instances come and go later."""

    def log(self, object: str, query: LogQuery) -> AsyncGenerator[str, None]:
        """Lines without their ends, each at most 16 KiB; bytes that are no UTF-8 are replaced."""

    async def run(self) -> None:
        """What it does beside the requests, until it is cancelled."""

    def end(self) -> None:
        """The control plane is about to end: logs that are followed end, and what it runs itself begins to."""

    async def close(self) -> None: ...


def standing(observed: Observed) -> Standing:
    """The state of an object: ready if one instance is, else the one that is nearest to that, else why not."""
    wanted, instances = observed.wanted, observed.instances
    if wanted is None:
        return Standing("unknown", 0, 0, "It does not exist, or may not be seen.")
    ready = [one for one in instances if one.state == "ready"]
    others = [one for one in instances if one.state not in ("ready", "stopped")]
    failing = [one for one in others if one.state == "failing"]
    if not wanted:
        # Also while those that are to end still answer
        state: State = "stopping" if others or ready else "stopped"
        return Standing(state, len(ready), 0, _said(others), _first([*others, *ready]))
    if ready:
        # It answers; what is wrong with others is said beside it.
        reason = _said(failing or others) or observed.problem
        return Standing("ready", len(ready), wanted, reason, min(map(_since, ready)) or None)
    if failing:
        return Standing("failing", 0, wanted, _said(failing), _first(failing))
    for state in _COMING:
        if found := [one for one in others if one.state == state]:
            return Standing(state, 0, wanted, _said(found) or observed.problem, _first(found))
    return Standing("waiting", 0, wanted, observed.problem or _why_there_is_none(others, observed.events))


def _why_there_is_none(stopping: Sequence[Instance], events: Sequence[Event]) -> str | None:
    """`stopping`: the instances before those that there should be."""
    if stopping:
        return f"{stopping[0].name} is still stopping."
    warning = next((one for one in events if one.warns), None)
    return warning and f"{warning.reason}: {warning.message}"


def _said(instances: Sequence[Instance]) -> str | None:
    return next((f"{one.name}: {one.reason}" for one in instances if one.reason), None)


def _since(one: Instance) -> int:
    return one.since or 0


def _first(instances: Sequence[Instance]) -> int | None:
    return min((one.since for one in instances if one.since is not None), default=None)
