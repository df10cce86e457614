"""The engine's metrics, by vLLM's names."""

import pytest
from prometheus_client.parser import text_string_to_metric_families

from inference_api.demo.model import Generation
from inference_api.demo.telemetry import Record, Telemetry
from inference_api.discovery.gauges import Gauges

TWO = (Generation(["a", "b", "c"], "stop"), Generation(["a"], "length"))


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def told(telemetry: Telemetry) -> dict[str, float]:
    """The samples, without buckets and times of creation; those of one name are told apart by why a request ended."""
    families = text_string_to_metric_families(telemetry.page().decode())
    return {
        s.name.removeprefix("vllm:") + s.labels.get("finished_reason", ""): s.value
        for family in families
        for s in family.samples
        if not s.name.endswith(("_bucket", "_created"))
    }


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def telemetry(clock: Clock) -> Telemetry:
    return Telemetry("gpt2", max_model_len=10, clock=clock)


def test_every_series_is_there_before_the_first_request(telemetry: Telemetry) -> None:
    seen = told(telemetry)
    assert {"num_requests_waiting", "kv_cache_usage_perc", "request_success_totalabort"} <= seen.keys()
    assert not any(seen.values())


def test_a_request_is_seen_while_it_runs_and_timed_when_it_is_over(telemetry: Telemetry, clock: Clock) -> None:
    record = Record(telemetry, 5, TWO)
    with telemetry.running(record):
        for seconds in (1.0, 0.25, 0.25):
            clock.now += seconds
            record.step()
        during = told(telemetry)
    after = told(telemetry)

    assert (during["num_requests_running"], after["num_requests_running"]) == (1, 0)
    assert (during["kv_cache_usage_perc"], after["kv_cache_usage_perc"]) == (9 / 160, 0)
    assert (after["prompt_tokens_total"], after["prefix_cache_queries_total"]) == (5, 5)
    assert after["generation_tokens_total"] == 4
    assert (after["request_success_totalstop"], after["request_success_totallength"]) == (1, 1)
    assert after["time_to_first_token_seconds_sum"] == after["request_prefill_time_seconds_sum"] == 1.0
    assert (after["inter_token_latency_seconds_count"], after["inter_token_latency_seconds_sum"]) == (2, 0.5)
    assert (after["e2e_request_latency_seconds_sum"], after["request_decode_time_seconds_sum"]) == (1.5, 0.5)


def test_a_request_that_nobody_waited_for_was_aborted(telemetry: Telemetry) -> None:
    record = Record(telemetry, 5, TWO)
    with telemetry.running(record):
        record.step()
    seen = told(telemetry)

    assert seen["request_success_totalabort"] == 1
    assert (seen["generation_tokens_total"], seen["e2e_request_latency_seconds_count"]) == (2, 0)


def test_the_cache_is_never_more_than_full(telemetry: Telemetry) -> None:
    with telemetry.running(Record(telemetry, 1000, TWO)):
        assert told(telemetry)["kv_cache_usage_perc"] == 1


def test_an_answer_without_a_token_takes_no_time(telemetry: Telemetry) -> None:
    with telemetry.running(Record(telemetry, 5, (Generation([], "stop"),))):
        pass
    seen = told(telemetry)

    assert (seen["request_success_totalstop"], seen["e2e_request_latency_seconds_count"]) == (1, 1)
    assert seen["e2e_request_latency_seconds_sum"] == 0


def test_a_router_reads_that_it_is_awake_and_how_busy_it_is() -> None:
    gauges = Gauges("vllm")
    gauges.feed(Telemetry("llama-3-8b", 4096).page())

    assert gauges.asleep() is False
    assert gauges.reading() == (0, 0, 0)
