"""When a model that starts by itself is idle, by what its driver and the routers say. Pure.

Times are Unix milliseconds.
"""

from collections.abc import Collection, Iterable, Mapping
from typing import NamedTuple

from control_plane.pure.lifecycle import State
from control_plane.pure.records import MINUTE
from control_plane.pure.reports import Reported

# For so long an activation keeps an engine that has not been ready since: a node may have to be made first.
PATIENCE = 30 * MINUTE
# What is on its way, or has been stopped, is not idle.
_STOPPABLE: frozenset[State] = frozenset({"ready", "failing"})


def may_serve(router: Reported, now: int, patience: int = PATIENCE) -> bool:
    """Whether a router that is lost may have requests all the same: it has not said that it ends, not long ago."""
    return router.lost(now) and not router.report["draining"] and now - router.at < patience


class Traffic(NamedTuple):
    """Of one model. `active`: requests in flight and queued; `requests`: so far, by router and its start."""

    active: int
    requests: Mapping[tuple[str, str], int]


def traffic_of(reports: Iterable[Reported], models: Collection[str]) -> dict[str, Traffic]:
    """Of those models that a router reports."""
    found: dict[str, Traffic] = {}
    for one in reports:
        for row in one.report["models"]:
            if (name := row["name"]) in models:
                known = found.get(name, Traffic(0, {}))
                count = {(one.instance, one.report["boot"]): row["requests"]}
                found[name] = Traffic(known.active + row["in_flight"] + row["queued"], {**known.requests, **count})
    return found


class Watched:
    """When each model was last asked, as far as that was seen. Where nothing is known, it counts as asked."""

    def __init__(self) -> None:
        self._busy_at: dict[str, int] = {}
        self._requests: dict[str, Mapping[tuple[str, str], int]] = {}

    def see(self, models: Collection[str], traffic: Mapping[str, Traffic], now: int) -> None:
        for name in self._busy_at.keys() - models:
            del self._busy_at[name]
            self._requests.pop(name, None)
        for name in models:
            seen, known = traffic.get(name), self._requests.get(name)
            if seen is None or known is None or seen.active or _more(seen.requests, known):
                self._busy_at[name] = now
            self._requests.pop(name, None)
            if seen is not None:
                self._requests[name] = seen.requests

    def note(self, model: str, at: int) -> None:
        """It was asked then, as something else says."""
        self._busy_at[model] = max(at, self._busy_at[model])

    def busy_at(self, model: str) -> int:
        return self._busy_at[model]


class Life(NamedTuple):
    """A deployment that runs. `busy_at`: when it was asked last, or nothing was known."""

    state: State
    idle_seconds: int | None
    was_ready_at: int | None
    last_activation_at: int | None
    busy_at: int


def is_idle(life: Life, now: int, patience: int = PATIENCE) -> bool:
    """Whether it may be stopped."""
    if life.idle_seconds is None or life.was_ready_at is None or life.state not in _STOPPABLE:
        return False
    activated = life.last_activation_at or 0
    if activated > life.was_ready_at and now - activated < patience:
        return False
    return now - max(life.was_ready_at, activated, life.busy_at) >= life.idle_seconds * 1000


def _more(now: Mapping[tuple[str, str], int], before: Mapping[tuple[str, str], int]) -> bool:
    return any(count > before.get(router, 0) for router, count in now.items())
