"""How many tokens a request took: as its engine reports, else counted by the events of its stream. Pure."""

from inference_api.features.delivery.records import NOTHING, SENT_SIZE, UNKNOWN, Metered
from inference_api.http.routes import INFERENCE_ROUTES
from inference_api.models import OK
from inference_api.observe.account import Record

# Routes whose streams are followed event by event; on those with typed events a report at the beginning has an output.
_COUNTED = frozenset(route.label for route in INFERENCE_ROUTES if route.end_marks)
_TYPED = frozenset(route.label for route in INFERENCE_ROUTES if route.token_type)
# Routes that generate nothing: their engines may leave the output out of a report.
_NO_OUTPUT = frozenset(
    {
        *("embeddings", "rerank", "score", "tokenize", "detokenize", "moderations", "classify", "pooling"),
        "count_tokens",
    }
)
# Bytes of a request body for each token of its prompt, if nobody counted them
_BYTES = 4
# Weight of the latest stream in the running ratio
_WEIGHT = 1 / 16
# Models beyond those of the catalogue after which the ratios of removed ones are forgotten
_SPARE = 1000


class Calibration:
    """For each model the ratio of tokens that its engine reports to events of a stream.

    An event may carry several tokens (speculative decoding), or a token be in no event of its own.
    """

    def __init__(self) -> None:
        self._ratios: dict[str, float] = {}

    def of(self, model: str) -> float:
        return self._ratios.get(model, 1.0)

    def learn(self, model: str, tokens: int, events: int, models: int) -> None:
        """Of a complete stream. `models`: how many there are."""
        ratio = self._ratios.get(model, 1.0)
        self._ratios[model] = ratio + (tokens / events - ratio) * _WEIGHT
        if len(self._ratios) > models + _SPARE:
            self._ratios = {model: self._ratios[model]}


def metered(record: Record, ratio: float) -> Metered:
    """The tokens of a request. `ratio`: tokens of an event."""
    if not 200 <= record.answered < 300:
        return NOTHING
    prompt, cached, completion, reasoning = record.tokens
    route, is_cut = record.route, record.outcome is not OK
    if route in _COUNTED and (record.events or (is_cut and record.stream)):
        counted = int(record.events * ratio + 0.5)
        if completion is None or (is_cut and route in _TYPED and counted > completion):
            return _estimate(record) if prompt is None else prompt, cached, counted, reasoning, "counted"
    if prompt is None and completion is None:
        return UNKNOWN
    if completion is None and route in _NO_OUTPUT:
        completion = 0
    return prompt, cached, completion, reasoning, "reported"


def _estimate(record: Record) -> int:
    size: int = record.state.get(SENT_SIZE, record.body_size)
    return -(-size // _BYTES)
