"""The state of a backend, for operators: whether it takes requests, and since when and why not."""

import math
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from inference_api.errors import NoBackend
from inference_api.routing.backend import Backend
from inference_api.routing.breaker import due
from inference_api.routing.fleet import Model

State = Literal[
    "out", "draining", "open", "half_open", "unhealthy", "stuck", "asleep", "resting", "recovering", "ready"
]
CircuitState = Literal["closed", "open", "half_open"]

# Retry-After if connections are refused: either a short restart, or longer than any client waits.
SOON = 1
_SHOWN = 3


class Standing(NamedTuple):
    """`state` is the first that holds, in the order of State; `since`, `retry_at`: seconds of the loop's clock."""

    state: State
    circuit: CircuitState
    reason: str | None = None
    since: float | None = None
    retry_at: float | None = None


def standing(backend: Backend, now: float, resting: float | None = None) -> Standing:
    """`resting`: end of its Retry-After pause."""
    origin, since = backend.origin, backend.changed
    circuit, half_open_at = _circuit(backend, now)
    if (override := backend.override) is not None:
        return Standing("out" if override.action == "out" else "draining", circuit, override.reason, override.since)
    if circuit == "half_open":
        return Standing(circuit, circuit, f"{_reason(backend)}; the next request tries it", since)
    if circuit == "open":
        return Standing(circuit, circuit, _reason(backend), since, half_open_at)
    if not origin.healthy:
        # Without a cause the last one has passed, and one is not enough.
        return Standing("unhealthy", circuit, f"health check: {origin.cause or 'one has passed, two must'}", since)
    if origin.stuck_since is not None:
        return Standing("stuck", circuit, "it has requests, and sends no byte", origin.stuck_since)
    if origin.asleep:
        return Standing("asleep", circuit, "it reports that it sleeps", since)
    if resting is not None and resting > now:
        return Standing("resting", circuit, "it sent Retry-After", since, resting)
    if backend.lacks is not None:
        return Standing("unhealthy", circuit, f"it {backend.lacks}", since)
    if backend.share < 1.0:
        return Standing("recovering", circuit, "slow start", since)
    # Not out yet: that requires a few failures in a row.
    return Standing("ready", circuit, _trouble(backend), since)


def row_of(backend: Backend, now: float, wall: float, began: float, resting: float | None = None) -> dict[str, Any]:
    """One backend, as GET /backends and router reports have it; times are Unix milliseconds.

    `wall`: Unix seconds at `now`; `began`: since when the router knows of backends; `resting`: as for `standing`.
    """

    def at(moment: float) -> int:
        return int((wall - now + moment) * 1000)

    found, override = standing(backend, now, resting), backend.override
    row: dict[str, Any] = {
        "model": backend.model,
        "backend": backend.label,
        "state": found.state,
        "in_flight": backend.in_flight,
        "circuit": found.circuit,
    }
    if found.reason is not None:
        row["reason"] = found.reason[:500]
    since = found.since
    if since is None and found.state != "ready":
        since = began
    if since is not None:
        row["since"] = at(since)
    if found.retry_at is not None:
        row["retry_at"] = at(found.retry_at)
    if (reading := backend.origin.reading) is not None:
        row["waiting"] = int(reading.waiting)
        if reading.kv_cache is not None:
            row["kv_usage"] = min(max(reading.kv_cache, 0.0), 1.0)
    if backend.last_error is not None:
        outcome, moment = backend.last_error
        row["last_error"] = {"outcome": outcome.value, "request_id": None, "at": at(moment)}
    if override is not None:
        row["override"] = override.id
    return row


def no_backend(model: Model, now: float) -> NoBackend:
    """The error for a request without an available backend."""
    refused = bool(model.awake) and all(backend.origin.refused for backend in model.awake)
    return NoBackend(
        model.name,
        SOON if refused else 5,
        asleep=bool(model.backends) and all(backend.origin.asleep for backend in model.backends),
        none=not model.entry.backends,
        why=why_not(model, now),
    )


def why_not(model: Model, now: float, causes: Mapping[Backend, str] | None = None) -> str:
    """The reasons for which its backends are out, for the log: `10.0.0.11:8000: connection refused`.

    `causes`: of the connections that have just failed.
    """
    causes = causes or {}
    if not model.backends and model.parent is not None and model.parent.backends:
        return f"no backend of its parent, the model {model.parent.name!r}, has this adapter"
    if not model.backends:
        return "its backends have no known address" if model.entry.backends else "it has no backends"
    reasons = [f"{backend.label}: {causes.get(backend) or _cause(backend, now)}" for backend in model.backends[:_SHOWN]]
    if len(model.backends) > _SHOWN:
        reasons.append(f"and {len(model.backends) - _SHOWN} more")
    return "; ".join(reasons)


def _cause(backend: Backend, now: float) -> str:
    if (override := backend.override) is not None:
        return f"{override.action} by an override ({override.reason})"
    if backend.origin.cause is not None:
        return backend.origin.cause
    if backend.last_error is not None:
        return backend.last_error[0].value
    state = standing(backend, now)
    return state.reason or state.state


def _trouble(backend: Backend) -> str | None:
    if backend.origin.cause:
        return f"health check: {backend.origin.cause}"
    return backend.last_error[0].value if backend.origin.failures and backend.last_error else None


def _circuit(backend: Backend, now: float) -> tuple[CircuitState, float]:
    """The state, and when it becomes half-open. Each circuit is read once, as it may close meanwhile (OPS_PORT)."""
    moments = [moment for moment in (due(backend.origin), due(backend.circuit)) if moment < math.inf]
    if not moments:
        return "closed", 0.0
    return "open" if now < max(moments) else "half_open", max(moments)


def _reason(backend: Backend) -> str:
    if backend.origin.opened is None and backend.refuses:
        return "upstream_4xx"
    return "failures in a row" if backend.last_error is None else backend.last_error[0].value
