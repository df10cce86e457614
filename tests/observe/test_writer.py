"""The writer of the log: lines in order, none lost while somebody reads, and nobody held up while nobody does."""

import asyncio
import contextlib
import fcntl
import gc
import io
import os
import select
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

import pytest

from inference_api.observe.writer import LogWriter
from tests.fakes import until

pytestmark = pytest.mark.anyio


@contextlib.contextmanager
def writing_to(stream: TextIO, capacity: int = 1 << 20) -> Iterator[LogWriter]:
    writer = LogWriter(stream, capacity, "{} lines are missing".format)
    try:
        yield writer
    finally:
        writer.close()


class Pipe:
    """A pipe of the smallest size there is. `reader`, `stream`: its ends."""

    def __init__(self) -> None:
        self.reader, end = os.pipe()
        fcntl.fcntl(end, fcntl.F_SETPIPE_SZ, 4096)
        self.stream = os.fdopen(end, "w")

    def lines(self, last: str, seconds: float = 15) -> list[str]:
        """Read until this line has come."""
        read, deadline = b"", time.monotonic() + seconds
        while not read.endswith(f"{last}\n".encode()):
            ready, _, _ = select.select([self.reader], [], [], max(0, deadline - time.monotonic()))
            assert ready, read[-100:]
            read += os.read(self.reader, 65536)
        return read.decode().splitlines()

    @property
    def full(self) -> bool:
        return not select.select([], [self.stream], [], 0)[1]

    def close(self) -> None:
        for end in (self.reader, self.stream.fileno()):
            with contextlib.suppress(OSError):
                os.close(end)


@pytest.fixture
def pipe() -> Iterator[Pipe]:
    pipe = Pipe()
    yield pipe
    # A writer that is blocked in it gets an error, and ends.
    with contextlib.suppress(OSError):
        os.close(pipe.reader)
    with contextlib.suppress(OSError):
        pipe.stream.close()


class Output(io.StringIO):
    """What a stream was given, and in how many writes."""

    writes = inside = most = 0

    def write(self, text: str) -> int:
        self.writes += 1
        self.inside += 1
        self.most = max(self.most, self.inside)
        time.sleep(0.0002)
        self.inside -= 1
        return super().write(text)


# Lines that are written


async def test_lines_are_written_together_and_soon() -> None:
    output = Output()
    with writing_to(output) as writer:
        began = asyncio.get_running_loop().time()
        for number in range(3):
            writer.later(str(number))
        assert output.writes == 0

        await until(output.getvalue)
        assert asyncio.get_running_loop().time() - began >= 0.045
        assert (output.writes, output.getvalue()) == (1, "0\n1\n2\n")

        writer.later("3")
        await until(lambda: output.writes == 2)


async def test_many_lines_do_not_wait() -> None:
    output = Output()
    with writing_to(output) as writer:
        for _ in range(800):
            writer.later("x" * 1000)
        await until(lambda: output.writes == 3)

        await until(lambda: output.writes == 4)
        assert writer.drain(5)
        assert len(output.getvalue().splitlines()) == 800


async def test_a_line_that_cannot_wait_comes_behind_those_that_can() -> None:
    output = Output()
    with writing_to(output) as writer:
        writer.later("1")
        writer.now("2")
        writer.later("3")
        writer.now("4")

        assert writer.drain(5)
        assert (output.getvalue(), output.writes) == ("1\n2\n3\n4\n", 2)


async def test_threads_may_log_beside_the_event_loop() -> None:
    """As the one does that sends spans."""
    output = Output()
    with writing_to(output) as writer:

        def elsewhere(name: int) -> None:
            for number in range(100):
                writer.now(f"{name} {number}")

        threads = [threading.Thread(target=elsewhere, args=(name,)) for name in range(3)]
        for thread in threads:
            thread.start()
        for number in range(100):
            writer.later(f"loop {number}")
            await asyncio.sleep(0.0002)
        for thread in threads:
            thread.join()
        assert writer.drain(10)

    assert output.most == 1
    lines = [line.split(" ") for line in output.getvalue().splitlines()]
    for name in ("0", "1", "2", "loop"):
        assert [int(number) for of, number in lines if of == name] == list(range(100))


def test_without_lines_nothing_is_written() -> None:
    output = Output()
    with writing_to(output) as writer:
        writer.flush()
        assert writer.drain(5)

    assert output.writes == 0


def test_a_finalizer_may_log_in_the_middle_of_it_all() -> None:
    output = io.StringIO()
    with writing_to(output, capacity=1 << 24) as writer:
        thresholds, numbers = gc.get_threshold(), iter(range(200))

        def collected(phase: str, info: dict[str, int]) -> None:
            if phase == "stop" and (number := next(numbers, None)) is not None:
                writer.now(f"finalizer {number}")

        gc.callbacks.append(collected)
        gc.set_threshold(1)
        try:
            for number in range(200):
                writer.now(f"line {number}")
        finally:
            gc.set_threshold(*thresholds)
            gc.callbacks.remove(collected)
        assert writer.drain(10)

    lines = output.getvalue().splitlines()
    assert [line for line in lines if line.startswith("line")] == [f"line {number}" for number in range(200)]
    assert sum(line.startswith("finalizer") for line in lines) > 100


# Lines that nobody reads


async def test_a_pipe_that_nobody_reads_holds_nobody_up_and_what_is_dropped_is_counted_and_told(pipe: Pipe) -> None:
    with writing_to(pipe.stream, capacity=10_000) as writer:
        # More than fits into the pipe: from here on the writer's thread is blocked.
        writer.now("x" * 4999)
        await until(lambda: pipe.full)
        for number in range(1000):
            writer.now(f"{number:099}")
        assert not writer.drain(0.1)
        assert writer.dropped == 950

        kept = await asyncio.to_thread(pipe.lines, f"{49:099}")
        assert writer.drain(5)
        writer.now("next")
        told = await asyncio.to_thread(pipe.lines, "next")

    assert [int(line) for line in kept[1:]] == list(range(50))
    assert told == ["950 lines are missing", "next"]
    assert writer.dropped == 950


async def test_the_one_who_hands_lines_over_may_be_interrupted_by_a_line(pipe: Pipe) -> None:
    """As by a finalizer, which runs anywhere."""

    def notice(lines: int) -> str:
        if not interrupted:
            interrupted.append(lines)
            writer.now("inside")
        return f"{lines} lines are missing"

    interrupted: list[int] = []
    writer = LogWriter(pipe.stream, 5000, notice)
    writer.now("x" * 4999)
    await until(lambda: pipe.full)
    writer.now("dropped")
    await asyncio.to_thread(pipe.lines, "x" * 4999)
    assert writer.drain(5)
    writer.now("outside")
    lines = await asyncio.to_thread(pipe.lines, "outside")
    writer.close()

    assert interrupted == [1]
    assert {"inside", "outside"} < set(lines)


async def test_a_reader_that_is_only_slow_gets_every_line(pipe: Pipe) -> None:
    with writing_to(pipe.stream) as writer:
        for number in range(1000):
            writer.later(f"{number:099}")
        await until(lambda: pipe.full)
        lines = await asyncio.to_thread(pipe.lines, f"{999:099}")

    assert [int(line) for line in lines] == list(range(1000))
    assert writer.dropped == 0


async def test_a_pipe_that_another_process_made_non_blocking_gets_every_line(pipe: Pipe) -> None:
    os.set_blocking(pipe.stream.fileno(), False)
    with writing_to(pipe.stream) as writer:
        for number in range(300):
            writer.now(f"{number:099}")
        await until(lambda: pipe.full)
        lines = await asyncio.to_thread(pipe.lines, f"{299:099}")

    assert [int(line) for line in lines] == list(range(300))
    assert writer.dropped == 0


def test_a_line_that_is_longer_than_all_that_may_wait_is_written(pipe: Pipe) -> None:
    with writing_to(pipe.stream, capacity=100) as writer:
        writer.now("x" * 3000)

        assert pipe.lines("x" * 3000) == ["x" * 3000]


async def test_without_a_reader_lines_are_counted_and_no_more(pipe: Pipe) -> None:
    os.close(pipe.reader)
    with writing_to(pipe.stream) as writer:
        for line in ("one", "two"):
            writer.now(line)

        assert writer.drain(5)
        assert writer.dropped == 2


def test_a_full_disk_costs_lines_and_no_more() -> None:
    with Path("/dev/full").open("w") as full, writing_to(full) as writer:
        writer.now("line")
        assert writer.drain(5)

        assert writer.dropped == 1


async def test_a_line_that_broke_off_does_not_take_the_next_one_along(tmp_path: Path) -> None:
    path = tmp_path / "fifo"
    os.mkfifo(path)
    first = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    with os.fdopen(os.open(path, os.O_WRONLY), "w") as stream, writing_to(stream) as writer:
        fcntl.fcntl(stream, fcntl.F_SETPIPE_SZ, 4096)
        writer.now("x" * 5000)
        await until(lambda: not select.select([], [stream], [], 0)[1])
        os.close(first)
        await until(lambda: writer.dropped == 1)
        second = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        rest = os.read(second, 65536)
        writer.now("next")
        assert writer.drain(5)
        told = os.read(second, 65536)
        os.close(second)

    assert set(rest) == set(b"x")
    assert told == b"\n1 lines are missing\nnext\n"
