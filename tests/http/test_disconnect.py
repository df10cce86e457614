"""A client that leaves cancels the work on its request, and nothing else does; against a server told by hand."""

import asyncio
from collections import deque
from contextlib import suppress
from typing import Any

import pytest
from starlette.types import Message

from inference_api.errors import ClientGone
from inference_api.http.disconnect import DisconnectWatcher

pytestmark = pytest.mark.anyio

LEFT: Message = {"type": "http.disconnect"}
BODY: Message = {"type": "http.request", "body": b"late", "more_body": False}


@pytest.fixture
def anyio_backend() -> str:
    """asyncio's own loop: uvloop runs in every test that goes through the server."""
    return "asyncio"


class Waiter(asyncio.Future[None]):
    """A future that knows how many callbacks are on it."""

    callbacks = 0

    def add_done_callback(self, *args: Any, **kwargs: Any) -> None:
        super().add_done_callback(*args, **kwargs)
        self.callbacks += 1

    def remove_done_callback(self, fn: Any) -> int:
        removed = super().remove_done_callback(fn)
        self.callbacks -= removed
        return removed


class Client:
    """Tells what it is made to tell, and otherwise suspends as uvicorn's `receive` does."""

    def __init__(self, *told: Message) -> None:
        self._told = deque(told)
        self.waiter = Waiter()
        self.calls = 0
        self.closed = 0

    async def receive(self) -> Message:
        self.calls += 1
        try:
            while not self._told:
                self.waiter = Waiter()
                await self.waiter
            return self._told.popleft()
        finally:
            self.closed += 1

    def tell(self, message: Message) -> None:
        self._told.append(message)
        self.waiter.set_result(None)


async def work(client: Client, watcher: DisconnectWatcher | None = None) -> str:
    """Five turns of the loop with an eye on the client."""
    with watcher or DisconnectWatcher(client.receive):
        for _ in range(5):
            await asyncio.sleep(0)
    return "done"


async def test_a_client_that_leaves_cancels_the_task() -> None:
    client = Client()
    watcher = DisconnectWatcher(client.receive)
    task = asyncio.create_task(work(client, watcher))
    await asyncio.sleep(0)

    client.tell(LEFT)

    with pytest.raises(ClientGone):
        await task
    assert watcher.gone
    assert (client.calls, client.closed) == (1, 1)


async def test_a_client_that_had_left_before_cancels_the_task_at_its_first_await() -> None:
    client = Client(LEFT)
    reached = []

    async def handler() -> None:
        try:
            with DisconnectWatcher(client.receive):
                reached.append("inside")
                await asyncio.sleep(0)
                reached.append("after")
        except ClientGone:
            reached.append("gone")
        # The task itself goes on, and may be cancelled again.
        await asyncio.sleep(0)
        reached.append("outside")

    await asyncio.create_task(handler())
    assert reached == ["inside", "gone", "outside"]


async def test_a_rest_of_the_body_is_no_departure() -> None:
    client = Client(BODY)
    watcher = DisconnectWatcher(client.receive)

    assert await work(client, watcher) == "done"
    assert not watcher.gone


async def test_a_body_that_comes_while_waiting_is_no_departure() -> None:
    client = Client()
    watcher = DisconnectWatcher(client.receive)
    task = asyncio.create_task(work(client, watcher))
    await asyncio.sleep(0)

    client.tell(BODY)

    assert await task == "done"
    assert not watcher.gone


async def test_a_receive_that_suspends_more_than_once_is_followed() -> None:
    client = Client()
    watcher = DisconnectWatcher(client.receive)
    task = asyncio.create_task(work(client, watcher))
    await asyncio.sleep(0)
    client.waiter.set_result(None)
    await asyncio.sleep(0)

    client.tell(LEFT)

    with pytest.raises(ClientGone):
        await task
    assert (client.calls, watcher.gone) == (1, True)


async def test_work_that_ends_leaves_nothing_behind() -> None:
    client = Client()

    assert await work(client) == "done"

    assert (client.closed, client.waiter.callbacks) == (1, 0)
    client.tell(LEFT)
    assert await asyncio.sleep(0, "not cancelled") == "not cancelled"


async def test_a_departure_in_the_same_turn_as_the_end_is_too_late() -> None:
    client = Client()
    watcher = DisconnectWatcher(client.receive)

    with watcher:
        await asyncio.sleep(0)
        # What waits for it is scheduled now, and runs when the work is over.
        client.tell(LEFT)
    await asyncio.sleep(0)
    await asyncio.sleep(0)

    assert not watcher.gone
    assert client.closed == 1


async def test_an_exception_of_the_work_passes() -> None:
    client = Client()

    with pytest.raises(ValueError, match="its own"), DisconnectWatcher(client.receive):
        raise ValueError("its own")

    assert client.closed == 1


async def test_somebody_elses_cancellation_is_no_departure() -> None:
    client = Client()
    watcher = DisconnectWatcher(client.receive)
    task = asyncio.create_task(work(client, watcher))
    await asyncio.sleep(0)

    task.cancel()

    with suppress(asyncio.CancelledError):
        await task
    assert task.cancelled()
    assert not watcher.gone
    assert client.closed == 1
