"""Keys in numbers: memory of a policy, and how long the event loop stops while one replaces another.

    .venv/bin/python -m benchmarks.policy [--keys 100000]

`held`: the longest time of the processor for which the thread that reads keeps the interpreter, with the collections of
garbage that fall into it: the event loop has to wait for as long. `ticker`: the longest delay of a timer of the event
loop, which counts what other processes take from it, too; compare it with that of an idle loop.
"""

import argparse
import asyncio
import gc
import json
import resource
import secrets
import tempfile
import time
from collections.abc import Awaitable, Callable, Generator
from pathlib import Path
from typing import NamedTuple, TypeVar

import uvloop

from inference_api.policy.keys import new_key
from inference_api.policy.source import Policies, PolicyFile
from inference_api.threads import giving_way, in_thread

T = TypeVar("T")

_TICK = 0.001


class Swap(NamedTuple):
    """`memory`: bytes of the policy. Seconds: held, the ticker of an idle loop and during the swap, the whole swap."""

    keys: int
    memory: int
    held: float
    idle: float
    ticker: float
    took: float


class Holds:
    """Runs steps as the router does, and notes the longest time of the processor between two rests."""

    def __init__(self) -> None:
        self.longest = 0.0

    def drive(self, steps: Generator[None, None, T]) -> T:
        began = time.thread_time()

        def rest() -> None:
            nonlocal began
            self.longest = max(self.longest, time.thread_time() - began)
            time.sleep(0.0005)
            began = time.thread_time()

        result = giving_way(steps, rest)
        rest()
        return result


def document(keys: int) -> str:
    """A policy as a control plane writes it: organisations of 100 keys, users, patterns, expiry."""
    pattern = new_key().digest.partition(":")[0]
    entries = [
        {
            "id": f"{number:012d}",
            "name": f"key-{number}",
            "digest": f"{pattern}:{secrets.token_hex(32)}",
            "organisation": f"team-{number // 100}",
            "user": f"user-{number // 10}",
            "models": ["llama-*", "chat"],
            "limits": [{"requests": 60, "per": 60}],
            "priority": 0,
            "weight": 1,
            "expires": "2127-01-31T00:00:00Z",
        }
        for number in range(keys)
    ]
    organisations = [{"name": f"team-{number}"} for number in range(keys // 100 + 1)]
    return json.dumps({"organisations": organisations, "keys": entries})


def memory() -> int:
    """Resident bytes of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


async def delays(work: Callable[[], Awaitable[None]]) -> list[float]:
    """The delays of a ticker beyond its interval while `work` runs."""
    found: list[float] = []
    ended = asyncio.Event()

    async def tick() -> None:
        while not ended.is_set():
            began = time.perf_counter()
            await asyncio.sleep(_TICK)
            found.append(time.perf_counter() - began - _TICK)

    ticker = asyncio.create_task(tick())
    try:
        await work()
    finally:
        ended.set()
        await ticker
    return found


async def measure(keys: int, folder: Path) -> Swap:
    """Read a policy at the start, as `serve` does, and replace it by another one of the same size."""
    path = folder / "policy.json"
    policies = Policies(str(path))
    text = document(keys)
    path.write_text('{"keys": []}')
    holds = Holds()
    file = PolicyFile(path, policies, peppered=False, drive=holds.drive)
    gc.collect()
    gc.freeze()

    async def swap() -> None:
        take = await in_thread(lambda: file.poll(now=True), "reload")
        assert take is not None
        before = policies.current
        take()
        # The previous one is freed by a thread.
        while before is not None and len(before.digests):  # noqa: ASYNC110
            await asyncio.sleep(0.01)

    async def idle() -> None:
        await asyncio.sleep(1)

    path.write_text(text)
    del text
    gc.collect()
    before = memory()
    await swap()
    gc.collect()
    grown = memory() - before
    path.write_text(document(keys))
    gc.collect()
    idle_delays = await delays(idle)
    holds.longest = 0.0
    began = time.perf_counter()
    busy_delays = await delays(swap)
    took = time.perf_counter() - began
    assert policies.current is not None
    return Swap(policies.current.keys, grown, holds.longest, max(idle_delays), max(busy_delays), took)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keys", type=int, default=100_000)
    keys = parser.parse_args().keys
    with tempfile.TemporaryDirectory() as folder:
        swap = uvloop.run(measure(keys, Path(folder)))
    print(f"keys                      {swap.keys}")
    print(f"memory of the policy      {swap.memory / 1e6:.1f} MB, {swap.memory / max(keys, 1):.0f} bytes a key")
    print(f"interpreter held          {swap.held * 1e3:.1f} ms at most, in {swap.took:.1f} s")
    print(f"ticker                    {swap.ticker * 1e3:.1f} ms late at most; {swap.idle * 1e3:.1f} ms without a swap")


if __name__ == "__main__":
    main()
