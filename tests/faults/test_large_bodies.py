"""A body within the limit costs little and stands in nobody's way, whatever it holds. Routers are processes here."""

import asyncio
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import orjson
import pytest

from tests.command import Command, command, ready
from tests.fakes import FakeEngine, Line, Received, post, raw_client, read_answer, until

pytestmark = pytest.mark.anyio

SIZE = 24_000_000
URL = "/v1/completions"


def wide(start: bytes, unit: bytes, end: bytes = b"0]}") -> bytes:
    return start + unit * ((SIZE - len(start) - len(end)) // len(unit)) + end


# Those that ask for an alias are rewritten.
BODIES = {
    "numbers": wide(b'{"model":"m","prompt":[', b"1,"),
    "lists": wide(b'{"model":"m","prompt":[', b"[],"),
    "a field nobody reads": wide(b'{"model":"m","prompt":"a","x":[', b"1,"),
    "members": wide(b'{"model":"m","prompt":"a"', b',"a":1', b"}"),
    "an alias, and token ids": wide(b'{"model":"alias","prompt":[', b"12345,"),
    "a text": wide(b'{"model":"alias","prompt":"', "é, \\n".encode(), b'"}'),
}
BOUNDARY = b"content-type: multipart/form-data; boundary=B\r\n"
UPLOAD = wide(
    b'--B\r\ncontent-disposition: form-data; name="model"\r\n\r\nalias\r\n'
    b'--B\r\ncontent-disposition: form-data; name="file"; filename="a"\r\n\r\n',
    b"\r\n--",
    b"\r\n--B--\r\n",
)


@pytest.fixture
async def router(tmp_path: Path, start_engine: Any) -> AsyncIterator[tuple[Command, FakeEngine]]:
    engine = await start_engine()
    async with command(tmp_path, engine, entry={"aliases": ["alias"]}) as running:
        await ready(running.client, "/readyz")
        yield running, engine


def megabytes(router: Command, which: str) -> float:
    status = Path(f"/proc/{router.process.pid}/status").read_text()
    found = re.search(rf"{which}:\s+(\d+)", status)
    assert found is not None
    return int(found[1]) / 1024


async def count_answers(line: Line) -> int:
    """How often /healthz answers until this is cancelled."""
    count = 0
    try:
        while True:
            await line.send(b"GET /healthz HTTP/1.1\r\nhost: router\r\n\r\n")
            assert (await read_answer(line.reader)).status == 200
            count += 1
    except asyncio.CancelledError:
        return count


async def ask(router: Command, request: bytes) -> tuple[int, int]:
    """The status of the answer, and how often /healthz answered since the request was sent."""
    async with raw_client(router.port) as client, raw_client(router.port) as other:
        await client.send(request)
        counting = asyncio.create_task(count_answers(other))
        answer = await read_answer(client.reader)
        counting.cancel()
        return answer.status, await counting


@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES.keys())
async def test_a_large_body_takes_little_memory_and_lets_others_in_between(
    body: bytes, router: tuple[Command, FakeEngine]
) -> None:
    running, engine = router
    before = megabytes(running, "VmRSS")

    status, others = await ask(running, post(URL, body))

    assert status == 200
    assert engine.requests[-1].body == body.replace(b'"alias"', b'"m"', 1)
    # A loop that reads the body at one go answers once, when it has.
    assert others >= 10
    assert megabytes(running, "VmHWM") - before < 3 * len(body) / 1e6 + 10


async def test_a_large_upload_lets_others_in_between(router: tuple[Command, FakeEngine]) -> None:
    running, engine = router
    head = b"POST /v1/audio/transcriptions HTTP/1.1\r\nhost: router\r\n" + BOUNDARY
    before = megabytes(running, "VmRSS")

    status, others = await ask(running, head + b"content-length: %d\r\n\r\n" % len(UPLOAD) + UPLOAD)

    assert status == 200
    assert engine.requests[-1].body == UPLOAD.replace(b"alias", b"m", 1)
    assert others >= 10
    assert megabytes(running, "VmHWM") - before < 3 * len(UPLOAD) / 1e6 + 10


async def silence(request: Received, line: Line) -> None:
    await line.reader.read(-1)


async def test_nothing_of_a_body_is_kept_but_its_bytes(tmp_path: Path, start_engine: Any) -> None:
    engine = await start_engine(silence)
    body = orjson.dumps({"model": "m", "prompt": [list(range(1000, 9000))] * 100})
    async with command(tmp_path, engine) as router:
        await ready(router.client, "/readyz")
        before = megabytes(router, "VmRSS")
        async with raw_client(router.port) as one, raw_client(router.port) as two, raw_client(router.port) as three:
            for client in (one, two, three):
                await client.send(post(URL, body))
            async with asyncio.timeout(20):
                await until(lambda: len(engine.requests) == 3)
            held = megabytes(router, "VmRSS") - before

    assert held < 3 * 3 * len(body) / 1e6 + 10
