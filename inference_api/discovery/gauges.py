"""What engines call the few gauges that a router reads, and a reader that picks them out of their `/metrics`."""

from collections.abc import Iterator

from inference_api.routing.backend import Reading
from inference_api.routing.entries import Engine

# Far above what an engine sends; more is not listened to.
_MAX_BYTES = 4 << 20
_MAX_LINE = 64 * 1024

_RUNNING, _WAITING, _KV_CACHE, _AWAKE = range(4)
# By engine: a name, its gauge, and what must be among its labels. vLLM has one series of each per engine core, and
# older ones have the GPU's cache; SGLang has one per data-parallel rank. Of "openai" nothing is known but its API.
_SERIES: dict[Engine, tuple[tuple[bytes, int, bytes], ...]] = {
    "vllm": (
        (b"\nvllm:num_requests_running", _RUNNING, b""),
        (b"\nvllm:num_requests_waiting", _WAITING, b""),
        (b"\nvllm:kv_cache_usage_perc", _KV_CACHE, b""),
        (b"\nvllm:gpu_cache_usage_perc", _KV_CACHE, b""),
        (b"\nvllm:engine_sleep_state", _AWAKE, b'sleep_state="awake"'),
    ),
    "tgi": ((b"\ntgi_batch_current_size", _RUNNING, b""), (b"\ntgi_queue_size", _WAITING, b"")),
    "sglang": (
        (b"\nsglang:num_running_reqs", _RUNNING, b""),
        (b"\nsglang:num_queue_reqs", _WAITING, b""),
        (b"\nsglang:token_usage", _KV_CACHE, b""),
    ),
    "llamacpp": (
        (b"\nllamacpp:requests_processing", _RUNNING, b""),
        (b"\nllamacpp:requests_deferred", _WAITING, b""),
        (b"\nllamacpp:kv_cache_usage_ratio", _KV_CACHE, b""),
    ),
}
TELL_LOAD = frozenset(_SERIES)
TELL_SLEEP = frozenset(engine for engine, series in _SERIES.items() if any(kind == _AWAKE for _, kind, _ in series))


class Gauges:
    """Picks an engine's gauges out of Prometheus' text format as it arrives; the rest of it is only searched.

    `sleep_only`: of all gauges, that one.
    """

    def __init__(self, engine: Engine, sleep_only: bool = False) -> None:
        self._series = [series for series in _SERIES[engine] if series[1] == _AWAKE or not sleep_only]
        self._sleep_only = sleep_only
        self._values: tuple[list[float], ...] = ([], [], [], [])
        # Every line begins with a line break, the first one too.
        self._rest = b"\n"
        self._size = 0
        # Nothing that follows can tell more.
        self.complete = False

    def feed(self, data: bytes) -> None:
        """Raises ValueError when the text is too long, or no text of this format."""
        self._size += len(data)
        block = self._rest + data
        end = block.rfind(b"\n")
        self._rest = block[end:]
        if self._size > _MAX_BYTES or len(self._rest) > _MAX_LINE:
            raise ValueError("that is not the metrics of an engine")
        for name, kind, label in self._series:
            self._values[kind].extend(_samples(block, name, label, end))
        if self._sleep_only and self._values[_AWAKE] and end:
            # The lines of a name stand together, and the last whole one is another's.
            self.complete = not block.startswith(self._series[0][0], block.rfind(b"\n", 0, end))

    def reading(self) -> Reading:
        """The sums over an engine's parts, of their caches the mean. Raises ValueError when it has no load."""
        self.feed(b"\n")
        running, waiting, kv_cache, _ = self._values
        if not running or not waiting:
            raise ValueError("these metrics do not tell the load")
        share = sum(kv_cache) / len(kv_cache) if kv_cache else None
        return Reading(sum(running), sum(waiting), share if share is None or share <= 1 else None)

    def asleep(self) -> bool | None:
        """Whether the engine sleeps, or a part of it, whose share of the requests would hang; None: it does not say."""
        self.feed(b"\n")
        awake = self._values[_AWAKE]
        return not all(awake) if awake else None


def _samples(block: bytes, name: bytes, label: bytes, end: int) -> Iterator[float]:
    """The values of a name whose lines are complete before `end`."""
    at = block.find(name, 0, end)
    while at >= 0:
        begin = at + len(name)
        at = block.find(b"\n", begin)
        line = block[begin:at]
        # Otherwise it is a longer name.
        if line[:1] in (b"{", b" ") and label in line:
            yield _value(line)
        at = block.find(name, at, end)


def _value(line: bytes) -> float:
    # A label may hold anything, a brace too; a timestamp may follow.
    value = float((line.rpartition(b"}")[2].split() or [b""])[0])
    if not 0 <= value < 1e9:
        raise ValueError(f"a load of {value}")
    return value
