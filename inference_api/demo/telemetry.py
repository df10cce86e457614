"""The engine's /metrics: those of vLLM's series that a dashboard of engines is made of."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from inference_api.demo.model import Generation
from inference_api.observe.metrics import TPOT_BUCKETS, TTFT_BUCKETS

_Metric = TypeVar("_Metric", Counter, Gauge, Histogram)

# The cache that it claims, in requests of full length.
_CACHE_SLOTS = 16
# Seconds, as in vLLM.
_BUCKETS = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)
_SLEEP_STATES = ("awake", "weights_offloaded", "discard_all")
_REASONS = ("stop", "length", "abort")
_COUNTERS = {
    "num_preemptions": "Preemptions.",
    "prefix_cache_queries": "Prompt tokens looked for in the prefix cache.",
    "prefix_cache_hits": "Prompt tokens found in the prefix cache.",
    "prompt_tokens": "Tokens of prompts.",
    "generation_tokens": "Tokens generated.",
}
_HISTOGRAMS = {
    "time_to_first_token": ("Seconds to the first token.", TTFT_BUCKETS),
    "inter_token_latency": ("Seconds between two tokens.", TPOT_BUCKETS),
    "e2e_request_latency": ("Seconds of a request.", _BUCKETS),
    "request_queue_time": ("Seconds in the queue.", _BUCKETS),
    "request_prefill_time": ("Seconds to the first token, without the queue.", _BUCKETS),
    "request_decode_time": ("Seconds from the first token to the last.", _BUCKETS),
}


class Telemetry:
    """The numbers of one engine. `clock`: monotonic seconds. Nothing ever waits, is preempted or found in a cache."""

    def __init__(self, model: str, max_model_len: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self._labels = {"model_name": model, "engine": "0"}
        self._registry = CollectorRegistry()
        self._running: list[Record] = []
        self._room = _CACHE_SLOTS * max_model_len
        self._one(Gauge, "num_requests_running", "Requests that run.").set_function(lambda: len(self._running))
        self._one(Gauge, "num_requests_waiting", "Requests in the queue.")
        self._one(Gauge, "kv_cache_usage_perc", "Used share of the cache, from 0 to 1.").set_function(self._cache_usage)
        states = self._several(Gauge, "engine_sleep_state", "1: in this state.", "sleep_state", _SLEEP_STATES)
        states["awake"].set(1)
        self.count = {name: self._one(Counter, name, text) for name, text in _COUNTERS.items()}
        self.ended = self._several(Counter, "request_success", "Requests that ended.", "finished_reason", _REASONS)
        self.seconds = {
            name: self._one(Histogram, f"{name}_seconds", text, buckets=buckets)
            for name, (text, buckets) in _HISTOGRAMS.items()
        }

    def page(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self._registry)

    @contextmanager
    def running(self, record: "Record") -> Iterator[None]:
        """Count a request as running, and when it is over by its outcome."""
        self._running.append(record)
        record.begin()
        try:
            yield
        finally:
            self._running.remove(record)
            record.end()

    def _cache_usage(self) -> float:
        return min(1.0, sum(record.held for record in self._running) / self._room)

    def _one(self, kind: type[_Metric], name: str, text: str, **more: Any) -> _Metric:
        return kind(f"vllm:{name}", text, list(self._labels), registry=self._registry, **more).labels(**self._labels)

    def _several(
        self, kind: type[_Metric], name: str, text: str, label: str, values: Sequence[str]
    ) -> dict[str, _Metric]:
        metric = kind(f"vllm:{name}", text, [*self._labels, label], registry=self._registry)
        return {value: metric.labels(**self._labels, **{label: value}) for value in values}


class Record:
    """One request: how far it is, and when it got there. `steps`: tokens of the longest choice."""

    def __init__(self, telemetry: Telemetry, prompt_tokens: int, generations: Sequence[Generation]) -> None:
        self._telemetry = telemetry
        self._prompt_tokens = prompt_tokens
        self._generations = generations
        self.steps = 0
        self._began = self._first = self._last = 0.0

    @property
    def held(self) -> int:
        """Tokens that it has in the cache."""
        return self._prompt_tokens + self._generated

    @property
    def _generated(self) -> int:
        return sum(min(len(generation.tokens), self.steps) for generation in self._generations)

    def begin(self) -> None:
        self._began = self._first = self._last = self._telemetry.clock()

    def step(self) -> None:
        """All choices have one token more, those excepted that are complete."""
        count, seconds, now = self._telemetry.count, self._telemetry.seconds, self._telemetry.clock()
        before, self.steps = self._generated, self.steps + 1
        count["generation_tokens"].inc(self._generated - before)
        if self.steps > 1:
            seconds["inter_token_latency"].observe(now - self._last)
        else:
            self._first = now
            count["prefix_cache_queries"].inc(self._prompt_tokens)
            count["prompt_tokens"].inc(self._prompt_tokens)
            seconds["time_to_first_token"].observe(now - self._began)
        self._last = now

    def end(self) -> None:
        ended, seconds = self._telemetry.ended, self._telemetry.seconds
        if self.steps < max(len(generation.tokens) for generation in self._generations):
            ended["abort"].inc()
            return
        for generation in self._generations:
            ended[generation.finish_reason].inc()
        seconds["e2e_request_latency"].observe(self._last - self._began)
        seconds["request_queue_time"].observe(0)
        seconds["request_prefill_time"].observe(self._first - self._began)
        seconds["request_decode_time"].observe(self._last - self._first)
