"""What keys, limits, usage and cost take of a request and of an event, beside a router without them.

    .venv/bin/python -m benchmarks.features    # two minutes; needs valgrind

In process, as `scripts/bench --check`. Every router gets the same requests, with a key. Instructions are counted by
valgrind, all in one run; the times are CPU time of this machine, the best of several rounds.
"""

import gc
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

from benchmarks import wire
from benchmarks.check import Case, fork, is_under_valgrind, prepare, try_case, under_valgrind
from benchmarks.inprocess import STREAM_EVENTS, Client, Loop, running
from benchmarks.setup import Setup
from inference_api.policy.keys import digest, new_key

_NOTHING = "nothing"
_ROUNDS, _TIMED = 7, 400
_PLENTY = 10**12
_KEY_FILE = "BENCHMARKS_POLICY"


class Rung(NamedTuple):
    """A router with more features than the one before it."""

    name: str
    setup: Setup


def rungs(policy: Path, limited: Path) -> list[Rung]:
    keys = (("auth", "keys"), ("policy", str(policy)))
    limits = (("auth", "keys"), ("policy", str(limited)))
    return [
        Rung("off", Setup(backends=2)),
        Rung("keys", Setup(backends=2, settings=keys)),
        Rung("keys, limits", Setup(backends=2, settings=limits)),
        Rung("keys, limits, usage, cost", Setup(backends=2, settings=(*limits, ("usage", "log")), price=True)),
    ]


def write_policies(directory: Path, key: str, id: str) -> tuple[Path, Path]:
    """One with a key only, and one with limits of three levels and a budget."""
    entry = {"id": id, "name": "bench", "digest": digest(key.encode()), "organisation": "team-a", "user": "ana"}
    limits = [{"requests": _PLENTY, "per": 60}, {"tokens": _PLENTY, "per": 60}, {"streams": 1000}]
    plain = {"organisations": [{"name": "team-a"}], "keys": [entry]}
    limited = {
        "organisations": [{"name": "team-a", "limits": limits, "budget": {"tokens": _PLENTY, "per": "month"}}],
        "keys": [{**entry, "limits": [{"requests": _PLENTY, "per": 60}]}],
        "limits": [{"scope": "user", "requests": _PLENTY, "per": 60}],
    }
    paths = directory / "policy.json", directory / "limited.json"
    for path, document in zip(paths, (plain, limited), strict=True):
        path.write_text(json.dumps(document))
    return paths


def cases(key: str, setup: Setup) -> list[Case]:
    silent = wire.request(0, STREAM_EVENTS).replace(b',"stream_options":{"include_usage":true}', b"")
    head, _, body = silent.partition(b"\r\n\r\n")
    fixed = b"\r\n".join(
        b"Content-Length: %d" % len(body) if line.startswith(b"Content-Length") else line
        for line in head.split(b"\r\n")
    )

    def whole(answer: bytes) -> wire.Checked:
        return wire.check(answer, 0)

    def stream(answer: bytes) -> wire.Checked:
        return wire.check(answer, STREAM_EVENTS)

    def counted(answer: bytes) -> wire.Checked:
        # The tokens, the reason to finish, [DONE], and the usage only without a feature that has asked for it.
        events = answer.count(b"data: ")
        return wire.Checked(events, events - 3 - answer.count(b'"usage":{') == STREAM_EVENTS)

    silent_request = fixed + b"\r\n\r\n" + body
    made = [
        Case("JSON request", wire.request(0), wire.JSON_END, whole, 300, setup=setup),
        Case("event", wire.request(0, STREAM_EVENTS), wire.STREAM_END[-5:], stream, 10, STREAM_EVENTS, setup),
        Case("event, usage removed", silent_request, wire.STREAM_END[-5:], counted, 10, STREAM_EVENTS, setup),
    ]
    return [
        Case(one.name, wire.with_key(one.request, key), one.end, one.check, one.count, one.units, one.setup)
        for one in made
    ]


def main() -> int:
    valgrind = shutil.which("valgrind")
    if valgrind is None:
        print("skipped: there is no valgrind to count instructions with (apt-get install valgrind)")
        return 0
    made = new_key()
    with tempfile.TemporaryDirectory() as directory:
        write_policies(Path(directory), made.key, made.id)
        os.environ[_KEY_FILE] = json.dumps([directory, made.key])
        counted, units = under_valgrind(valgrind, "benchmarks.features")
        nothing = counted.pop(_NOTHING)
        instructions = {name: (total - nothing) / units[name] for name, total in counted.items()}
        times = dict(_times())
    print(f"{'':42}{'instructions':>14}{'more':>10}{'us':>9}{'more':>8}")
    for name in dict.fromkeys(name.partition(": ")[2] for name in instructions):
        first = f"off: {name}"
        for rung in dict.fromkeys(each.partition(": ")[0] for each in instructions):
            this = f"{rung}: {name}"
            more, us = instructions[this] - instructions[first], times[this]
            print(f"{name + ', ' + rung:42}{instructions[this]:14,.0f}{more:10,.0f}{us:9.2f}{us - times[first]:8.2f}")
    return 0


def _ladder() -> tuple[list[Rung], str]:
    directory, key = json.loads(os.environ[_KEY_FILE])
    return rungs(Path(directory, "policy.json"), Path(directory, "limited.json")), key


def _times() -> Iterator[tuple[str, float]]:
    """CPU microseconds of one unit of each case. The rungs take turns, so that a busy machine is busy for all."""
    ladder, key = _ladder()
    with running(*(rung.setup for rung in ladder)) as (loop, clients):
        loop.run_until_complete(prepare({rung.setup: client for rung, client in zip(ladder, clients, strict=True)}))
        best: dict[str, float] = {}
        work = [
            (f"{rung.name}: {case.name}", client, case)
            for rung, client in zip(ladder, clients, strict=True)
            for case in cases(key, rung.setup)
        ]
        for _, client, case in work:
            try_case(loop, client, case)
        gc.collect()
        gc.freeze()
        for _ in range(_ROUNDS):
            for name, client, case in work:
                count = max(1, _TIMED // case.units)
                began = time.process_time()
                loop.run_until_complete(client.run(case.request, count, case.end))
                took = (time.process_time() - began) * 1e6 / (count * case.units)
                best[name] = min(best.get(name, took), took)
        yield from best.items()


def _work(loop: Loop, client: Client, case: Case) -> None:
    loop.run_until_complete(client.run(case.request, case.count, case.end))


def _run_forks() -> None:
    ladder, key = _ladder()
    with running(*(rung.setup for rung in ladder)) as (loop, clients):
        loop.run_until_complete(prepare({rung.setup: client for rung, client in zip(ladder, clients, strict=True)}))
        work = [
            (rung, client, case)
            for rung, client in zip(ladder, clients, strict=True)
            for case in cases(key, rung.setup)
        ]
        for _, client, case in work:
            try_case(loop, client, case)
        gc.collect()
        gc.freeze()
        # What the parent has done so far counts in each of its forks.
        forks = {_NOTHING: (fork(lambda: None), 1)}
        for rung, client, case in work:
            count = fork(partial(_work, loop, client, case))
            forks[f"{rung.name}: {case.name}"] = (count, case.count * case.units)
        print(json.dumps(forks), flush=True)
        os._exit(0)


if __name__ == "__main__":
    if is_under_valgrind():
        _run_forks()
    else:
        raise SystemExit(main())
