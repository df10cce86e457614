"""Names of the few gauges that the router reads from engines, and a reader that extracts them from `/metrics`."""

from collections.abc import Iterator

from inference_api.routing.backend import Reading
from inference_api.routing.entries import Engine

# Limit of a page, far above what engines send.
_MAX_BYTES = 4 << 20
_MAX_LINE = 64 * 1024

_RUNNING, _WAITING, _KV_CACHE, _AWAKE = range(4)
# By engine: metric name, gauge, required labels. vLLM has one series of each per engine core, and older releases name
# the GPU's cache; SGLang has one per data-parallel rank. "openai" stands for any other engine.
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
    """Extracts an engine's gauges from Prometheus' text format as it arrives, without parsing the rest.

    `sleep_only`: only the gauge of sleep.
    """

    def __init__(self, engine: Engine, sleep_only: bool = False) -> None:
        self._series = [series for series in _SERIES[engine] if series[1] == _AWAKE or not sleep_only]
        self._sleep_only = sleep_only
        self._values: tuple[list[float], ...] = ([], [], [], [])
        # Every line then begins with a line break, also the first.
        self._rest = b"\n"
        self._size = 0
        # All gauges were read.
        self.complete = False

    def feed(self, data: bytes) -> None:
        """Raises ValueError if the text is too long, or not of this format."""
        self._size += len(data)
        block = self._rest + data
        end = block.rfind(b"\n")
        self._rest = block[end:]
        if self._size > _MAX_BYTES or len(self._rest) > _MAX_LINE:
            raise ValueError("the page is not in Prometheus' text format")
        for name, kind, label in self._series:
            self._values[kind].extend(_samples(block, name, label, end))
        if self._sleep_only and self._values[_AWAKE] and end:
            # The lines of a name are adjacent, and the last complete line has another name.
            self.complete = not block.startswith(self._series[0][0], block.rfind(b"\n", 0, end))

    def reading(self) -> Reading:
        """Sums over the engine's parts; the mean for caches. Raises ValueError if the page has no load."""
        self.feed(b"\n")
        running, waiting, kv_cache, _ = self._values
        if not running or not waiting:
            raise ValueError("these metrics do not contain the load")
        share = sum(kv_cache) / len(kv_cache) if kv_cache else None
        return Reading(sum(running), sum(waiting), share if share is None or share <= 1 else None)

    def asleep(self) -> bool | None:
        """Whether the engine, or a part of it, sleeps: its share of the requests would hang. None: not reported."""
        self.feed(b"\n")
        awake = self._values[_AWAKE]
        return not all(awake) if awake else None


def _samples(block: bytes, name: bytes, label: bytes, end: int) -> Iterator[float]:
    """The values of a name, from the lines that are complete before `end`."""
    at = block.find(name, 0, end)
    while at >= 0:
        begin = at + len(name)
        at = block.find(b"\n", begin)
        line = block[begin:at]
        # Otherwise a longer name.
        if line[:1] in (b"{", b" ") and label in line:
            yield _value(line)
        at = block.find(name, at, end)


def _value(line: bytes) -> float:
    # A label may contain any text, also a brace; a timestamp may follow.
    value = float((line.rpartition(b"}")[2].split() or [b""])[0])
    if not 0 <= value < 1e9:
        raise ValueError(f"a load of {value}")
    return value
