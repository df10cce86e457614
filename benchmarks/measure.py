"""One sample: a load on a router, with the clocks read right before and right after it."""

import asyncio
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import uvloop

from benchmarks import cpu, wire
from benchmarks.candidates import Candidate, Site
from benchmarks.client import Client, examine
from benchmarks.loads import Load
from benchmarks.processes import free_port, running
from benchmarks.samples import Sample, quantile
from benchmarks.setup import ONE_OF_EACH, Setup


@dataclass(frozen=True, slots=True)
class _Reading:
    """All clocks at one moment, in nanoseconds; the cores' cover everybody on them."""

    time: int
    router: int
    load: int
    cores: tuple[int, int]
    ticks: tuple[int, int]


@dataclass(frozen=True, slots=True)
class Bench:
    """One engine, where everything runs, and where its files go."""

    engine_pid: int
    engine_port: int
    cores: tuple[int, int]
    """The router's, and the one that engine and client share."""
    directory: Path
    noise: float
    """The share of a core that others may use during a sample."""
    tries: int

    @contextmanager
    def router(self, candidate: Candidate, setup: Setup = ONE_OF_EACH) -> Iterator[tuple[int, int]]:
        """The pid and the port of a fresh process of this candidate."""
        port = free_port()
        start = candidate.start(port, Site(self.engine_port, setup, self.directory))
        log = self.directory / f"{candidate.name}-{setup.label}.log"
        with running(
            start.command, core=self.cores[0], log=log, port=port, ready=candidate.ready, env=start.env
        ) as pid:
            yield pid, port

    def measure(self, name: str, pid: int, port: int, load: Load) -> Sample:
        """A sample of a load, tried again when others kept the cores busy; `pid` 0 is no router at all."""
        best: Sample | None = None
        grown = 0.0
        for _ in range(self.tries):
            self._wait_for_quiet()
            speed = cpu.yardstick_ns(self.cores[0])
            try:
                sample = uvloop.run(self._measure(name, pid, port, load))
            except (wire.BadAnswer, OSError) as exc:
                raise wire.BadAnswer(f"{name} under {load.name}: {exc}") from None
            sample.yardstick_ms = speed / 1e6
            # Memory is not given back, so a second try finds it there already.
            grown = max(grown, sample.open_kb)
            if best is None or sample.noise < best.noise:
                best = sample
            if best.clean:
                break
            print(f"  too noisy    {sample}", file=sys.stderr)
        assert best
        best.open_kb = grown
        return best

    def _wait_for_quiet(self, patience: float = 10) -> None:
        deadline = time.monotonic() + patience
        while time.monotonic() < deadline:
            before, start = self._busy(), time.monotonic_ns()
            time.sleep(0.2)
            spent = time.monotonic_ns() - start
            if max(b - a for a, b in zip(before, self._busy(), strict=True)) <= self.noise * spent:
                return

    def _busy(self) -> tuple[int, int]:
        return cpu.busy_ns(self.cores[0]), cpu.busy_ns(self.cores[1])

    def _read(self, pids: frozenset[int]) -> _Reading:
        load = frozenset({self.engine_pid, os.getpid()})
        return _Reading(time.monotonic_ns(), cpu.cpu_ns(pids), cpu.cpu_ns(load), self._busy(), cpu.ticks(pids))

    async def _measure(self, name: str, pid: int, port: int, load: Load) -> Sample:
        client = Client(port)
        pids = cpu.members(pid) if pid else frozenset[int]()
        empty = cpu.resident_bytes(pids)
        try:
            await client.connect(load.connections)
            await load.warm_up().run(client)
            before = self._read(pids)
            halfway = asyncio.create_task(_resident_later(pids, load.tokens * load.interval / 2))
            seconds, exchanges = await load.run(client)
            after = self._read(pids)
            if pid and cpu.members(pid) != pids:
                raise wire.BadAnswer("the router's processes changed during the load, so its CPU time is not known")
            open_streams = await halfway
        finally:
            client.close()
        result = examine(exchanges, load.check, seconds)
        units = result.events if load.tokens else result.requests
        held = result.delays if load.tokens else result.latencies
        user, system = (b - a for a, b in zip(before.ticks, after.ticks, strict=True))
        passed, used = after.time - before.time, after.router - before.router
        busy = [b - a for a, b in zip(before.cores, after.cores, strict=True)]
        others = max(busy[0] - used, busy[1] - (after.load - before.load))
        return Sample(
            candidate=name,
            load=load.name,
            streamed=load.tokens > 0,
            units=units,
            cpu_us=used / 1e3 / units,
            kernel_share=system / max(1, user + system),
            router_busy=used / passed,
            load_busy=(after.load - before.load) / passed,
            noise=max(0.0, others / passed),
            clean=others <= self.noise * passed,
            per_second=units / seconds,
            open_loop=load.rate > 0,
            first_byte_p50=quantile(result.first_bytes, 0.5),
            first_byte_p99=quantile(result.first_bytes, 0.99),
            held_p50=quantile(held, 0.5),
            held_p99=quantile(held, 0.99),
            events_per_read=len(result.delays) / max(1, result.reads_with_events),
            exact=result.exact,
            open_kb=(open_streams - empty) / 1e3 / load.connections,
        )


async def _resident_later(pids: frozenset[int], delay: float) -> int:
    await asyncio.sleep(delay)
    return cpu.resident_bytes(pids)
