"""Where the instructions of a request go: each stage is taken out, and what is missing then is what it costs.

    .venv/bin/python -m benchmarks.stages    # two minutes; needs valgrind

In process, as `scripts/bench --check`: without the kernel's part, and without the event loop's reading and writing.
What is taken out is replaced by its result, so that everything after it goes on as before; the call or two that the
replacement takes are counted as the rest's. Of a short cut it says what would be paid without it.
"""

import gc
import json
import os
import shutil
import sys
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any, NamedTuple

import orjson

from benchmarks import wire
from benchmarks.check import CASES, PLAIN, Case, fork, is_under_valgrind, try_case, under_valgrind
from benchmarks.inprocess import Client, Loop, running
from inference_api.models import Reply
from inference_api.observe.account import Account
from inference_api.observe.metrics import Metrics
from inference_api.relay import relay
from inference_api.relay.events import EventTracker
from inference_api.routing.fleet import Model
from inference_api.server import repeated_head as client_heads
from inference_api.server.cycle import cycle_of
from inference_api.upstream import connection
from inference_api.upstream import repeated_head as heads
from inference_api.upstream.response import ResponseStream

EVENT = CASES[1]
_WARM = 20
_HEADERS = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(wire.ANSWER))]
_LINES = b"".join([b"%b: %b\r\n" % pair for pair in _HEADERS])


class Stage(NamedTuple):
    """`take_out` makes it free, in a fork of its own; `cases` are those that have it."""

    name: str
    take_out: Callable[[Client], None]
    cases: tuple[Case, ...] = (PLAIN,)


def _nothing(*_: Any, **__: Any) -> None: ...


def _pipeline(client: Client) -> Any:
    accounts: Any = client.app
    return accounts.app.pipelines["/v1/chat/completions"]


def _replace(client: Client, **parts: Any) -> None:
    pipeline = _pipeline(client)
    pipeline.stages = pipeline.stages._replace(**parts)


def _router(client: Client) -> None:
    answer = b"HTTP/1.1 200 OK\r\n" + _LINES + b"\r\n" + wire.ANSWER
    stand_in: Any = SimpleNamespace(data_received=lambda _: client._read(answer))
    client._protocol = stand_in


def _application(client: Client) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        cycle = cycle_of(send)
        assert cycle is not None
        cycle.respond(200, _LINES, wire.ANSWER)

    client._protocol._app = app


def _upstream(client: Client) -> None:
    place: Any = SimpleNamespace(loop=client._loop)
    known = heads.RepeatedHead.learn(b"HTTP/1.1 200 OK\r\n" + _LINES + b"\r\n" + wire.ANSWER, _HEADERS)

    async def send(call: Any, model: Model) -> Reply:
        stream = ResponseStream(place)
        stream.complete, stream.pieces, stream.size, stream.known = True, [wire.ANSWER], len(wire.ANSWER), known
        return Reply(200, _HEADERS, stream, model.backends[0], _nothing)

    _replace(client, send=send)


def _body_check(client: Client) -> None:
    pipeline = _pipeline(client)
    reader = pipeline.route.reader
    asked = reader.at_once(wire.request(0).partition(b"\r\n\r\n")[2])
    assert asked is not None
    # A Call takes them apart.
    stand_in: Any = SimpleNamespace(at_once=lambda _: (asked[0].copy(), *asked[1:]), bulky=reader.bulky)
    pipeline.route = pipeline.route._replace(reader=stand_in)


def _resolve(client: Client) -> None:
    model = _pipeline(client).stages.resolve(wire.MODEL, None)
    _replace(client, resolve=lambda *_: model)


def _choose(client: Client) -> None:
    Model.choose = lambda model, key, tried=(): model.backends[0]  # type: ignore[method-assign, assignment]


def _answer_check(client: Client) -> None:
    usage = orjson.loads(wire.ANSWER)["usage"]
    relay.read_answer = lambda body: (usage, False)  # type: ignore[attr-defined]


def _events(client: Client) -> None:
    EventTracker.feed = _nothing  # type: ignore[method-assign, assignment]
    EventTracker.complete = True  # type: ignore[method-assign, assignment]


def _metrics(client: Client) -> None:
    accounts: Any = client.app
    accounts._sinks = accounts._sinks[1:]
    Metrics.attempt = _nothing  # type: ignore[method-assign]


def _access_log(client: Client) -> None:
    accounts: Any = client.app
    accounts._sinks = accounts._sinks[:-1]


def _account(client: Client) -> None:
    _metrics(client)
    _access_log(client)
    for name in ("accepted", "end"):
        setattr(Account, name, _nothing)


def _known_requests(client: Client) -> None:
    client_heads.RepeatedHead.body_at = lambda *_: 0  # type: ignore[method-assign]


def _known_answers(client: Client) -> None:
    heads.RepeatedHead.read = _nothing  # type: ignore[method-assign]


def _whole_chunks(client: Client) -> None:
    connection._SIZE_LINES.clear()


STAGES = (
    Stage("the router: all but this harness", _router),
    Stage("the application: all but server and task", _application),
    Stage("forward: attempt, connection, answer's head", _upstream),
    Stage("body: JSON and fields", _body_check),
    Stage("resolve", _resolve),
    Stage("choose", _choose),
    Stage("answer: JSON and usage", _answer_check),
    Stage("follow events", _events, (EVENT,)),
    Stage("observe: metrics, access line, accounts", _account, (PLAIN, EVENT)),
    Stage("  of these the metrics", _metrics),
    Stage("  of these the access line", _access_log),
    Stage("without known request heads", _known_requests),
    Stage("without known answer heads", _known_answers),
    Stage("without whole chunks", _whole_chunks, (EVENT,)),
)
_WHOLE = Stage("whole", _nothing, (PLAIN, EVENT))


def main() -> int:
    if is_under_valgrind():
        _run_forks()
    valgrind = shutil.which("valgrind")
    if valgrind is None:
        print("there is no valgrind to count instructions with (apt-get install valgrind)", file=sys.stderr)
        return 1
    print("\n".join(table(*under_valgrind(valgrind, "benchmarks.stages"))))
    return 0


def table(counted: Mapping[str, int], units: Mapping[str, int]) -> list[str]:
    """Lines of a table, from what forks that did their work once and twice counted."""
    cost = {
        name: (total - counted[f"{name} once"]) / units[name]
        for name, total in counted.items()
        if f"{name} once" in counted
    }
    lines = [f"{'instructions per':48}{'JSON request':>16}{'event':>16}"]
    for stage in (_WHOLE, *STAGES):
        cells = []
        for case in (PLAIN, EVENT):
            whole = cost[_key(_WHOLE, case)]
            if case not in stage.cases:
                cells.append(f"{'':16}")
            elif stage is _WHOLE:
                cells.append(f"{whole:10,.0f}  100%")
            else:
                part = abs(whole - cost[_key(stage, case)])
                cells.append(f"{part:10,.0f}{part / whole:6.0%}")
        lines.append(f"{stage.name:48}" + "".join(cells))
    return lines


def _key(stage: Stage, case: Case) -> str:
    return f"{stage.name}: {case.name}"


# What runs under valgrind


def _run_forks() -> None:
    with running(PLAIN.setup) as (loop, [client]):
        for case in (PLAIN, EVENT):
            try_case(loop, client, case)
        gc.collect()
        gc.freeze()
        forks = {}
        for stage in (_WHOLE, *STAGES):
            for case in stage.cases:
                key = _key(stage, case)
                forks[f"{key} once"] = fork(_work(loop, client, stage, case, 1)), 0
                forks[key] = fork(_work(loop, client, stage, case, 2)), case.count * case.units
        print(json.dumps(forks), flush=True)
        os._exit(0)


def _work(loop: Loop, client: Client, stage: Stage, case: Case, times: int) -> Callable[[], Any]:
    def work() -> None:
        stage.take_out(client)
        loop.run_until_complete(client.run(case.request, _WARM + times * case.count, case.end))

    return work


if __name__ == "__main__":
    sys.exit(main())
