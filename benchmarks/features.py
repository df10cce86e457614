"""What features take of a request and of an event, beside a router without them: keys, limits, usage, cost, and those
that make many models one, which do not apply to the request.

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
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import wire
from benchmarks.check import Case, fork, is_under_valgrind, prepare, try_case, under_valgrind
from benchmarks.inprocess import Client, Loop, running
from benchmarks.setup import Setup
from inference_api.policy.keys import digest, new_key

_NOTHING = "nothing"
_ROUNDS, _TIMED = 7, 400
# Events of a short and of a long stream
_SHORT, _LONG = 100, 300
_PLENTY = 10**12
_KEY_FILE = "BENCHMARKS_POLICY"


_PRICE = {"price": {"input": 0.2, "cached_input": 0.02, "output": 0.6}}
_CORS = ("cors_origins", "https://app.example")
# Features that a model can have, none of which has anything to do for an ordinary request
_MANY = {
    "fallbacks": ["other"],
    "context_fallbacks": ["other"],
    "hedge": {"after": 60_000},
    "shadow": {"to": "other", "sample": 1e-9},
    "cache": {"ttl": 60},
    "max_in_flight": 100_000,
    "queue": {"timeout": 9, "size": 9},
    "hold": 9,
}
_VIRTUAL = [
    {"name": "other", "backends": ["http://127.0.0.1:9"]},
    {"name": "another", "backends": ["http://127.0.0.1:9"]},
    {"name": "split", "split": {"variants": {"other": 1, "another": 1}}},
    {"name": "race", "race": {"members": ["other", "another"]}},
    {"name": "consensus", "consensus": {"members": ["other", "another"]}},
]
_VERSION = {"version": 1, "messages": [{"role": "system", "content": "Help."}]}
_PROMPTS = [{"name": "support", "labels": {"production": 1}, "versions": [_VERSION]}]


class Rung(NamedTuple):
    """A router with more features than the one before it."""

    name: str
    setup: Setup


def rungs(directory: Path) -> list[Rung]:
    def policy(name: str) -> tuple[tuple[str, str], ...]:
        return (("auth", "keys"), ("policy", str(directory / f"{name}.json")))

    def priced(name: str, *settings: tuple[str, str], **more: Any) -> Setup:
        keys = json.dumps(_PRICE | more)
        further = json.dumps(_VIRTUAL) if settings else ""
        return Setup(backends=2, settings=(*policy(name), ("usage", "log"), *settings), keys=keys, further=further)

    return [
        Rung("off", Setup(backends=2)),
        Rung("keys", Setup(backends=2, settings=policy("keys"))),
        Rung("keys, limits", Setup(backends=2, settings=policy("limits"))),
        Rung("keys, limits, usage, cost", priced("limits")),
        Rung("the same and a budget", priced("budgets")),
        # Without the budget: beside "keys, limits, usage, cost"
        Rung("many as one, elsewhere", priced("prompts", _CORS)),
        Rung("many as one, at this model", priced("prompts", _CORS, **_MANY)),
    ]


def write_policies(directory: Path, key: str, id: str) -> None:
    """One with a key only; one with limits of requests, tokens and streams on three levels; one with a budget, too."""
    entry = {"id": id, "name": "bench", "digest": digest(key.encode()), "organisation": "team-a", "user": "ana"}
    limits = [{"requests": _PLENTY, "per": 60}, {"tokens": _PLENTY, "per": 60}, {"streams": 1000}]
    team: dict[str, object] = {"name": "team-a", "limits": limits}
    limited = {
        "keys": [{**entry, "limits": [{"requests": _PLENTY, "per": 60}]}],
        "limits": [{"scope": "user", "requests": _PLENTY, "per": 60}],
    }
    documents = {
        "keys": {"organisations": [{"name": "team-a"}], "keys": [entry]},
        "limits": {"organisations": [team], **limited},
        "prompts": {"organisations": [team], **limited, "prompts": _PROMPTS},
        "budgets": {"organisations": [{**team, "budget": {"cost": 10**9, "per": "month"}}], **limited},
    }
    for name, document in documents.items():
        (directory / f"{name}.json").write_text(json.dumps(document))


def cases(key: str, setup: Setup) -> list[Case]:
    def whole(answer: bytes) -> wire.Checked:
        return wire.check(answer, 0)

    made = [Case("JSON request", wire.request(0), wire.JSON_END, whole, 300, setup=setup)]
    for name, request in (("stream", _asking), ("stream, usage removed", _silent)):
        for events in (_SHORT, _LONG):
            check = partial(_checked, events)
            made.append(Case(f"{name}, {events}", request(events), wire.STREAM_END[-5:], check, 10, setup=setup))
    return [
        Case(one.name, wire.with_key(one.request, key), one.end, one.check, one.count, one.units, one.setup)
        for one in made
    ]


def _asking(events: int) -> bytes:
    """The request of a stream that asks for its usage."""
    return wire.request(0, events)


def _silent(events: int) -> bytes:
    """The same, without that: the router asks, and removes the event with the answer."""
    head, _, body = _asking(events).replace(b',"stream_options":{"include_usage":true}', b"").partition(b"\r\n\r\n")
    lines = [b"Content-Length: %d" % len(body) if b"Content-Length" in line else line for line in head.split(b"\r\n")]
    return b"\r\n".join([*lines, b"", body])


def _checked(tokens: int, answer: bytes) -> wire.Checked:
    # The tokens, the reason to finish, [DONE], and the usage, if it was not removed.
    events = answer.count(b"data: ")
    return wire.Checked(events, events - 3 - answer.count(b'"usage":{') == tokens)


def _rows(figures: Mapping[str, float]) -> dict[str, float]:
    """By rung and row: a JSON request; of a stream its beginning and end, and an event, by two lengths of it."""
    rows = {}
    for name, long in figures.items():
        rung, _, case = name.partition(": ")
        if not case.startswith("stream"):
            rows[name] = long
        elif case.endswith(f", {_LONG}"):
            kind = case.removesuffix(f", {_LONG}")
            short = figures[f"{rung}: {kind}, {_SHORT}"]
            event = (long - short) / (_LONG - _SHORT)
            rows[f"{rung}: {kind}: begin and end"] = short - _SHORT * event
            rows[f"{rung}: {kind}: event"] = event
    return rows


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
        instructions = _rows({name: (total - nothing) / units[name] for name, total in counted.items()})
        times = _rows(dict(_times()))
    print(f"{'':62}{'instructions':>14}{'more':>10}{'us':>9}{'more':>8}")
    for name in dict.fromkeys(name.partition(": ")[2] for name in instructions):
        first = f"off: {name}"
        for rung in dict.fromkeys(each.partition(": ")[0] for each in instructions):
            this = f"{rung}: {name}"
            more, us = instructions[this] - instructions[first], times[this]
            print(f"{name + ', ' + rung:62}{instructions[this]:14,.0f}{more:10,.0f}{us:9.2f}{us - times[first]:8.2f}")
    return 0


def _ladder() -> tuple[list[Rung], str]:
    directory, key = json.loads(os.environ[_KEY_FILE])
    return rungs(Path(directory)), key


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
                count = _TIMED if case.name == "JSON request" else _TIMED // _SHORT
                began = time.process_time()
                loop.run_until_complete(client.run(case.request, count, case.end))
                took = (time.process_time() - began) * 1e6 / count
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
