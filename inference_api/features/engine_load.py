"""LOAD_SIGNAL_INTERVAL: adds the load that engines report to the router's own count, for balancing and metrics.

Only the backend knows the load from other routers and clients. Old readings are dropped: balancing then uses the
router's own counts.
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, TypeVar

from pydantic import Field

from inference_api.core import Core
from inference_api.discovery.engine_metrics import EngineMetrics
from inference_api.feature import Feature, Switch
from inference_api.observe.exposition import Family
from inference_api.observe.families import BY_BACKEND, gauge
from inference_api.routing.backend import Backend, Reading
from inference_api.routing.balance import LeastInFlight, TwoChoices
from inference_api.routing.balancer import BackendView, MakeBalancer, running_weights
from inference_api.routing.fleet import Fleet
from inference_api.settings import Group, Settings

R = TypeVar("R", bound=BackendView)


class Options(Group):
    load_signal_interval: Annotated[float, Field(ge=0, allow_inf_nan=False)] = Field(
        default=0,
        description="seconds between two reads of the backends' own metrics, for balancing, +-20 %; 0: off",
    )


def build(core: Core, settings: Settings) -> Feature | None:
    """Polls the engines' metrics every `load_signal_interval` seconds; 0: off."""
    if not settings.of(Options).load_signal_interval:
        return None
    poller = EngineMetrics(
        core.fleet,
        core.own_transport,
        settings.of(Options).load_signal_interval,
        functools.partial(core.metrics.probe_failed, kind="metrics"),
        rand=core.rand.random,
    )
    return Feature("engine_load", collect=lambda: families(core.fleet), tasks=(poller.run,))


def balancers(settings: Settings) -> Mapping[str, MakeBalancer]:
    """The algorithms that use load alone, with the reported load; none if that is off."""
    if not settings.of(Options).load_signal_interval:
        return {}
    return {"least_in_flight": LeastReported, "two_choices": TwoReported}


class LeastReported(LeastInFlight[R]):
    """The backend with the least load by weight, in flight and reported."""

    def loads(self, backends: Sequence[R]) -> list[float]:
        return [
            (backend.origin.in_flight + backend.origin.reported + backend.extra) / backend.weight
            for backend in backends
        ]


class TwoReported(TwoChoices[R]):
    """The less loaded of two random backends, by requests in flight and reported."""

    def ends(self, backends: Sequence[R]) -> list[float] | None:
        # Never None, so that only one place compares.
        return running_weights(backends)

    def is_lighter(self, first: R, second: R) -> bool:
        load = first.origin.in_flight + first.origin.reported + first.extra
        other = second.origin.in_flight + second.origin.reported + second.extra
        return (load + 1) * second.weight <= (other + 1) * first.weight


def families(fleet: Fleet) -> Iterator[Family]:
    """Gauges of the load that each backend last reported; no series without a report."""
    backends = [backend for model in fleet.models.values() for backend in model.backends]

    def read(value: Callable[[Backend, Reading], float | None]) -> list[tuple[tuple[str, str], float | None]]:
        return [
            ((backend.model, backend.label), None if reading is None else value(backend, reading))
            for backend in backends
            for reading in (backend.origin.reading,)
        ]

    text = "Running requests, as the backend reports."
    yield gauge("backend_running_requests", text, BY_BACKEND, read(lambda _, reading: reading.running))
    text = "Waiting requests, as the backend reports."
    yield gauge("backend_queue_depth", text, BY_BACKEND, read(lambda _, reading: reading.waiting))
    text = "Used share of the backend's KV cache."
    yield gauge("backend_kv_cache_usage_ratio", text, BY_BACKEND, read(lambda _, reading: reading.kv_cache))
    text = "Time of the backend's last report of its load, in Unix seconds."
    scraped = [((backend.model, backend.label), backend.origin.scraped_at or None) for backend in backends]
    yield gauge("backend_last_scrape_timestamp_seconds", text, BY_BACKEND, scraped)


FEATURE = Switch(build, Options, balancers=balancers)
