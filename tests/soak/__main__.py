"""Hours of traffic in which everything goes wrong, and the question whether the router kept its word.

Three engines that fail at random and are killed in turn, a registry that comes and goes, clients of which a third
leaves early; every answer holds the nonce of its request. It prints what happened, and PASS or FAIL.
"""

import argparse
import asyncio
import os
import random
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from statistics import linear_regression
from typing import Any

import httpx
import orjson
import uvloop

from tests.e2e.processes import BIN, Process, stopping
from tests.soak.client import MANY_TIMES, Users

# Short, so that an hour of mishaps fits into a minute.
SETTINGS = {
    "INFERENCE_API_FIRST_BYTE_TIMEOUT": "2",
    "INFERENCE_API_IDLE_TIMEOUT": "2",
    "INFERENCE_API_BREAKER_COOLDOWN": "2",
    "INFERENCE_API_HEALTH_INTERVAL": "1",
    "INFERENCE_API_REGISTRY_REFRESH": "2",
    "INFERENCE_API_LOG_LEVEL": "info",
}
# A slope says nothing about an hour until the allocator has settled.
_SLOPE_AFTER = 600.0
_MAX_SLOPE = 1.0


class Watch:
    """Looks at the router's process once a second."""

    def __init__(self, url: str, pid: int) -> None:
        self._url = url
        self._proc = Path(f"/proc/{pid}")
        self.times: list[float] = []
        self.rss: list[float] = []
        self.fds: list[int] = []
        self.answers: list[float] = []

    async def run(self) -> None:
        began = time.monotonic()
        async with httpx.AsyncClient(trust_env=False, timeout=10) as client:
            while True:
                asked = time.monotonic()
                await client.get(f"{self._url}/healthz")
                self.answers.append(time.monotonic() - asked)
                self.times.append(time.monotonic() - began)
                self.rss.append(self.resident())
                self.fds.append(self.open_files())
                await asyncio.sleep(1)

    def resident(self) -> float:
        """MB"""
        return int((self._proc / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6

    def open_files(self) -> int:
        return len(os.listdir(self._proc / "fd"))

    def slope(self) -> float:
        """MB an hour, after the first fifth."""
        skip = len(self.times) // 5
        return linear_regression(self.times[skip:], self.rss[skip:]).slope * 3600


def models(backends: list[dict[str, str]]) -> list[dict[str, Any]]:
    """`m`, and what can be made of it and two others."""

    def real(name: str, count: int = 3, **more: Any) -> dict[str, Any]:
        return {"name": name, "backends": backends[:count], **more}

    members = ["m", "n", "o"]
    return [
        *map(real, members),
        {"name": "split", "split": {"variants": {"m": 70, "n": 30}}},
        {"name": "race", "race": {"members": members, "stagger": 0.02}},
        {"name": "consensus", "consensus": {"members": members}},
        real("fallback", 1, fallbacks=["m", "n"]),
        real("hedged", hedge={"after": 50, "budget": 0.5}),
        real("shadowed", shadow={"to": "n", "sample": 0.5}),
        real("cached", cache={"ttl": 2}),
        real("queued", max_in_flight=2, queue={"timeout": 1, "size": 30}),
    ]


def engines(directory: Path, faults: float, count: int = 3) -> list[Process]:
    command = [sys.executable, "-m", "tests.soak.engine", "--port", "{port}", "--faults", str(faults)]
    command += ["--journal", str(directory / "journal")]
    return [Process(f"engine-{i}", command, directory) for i in range(count)]


async def kill_in_turn(processes: list[Process], every: float) -> None:
    """SIGKILL one engine after the other; it is back on its port half the time later."""
    number = 0
    while True:
        await asyncio.sleep(every / 2)
        victim = processes[number % len(processes)]
        victim.kill()
        await asyncio.sleep(every / 2)
        victim.restart()
        number += 1


async def flap(registry: Process) -> None:
    """The registry is away for a third of the time."""
    while True:
        await asyncio.sleep(random.uniform(5, 12))
        registry.kill()
        await asyncio.sleep(random.uniform(2, 6))
        registry.restart()


def executions(journal: Path) -> tuple[int, list[str]]:
    """How many requests were executed more than once, and the nonces for which that was after an answer had begun."""
    started: Counter[str] = Counter()
    answered: set[str] = set()
    wrong = []
    for line in journal.read_text().splitlines():
        kind, nonce = line.split()
        if nonce.startswith(MANY_TIMES):
            continue
        if kind == "A":
            answered.add(nonce)
            continue
        started[nonce] += 1
        if nonce in answered or started[nonce] > 2:
            wrong.append(nonce)
    return sum(count > 1 for count in started.values()), wrong


async def soak(options: argparse.Namespace, directory: Path) -> list[str]:
    problems: list[str] = []
    with stopping() as processes:
        fleet = engines(directory, options.faults)
        processes += fleet
        catalogue = directory / "catalogue.json"
        backends = [{"url": engine.url} for engine in fleet]
        catalogue.write_bytes(orjson.dumps({"models": models(backends)}))
        store: list[str | Path] = [BIN / "registry-stub", "serve", "--port", "{port}", "--catalogue", catalogue]
        registry = Process("registry", [*store, "--database", directory / "registry.sqlite3"], directory)
        processes.append(registry)
        registry.wait_until_ready("/healthz", 20)
        environ = SETTINGS | {"INFERENCE_API_CATALOGUE": str(catalogue), "INFERENCE_API_REGISTRY_URL": registry.url}
        router = Process("router", [BIN / "inference-api", "serve"], directory, INFERENCE_API_PORT="{port}", **environ)
        processes.append(router)
        router.wait_until_ready("/readyz", 20)

        watch = Watch(router.url, router.pid)
        users = Users(router.port, options.users, options.rate, options.leaving, options.many)
        mishaps = [watch.run()]
        if options.kill_every:
            mishaps.append(kill_in_turn(fleet, options.kill_every))
        if options.flap:
            mishaps.append(flap(registry))
        tasks = [asyncio.create_task(mishap) for mishap in mishaps]
        files = watch.open_files()
        try:
            await users.run(options.seconds)
        finally:
            for task in tasks:
                task.cancel()
            ended = await asyncio.gather(*tasks, return_exceptions=True)
        problems += [f"a helper failed: {exc!r}" for exc in ended if isinstance(exc, Exception)]
        problems += users.violations
        if not router.alive:
            return [*problems, f"the router ended with {router.exit_code}:\n{router.tail()}"]
        problems += await quiescence(router, watch, files)
        problems += report(users, watch, options, *executions(directory / "journal"))
        if "Traceback" in router.log.read_text():
            problems.append(f"the router's log has a traceback, see {router.log}")
    return problems


async def quiescence(router: Process, watch: Watch, files: int) -> list[str]:
    """What is left a few seconds after the last client has gone."""
    problems: list[str] = []
    for _ in range(100):
        await asyncio.sleep(0.1)
        counts = ("requests_in_flight", "backend_in_flight", "queue_depth")
        in_flight = sum(router.sample(f"inference_api_{name}") for name in counts)
        # The registry's connection, and idle ones to the engines that are about to expire.
        open_now = watch.open_files()
        problems = []
        if in_flight:
            problems.append(f"{in_flight:.0f} requests are still counted as in flight")
        if open_now > files + 8:
            problems.append(f"{open_now} files are open, {files} were in the beginning")
        if not problems:
            break
    return problems


def report(users: Users, watch: Watch, options: argparse.Namespace, twice: int, wrong: list[str]) -> list[str]:
    total = sum(users.ended.values())
    slowest = sorted(watch.answers)
    print(f"{total} requests in {options.seconds:.0f} s, {total / options.seconds:.0f} a second:")
    for outcome, count in users.ended.most_common():
        print(f"  {outcome:<20} {count:>8}  {count / total:6.1%}")
    print(f"executed twice, before any answer: {twice - len(wrong)}; after one had begun: {len(wrong)}")
    slope = watch.slope()
    print(
        f"RSS {watch.rss[0]:.1f} MB, at the end {watch.rss[-1]:.1f} MB, slope {slope:+.2f} MB/h after the first fifth"
    )
    print(f"files {watch.fds[0]} -> {watch.fds[-1]}, most {max(watch.fds)}")
    print(f"/healthz p50 {slowest[len(slowest) // 2] * 1e3:.1f} ms, slowest {slowest[-1] * 1e3:.1f} ms")
    problems = [f"{nonce} was executed again after its answer had begun" for nonce in wrong]
    if options.seconds >= _SLOPE_AFTER and slope > _MAX_SLOPE:
        problems.append(f"memory grows by {slope:.2f} MB an hour")
    if options.strict:
        lost = users.ended["error_answer"]
        if lost:
            problems.append(f"{lost} requests got an error although they had not been answered a byte")
    if not users.ended["ok"]:
        problems.append("no request was answered")
    return problems


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/soak", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--users", type=int, default=40)
    parser.add_argument("--rate", type=float, default=200, help="requests a second")
    parser.add_argument("--leaving", type=float, default=0.3, help="share of the clients that leave early")
    parser.add_argument("--faults", type=float, default=0.15, help="share of the requests that an engine spoils")
    parser.add_argument("--kill-every", type=float, default=10, help="seconds between kill -9 of an engine; 0: never")
    parser.add_argument("--no-flap", dest="flap", action="store_false", help="leave the registry alone")
    parser.add_argument("--many", type=float, default=0.4, help="share of the requests for models with features")
    parser.add_argument("--strict", action="store_true", help="an error answer is a failure too")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="soak-") as directory, suppress(KeyboardInterrupt):
        problems = uvloop.run(soak(options, Path(directory)))
        for problem in problems[:20]:
            print(f"  - {problem}")
        print(f"FAIL: {len(problems)} problems" if problems else "PASS")
        return 1 if problems else 0
    return 130


if __name__ == "__main__":
    sys.exit(main())
