"""What models were asked in the last hour, and what they have cost in the last day: GET /usage, for a few of them."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from control_plane.plane import Act, Plane
from control_plane.pure.records import DAY, HOUR
from control_plane.services import usage
from control_plane.services.usage import MOST_ROWS, Question

# Milliseconds for which an answer is shown again
KEPT = 10_000


class ModelUse(NamedTuple):
    """`requests`, `errors`, `latency_p95` (milliseconds; None: of no request): of the last hour.

    `cost_nanos`, `unpriced`, `day`: cost, requests without a price, and requests of the last day.
    """

    requests: int = 0
    errors: int = 0
    latency_p95: float | None = None
    cost_nanos: int = 0
    unpriced: int = 0
    day: int = 0


async def of_models(plane: Plane, act: Act, names: Iterable[str], virtual: Iterable[str] = ()) -> dict[str, ModelUse]:
    """By name, at most KEPT old. `virtual`: models for which others answer: they are known by what was asked.

    At most MOST_ROWS of each. Raises StorageUnavailable.
    """
    return {
        **await _by(plane, act, "model", tuple(sorted(names))),
        **await _by(plane, act, "asked_model", tuple(sorted(virtual))),
    }


async def _by(plane: Plane, act: Act, dimension: str, names: tuple[str, ...]) -> Mapping[str, ModelUse]:
    if not names:
        return {}
    if len(names) > MOST_ROWS:
        raise ValueError(f"{len(names)} models, at most {MOST_ROWS}")
    scope = act.principal.scope("usage.see")
    key = "model_use", dimension, names, scope, None if scope.everything else act.principal.user
    return await plane.kept.get(key, act.at, KEPT, lambda: _read(plane, act, dimension, names))


async def _read(plane: Plane, act: Act, dimension: str, names: tuple[str, ...]) -> Mapping[str, ModelUse]:
    async def rows(span: int) -> dict[str, Mapping[str, Any]]:
        asked = Question(act.at - span, act.at, "1h", (dimension,), among=names)
        report = await usage.report(plane, act, asked)
        return {row["group"][dimension]: row for row in report["rows"] if row["group"] is not None}

    hour, day = await rows(HOUR), await rows(DAY)
    return {name: _use(hour.get(name), day.get(name)) for name in names}


def _use(hour: Mapping[str, Any] | None, day: Mapping[str, Any] | None) -> ModelUse:
    found = ModelUse()
    if hour is not None:
        found = found._replace(requests=hour["requests"], errors=hour["errors"], latency_p95=hour["latency_ms"]["p95"])
    if day is not None:
        found = found._replace(cost_nanos=day["cost_nanos"], unpriced=day["unpriced"], day=day["requests"])
    return found
