"""Calls that may hang, each in a thread of its own."""

import asyncio
import threading

import pytest

from inference_api.threads import in_thread
from tests.fakes import until

pytestmark = pytest.mark.anyio


async def test_a_call_gives_what_it_gives_and_raises_what_it_raises() -> None:
    seen: list[tuple[str, bool]] = []

    def call() -> int:
        thread = threading.current_thread()
        seen.append((thread.name, thread.daemon))
        return 5

    assert await in_thread(call, "aside") == 5
    # A daemon: the process may end while it hangs.
    assert seen == [("aside", True)]
    with pytest.raises(ZeroDivisionError):
        await in_thread(lambda: 1 / 0, "aside")


async def test_a_call_that_hangs_holds_up_no_other_and_is_left_by_who_is_cancelled() -> None:
    release = threading.Event()
    hanging = [asyncio.create_task(in_thread(lambda: release.wait(30), "hangs")) for _ in range(40)]
    try:
        await asyncio.sleep(0)
        assert await asyncio.wait_for(in_thread(lambda: 1, "aside"), 10) == 1
        hanging[0].cancel()
        with pytest.raises(asyncio.CancelledError):
            await hanging[0]
    finally:
        release.set()
    assert await asyncio.gather(*hanging[1:]) == [True] * 39
    await until(lambda: not [thread for thread in threading.enumerate() if thread.name == "hangs"])


def test_a_call_that_ends_after_its_loop_is_nobodys() -> None:
    release, ended = threading.Event(), threading.Event()
    errors: list[object] = []
    threading.excepthook, before = errors.append, threading.excepthook

    def call() -> None:
        release.wait(30)
        ended.set()

    async def leave() -> None:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(in_thread(call, "late"), 0.01)

    try:
        asyncio.run(leave())
        release.set()
        assert ended.wait(10)
        for thread in threading.enumerate():
            if thread.name == "late":
                thread.join(10)
    finally:
        threading.excepthook = before
    assert errors == []


async def test_where_there_is_no_thread_there_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", start)
    with pytest.raises(OSError, match="no thread"):
        await in_thread(lambda: 1, "aside")
