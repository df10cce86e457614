"""The access line: one Record as the fields of a log line. docs/log-schema.json describes them."""

from collections.abc import Callable

from inference_api.observe.account import UNKNOWN, Record, shown_status
from inference_api.observe.log import UNSERVED, Fields


def access_line(record: Record) -> Fields:
    """The fields of one request; what is not known of it is null, and what seldom is is left out."""
    prompt, cached, completion, _ = record.tokens
    first = record.first
    line = {
        "request_id": record.request_id,
        "route": record.route,
        "model": record.model_name,
        "backend": record.backend,
        "client": None if record.client is None else record.client[0],
        "status": shown_status(record),
        # `value` goes through a descriptor that costs more than the rest of the line.
        "outcome": record.outcome._value_,
        "attempts": record.attempts,
        "stream": record.stream,
        "latency_ms": int(record.took * 1e5) / 100,
        "ttft_ms": None if first is None else int(first * 1e5) / 100,
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "bytes": record.size,
    }
    if record.code is not None:
        line["code"] = record.code
    if record.asked is not None and record.asked != record.model_name and record.model_name != UNKNOWN:
        line["asked_model"] = record.asked
    if cached is not None:
        line["cached_tokens"] = cached
    if record.events and completion is None:
        line["events"] = record.events
    if record.extra:
        line.update(record.extra)
    return line


def access_log(write: Callable[[Fields], None], level: str = "info") -> Callable[[Record], None]:
    """A sink that writes the access line of each request; at the level `warning`, of those that are one."""
    if level == "warning":
        return lambda record: write(access_line(record)) if record.status == UNSERVED else None
    return lambda record: write(access_line(record))
