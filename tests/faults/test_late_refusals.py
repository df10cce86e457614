"""Requests whose fault shows after they were handed on: a refusal of the protocol is never a fault of the router's."""

import asyncio
from contextlib import suppress
from itertools import pairwise

import orjson
import pytest

from tests.fakes import CHAT, chunk, post, raw_client, read_answer, until
from tests.faults.lab import URL, Lab

pytestmark = pytest.mark.anyio

CHUNKED = b"transfer-encoding: chunked\r\n"
EXPECTS = b"expect: 100-continue\r\n"
UPGRADES = b"connection: upgrade\r\nupgrade: h2c\r\n"
FAULTS = {
    "chunk size": b"ZZ\r\n",
    "chunk size behind a chunk": chunk(b"{}") + b"ZZ\r\n",
    "chunk end": b"2\r\n{}XX",
    "bare line feed": b"2\n{}\n0\n\n",
    "huge chunk": b"f" * 17 + b"\r\n",
    "endless extension": b"2;" + b"x" * 100_000,
    "endless trailer": b"0\r\nx: " + b"x" * 100_000,
    "framing in a trailer": b"0\r\ncontent-length: 3\r\n\r\n",
}
PATHS = (URL, "/v1/embeddings", "/v1/models", "/nope")


def request(path: str, *headers: bytes, version: bytes = b"1.1") -> bytes:
    first = b"POST %b HTTP/%b\r\nhost: router\r\ncontent-type: application/json\r\n" % (path.encode(), version)
    return first + b"".join(headers) + b"\r\n"


async def statuses(port: int, *parts: bytes) -> list[int]:
    """Of every answer, interim ones too, on a connection that the router ends; one read of the router per part."""
    async with raw_client(port) as client, asyncio.timeout(10):
        with suppress(ConnectionError):
            for part in parts:
                await client.send(part)
                await asyncio.sleep(0.02)
        said = b""
        with suppress(ConnectionError):
            while piece := await client.reader.read(2**16):
                said += piece
    return [int(after[:3]) for _, after in pairwise(said.split(b"HTTP/1.1 "))]


@pytest.mark.parametrize("path", PATHS)
async def test_what_is_logged_is_what_the_client_got(path: str, lab: Lab) -> None:
    served = await lab.router(await lab.engine())

    async with raw_client(served.port) as client:
        await client.send(request(path, CHUNKED) + b"ZZ\r\n")
        answer = await read_answer(client.reader)
    await until(lambda: served.lines)

    assert answer.status == 400
    [line] = served.lines
    assert (line["status"], line["outcome"], line["bytes"]) == (400, "refused", len(answer.body))
    assert line["request_id"] == answer.headers["x-request-id"] == orjson.loads(answer.body)["request_id"]


async def nobody_is_to_blame(lab: Lab, count: int) -> None:
    """All of them are counted, none as a fault of ours; the fixtures look at the log and what is left."""
    [served] = lab.quiescence.routers
    await until(lambda: len(served.lines) == count and served.router.core.admission.in_flight == 0)
    assert {line["outcome"] for line in served.lines} <= {"refused", "client_gone"}
    assert {line["status"] for line in served.lines} <= {400, 404, 405, 408, 499}
    assert 'code="500"' not in (await served.client.get("/metrics")).text
    assert all(engine.requests == [] for engine in lab.engines)


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
@pytest.mark.parametrize("headers", [(), (EXPECTS,), (UPGRADES,), (EXPECTS, UPGRADES)], ids=len)
async def test_a_body_that_breaks_costs_the_router_no_fault_of_its_own(
    fault: bytes, headers: tuple[bytes, ...], lab: Lab
) -> None:
    served = await lab.router(await lab.engine())

    for path in PATHS:
        head = request(path, CHUNKED, *headers)
        for parts in ([head + fault], [head, fault], [head + fault[:3], fault[3:]]):
            said = await statuses(served.port, *parts)
            assert set(said) <= {100, 400, 404, 405}, parts
            assert [status for status in said if status != 100] in ([400], [404], [405]), parts

    await nobody_is_to_blame(lab, 3 * len(PATHS))


@pytest.mark.parametrize("headers", [(), (EXPECTS,), (UPGRADES, EXPECTS)], ids=len)
async def test_nor_does_a_body_that_does_not_come(headers: tuple[bytes, ...], lab: Lab) -> None:
    served = await lab.router(await lab.engine(), body_timeout=0.3)
    unfinished = [request(URL, b"content-length: 10\r\n", *headers) + b"{", request(URL, CHUNKED, *headers) + b"5\r\n{"]

    for data in unfinished:
        assert [status for status in await statuses(served.port, data) if status != 100] == [408]

    await nobody_is_to_blame(lab, 2)


@pytest.mark.parametrize("leave", ["reset", "close", "half-close"])
async def test_nor_does_a_client_that_leaves_in_the_middle_of_it(leave: str, lab: Lab) -> None:
    served = await lab.router(await lab.engine())

    for rest in (b"", b"1", b"1\r\n{", b"ZZ\r\n"):
        async with raw_client(served.port) as client:
            await client.send(request(URL, CHUNKED, EXPECTS) + rest)
            if leave == "reset":
                client.reset()
            elif leave == "close":
                client.close()
            else:
                client.writer.write_eof()
                await client.reader.read(-1)

    await nobody_is_to_blame(lab, 4)


@pytest.mark.parametrize("behind", [b"garbage\r\n\r\n", b"\x00" * 100, request(URL, CHUNKED, EXPECTS) + b"ZZ\r\n"])
async def test_what_is_wrong_behind_a_request_costs_neither_of_them_a_fault(behind: bytes, lab: Lab) -> None:
    served = await lab.router(engine := await lab.engine())

    said = await statuses(served.port, post(URL, CHAT, EXPECTS) + behind)

    assert [status for status in said if status != 100] == [200]
    assert len(engine.requests) == 1
    assert {line["status"] for line in served.lines} == {200}
