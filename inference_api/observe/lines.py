"""The access line: one Record as the fields of a log line. docs/log-schema.json describes them."""

from collections.abc import Callable

from inference_api.observe.account import UNKNOWN, Record, shown_status
from inference_api.observe.log import UNSERVED, Fields


def access_line(record: Record) -> Fields:
    """The fields of one request. Unknown values are null; rare fields are left out."""
    # Unpacked at once: reading a field by name costs ten times as much.
    (
        request_id, route, model_name, asked, backend, status, outcome, attempts, stream, code, took, first, _,
        (prompt, cached, completion, _), events, size, _, _, client, _, extra, _, _, _, _, _,
    ) = record  # fmt: skip
    line = {
        "request_id": request_id,
        "route": route,
        "model": model_name,
        "backend": backend,
        "client": None if client is None else client[0],
        "status": shown_status(status, outcome),
        # `value` goes through a descriptor that costs more than the rest of the line.
        "outcome": outcome._value_,
        "attempts": attempts,
        "stream": stream,
        "latency_ms": int(took * 1e5) / 100,
        "ttft_ms": None if first is None else int(first * 1e5) / 100,
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "bytes": size,
    }
    if code is not None:
        line["code"] = code
    if asked is not None and asked != model_name and model_name != UNKNOWN:
        line["asked_model"] = asked
    if cached is not None:
        line["cached_tokens"] = cached
    if events and completion is None:
        line["events"] = events
    if extra:
        line.update(extra)
    return line


def access_log(write: Callable[[Fields], None], level: str = "info") -> Callable[[Record], None]:
    """A sink that writes the access line of each request; at the level `warning`, only lines that are warnings."""
    if level == "warning":
        return lambda record: write(access_line(record)) if record.status == UNSERVED else None
    return lambda record: write(access_line(record))
