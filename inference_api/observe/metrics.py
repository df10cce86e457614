"""Prometheus metrics, kept as plain numbers and rendered when somebody scrapes.

A labelled prometheus_client child costs 0.9 us to count and 2.5 us to observe; an int and a bisect cost a tenth
(docs/adr/0003). Everything is written by the event loop only, so there is nothing to lock.
"""

import platform
import time
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, ItemsView, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from inference_api import __version__
from inference_api.models import Outcome
from inference_api.routing.backend import Backend, Model
from inference_api.routing.origin import Origin
from inference_api.routing.registry import RegistryStatus

# Seconds. OpenTelemetry's bucket boundaries for GenAI servers, with vLLM's and longer ones added.
TTFT_BUCKETS = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160,
)  # fmt: skip
TPOT_BUCKETS = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10)
DURATION_BUCKETS = (
    0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92, 163.84, 327.68, 655.36,
)  # fmt: skip
OVERHEAD_BUCKETS = (0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.5)
# Tokens: OpenTelemetry's powers of four, up to the longest context there is.
TOKEN_BUCKETS = (1, 4, 16, 64, 256, 1024, 4096, 16384, 65536, 262144)

_ABORTS = {
    Outcome.CLIENT_GONE: "client_disconnect",
    Outcome.RESET: "upstream_reset",
    Outcome.PROTOCOL_ERROR: "upstream_reset",
    Outcome.TRUNCATED: "truncated",
    Outcome.ERROR_EVENT: "error_event",
    Outcome.IDLE_TIMEOUT: "idle_timeout",
    Outcome.TOTAL_TIMEOUT: "deadline",
    Outcome.DRAIN_TIMEOUT: "shutdown",
    Outcome.INTERNAL_ERROR: "internal_error",
}

# The error codes with which the router turns a request away, whatever the request itself is like.
_REJECTIONS = {
    "overloaded": "overload",
    "no_backend_available": "no_backend",
    "model_not_found": "unknown_model",
    "registry_unavailable": "registry_unavailable",
    "request_too_large": "too_large",
    "headers_too_large": "too_large",
    "uri_too_long": "too_large",
    "shutting_down": "draining",
}
# Shown as 0 from the start: an alert on a counter that begins with 1 would miss the first of them.
_OF_A_MODEL = ("overload", "no_backend")
_OF_NO_MODEL = ("overload", "unknown_model", "too_large")
# So are these, and why a stream was aborted: of each model, route and kind of request that has been seen, and of chat
# from the start, for the first burst of a new pod may well be of errors. In a catalogue of more models than this most
# are never asked for here, and their zeros would be most of what is scraped: there each has to be seen first.
_FAULTS = (502, 503, 504)
_FEW_MODELS = 100


class Histogram:
    """Counts per bucket, and the sum."""

    __slots__ = ("bounds", "counts", "sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    def cumulative(self) -> list[tuple[str, float]]:
        total, buckets = 0, []
        for bound, count in zip((*self.bounds, None), self.counts, strict=True):
            total += count
            buckets.append(("+Inf" if bound is None else str(float(bound)), float(total)))
        return buckets


class _Requests:
    """One cell of requests_total, with the histogram that its requests are timed in."""

    __slots__ = ("count", "durations")

    def __init__(self, durations: Histogram) -> None:
        self.count = 0
        self.durations = durations


class Metrics(Collector):
    """Every number the router exports. The others are asked at scrape time for what they know.

    `discovery`: look-ups that were of no use, by reason. `draining`: whether the process has been asked to stop.
    `silence`: seconds since the event loop last came by, None if it need not. `revision`: of the source that was built.
    `dropped_lines`: of the log, that could not be written. `clock`: Unix seconds.
    """

    def __init__(
        self,
        fleet: Callable[[], Iterable[Model]],
        registry: Callable[[], RegistryStatus],
        discovery: Callable[[], Mapping[str, int]] = dict,
        draining: Callable[[], bool] = bool,
        silence: Callable[[], float | None] = lambda: None,
        revision: str = "",
        dropped_lines: Callable[[], int] = int,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._fleet = fleet
        self._registry = registry
        self._discovery = discovery
        self._draining = draining
        self._silence = silence
        self._revision = revision
        self._dropped_lines = dropped_lines
        self._clock = clock
        self._requests: dict[tuple[str, str, int, bool], _Requests] = {}
        self._durations: dict[tuple[str, str, bool, str], Histogram] = defaultdict(lambda: Histogram(DURATION_BUCKETS))
        self._first_token: dict[tuple[str, str], Histogram] = defaultdict(lambda: Histogram(TTFT_BUCKETS))
        self._per_token: dict[tuple[str, str], Histogram] = defaultdict(lambda: Histogram(TPOT_BUCKETS))
        self._overhead: dict[str, Histogram] = defaultdict(lambda: Histogram(OVERHEAD_BUCKETS))
        self._tokens: dict[tuple[str, str], Histogram] = defaultdict(lambda: Histogram(TOKEN_BUCKETS))
        self._rejected: dict[tuple[str, str], int] = defaultdict(int)
        self._aborts: dict[tuple[str, str], int] = defaultdict(int)
        self._attempts: dict[tuple[str, str, str], int] = defaultdict(int)
        self._retries: dict[tuple[str, str], int] = defaultdict(int)
        self._probe_failures: dict[tuple[str, str, str], int] = defaultdict(int)
        self.loop_lag = Histogram(OVERHEAD_BUCKETS)

    # Written on the request path

    def request(self, model: str, route: str, code: int, stream: bool, seconds: float) -> None:
        key = (model, route, code, stream)
        cell = self._requests.get(key)
        if cell is None:
            durations = self._durations[model, route, stream, f"{code // 100}xx"]
            cell = self._requests[key] = _Requests(durations)
        cell.count += 1
        cell.durations.observe(seconds)

    def overhead(self, route: str, seconds: float) -> None:
        self._overhead[route].observe(seconds)

    def first_token(self, model: str, route: str, seconds: float) -> None:
        self._first_token[model, route].observe(seconds)

    def per_token(self, model: str, route: str, seconds: float) -> None:
        self._per_token[model, route].observe(seconds)

    def tokens(self, model: str, kind: str, count: int) -> None:
        self._tokens[model, kind].observe(count)

    def refused(self, model: str, code: str) -> None:
        """The router answered with an error of its own; not every one of them rejects a request."""
        reason = _REJECTIONS.get(code)
        if reason is not None:
            self._rejected[model, reason] += 1

    def stream_ended(self, model: str, outcome: Outcome) -> None:
        """The answer's head said that all was well; of a JSON answer too, if it was too large to be held."""
        reason = _ABORTS.get(outcome)
        if reason is not None:
            self._aborts[model, reason] += 1

    def attempt(self, backend: Backend, outcome: Outcome) -> None:
        # Not the Outcome itself, whose hash is computed in Python.
        self._attempts[backend.model, backend.label, outcome._value_] += 1

    def retry(self, model: str, reason: str) -> None:
        self._retries[model, reason] += 1

    # Written beside it

    def probe_failed(self, origin: Origin, kind: str) -> None:
        for backend in origin.backends:
            self._probe_failures[backend.model, backend.label, kind] += 1

    def forget_models(self) -> None:
        """Drop the series of models that have left the catalogue."""
        models = {"unknown", *(model.name for model in self._fleet())}
        by_model: tuple[dict[Any, Any], ...] = (
            self._requests, self._durations, self._first_token, self._per_token, self._tokens, self._aborts,
            self._retries, self._rejected,
        )  # fmt: skip
        for series in by_model:
            for key in [key for key in series if key[0] not in models]:
                del series[key]

    def forget_backends(self) -> None:
        """Drop the series of replicas that have left; with pod addresses they would pile up with every rollout."""
        known = {(model.name, backend.label) for model in self._fleet() for backend in model.backends}
        by_backend: tuple[dict[Any, Any], ...] = self._attempts, self._probe_failures
        for series in by_backend:
            for key in [key for key in series if key[:2] not in known]:
                del series[key]

    # Read by a scrape

    def collect(self) -> Iterator[Metric]:
        yield from self._request_families()
        yield from self._token_families()
        yield from self._backend_families()
        yield from self._load_families()
        yield from self._registry_families()
        yield from self._process_families()

    def _request_families(self) -> Iterator[Metric]:
        requests = _counter("requests", "Requests answered, or given up.", "model_name", "route", "code", "stream")
        counts = {key: cell.count for key, cell in _copy(self._requests)}
        for (model, route, code, stream), count in (self._no_faults() | counts).items():
            requests.add_metric([model, route, str(code), _flag(stream)], count)
        yield requests
        text = "Seconds from the request head to the end of the answer."
        durations = _histogram("request_duration", text, "model_name", "route", "stream", "code_class")
        for (model, route, stream, code_class), histogram in _copy(self._durations):
            _add(durations, [model, route, _flag(stream), code_class], histogram)
        yield durations
        overhead = _histogram("overhead", "Seconds from the whole request to its first attempt.", "route")
        for route, histogram in _copy(self._overhead):
            _add(overhead, [route], histogram)
        yield overhead
        in_flight = _gauge("requests_in_flight", "Requests whose answer has not ended.", "model_name")
        for served in self._fleet():
            in_flight.add_metric([served.name], served.in_flight)
        yield in_flight
        rejected = _counter("rejected_requests", "Requests turned away, by why.", "model_name", "reason")
        for labels, count in (self._no_rejections() | dict(self._rejected)).items():
            rejected.add_metric(labels, count)
        yield rejected

    def _asked_for(self) -> set[tuple[str, str, bool]]:
        """The (model, route, stream) for which there is to be a 0 where nothing has gone wrong."""
        found = {(model, route, stream) for (model, route, _, stream), _ in _copy(self._requests) if model != "unknown"}
        models = [model.name for model in self._fleet()]
        if len(models) <= _FEW_MODELS:
            found.update((name, "chat_completions", stream) for name in models for stream in (False, True))
        return found

    def _no_faults(self) -> dict[tuple[str, str, int, bool], int]:
        return {(model, route, code, stream): 0 for model, route, stream in self._asked_for() for code in _FAULTS}

    def _no_aborts(self) -> dict[tuple[str, str], int]:
        models = {model for model, _, _ in self._asked_for()}
        return {(model, reason): 0 for model in models for reason in _ABORTS.values()}

    def _no_rejections(self) -> dict[tuple[str, str], int]:
        models = [(model.name, reason) for model in self._fleet() for reason in _OF_A_MODEL]
        return dict.fromkeys([*models, *(("unknown", reason) for reason in _OF_NO_MODEL)], 0)

    def _token_families(self) -> Iterator[Metric]:
        first = _histogram("time_to_first_token", "Seconds to the first byte of a streamed answer.", *_BY_ROUTE)
        for labels, histogram in _copy(self._first_token):
            _add(first, labels, histogram)
        yield first
        per_token = _histogram("time_per_output_token", "Seconds per token after the first, if known.", *_BY_ROUTE)
        for labels, histogram in _copy(self._per_token):
            _add(per_token, labels, histogram)
        yield per_token
        tokens = _counter("tokens", "Tokens by `usage`; output_estimate counts streamed events.", "model_name", "type")
        per_request = HistogramMetricFamily(
            "inference_api_request_tokens", "Tokens of one request.", labels=("model_name", "type")
        )
        for labels, histogram in _copy(self._tokens):
            tokens.add_metric(labels, histogram.sum)
            _add(per_request, labels, histogram)
        yield from (tokens, per_request)
        aborts = _counter("stream_aborts", "Answers that broke after a good head.", "model_name", "reason")
        for labels, count in (self._no_aborts() | dict(self._aborts)).items():
            aborts.add_metric(labels, count)
        yield aborts

    def _backend_families(self) -> Iterator[Metric]:
        attempts = _counter("upstream_attempts", "Attempts, by how they ended.", "model_name", "backend", "outcome")
        for labels, count in _copy(self._attempts):
            attempts.add_metric(labels, count)
        yield attempts
        text = "Attempts repeated, and requests that were not because the budget was spent or they are poison."
        retries = _counter("retries", text, "model_name", "reason")
        for (name, reason), count in _copy(self._retries):
            retries.add_metric([name, reason], count)
        yield retries
        yield from self._health_families()

    def _health_families(self) -> Iterator[Metric]:
        in_flight = _gauge("backend_in_flight", "Attempts whose answer has not ended.", *_BY_BACKEND)
        up = _gauge("backend_up", "1: it passes its health checks and is not stuck.", *_BY_BACKEND)
        circuit = _gauge("backend_circuit_open", "1: failures keep all requests but a probe from it.", *_BY_BACKEND)
        asleep = _gauge("backend_asleep", "1: the backend says that it sleeps, so no request goes to it.", *_BY_BACKEND)
        text = "Times a backend failed a health check, or did not tell its metrics."
        failures = _counter("backend_probe_failures", text, *_BY_BACKEND, "kind")
        panic = _gauge("panic_mode", "1: more than half of its backends are out, so all are used.", "model_name")
        for model in self._fleet():
            panic.add_metric([model.name], model.panic)
            for backend in model.backends:
                place = (model.name, backend.label)
                in_flight.add_metric(place, backend.in_flight)
                up.add_metric(place, backend.origin.up)
                circuit.add_metric(place, backend.origin.opened is not None)
                if backend.origin.asleep is not None:
                    asleep.add_metric(place, backend.origin.asleep)
                failures.add_metric([*place, "health"], self._probe_failures.get((*place, "health"), 0))
                if (scrapes := self._probe_failures.get((*place, "metrics"))) is not None:
                    failures.add_metric([*place, "metrics"], scrapes)
        yield from (in_flight, up, circuit, asleep, failures, panic)

    def _load_families(self) -> Iterator[Metric]:
        running = _gauge("backend_running_requests", "Requests the backend says it works on.", *_BY_BACKEND)
        waiting = _gauge("backend_queue_depth", "Requests the backend says it has waiting.", *_BY_BACKEND)
        cache = _gauge("backend_kv_cache_usage_ratio", "Used share of the backend's KV cache.", *_BY_BACKEND)
        text = "When the backend last told its load, in Unix seconds."
        scraped = _gauge("backend_last_scrape_timestamp_seconds", text, *_BY_BACKEND)
        for backend in [backend for model in self._fleet() for backend in model.backends]:
            labels = [backend.model, backend.label]
            if backend.origin.scraped:
                scraped.add_metric(labels, backend.origin.scraped)
            if (reading := backend.origin.reading) is not None:
                running.add_metric(labels, reading.running)
                waiting.add_metric(labels, reading.waiting)
                if reading.kv_cache is not None:
                    cache.add_metric(labels, reading.kv_cache)
        yield from (running, waiting, cache, scraped)

    def _registry_families(self) -> Iterator[Metric]:
        status = self._registry()
        models = _gauge("registry_models", "Models that can be named, by where the catalogue came from.", "source")
        for source in ("registry", "stale", "static"):
            models.add_metric([source], status.models if source == status.source else 0)
        yield models
        success = _gauge("registry_last_success_timestamp_seconds", "When the registry last answered; 0: never.")
        success.add_metric([], status.last_success)
        yield success
        failures = _counter("registry_sync_failures", "Looks at the registry that failed.", "reason")
        for reason, count in _copy(status.failures):
            failures.add_metric([reason], count)
        yield failures
        lookups = _counter("discovery_failures", "Look-ups of backends' host names that were of no use.", "reason")
        for reason, count in _copy(self._discovery()):
            lookups.add_metric([reason], count)
        yield lookups

    def _process_families(self) -> Iterator[Metric]:
        draining = _gauge("draining", "1: the process has been asked to stop, and ends what it has in flight.")
        draining.add_metric([], self._draining())
        yield draining
        lag = _histogram("event_loop_lag", "Seconds by which the event loop was late for a timer.")
        _add(lag, [], self.loop_lag)
        yield lag
        ticked = _gauge("event_loop_last_tick_timestamp_seconds", "When the event loop last came by, in Unix seconds.")
        # From a clock that nobody sets, so that a step of the other one is no hang.
        if (silence := self._silence()) is not None:
            ticked.add_metric([], self._clock() - silence)
        yield ticked
        dropped = _counter("log_lines_dropped", "Lines of the log that could not be written in time.")
        dropped.add_metric([], self._dropped_lines())
        yield dropped
        build = _gauge("build_info", "Always 1; the labels say what runs.", "version", "revision", "python_version")
        build.add_metric([__version__, self._revision, platform.python_version()], 1)
        yield build


_K = TypeVar("_K")
_V = TypeVar("_V")
_BY_ROUTE = ("model_name", "route")
_BY_BACKEND = ("model_name", "backend")


def _counter(name: str, text: str, *labels: str) -> CounterMetricFamily:
    return CounterMetricFamily(f"inference_api_{name}", text, labels=labels)


def _gauge(name: str, text: str, *labels: str) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"inference_api_{name}", text, labels=labels)


def _histogram(name: str, text: str, *labels: str) -> HistogramMetricFamily:
    return HistogramMetricFamily(f"inference_api_{name}_seconds", text, labels=labels)


def _add(family: HistogramMetricFamily, labels: Sequence[str], histogram: Histogram) -> None:
    family.add_metric(labels, histogram.cumulative(), histogram.sum)


def _copy(series: Mapping[_K, _V]) -> ItemsView[_K, _V]:
    """A scrape may run on a thread of its own (OPS_PORT) while the event loop adds a series.

    A dict is copied in one go. A list of its items is not: it makes a tuple for each, that may start a garbage
    collection, and that may let the other thread run.
    """
    return dict(series).items()


def _flag(value: bool) -> str:
    return "true" if value else "false"
