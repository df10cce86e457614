"""Is the router as cheap as it was? The instructions of its request path in process, held to those in `baseline.json`.

scripts/bench --check                     # 1 if anything takes 10 % more than the baseline says
scripts/bench --check --update-baseline   # after a change that is meant to cost more, or that made it cheaper

Valgrind counts the instructions of a process, which no neighbour and no clock can change: two runs differ by less than
one per cent. The routers are started once, under valgrind; each case then runs in a fork of them, and what the fork
of no case counts is taken off. A fixed piece of Python is counted too: it tells a dearer interpreter from a dearer
router.
"""

import asyncio
import gc
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks import wire
from benchmarks.inprocess import STREAM_EVENTS, Client, Loop, running
from benchmarks.setup import Setup, allow_files

BASELINE = Path(__file__).with_name("baseline.json")
HEADROOM = 1.10
# What ten thousand of something may cost a request over one of them.
GROWTH = 1.05
# Seconds; ten times what it takes.
_TIMEOUT = 300
_INSIDE = "BENCHMARKS_UNDER_VALGRIND"
_NOTHING, _YARDSTICK = "nothing", "yardstick"
_YARDSTICKS = 200
_BASE = Setup(backends=2)


@dataclass(frozen=True, slots=True)
class Case:
    """A request, how often it is sent, how many units of work one holds, and on which setup."""

    name: str
    request: bytes
    end: bytes
    check: Callable[[bytes], wire.Checked]
    count: int
    units: int = 1
    setup: Setup = _BASE


def _whole(answer: bytes) -> wire.Checked:
    return wire.check(answer, 0)


def _stream(answer: bytes) -> wire.Checked:
    return wire.check(answer, STREAM_EVENTS)


def _json(name: str, setup: Setup = _BASE, prompt: int = 0, count: int = 300) -> Case:
    return Case(name, wire.request(0, prompt=prompt), wire.JSON_END, _whole, count, setup=setup)


PLAIN = _json("JSON request")
# What a JSON request must not pay for.
GROWN = (
    _json("JSON request, 10,000 models", Setup(models=10_000)),
    _json("JSON request, 256 backends", Setup(backends=256)),
    _json("JSON request, 1,000 open streams", Setup(streams=1000)),
    _json("JSON request, 300 models with series", Setup(models=300, asked=300)),
)
CASES = (
    PLAIN,
    Case("event of a stream", wire.request(0, STREAM_EVENTS), wire.STREAM_END[-5:], _stream, 10, STREAM_EVENTS),
    _json("JSON request of 100 KB", prompt=100_000, count=50),
    Case("embeddings of 1 MB", wire.embeddings_request(0), wire.JSON_END, wire.check_embeddings, 10),
    *GROWN,
)


def main(update: bool = False) -> int:
    """One line per case; 1 if one costs too much."""
    valgrind = shutil.which("valgrind")
    if valgrind is None:
        print("skipped: there is no valgrind to count instructions with (apt-get install valgrind)")
        return 0
    counts = _count(valgrind)
    if update:
        BASELINE.write_text(json.dumps({"made with": _versions(), "instructions": counts}, indent=1) + "\n")
        print(f"{BASELINE} is now what was counted")
    baseline = json.loads(BASELINE.read_text())
    lines, missed = verdicts(counts, baseline["instructions"])
    if baseline["made with"] != _versions():
        lines.append(f"note: the baseline was made with {baseline['made with']}, this is {_versions()}")
    print("\n".join(lines))
    return 1 if missed else 0


def verdicts(counts: Mapping[str, float], baseline: Mapping[str, float]) -> tuple[list[str], int]:
    """What to print, and how many limits are missed."""
    lines, missed = [], 0
    # An interpreter that takes more instructions for the same Python takes them for the router's too.
    machine = counts[_YARDSTICK] / baseline[_YARDSTICK]
    for case in CASES:
        value = counts[case.name] / (baseline[case.name] * machine)
        missed += value > HEADROOM
        lines.append(_line(case.name, counts[case.name], value, HEADROOM, "of the baseline"))
    for case in GROWN:
        value = counts[case.name] / counts[PLAIN.name]
        missed += value > GROWTH
        lines.append(_line(case.name, counts[case.name], value, GROWTH, f"of a plain {PLAIN.name}"))
    return lines, missed


def _line(name: str, count: float, value: float, limit: float, what: str) -> str:
    verdict = "met" if value <= limit else "MISSED"
    return f"{name:38}{count:12,.0f} instructions, {value:6.1%} {what}, at most {limit:.0%}: {verdict}"


def _versions() -> dict[str, str]:
    python = {"python": sys.version.split()[0], "machine": os.uname().machine}
    return python | {name: version(name) for name in ("httptools", "orjson", "pydantic", "uvloop")}


def _count(valgrind: str) -> dict[str, float]:
    """Instructions of one unit of each case."""
    counted, units = under_valgrind(valgrind, "benchmarks.check")
    nothing = counted.pop(_NOTHING)
    return {name: round((total - nothing) / units[name], 1) for name, total in counted.items()}


def under_valgrind(valgrind: str, module: str) -> tuple[dict[str, int], dict[str, int]]:
    """Run a module that prints {name: (pid of a fork, units)}: instructions by name, and units by name."""
    with tempfile.TemporaryDirectory() as directory:
        tool = ["-q", "--tool=cachegrind", "--cache-sim=no", f"--cachegrind-out-file={directory}/%p"]
        command = [valgrind, *tool, f"--log-file={directory}/log", sys.executable, "-m", module]
        environment = {**os.environ, _INSIDE: "1", "PYTHONHASHSEED": "0"}
        done = subprocess.run(command, stdout=subprocess.PIPE, env=environment, timeout=_TIMEOUT, check=True)
        forks: dict[str, tuple[int, int]] = json.loads(done.stdout)
        counted = {name: _instructions(Path(directory, str(pid))) for name, (pid, _) in forks.items()}
    return counted, {name: units for name, (_, units) in forks.items()}


def is_under_valgrind() -> bool:
    return _INSIDE in os.environ


def _instructions(file: Path) -> int:
    return int(file.read_text().rpartition("summary:")[2])


# What runs under valgrind


def _run_forks() -> None:
    allow_files(4000)
    setups = list(dict.fromkeys(case.setup for case in CASES))
    with running(*setups) as (loop, clients):
        by_setup = dict(zip(setups, clients, strict=True))
        loop.run_until_complete(prepare(by_setup))
        for case in CASES:
            try_case(loop, by_setup[case.setup], case)
        # As the server does before it serves: what is there to stay is not looked at again.
        gc.collect()
        gc.freeze()
        forks = {_NOTHING: (fork(lambda: None), 1), _YARDSTICK: (fork(_yardsticks), _YARDSTICKS)}
        for case in CASES:
            forks[case.name] = (fork(_work(loop, by_setup[case.setup], case)), case.count * case.units)
        print(json.dumps(forks), flush=True)
        # To stop all these routers properly takes longer than to count, under valgrind.
        os._exit(0)


async def prepare(clients: Mapping[Setup, Client]) -> None:
    for setup, client in clients.items():
        await client.hold(setup.streams)
        for name in setup.asked_names():
            await client.run(wire.request(0, model=name), 1, wire.JSON_END)
    # The first questions to the engines are asked and answered.
    for _ in range(1000):
        await asyncio.sleep(0)


def try_case(loop: Loop, client: Client, case: Case) -> None:
    """Short cuts are learnt, byte code is specialised, each backend is connected; and the answer is right."""
    loop.run_until_complete(client.run(case.request, 20 + 6 * case.setup.backends, case.end))
    if not case.check(client.answer).exact:
        raise wire.BadAnswer(f"the answer to {case.name} is not the engine's")


def _work(loop: Loop, client: Client, case: Case) -> Callable[[], Any]:
    return lambda: loop.run_until_complete(client.run(case.request, case.count, case.end))


def fork(work: Callable[[], Any]) -> int:
    """The pid of a process that did this work, and ended."""
    pid = os.fork()
    if not pid:
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    _, status = os.waitpid(pid, 0)
    if status:
        raise RuntimeError(f"a fork ended with {status}")
    return pid


class _Record:
    __slots__ = ("fields", "size")

    def __init__(self, fields: dict[bytes, bytes], size: int) -> None:
        self.fields = fields
        self.size = size


def _yardsticks() -> None:
    for _ in range(_YARDSTICKS):
        yardstick()


def yardstick(rounds: int = 50) -> int:
    """What a router's Python is made of: calls, objects, small dictionaries, bytes. About 100 us in all."""
    kept: list[_Record] = []
    for number in range(rounds):
        line = b"content-length: %d" % number
        name, _, value = line.partition(b": ")
        record = _Record({name: value, b"host": b"127.0.0.1"}, len(line))
        if record.fields.get(b"host") is not None and record.size:
            kept.append(record)
    return len(b"".join([record.fields[b"content-length"] for record in kept]))


if __name__ == "__main__":
    _run_forks()
