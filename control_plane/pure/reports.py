"""What routers report, and what follows from all reports together. Pure.

Times in reports are Unix milliseconds, and stay so where a report is shown.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple, get_args

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from inference_api.routing.entries import ModelName

# From the worst; a backend's state is the first that holds.
State = Literal[
    "out", "draining", "open", "half_open", "unhealthy", "stuck", "asleep", "resting", "recovering", "ready"
]
STATES: tuple[State, ...] = get_args(State)
_RANKS = {state: rank for rank, state in enumerate(STATES)}
# States in which a backend takes requests
USABLE = frozenset({"half_open", "resting", "recovering", "ready"})
# Milliseconds between two reports, if a router has sent only one; reports that may be missing; least time until lost
FIRST_INTERVAL, _MISSING, _LEAST = 5_000, 3, 15_000

Count = Annotated[int, Field(ge=0)]
Moment = Annotated[int, Field(ge=1)]
Label = Annotated[str, StringConstraints(min_length=1, max_length=2048)]
Instance = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._@-]{0,127}$")]
OverrideId = Annotated[str, StringConstraints(pattern=r"^ovr_[0-9A-HJKMNP-TV-Z]{26}$")]
_Etag = Annotated[str, StringConstraints(max_length=256)] | None


class _Part(BaseModel):
    # A later router may say more.
    model_config = ConfigDict(extra="ignore", frozen=True, hide_input_in_errors=True)


class DeliveryReport(_Part):
    made: Count
    delivered: Count
    queued: Count
    spooled: Count
    dropped: Count


class HeldEtags(_Part):
    models: _Etag
    policy: _Etag
    overrides: _Etag
    spend: _Etag


class ModelReport(_Part):
    name: ModelName
    in_flight: Count
    queued: Count
    requests: Count
    errors: Count


class LastError(_Part):
    outcome: Annotated[str, StringConstraints(pattern=r"^[a-z0-9_]+$")]
    request_id: Annotated[str, StringConstraints(max_length=128)] | None
    at: Moment


class BackendReport(_Part):
    model: ModelName
    backend: Label
    state: State
    in_flight: Count
    circuit: Literal["closed", "open", "half_open"] | None = None
    reason: Annotated[str, StringConstraints(max_length=500)] | None = None
    since: Moment | None = None
    retry_at: Moment | None = None
    waiting: Count | None = None
    kv_usage: Annotated[float, Field(ge=0, le=1)] | None = None
    last_error: LastError | None = None
    override: OverrideId | None = None


class RouterReport(_Part):
    """The body of PUT /routers/{instance}."""

    boot: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{16}$")]
    version: Annotated[str, StringConstraints(max_length=64)]
    started_at: Moment
    at: Moment
    draining: bool
    in_flight: Count
    lag_ms: Annotated[float, Field(ge=0)]
    currency: Annotated[str, StringConstraints(pattern=r"^[A-Z]{3}$")]
    usage: DeliveryReport
    etags: HeldEtags
    overrides: Annotated[tuple[OverrideId, ...], Field(max_length=10_000)]
    models: tuple[ModelReport, ...]
    backends: tuple[BackendReport, ...]


class Reported(NamedTuple):
    """The last report of a router, as it was sent. `at`: when it came; `interval`: milliseconds since the last one."""

    instance: str
    report: Mapping[str, Any]
    at: int
    interval: int

    def lost(self, now: int) -> bool:
        return now - self.at > max(_LEAST, _MISSING * self.interval)


class MergedBackend(NamedTuple):
    """One backend of one model over the routers that know it. `by_router`: their rows."""

    model: str
    backend: str
    state: str
    agree: str
    by_router: Mapping[str, Mapping[str, Any]]

    @property
    def in_flight(self) -> int:
        """Over all routers."""
        return sum(row["in_flight"] for row in self.by_router.values())

    @property
    def waiting(self) -> int | None:
        """The queue of the engine, as the router saw it that saw the longest."""
        found: int | None = self._most("waiting")
        return found

    @property
    def kv_usage(self) -> float | None:
        """A share of 1."""
        found: float | None = self._most("kv_usage")
        return found

    def _most(self, name: str) -> Any:
        found = (row.get(name) for row in self.by_router.values())
        return max((value for value in found if value is not None), default=None)


class Acknowledged(NamedTuple):
    """How many of the routers that report obey an override, and which do not."""

    routers: int
    of: int
    missing: tuple[str, ...]


class Following(NamedTuple):
    """How many of the routers that report have a document as it is now, which do not yet, and which poll none."""

    routers: int
    of: int
    missing: tuple[str, ...]
    without: tuple[str, ...]


def interval_after(known: Reported | None, boot: str, now: int) -> int:
    """Milliseconds between the reports of a router, once it has sent one more.

    A gap in which it was lost, or started again, says nothing about its interval.
    """
    if known is None or known.report["boot"] != boot:
        return FIRST_INTERVAL
    return known.interval if known.lost(now) else max(1_000, now - known.at)


def merged(reports: Iterable[Reported]) -> list[MergedBackend]:
    """The backends that routers report, in the order of models and labels: the worst state of each counts."""
    found: dict[tuple[str, str], dict[str, Mapping[str, Any]]] = {}
    for reported in reports:
        for row in reported.report["backends"]:
            found.setdefault((row["model"], row["backend"]), {})[reported.instance] = row
    return [_merged(*key, found[key]) for key in sorted(found)]


def _merged(model: str, backend: str, rows: dict[str, Mapping[str, Any]]) -> MergedBackend:
    states = [row["state"] for row in rows.values()]
    worst = states[0] if states.count(states[0]) == len(states) else min(states, key=_RANKS.__getitem__)
    return MergedBackend(model, backend, worst, f"{states.count(worst)}/{len(states)}", rows)


def model_states(backends: Iterable[MergedBackend]) -> dict[str, str]:
    """ok, degraded or failing by model: degraded if a backend is not ready, failing if none takes requests."""
    found: dict[str, list[str]] = {}
    for one in backends:
        found.setdefault(one.model, []).append(one.state)
    return {model: _model_state(states) for model, states in found.items()}


def _model_state(states: Sequence[str]) -> str:
    if all(state == "ready" for state in states):
        return "ok"
    return "degraded" if any(state in USABLE for state in states) else "failing"


def acknowledged(id: str, reports: Sequence[Reported]) -> Acknowledged:
    missing = tuple(one.instance for one in reports if id not in one.report["overrides"])
    return Acknowledged(len(reports) - len(missing), len(reports), missing)


def following(document: str, etag: str | None, reports: Sequence[Reported]) -> Following:
    held = {one.instance: one.report["etags"].get(document) for one in reports}
    without = tuple(name for name, one in held.items() if one is None)
    missing = tuple(name for name, one in held.items() if one is not None and one != etag)
    return Following(len(held) - len(without) - len(missing), len(held), missing, without)
