"""The families of a scrape: the counters of `metrics`, and gauges read at that moment."""

import platform
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from inference_api import __version__
from inference_api.models import AUTH_FAILED
from inference_api.observe.account import UNKNOWN
from inference_api.observe.exposition import Family
from inference_api.observe.exposition import Series as Shown
from inference_api.observe.metrics import ABORTS, Metrics
from inference_api.observe.series import Count, Histogram, Series
from inference_api.routing.backend import Backend
from inference_api.routing.entries import Credentials
from inference_api.routing.fleet import Model
from inference_api.routing.registry import RegistryStatus

# Shown as 0 from the start: an alert on a counter that begins with 1 would miss the first event.
_OF_A_MODEL = ("overload", "no_backend")
_OF_NO_MODEL = ("overload", "unknown_model", "too_large")
# Also shown as 0, like the reasons of aborted streams: for each model, route and kind of request seen so far, and for
# chat from the start, since the first requests of a new pod may fail. In catalogues of more models than this, most get
# no requests here, and their zeros would dominate the scrape: there only models that were requested have series.
_FAULTS = (502, 503, 504)
_FEW_MODELS = 100
_CHAT = "chat_completions"
_BY_ROUTE = ("model_name", "route")
BY_BACKEND = ("model_name", "backend")


class Families:
    """Every family, made anew for each scrape; its series are looked up while they are read.

    May run on a separate thread (OPS_PORT): every source must allow that.

    `discovery`: failed look-ups, by reason. `draining`: whether the process is stopping.
    `silence`: seconds since the last turn of the event loop, None while it is not running. `revision`: of the source.
    `dropped_lines`: lines of the log that were not written. `clock`: Unix seconds. `collectors`: the
    families of features.
    """

    def __init__(
        self,
        metrics: Metrics,
        registry: Callable[[], RegistryStatus],
        discovery: Callable[[], Mapping[str, int]] = dict,
        draining: Callable[[], bool] = bool,
        silence: Callable[[], float | None] = lambda: None,
        revision: str = "",
        dropped_lines: Callable[[], int] = int,
        clock: Callable[[], float] = time.time,
        collectors: Sequence[Callable[[], Iterator[Family]]] = (),
    ) -> None:
        self._metrics = metrics
        self._registry = registry
        self._discovery = discovery
        self._draining = draining
        self._silence = silence
        self._revision = revision
        self._dropped_lines = dropped_lines
        self._clock = clock
        self._collectors = tuple(collectors)

    def __call__(self) -> Iterator[Family]:
        yield from self._of_requests()
        yield from self._of_tokens()
        yield from self._of_attempts()
        yield from self._of_backends()
        yield from self._of_registry()
        yield from self._of_process()
        for collect in self._collectors:
            yield from collect()

    def _of_requests(self) -> Iterator[Family]:
        metrics = self._metrics
        text = "Finished requests."
        yield counter("requests", text, ("model_name", "route", "code", "stream"), self._requests())
        text = "Seconds from the request head to the end of the answer."
        durations = (
            ((model, route, _flag(stream), code_class), histogram)
            for (model, route, stream, code_class), histogram in metrics.durations.snapshot().items()
        )
        yield seconds("request_duration", text, ("model_name", "route", "stream", "code_class"), durations)
        text = "Seconds from the whole request to its first attempt."
        yield seconds("overhead", text, ("route",), metrics.overheads.snapshot().items())
        in_flight = (((model.name,), model.in_flight) for model in self._models())
        yield gauge("requests_in_flight", "Requests in flight.", ("model_name",), in_flight)
        text = "Requests turned away, by why."
        yield counter("rejected_requests", text, ("model_name", "reason"), self._rejections())

    def _requests(self) -> Iterator[Shown]:
        seen = self._metrics.requests.snapshot()
        for (model, route, code, stream), cell in seen.items():
            yield (model, route, str(code), _flag(stream)), cell.count
        for model, route, stream in self._asked_for(seen):
            for code in _FAULTS:
                zero = None if (model, route, code, stream) in seen else 0
                yield (model, route, str(code), _flag(stream)), zero

    def _asked_for(self, seen: Iterable[tuple[str, str, int, bool]]) -> Iterator[tuple[str, str, bool]]:
        """The (model, route, stream) for which counters of errors are shown as 0."""
        shown = set()
        for model, route, _, stream in seen:
            if model != UNKNOWN and (model, route, stream) not in shown:
                shown.add((model, route, stream))
                yield model, route, stream
        names = self._metrics.fleet()
        if len(names) <= _FEW_MODELS:
            chats = ((name, _CHAT, stream) for name in names for stream in (False, True))
            yield from (chat for chat in chats if chat not in shown)

    def _aborts(self) -> Iterator[Shown]:
        seen = self._metrics.aborts.snapshot()
        yield from ((labels, cell.count) for labels, cell in seen.items())
        shown = set()
        for model, _, _ in self._asked_for(self._metrics.requests.snapshot()):
            if model not in shown:
                shown.add(model)
                yield from _zeros(model, dict.fromkeys(ABORTS.values()), seen)

    def _rejections(self) -> Iterator[Shown]:
        seen = self._metrics.rejections.snapshot()
        yield from ((labels, cell.count) for labels, cell in seen.items())
        expected = {UNKNOWN: _OF_NO_MODEL} | dict.fromkeys(self._metrics.fleet(), _OF_A_MODEL)
        for model, reasons in expected.items():
            yield from _zeros(model, reasons, seen)

    def _of_tokens(self) -> Iterator[Family]:
        metrics = self._metrics
        text = "Seconds to the first token of a streamed answer."
        yield seconds("time_to_first_token", text, _BY_ROUTE, metrics.first_tokens.snapshot().items())
        text = "Seconds per token after the first, if known."
        yield seconds("time_per_output_token", text, _BY_ROUTE, metrics.per_tokens.snapshot().items())
        text = "Tokens by `usage`; output_estimate counts events with a token."
        kinds = ("model_name", "type")
        counts = ((labels, histogram.sum) for labels, histogram in metrics.token_counts.snapshot().items())
        yield counter("tokens", text, kinds, counts)
        text = "Tokens of one request."
        yield Family("histogram", "inference_api_request_tokens", text, kinds, metrics.token_counts.snapshot().items())
        text = "Answers that failed after a successful head."
        yield counter("stream_aborts", text, ("model_name", "reason"), self._aborts())

    def _of_attempts(self) -> Iterator[Family]:
        metrics = self._metrics
        text = "Attempts, by outcome."
        yield counter("upstream_attempts", text, (*BY_BACKEND, "outcome"), _counts(metrics.attempts))
        text = "Attempts whose backend refused the router's credentials."
        yield counter("upstream_auth_failures", text, BY_BACKEND, self._auth_failures())
        text = "Retries, and retries forbidden by the budget or the poison guard."
        yield counter("retries", text, ("model_name", "reason"), _counts(metrics.retries))

    def _of_backends(self) -> Iterator[Family]:
        text = "Attempts in flight."
        yield gauge("backend_in_flight", text, BY_BACKEND, self._each(lambda backend: backend.in_flight))
        text = "1: the backend passes its health checks and is not stuck."
        yield gauge("backend_up", text, BY_BACKEND, self._each(lambda backend: backend.origin.up))
        text = "1: the circuit is not closed; the backend gets only probes."
        yield gauge("backend_circuit_open", text, BY_BACKEND, self._each(lambda backend: backend.failing))
        text = "1: the backend gives errors that the other backends do not, and gets only probes."
        # Rare: a series exists only while the value is 1.
        aside = self._each(lambda backend: None if backend.circuit.opened is None else True)
        yield gauge("backend_set_aside", text, BY_BACKEND, aside)
        text = "1: the backend reports that it sleeps, and gets no requests."
        yield gauge("backend_asleep", text, BY_BACKEND, self._each(lambda backend: backend.origin.asleep))
        text = "Failed health checks, failed reads of metrics, and lists without the model."
        yield counter("backend_probe_failures", text, (*BY_BACKEND, "kind"), self._probe_failures())
        text = "1: more than half of the model's backends are out, so all are used."
        panic = (((model.name,), model.panic) for model in self._models())
        yield gauge("panic_mode", text, ("model_name",), panic)

    def _auth_failures(self) -> Iterator[Shown]:
        counts = {
            labels[:2]: cell.count
            for labels, cell in self._metrics.attempts.snapshot().items()
            if labels[2] == AUTH_FAILED
        }
        yield from counts.items()
        for model in self._models():
            # From 0 on where it is likely, so that an alert sees the first one.
            for backend in model.backends if isinstance(model.entry.credentials, Credentials) else ():
                if (labels := (backend.model, backend.label)) not in counts:
                    yield labels, 0

    def _models(self) -> Iterator[Model]:
        """Without adapters, whose requests and backends are those of their parents."""
        return (model for model in self._metrics.fleet().values() if model.parent is None)

    def _backends(self) -> Iterator[Backend]:
        return (backend for model in self._models() for backend in model.backends)

    def _each(self, value: Callable[[Backend], float | None]) -> Iterator[Shown]:
        return (((backend.model, backend.label), value(backend)) for backend in self._backends())

    def _probe_failures(self) -> Iterator[Shown]:
        seen = self._metrics.probe_failures.snapshot()
        for backend in self._backends():
            health, *others = ((backend.model, backend.label, kind) for kind in ("health", "metrics", "model"))
            yield health, seen[health].count if health in seen else 0
            yield from ((labels, seen[labels].count if labels in seen else None) for labels in others)

    def _of_registry(self) -> Iterator[Family]:
        status = self._registry()
        text = "Models, by the source of the catalogue."
        sources = ("registry", "stale", "static")
        models = (((source,), status.models if source == status.source else 0) for source in sources)
        yield gauge("registry_models", text, ("source",), models)
        text = "Time of the registry's last answer, in Unix seconds; 0: never."
        yield gauge("registry_last_success_timestamp_seconds", text, (), _alone(status.last_success))
        text = "Failed polls of the registry."
        yield counter("registry_sync_failures", text, ("reason",), _reasons(status.failures))
        text = "Failed look-ups of backends' host names."
        yield counter("discovery_failures", text, ("reason",), _reasons(self._discovery()))

    def _of_process(self) -> Iterator[Family]:
        text = "1: the process is stopping, and finishes requests in flight."
        yield gauge("draining", text, (), _alone(self._draining()))
        text = "Seconds by which the event loop was late for a timer."
        yield seconds("event_loop_lag", text, (), _alone(self._metrics.loop_lag))
        text = "Time of the event loop's last turn, in Unix seconds."
        silence = self._silence()
        # From the monotonic clock, so that a step of the wall clock does not look like a hang.
        ticked = () if silence is None else _alone(self._clock() - silence)
        yield gauge("event_loop_last_tick_timestamp_seconds", text, (), ticked)
        text = "Log lines that were dropped."
        yield counter("log_lines_dropped", text, (), _alone(self._dropped_lines()))
        text = "Always 1; the labels have the version."
        built = [((__version__, self._revision, platform.python_version()), 1)]
        yield gauge("build_info", text, ("version", "revision", "python_version"), built)


def counter(name: str, text: str, labels: Sequence[str], series: Iterable[Shown]) -> Family:
    return Family("counter", f"inference_api_{name}", text, labels, series)


def gauge(name: str, text: str, labels: Sequence[str], series: Iterable[Shown]) -> Family:
    return Family("gauge", f"inference_api_{name}", text, labels, series)


def seconds(name: str, text: str, labels: Sequence[str], series: Iterable[Shown]) -> Family:
    return Family("histogram", f"inference_api_{name}_seconds", text, labels, series)


def _alone(value: float | Histogram) -> list[Shown]:
    return [((), value)]


def _counts(series: Series[Any, Count]) -> Iterator[Shown]:
    return ((labels, cell.count) for labels, cell in series.snapshot().items())


def _reasons(counts: Mapping[str, int]) -> Iterator[Shown]:
    return (((reason,), count) for reason, count in dict(counts).items())


def _zeros(model: str, reasons: Iterable[str], seen: Mapping[tuple[str, str], Count]) -> Iterator[Shown]:
    return (((model, reason), None if (model, reason) in seen else 0) for reason in reasons)


def _flag(value: bool) -> str:
    return "true" if value else "false"
