"""A backend that dies under load takes with it only the streams that had begun, and none of those looks complete."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import httpx
import pytest

from tests.e2e.conftest import Engines, StartRouter, unfinished
from tests.e2e.processes import Process, until

pytestmark = pytest.mark.e2e

CLIENTS = 40
TOKENS = 900
BODY = {"model": "llama-3-8b", "prompt": "Once upon a time", "max_tokens": TOKENS, "ignore_eos": True}


@pytest.fixture(scope="module")
def router(start_router: StartRouter, catalogue: Path) -> Process:
    """A new one: to others, an engine of an earlier test may still be asleep, or in its slow start."""
    return start_router(catalogue)


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


def ask(client: httpx.Client, number: int) -> Told:
    stream = number % 2 == 0
    status, body = 0, b""
    try:
        with client.stream("POST", "/v1/completions", json=BODY | {"stream": stream}) as answer:
            status = answer.status_code
            for piece in answer.iter_raw():
                body += piece
    except httpx.TransportError:
        return Told(stream, status, body, broken=True)
    return Told(stream, status, body, broken=False)


def test_only_begun_streams_are_lost_and_none_looks_complete(idle_engines: Engines, client: httpx.Client) -> None:
    victim, survivor = idle_engines["llama-3-8b"]
    with ThreadPoolExecutor(CLIENTS) as pool:
        asked = [pool.submit(ask, client, number) for number in range(CLIENTS)]
        assert until(lambda: unfinished(victim) + unfinished(survivor) == CLIENTS, seconds=20)
        on_victim = unfinished(victim)
        victim.kill()
        told = [future.result() for future in asked]
    lost = [one for one in told if not one.complete]
    assert on_victim > CLIENTS / 4
    # What was lost had a head, so it had begun; and its client was told that it broke.
    assert [one for one in lost if not (one.stream and one.status == 200 and one.broken)] == []
    assert [one for one in lost if b"[DONE]" in one.body or b'"finish_reason":"length"' in one.body] == []
    assert 0 < len(lost) <= on_victim


def test_the_survivor_answers_everything_afterwards(idle_engines: Engines, client: httpx.Client) -> None:
    answers = [client.post("/v1/completions", json=BODY | {"max_tokens": 1}) for _ in range(30)]
    assert [answer.status_code for answer in answers] == [200] * 30
