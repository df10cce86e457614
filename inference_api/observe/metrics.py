"""The counters of requests: plain numbers, updated at each event and read at a scrape.

A labelled prometheus_client child costs 0.9 us to count and 2.5 us to observe; an int and a bisect cost a tenth
(docs/adr/0003). Only the event loop writes, so there are no locks.
"""

from collections.abc import Callable, Mapping
from typing import Any

from inference_api.models import OK, Outcome
from inference_api.observe.account import REJECTED, UNKNOWN, Record, shown_status
from inference_api.observe.series import Count, Histogram, Series
from inference_api.routing.backend import Backend, Origin
from inference_api.routing.fleet import Model

# Seconds. OpenTelemetry's bucket boundaries for GenAI servers, with vLLM's and longer ones added.
TTFT_BUCKETS = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160,
)  # fmt: skip
TPOT_BUCKETS = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10)
DURATION_BUCKETS = (
    0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92, 163.84, 327.68, 655.36,
)  # fmt: skip
OVERHEAD_BUCKETS = (0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.5)
# Tokens: OpenTelemetry's powers of four, up to the longest contexts.
TOKEN_BUCKETS = (1, 4, 16, 64, 256, 1024, 4096, 16384, 65536, 262144)

ABORTS = {
    Outcome.CLIENT_GONE: "client_disconnect",
    Outcome.RESET: "upstream_reset",
    Outcome.PROTOCOL_ERROR: "upstream_reset",
    Outcome.TRUNCATED: "truncated",
    Outcome.ERROR_EVENT: "error_event",
    Outcome.ABORTED: "aborted",
    Outcome.IDLE_TIMEOUT: "idle_timeout",
    Outcome.TOTAL_TIMEOUT: "deadline",
    Outcome.DRAIN_TIMEOUT: "shutdown",
    Outcome.INTERNAL_ERROR: "internal_error",
}

# Of those, a broken answer: the client did not ask for its end.
BROKEN = frozenset(ABORTS.values()) - {"client_disconnect"}

# Codes of rejections that are not the fault of the request
_REJECTIONS = {
    "overloaded": "overload",
    "no_backend_available": "no_backend",
    "model_loading": "no_backend",
    "model_not_found": "unknown_model",
    "registry_unavailable": "registry_unavailable",
    "request_too_large": "too_large",
    "headers_too_large": "too_large",
    "uri_too_long": "too_large",
    "shutting_down": "draining",
    "invalid_api_key": "auth",
    "api_key_expired": "auth",
    "api_key_disabled": "auth",
    "auth_unavailable": "auth",
    "model_not_priced": "forbidden",
    "rate_limit_exceeded": "rate_limit",
    "insufficient_quota": "budget",
    "limits_unavailable": "limits",
    "prompt_not_found": "prompt",
    "prompt_variable_missing": "prompt",
    "prompt_variable_unknown": "prompt",
    "prompt_variable_invalid": "prompt",
}


class _Requests(Count):
    """One cell of requests_total, with the histograms of its requests: one look-up for all of them."""

    __slots__ = ("durations", "input", "output", "overhead")

    def __init__(self, durations: Histogram) -> None:
        super().__init__()
        self.durations = durations
        # Made at first use: no series without a count.
        self.overhead: Histogram | None = None
        self.input: Histogram | None = None
        self.output: Histogram | None = None


class Metrics:
    """Every counter of requests and probes. Gauges, which are read at a scrape, are in `families`.

    `fleet`: the models by name. Only they and their backends have series.
    """

    def __init__(self, fleet: Callable[[], Mapping[str, Model]]) -> None:
        self.fleet = fleet
        self.requests: Series[tuple[str, str, int, bool], _Requests] = Series(self._timed, self._of_model)
        self.durations: Series[tuple[str, str, bool, str], Histogram] = self._histograms(DURATION_BUCKETS)
        self.first_tokens: Series[tuple[str, str], Histogram] = self._histograms(TTFT_BUCKETS)
        self.per_tokens: Series[tuple[str, str], Histogram] = self._histograms(TPOT_BUCKETS)
        self.token_counts: Series[tuple[str, str], Histogram] = self._histograms(TOKEN_BUCKETS)
        self.rejections: Series[tuple[str, str], Count] = Series(_count, self._of_model)
        self.aborts: Series[tuple[str, str], Count] = Series(_count, self._of_model)
        self.retries: Series[tuple[str, str], Count] = Series(_count, self._of_model)
        self.attempts: Series[tuple[str, str, str], Count] = Series(_count, self._of_backend)
        self.probe_failures: Series[tuple[str, str, str], Count] = Series(_count, self._of_backend)
        self.overheads: Series[tuple[str], Histogram] = Series(lambda key: Histogram(OVERHEAD_BUCKETS))
        self.loop_lag = Histogram(OVERHEAD_BUCKETS)

    def _histograms(self, bounds: tuple[float, ...]) -> Series[Any, Histogram]:
        return Series(lambda key: Histogram(bounds), self._of_model)

    def _timed(self, key: tuple[str, str, int, bool]) -> _Requests:
        model, route, code, stream = key
        return _Requests(self.durations[model, route, stream, f"{code // 100}xx"])

    def _of_model(self, key: tuple[Any, ...]) -> bool:
        return key[0] == UNKNOWN or key[0] in self.fleet()

    def _of_backend(self, key: tuple[str, str, str]) -> bool:
        model = self.fleet().get(key[0])
        return model is not None and any(backend.label == key[1] for backend in model.backends)

    # Written on the request path

    def record(self, record: Record) -> None:
        """A sink: count a finished request."""
        # Unpacked at once: reading a field by name costs ten times as much.
        (
            _, route, model, _, _, status, outcome, _, stream, code, took, first, overhead,
            tokens, events, _, _, _, _, _, _, state, _, _, _, _,
        ) = record  # fmt: skip
        cell = self.requests[model, route, shown_status(status, outcome), stream]
        cell.count += 1
        cell.durations.observe(took)
        if overhead is not None:
            if cell.overhead is None:
                cell.overhead = self.overheads[route,]
            cell.overhead.observe(overhead)
        if code is not None and (reason := _REJECTIONS.get(code)) is not None:
            reason = "forbidden" if status == 403 else state.get(REJECTED, reason)
            self.rejections[model, reason].count += 1
        # The head was a success, also that of a JSON answer that was too large to be held.
        if outcome is not OK and 0 < status < 300:
            self._abort(model, outcome)
        if first is not None and status < 300:
            self.first_tokens[model, route].observe(first)
        if events or tokens[0] is not None or tokens[2] is not None:
            self._count_tokens(cell, record)

    def _count_tokens(self, cell: _Requests, record: Record) -> None:
        model, first, (prompt, cached, completion, _) = record.model_name, record.first, record.tokens
        if prompt:
            if cell.input is None:
                cell.input = self.token_counts[model, "input"]
            cell.input.observe(prompt)
        if cached:
            self.token_counts[model, "cached_input"].observe(cached)
        if completion:
            if cell.output is None:
                cell.output = self.token_counts[model, "output"]
            cell.output.observe(completion)
            if first is not None and completion > 1:
                self.per_tokens[model, record.route].observe((record.took - first) / (completion - 1))
        elif record.events and completion is None:
            self.token_counts[model, "output_estimate"].observe(record.events)

    def _abort(self, model: str, outcome: Outcome) -> None:
        reason = ABORTS.get(outcome)
        if reason is not None:
            self.aborts[model, reason].count += 1

    def attempt(self, backend: Backend, outcome: Outcome) -> None:
        # Not the Outcome itself, whose hash is computed in Python.
        self.attempts[backend.model, backend.label, outcome._value_].count += 1

    def retry(self, model: str, reason: str) -> None:
        self.retries[model, reason].count += 1

    # Written by background tasks

    def probe_failed(self, origin: Origin, kind: str) -> None:
        for backend in origin.backends:
            self.backend_failed(backend, kind)

    def backend_failed(self, backend: Backend, kind: str) -> None:
        self.probe_failures[backend.model, backend.label, kind].count += 1

    def forget_models(self) -> None:
        """Drop the series of models that have left the catalogue."""
        by_model: tuple[Series[Any, Any], ...] = (
            self.requests, self.durations, self.first_tokens, self.per_tokens, self.token_counts, self.aborts,
            self.retries, self.rejections,
        )  # fmt: skip
        for series in by_model:
            series.forget()

    def forget_backends(self) -> None:
        """Drop the series of removed backends; with pod addresses, every rollout would add new ones."""
        known = {(backend.model, backend.label) for model in self.fleet().values() for backend in model.backends}
        self.attempts.forget(lambda key: key[:2] in known)
        self.probe_failures.forget(lambda key: key[:2] in known)


def _count(key: Any) -> Count:
    return Count()
