"""The engine's /metrics: those of vLLM's series that a dashboard of engines is made of."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from inference_api.demo.model import Generation
from inference_api.observe.metrics import TPOT_BUCKETS, TTFT_BUCKETS

_Metric = TypeVar("_Metric", Counter, Gauge, Histogram)

# Seconds, as in vLLM.
_LATENCY_BUCKETS = (
    0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680,
)  # fmt: skip
# The size of the cache that it claims, in requests of full length.
_CACHE_SLOTS = 16


class Telemetry:
    """The numbers of one engine. `clock`: monotonic seconds. Nothing ever waits, is preempted or found in a cache."""

    def __init__(self, model: str, max_model_len: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self._registry = CollectorRegistry()
        self._labels = {"model_name": model, "engine": "0"}
        self._room = _CACHE_SLOTS * max_model_len
        self._running: list[Record] = []
        self._gauges()
        self.preemptions = self._counter("num_preemptions", "Preemptions.")
        self.queried = self._counter("prefix_cache_queries", "Prompt tokens looked for in the prefix cache.")
        self.hits = self._counter("prefix_cache_hits", "Prompt tokens found in the prefix cache.")
        self.prompt_tokens = self._counter("prompt_tokens", "Tokens of prompts.")
        self.generation_tokens = self._counter("generation_tokens", "Tokens generated.")
        self._success = Counter(
            "vllm:request_success", "Requests that ended.", [*self._labels, "finished_reason"], registry=self._registry
        )
        for reason in ("stop", "length", "abort"):
            self._success.labels(**self._labels, finished_reason=reason)
        self.first_token = self._histogram("time_to_first_token", "Seconds to the first token.", TTFT_BUCKETS)
        self.inter_token = self._histogram("inter_token_latency", "Seconds between two tokens.", TPOT_BUCKETS)
        self.whole = self._histogram("e2e_request_latency", "Seconds of a request.")
        self.queued = self._histogram("request_queue_time", "Seconds in the queue.")
        self.prefill = self._histogram("request_prefill_time", "Seconds to the first token, without the queue.")
        self.decode = self._histogram("request_decode_time", "Seconds from the first token to the last.")

    def page(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self._registry)

    def ended(self, reason: str) -> None:
        self._success.labels(**self._labels, finished_reason=reason).inc()

    @contextmanager
    def running(self, record: "Record") -> Iterator[None]:
        """Count a request as running, and when it is over as what became of it."""
        self._running.append(record)
        record.begin()
        try:
            yield
        finally:
            self._running.remove(record)
            record.end()

    def _gauges(self) -> None:
        gauges: dict[str, tuple[str, Callable[[], float]]] = {
            "num_requests_running": ("Requests that are worked on.", lambda: len(self._running)),
            "num_requests_waiting": ("Requests in the queue.", lambda: 0),
            "kv_cache_usage_perc": ("Used share of the cache; 1 is all of it.", self._cache_usage),
        }
        for name, (text, value) in gauges.items():
            self._labelled(Gauge, name, text).set_function(value)
        names = [*self._labels, "sleep_state"]
        states = Gauge("vllm:engine_sleep_state", "1: the engine is in this state.", names, registry=self._registry)
        for state in ("awake", "weights_offloaded", "discard_all"):
            states.labels(**self._labels, sleep_state=state).set(state == "awake")

    def _cache_usage(self) -> float:
        return min(1.0, sum(record.held for record in self._running) / self._room)

    def _counter(self, name: str, text: str) -> Counter:
        return self._labelled(Counter, name, text)

    def _histogram(self, name: str, text: str, buckets: Sequence[float] = _LATENCY_BUCKETS) -> Histogram:
        return self._labelled(Histogram, f"{name}_seconds", text, buckets=buckets)

    def _labelled(self, kind: type[_Metric], name: str, text: str, **more: Any) -> _Metric:
        metric = kind(f"vllm:{name}", text, list(self._labels), registry=self._registry, **more)
        return metric.labels(**self._labels)


class Record:
    """One request: how far it is, and when it got there."""

    def __init__(self, telemetry: Telemetry, prompt_tokens: int, generations: Sequence[Generation]) -> None:
        self._telemetry = telemetry
        self._prompt_tokens = prompt_tokens
        self._generations = generations
        self._steps = 0
        self._began = self._first = self._last = 0.0

    @property
    def held(self) -> int:
        """Tokens that it has in the cache."""
        return self._prompt_tokens + self._generated

    @property
    def _generated(self) -> int:
        return sum(min(len(generation.tokens), self._steps) for generation in self._generations)

    def begin(self) -> None:
        self._began = self._first = self._last = self._telemetry.clock()

    def step(self) -> None:
        """All choices have one token more, those excepted that are complete."""
        telemetry, now = self._telemetry, self._telemetry.clock()
        before, self._steps = self._generated, self._steps + 1
        telemetry.generation_tokens.inc(self._generated - before)
        if self._steps > 1:
            telemetry.inter_token.observe(now - self._last)
        else:
            self._first = now
            telemetry.queried.inc(self._prompt_tokens)
            telemetry.prompt_tokens.inc(self._prompt_tokens)
            telemetry.first_token.observe(now - self._began)
        self._last = now

    def end(self) -> None:
        telemetry = self._telemetry
        if self._steps < max(len(generation.tokens) for generation in self._generations):
            telemetry.ended("abort")
            return
        for generation in self._generations:
            telemetry.ended(generation.finish_reason)
        telemetry.whole.observe(self._last - self._began)
        telemetry.queued.observe(0)
        telemetry.prefill.observe(self._first - self._began)
        telemetry.decode.observe(self._last - self._first)
