"""A replica that dies under load takes with it only the streams that had begun, and none of those looks complete."""

from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import httpx
import pytest

from tests.e2e.conftest import Engines
from tests.e2e.processes import Process, until

pytestmark = pytest.mark.e2e

CLIENTS = 40
TOKENS = 400
BODY = {"model": "llama-3-8b", "prompt": "Once upon a time", "max_tokens": TOKENS, "ignore_eos": True}


class Told(NamedTuple):
    """What a client got: the status (0: not even a head), the body so far, and whether the connection broke."""

    stream: bool
    status: int
    body: bytes
    broken: bool

    @property
    def complete(self) -> bool:
        # The usage of a JSON answer, and the mark of a stream, are the last that is written.
        end = b"data: [DONE]" if self.stream else b'"completion_tokens":%d' % TOKENS
        return self.status == 200 and end in self.body


def ask(url: str, number: int) -> Told:
    stream = number % 2 == 0
    status, body, broken = 0, b"", False
    with httpx.Client(timeout=120, trust_env=False) as client:
        try:
            with client.stream("POST", url + "/v1/completions", json=BODY | {"stream": stream}) as answer:
                status = answer.status_code
                for piece in answer.iter_raw():
                    body += piece
        except httpx.TransportError:
            broken = True
    return Told(stream, status, body, broken)


def test_only_begun_streams_are_lost_and_none_looks_complete(idle_engines: Engines, router: Process) -> None:
    victim, survivor = idle_engines["llama-3-8b"]
    with ThreadPoolExecutor(CLIENTS) as pool:
        asked: list[Future[Told]] = [pool.submit(ask, router.url, number) for number in range(CLIENTS)]
        assert until(lambda: victim.unfinished() + survivor.unfinished() == CLIENTS, seconds=30)
        on_victim = victim.unfinished()
        victim.kill()
        told = [future.result() for future in asked]
    lost = [one for one in told if not one.complete]
    assert on_victim > CLIENTS / 4
    # A status means that a head had come: what is lost had begun, and the client is told that it broke.
    assert [one for one in lost if not (one.stream and one.status == 200 and one.broken)] == []
    assert [one for one in lost if b"[DONE]" in one.body or b'"finish_reason":"length"' in one.body] == []
    assert 0 < len(lost) <= on_victim


def test_the_survivor_answers_everything_afterwards(
    idle_engines: Engines, router: Process, client: httpx.Client
) -> None:
    answers = [client.post("/v1/completions", json=BODY | {"max_tokens": 1}) for _ in range(30)]
    assert [answer.status_code for answer in answers] == [200] * 30
