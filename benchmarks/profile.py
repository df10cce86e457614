"""Where `ours` spends its CPU: py-spy for Python functions, perf (if there) for what is below them."""

import asyncio
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import uvloop

from benchmarks.candidates import Candidate, NotInstalled, from_pypi, venv
from benchmarks.setup import Setup

RouterContext = Callable[[Candidate, Setup], AbstractContextManager[tuple[int, int]]]
Run = Callable[[int], Awaitable[object]]
"""Runs a load once against the router on this port."""

_SECONDS = 10
_TOP = 40
_PY_SPY = from_pypi("py-spy", "py-spy==0.4.3")


def profile(router: RouterContext, ours: Candidate, loads: Sequence[tuple[str, Setup, Run]], directory: Path) -> int:
    """Each load once per tool, each time on a fresh process; the tables go to stdout and to `directory`."""
    directory.mkdir(parents=True, exist_ok=True)
    try:
        ours.install()
        _PY_SPY()
    except NotInstalled as exc:
        print(f"cannot profile: {exc}", file=sys.stderr)
        return 1
    for name, setup, run in loads:
        with router(ours, setup) as (pid, port):
            _python(pid, port, run, directory / name)
        if shutil.which("perf"):
            with router(ours, setup) as (pid, port):
                _native(pid, port, run, directory / name)
    return 0


def _python(pid: int, port: int, run: Run, to: Path) -> None:
    collapsed = to.with_suffix(".collapsed")
    command = [str(venv("py-spy") / "bin/py-spy"), "record", "--pid", str(pid), "--rate", "500", "--function"]
    _record([*command, "--format", "raw", "--output", str(collapsed)], port, run)
    _show(to.with_suffix(".python.txt"), f"{to.name}: Python functions by self time", flat(collapsed.read_text()))


def _native(pid: int, port: int, run: Run, to: Path) -> None:
    data = to.with_suffix(".perf")
    _record(["perf", "record", "-q", "-e", "cpu-clock", "-F", "1999", "-p", str(pid), "-o", str(data)], port, run)
    report = ["perf", "report", "-i", str(data), "--stdio", "--no-children", "-g", "none"]
    text = ""
    for sort in ("dso", "dso,symbol"):
        done = subprocess.run([*report, "--fields", f"overhead,{sort}"], capture_output=True, text=True, check=False)
        lines = [line.rstrip() for line in done.stdout.splitlines() if line.strip() and not line.startswith("#")]
        text += "\n".join(lines[:_TOP]) + "\n\n"
    _show(to.with_suffix(".native.txt"), f"{to.name}: libraries, then symbols, by self time", text)


def flat(collapsed: str) -> str:
    """Collapsed stacks (`a;b;c 12` a line) as tables: the share of each file and of each function."""
    own: Counter[str] = Counter()
    below: Counter[str] = Counter()
    for line in collapsed.splitlines():
        stack, _, count = line.rpartition(" ")
        frames = stack.split(";")
        own[frames[-1]] += int(count)
        below.update(dict.fromkeys(frames, int(count)))
    total = max(1, own.total())
    files: Counter[str] = Counter()
    for name, n in own.items():
        files[name.rpartition("(")[2].partition(":")[0]] += n
    by_file = [f"{n / total:7.1%}  {name}" for name, n in files.most_common(_TOP // 2)]
    rows = [f"{n / total:7.1%} {below[name] / total:7.1%}  {name}" for name, n in own.most_common(_TOP)]
    return "\n".join([f"   self  file  ({total} samples)", *by_file, "", "   self   total  function", *rows]) + "\n"


def _record(command: list[str], port: int, run: Run) -> None:
    recorder = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        uvloop.run(_repeat(port, run))
    finally:
        # Both tools write their file when they are interrupted.
        recorder.send_signal(signal.SIGINT)
        recorder.wait(60)


async def _repeat(port: int, run: Run) -> None:
    await asyncio.sleep(1)  # the recorder attaches
    until = time.monotonic() + _SECONDS
    while time.monotonic() < until:
        await run(port)


def _show(file: Path, title: str, text: str) -> None:
    file.write_text(f"{title}\n{text}")
    print(f"\n{title} ({file})\n{text}")
