"""The metrics of the control plane. With few requests a second, prometheus-client's counters suffice."""

import platform
import time
from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.openmetrics.exposition import generate_latest as generate_openmetrics
from starlette.requests import Request
from starlette.responses import Response

from inference_api import __version__
from inference_api.http.negotiation import OPENMETRICS, TEXT, wants_openmetrics


class Metrics:
    """`clock`: monotonic seconds. Services add families of their own to `registry`."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.clock = clock
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self.requests = Counter(
            "control_plane_http_requests", "Requests answered.", ["method", "route", "code"], registry=self.registry
        )
        self.durations = Histogram(
            "control_plane_http_request_duration_seconds",
            "Seconds from the request to the end of the answer.",
            ["method", "route"],
            registry=self.registry,
        )
        self.database_errors = Counter(
            "control_plane_database_errors", "Requests that the database failed.", registry=self.registry
        )
        self.password_hashes = Counter(
            "control_plane_password_hashes", "Hashes of passwords made or checked.", registry=self.registry
        )
        self.usage_records = Counter(
            "control_plane_usage_records", "Usage records of routers.", ["result"], registry=self.registry
        )
        for result in ("accepted", "duplicate", "refused"):
            self.usage_records.labels(result)
        build = Gauge(
            "control_plane_build_info",
            "Always 1; the labels say what runs.",
            ["version", "python_version"],
            registry=self.registry,
        )
        build.labels(__version__, platform.python_version()).set(1)

    def gauge(self, name: str, text: str, read: Callable[[], float]) -> None:
        """A gauge `control_plane_<name>` that is read at each scrape."""
        Gauge(f"control_plane_{name}", text, registry=self.registry).set_function(read)

    async def page(self, request: Request) -> Response:
        openmetrics = wants_openmetrics(",".join(request.headers.getlist("accept")))
        write: Callable[[CollectorRegistry], bytes] = generate_openmetrics if openmetrics else generate_latest
        return Response(write(self.registry), headers={"content-type": OPENMETRICS if openmetrics else TEXT})
