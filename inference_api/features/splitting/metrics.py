"""What the requests of each variant came to: to compare a canary with the rest."""

from collections.abc import Iterator, Mapping
from typing import Any

from inference_api.observe.account import Record, shown_status
from inference_api.observe.exposition import Family
from inference_api.observe.families import counter, seconds
from inference_api.observe.metrics import DURATION_BUCKETS, TTFT_BUCKETS
from inference_api.observe.series import Count, Histogram, Series
from inference_api.routing.fleet import Fleet

_LABELS = ("model_name", "variant")
_TYPES = ("input", "cached_input", "output")


class VariantMetrics:
    """Counts by virtual model and variant. Only names of the catalogue become labels."""

    def __init__(self, fleet: Fleet) -> None:
        def of_model(key: tuple[Any, ...]) -> bool:
            return key[0] in fleet.models and key[1] in fleet.models[key[0]].members

        self._requests: Series[tuple[str, str, str], Count] = Series(lambda key: Count(), of_model)
        self._tokens: Series[tuple[str, str, str], Count] = Series(lambda key: Count(), of_model)
        self._durations: Series[tuple[str, str], Histogram] = Series(lambda key: Histogram(DURATION_BUCKETS), of_model)
        self._firsts: Series[tuple[str, str], Histogram] = Series(lambda key: Histogram(TTFT_BUCKETS), of_model)
        self._all: tuple[Series[Any, Any], ...] = (self._requests, self._tokens, self._durations, self._firsts)
        self._fleet = fleet
        self._version = 0

    def count(self, virtual: str, variant: str, record: Record) -> None:
        """Count a request that `variant` got."""
        if self._version != self._fleet.version:
            self._version = self._fleet.version
            for series in self._all:
                series.forget()
        status = shown_status(record.status, record.outcome)
        if not status:
            # It lost a race before it had a status: that says nothing of the variant.
            return
        self._requests[virtual, variant, f"{status // 100}xx"].count += 1
        self._durations[virtual, variant].observe(record.took)
        if record.first is not None and status < 300:
            self._firsts[virtual, variant].observe(record.first)
        for kind, tokens in zip(_TYPES, record.tokens, strict=False):
            if tokens:
                self._tokens[virtual, variant, kind].count += tokens

    def collect(self) -> Iterator[Family]:
        if self._requests:
            requests, tokens, durations, firsts = (series.snapshot() for series in self._all)
            yield from families(requests, tokens, durations, firsts)


def families(
    requests: Mapping[tuple[str, str, str], Count],
    tokens: Mapping[tuple[str, str, str], Count],
    durations: Mapping[tuple[str, str], Histogram],
    firsts: Mapping[tuple[str, str], Histogram],
) -> Iterator[Family]:
    text = "Requests to virtual models, by the variant that got them."
    yield counter("variant_requests", text, (*_LABELS, "code_class"), _values(requests))
    text = "Tokens of those requests, as tokens_total counts them."
    yield counter("variant_tokens", text, (*_LABELS, "type"), _values(tokens))
    text = "Duration of those requests, from the request head to the end of the answer."
    yield seconds("variant_request_duration", text, _LABELS, durations.items())
    text = "Time from the request head to the first token of a stream."
    yield seconds("variant_time_to_first_token", text, _LABELS, firsts.items())


def _values(cells: Mapping[tuple[str, str, str], Count]) -> list[tuple[tuple[str, str, str], float]]:
    return [(labels, float(cell.count)) for labels, cell in cells.items()]
