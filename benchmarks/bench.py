"""CPU per JSON request and per streamed event, ours beside its peers.

scripts/bench --rounds 5 --candidates nginx,vllm-router,ours --loads json,streams
"""

import argparse
import json
import os
import platform
import signal
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path

from benchmarks import chart, check, cpu, report, scaling
from benchmarks.candidates import CANDIDATES, Candidate, NotInstalled
from benchmarks.client import Client
from benchmarks.loads import LOADS, Load
from benchmarks.measure import Bench
from benchmarks.processes import CannotStart, free_port, running
from benchmarks.profile import profile
from benchmarks.samples import Sample, all_medians
from benchmarks.setup import allow_files
from benchmarks.wire import BadAnswer


async def _once(port: int, load: Load) -> None:
    client = Client(port)
    try:
        await client.connect(load.connections)
        await load.run(client)
    finally:
        client.close()


def run(bench: Bench, candidates: list[Candidate | None], loads: list[Load], rounds: int) -> list[Sample]:
    """Each round and setup on new processes, each load in slices that the candidates take in turn. None: no router."""
    samples = []
    plan = [(number, setup) for number in range(rounds) for setup in dict.fromkeys(load.setup for load in loads)]
    for number, setup in plan:
        with ExitStack() as stack:
            targets = [
                (each, *(stack.enter_context(bench.router(each, setup)) if each else (0, bench.engine_port)))
                for each in candidates
                if each is None or each.can(setup)
            ]
            idle = {pid: cpu.proportional_bytes(cpu.members(pid)) / 1e6 if pid else 0.0 for _, pid, _ in targets}
            now = [load for load in loads if load.setup == setup]
            for load, part in ((each, part) for each in now for part in range(each.slices)):
                # Another one goes first each time, so that a machine that gets busier favours nobody.
                turn = (number + part) % len(targets)
                for candidate, pid, port in targets[turn:] + targets[:turn]:
                    name, scale = (candidate.name, candidate.scale) if candidate else ("direct", 1.0)
                    sample = bench.measure(name, pid, port, load.scaled(scale))
                    sample.round, sample.slice, sample.idle_mb = number, part, idle[pid]
                    samples.append(sample)
                    print(f"round {number + 1}/{rounds}.{part + 1}  {sample}", file=sys.stderr)
    return samples


def choose(names: list[str]) -> tuple[list[Candidate | None], dict[str, str]]:
    """The candidates that are, or now have been, installed, and their versions."""
    chosen: list[Candidate | None] = []
    versions = {}
    for name in names:
        if name == "direct":
            chosen.append(None)
            continue
        try:
            versions[name] = CANDIDATES[name].install()
            chosen.append(CANDIDATES[name])
        except NotInstalled as exc:
            print(f"skipped {name}: {exc}", file=sys.stderr)
    return chosen, versions


def _parse(argv: list[str] | None) -> argparse.Namespace:
    def names_of(known: list[str]) -> Callable[[str], list[str]]:
        def parse(text: str) -> list[str]:
            if unknown := [name for name in text.split(",") if name not in known]:
                raise argparse.ArgumentTypeError(f"{unknown[0]!r} is not one of {', '.join(known)}")
            return text.split(",")

        return parse

    cores = sorted(os.sched_getaffinity(0))
    parser = argparse.ArgumentParser(prog="scripts/bench", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    everybody = ["direct", *(name for name in CANDIDATES if name != "vllm-router-default")]
    parser.add_argument("--candidates", type=names_of(["direct", *CANDIDATES]), default=everybody)
    parser.add_argument("--loads", type=names_of(list(LOADS)), default=list(LOADS))
    parser.add_argument("--share", type=float, default=1.0, help="of each load's requests; 0.1 is for a quick look")
    parser.add_argument("--router-core", type=int, default=cores[0])
    parser.add_argument("--load-core", type=int, default=cores[-1])
    parser.add_argument("--noise", type=float, default=0.1, help="share of a core others may use during a sample")
    parser.add_argument("--tries", type=int, default=3, help="how often to try for a sample without more noise")
    parser.add_argument(
        "--check", action="store_true", help="count the instructions of `ours`, compare, measure nothing"
    )
    parser.add_argument(
        "--update-baseline", action="store_true", help="with --check: take what was counted as the baseline"
    )
    parser.add_argument("--scaling", action="store_true", help="`ours` alone, with more and more of something")
    parser.add_argument("--output", type=Path, metavar="DIR", default=Path("build/bench"), help="for JSON and charts")
    parser.add_argument("--logs", type=Path, metavar="DIR", help="keep the candidates' logs there")
    parser.add_argument("--profile", type=Path, metavar="DIR", help="say where `ours` spends its time, measure nothing")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    options = _parse(argv)
    if options.check:
        return check.main(options.update_baseline)
    if options.router_core == options.load_core:
        print("one core only: router, engine and client disturb each other's caches", file=sys.stderr)
    os.sched_setaffinity(0, {options.load_core})
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    loads = [LOADS[name].scaled(options.share) for name in options.loads]
    allow_files(4 * max(load.connections for load in LOADS.values()) + 1000)
    try:
        with ExitStack() as stack:
            directory = options.logs or Path(stack.enter_context(tempfile.TemporaryDirectory()))
            directory.mkdir(parents=True, exist_ok=True)
            bench = _bench(stack, options, directory)
            if options.profile:
                work = [(load.name, load.setup, partial(_once, load=load)) for load in loads]
                return profile(bench.router, CANDIDATES["ours"], work, options.profile)
            candidates, versions = choose(["ours"] if options.scaling else options.candidates)
            if options.scaling:
                samples = scaling.run(bench, options.rounds, options.share)
            else:
                samples = run(bench, candidates, loads, options.rounds)
    except (BadAnswer, CannotStart) as exc:
        print(f"the run is void: {exc}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    _tell(samples, versions, options.output, options.scaling)
    return 0


def _bench(stack: ExitStack, options: argparse.Namespace, directory: Path) -> Bench:
    """With an engine that runs until the stack is left."""
    port = free_port()
    addresses = max(load.setup.backends for load in LOADS.values())
    engine = [sys.executable, "-m", "benchmarks.engine", "--port", str(port), "--addresses", str(addresses)]
    log = directory / "engine.log"
    pid = stack.enter_context(running(engine, core=options.load_core, log=log, port=port, ready="/health"))
    return Bench(pid, port, (options.router_core, options.load_core), directory, options.noise, options.tries)


def _tell(samples: list[Sample], versions: dict[str, str], directory: Path, grown: bool) -> None:
    """Print the table; write samples, medians and charts."""
    machine = {"cpu": _cpu_model(), "kernel": platform.release(), "python": platform.python_version()}
    document = {"machine": machine, "versions": versions, "medians": all_medians(samples)}
    title = f"{', '.join(f'{name} {version}' for name, version in versions.items())} - {machine['cpu']}"
    drawn = chart.lines(title, scaling.panels(samples)) if grown else chart.bars(title, report.panels(samples))
    name = "scaling" if grown else "bench"
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / f"{name}.json").open("w") as file:
        json.dump({**document, "samples": [asdict(sample) for sample in samples]}, file, indent=1)
    (directory / f"{name}.svg").write_text(drawn)
    print(scaling.table(samples) if grown else report.table(samples, versions, machine))
    print(f"\nsamples, medians and charts are in {directory}/{name}.json and {name}.svg")


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


if __name__ == "__main__":
    sys.exit(main())
