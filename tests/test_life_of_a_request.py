"""docs/architecture.md says which files a request passes: the files that one passes when it is run under a profiler."""

import asyncio
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

import inference_api
from inference_api.feature import Feature
from inference_api.models import Call, Reply, Send
from inference_api.observe.account import Record
from inference_api.routing.fleet import Model
from inference_api.upstream.attempt import Attempt, SendAttempt
from tests.conftest import Served
from tests.fakes import CHAT, SSE_HEAD, STREAM, Line, Received, chunk, event, post, raw_client, read_answer

pytestmark = pytest.mark.anyio
Start = Callable[..., Any]
ROOT = Path(inference_api.__file__).parent
PAGE = (ROOT.parent / "docs" / "architecture.md").read_text()
URL = "/v1/chat/completions"
# Background tasks that may have their turn in between, and what they call
BESIDE = {
    "observe/lag.py",
    "routing/prober.py",
    "discovery/list_poller.py",
    "discovery/lists.py",
    "upstream/dial.py",
    "pace.py",
}


def files_in(text: str) -> list[str]:
    return re.findall(r"`([a-z_/]+\.py)`", text)


def part(title: str) -> str:
    """The text of one section of the page."""
    return PAGE.split(f"## {title}\n")[1].split("\n## ")[0]


class Trace:
    """`files`: those of which code ran, in order; `stacks`: those on the stack when bytes went out."""

    def __init__(self) -> None:
        self.files: dict[str, None] = {}
        self.stacks: set[str] = set()

    def __call__(self, frame: FrameType, kind: str, argument: object) -> None:
        path = _ours(frame)
        if kind != "call" or path is None:
            return
        self.files[path] = None
        if (path, frame.f_code.co_name) in WRITES:
            above: FrameType | None = frame
            while above is not None:
                self.stacks |= {found for found in [_ours(above)] if found}
                above = above.f_back


# Where the request goes to the engine, and the answer to the client
WRITES = {("upstream/connection.py", "exchange"), ("server/connection.py", "write")}


def _ours(frame: FrameType) -> str | None:
    path = Path(frame.f_code.co_filename)
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else None


@contextmanager
def traced() -> Iterator[Trace]:
    trace, before = Trace(), sys.getprofile()
    sys.setprofile(trace)
    try:
        yield trace
    finally:
        sys.setprofile(before)


async def test_a_json_request_passes_the_files_of_the_page(start_engine: Start, start_router: Start) -> None:
    served: Served = await start_router(await start_engine(), health_interval=3600)
    text = part("Life of a JSON request")
    chain = re.findall(r"^\d+\. `([a-z_/]+\.py)`", text, re.MULTILINE)

    async with raw_client(served.port) as client:
        for _ in range(8):
            # Its head is known, and its connection is there.
            await client.send(post(URL, CHAT))
            await read_answer(client.reader)
        with traced() as trace:
            await client.send(post(URL, CHAT))
            answer = await read_answer(client.reader)

    assert answer.status == 200
    # A dispatcher only returns what the next step makes.
    assert trace.stacks | {"http/dispatch.py"} == set(chain)
    assert len(chain) <= 12
    called = set(files_in(text.split("return at once:")[1].split("`tests/")[0]))
    assert trace.files.keys() - BESIDE == {*chain, *called}
    assert f"code of {len(chain) + len(called)} files in all" in text
    assert f"The other {len(called)} are" in text


async def test_an_event_passes_three_files(start_engine: Start, start_router: Start) -> None:
    go = asyncio.Event()

    async def script(request: Received, line: Line) -> None:
        await line.send(SSE_HEAD, chunk(event("one")), chunk(event("two")))
        await go.wait()
        await line.send(chunk(event("three")))
        await line.gone()

    served: Served = await start_router(await start_engine(script), health_interval=3600)
    async with raw_client(served.port) as client:
        await client.send(post(URL, STREAM))
        await client.reader.readuntil(b'"two"')
        with traced() as trace:
            go.set()
            await client.reader.readuntil(b'"three"')

    [event_text] = re.findall(r"^3\. (Each event passes three files.*?)^4\. ", part("Life of a stream"), re.M | re.S)
    assert list(trace.files) == files_in(event_text)


async def test_what_is_made_without_its_constructor_has_all_its_fields(
    start_engine: Start, start_router: Start
) -> None:
    made: list[Any] = []

    def sending(send: Send) -> Send:
        async def noted(call: Call, model: Model) -> Reply:
            made.append(call)
            return await send(call, model)

        return noted

    def attempting(send: SendAttempt) -> SendAttempt:
        async def noted(attempt: Attempt) -> Reply:
            made.extend([attempt, attempt.prepared])
            return await send(attempt)

        return noted

    feature = Feature("notes", send=sending, attempt=attempting, record=made.append)
    served: Served = await start_router(await start_engine(), features=[feature])
    await served.chat()

    assert [type(value).__name__ for value in made] == ["Call", "Attempt", "Prepared", "Record"]
    assert all(len(value) == len(value._fields) for value in made)
    [record] = [value for value in made if isinstance(value, Record)]
    assert (record.status, record.path, record.model) == (200, URL, made[1].model)


@pytest.mark.parametrize("path", sorted(set(files_in(PAGE))))
def test_every_file_of_the_page_exists(path: str) -> None:
    assert any((root / path).exists() for root in (ROOT, ROOT.parent, ROOT.parent / "control_plane"))
