"""Usage records on disk: whole lines, none twice while the process lives, adopted after it, bounded, and torn ones."""

import errno
import fcntl
import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from inference_api.features.delivery.spool import Appended, Spool


def lines(start: int, count: int, size: int = 40) -> list[bytes]:
    return [b'{"id":"%0*d"}' % (size, number) for number in range(start, start + count)]


def drain(spool: Spool, most: int = 500) -> list[bytes]:
    found = []
    while batch := spool.read(most):
        found += batch
        spool.settle()
    return found


@pytest.fixture
def spool(tmp_path: Path) -> Iterator[Spool]:
    made = Spool(tmp_path / "spool", "a")
    made.adopt()
    yield made
    made.close()


def test_what_was_appended_is_read_in_order_and_then_gone(spool: Spool, tmp_path: Path) -> None:
    assert spool.append(lines(0, 700)) == Appended(700, 0, None)
    assert spool.append(lines(700, 5)) == Appended(5, 0, None)
    [file] = (tmp_path / "spool").iterdir()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert file.read_bytes() == b"".join(line + b"\n" for line in lines(0, 705))
    assert (spool.size, spool.records) == (file.stat().st_size, 705)

    assert drain(spool) == lines(0, 705)

    assert list((tmp_path / "spool").iterdir()) == []
    assert (spool.size, spool.records) == (0, 0)


def test_a_batch_stays_until_it_is_settled(spool: Spool) -> None:
    spool.append(lines(0, 10))

    assert spool.read(4) == spool.read(4) == lines(0, 4)
    assert spool.read(2) == lines(0, 2)
    spool.settle()
    spool.append(lines(10, 1))
    assert drain(spool, 3) == lines(2, 9)


def test_a_batch_is_bounded_in_bytes(spool: Spool) -> None:
    spool.append(lines(0, 10, 1000))

    assert len(spool.read(500, 3500)) == 3


def test_the_files_of_a_process_that_ended_are_adopted(tmp_path: Path) -> None:
    first, second = Spool(tmp_path, "a"), Spool(tmp_path, "b")
    first.append(lines(0, 10))
    assert first.read(4)
    first.settle()
    assert second.adopt() == 0
    first.close()

    assert second.adopt() == 10
    assert second.adopt() == 0
    # All of them: only the process that ended knew which were delivered.
    assert drain(second) == lines(0, 10)
    assert list(tmp_path.iterdir()) == []


def test_only_one_of_several_processes_adopts_a_file(tmp_path: Path) -> None:
    left = Spool(tmp_path, "a")
    left.append(lines(0, 10))
    left.close()

    spools = [Spool(tmp_path, name) for name in "bcd"]

    assert [spool.adopt() for spool in spools] == [10, 0, 0]


@pytest.mark.parametrize("torn", [b'{"id":"to', b'{"id":"torn","x":[{}', b"\0\0\0\0"])
def test_a_line_that_a_kill_tore_is_skipped(tmp_path: Path, torn: bytes) -> None:
    (tmp_path / "left.jsonl").write_bytes(b"\n".join(lines(0, 3)) + b"\n" + torn)
    spool = Spool(tmp_path, "a")

    spool.adopt()

    assert drain(spool) == lines(0, 3)
    assert list(tmp_path.iterdir()) == []


def test_a_last_line_that_lacks_its_end_only_is_read(tmp_path: Path) -> None:
    (tmp_path / "left.jsonl").write_bytes(b"\n".join(lines(0, 3)))
    spool = Spool(tmp_path, "a")

    spool.adopt()

    assert drain(spool) == lines(0, 3)


def test_what_is_no_record_is_skipped(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"\n\nrubbish\n" + lines(0, 1)[0] + b"\n" + b"x" * 3_000_000)
    (tmp_path / "b.jsonl").write_bytes(b"")
    (tmp_path / "c.jsonl").mkdir()
    (tmp_path / "d.jsonl").symlink_to(tmp_path / "a.jsonl")
    (tmp_path / "other").write_bytes(b"{}\n")
    spool = Spool(tmp_path, "a")

    assert spool.adopt() == 4
    assert drain(spool) == lines(0, 1)

    assert {path.name for path in tmp_path.iterdir()} == {"c.jsonl", "d.jsonl", "other"}


def test_the_oldest_file_goes_when_it_is_full(tmp_path: Path) -> None:
    # 16 files of 1000 bytes: each holds ten lines of 100.
    spool = Spool(tmp_path, "a", limit=16_000)
    lost = [spool.append(lines(number, 1, 90)).lost for number in range(0, 200)]

    assert spool.size <= 16_000
    assert sum(lost) + spool.records == 200
    assert spool.size == sum(path.stat().st_size for path in tmp_path.iterdir())
    left = drain(spool)
    assert left == lines(200 - len(left), len(left), 90)
    assert len(left) >= 140


def test_a_batch_that_goes_while_it_is_sent_is_not_settled_twice(tmp_path: Path) -> None:
    spool = Spool(tmp_path, "a", limit=1000)
    spool.append(lines(0, 5, 90))
    assert spool.read()
    spool.append(lines(5, 9, 90))
    spool.settle()

    assert drain(spool) == lines(4, 10, 90)


def test_of_more_than_all_room_the_last_lines_are_kept(tmp_path: Path) -> None:
    spool = Spool(tmp_path, "a", limit=16_000)

    assert spool.append(lines(0, 1000, 90)) == Appended(1000, 840, None)
    assert drain(spool) == lines(840, 160, 90)


class FullDisk:
    """Takes some bytes, and then no more, until there is room."""

    def __init__(self, room: int) -> None:
        self.room = room

    def write(self, fd: int, data: memoryview) -> int:
        if self.room == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        taken = os.write(fd, data[: self.room])
        self.room -= taken
        return taken


def test_a_full_disk_leaves_whole_lines(tmp_path: Path) -> None:
    disk = FullDisk(70)
    spool = Spool(tmp_path, "a", write=disk.write)
    spool.append(lines(0, 1))

    for _ in range(5):
        full = spool.append(lines(1, 10))
        assert (full.written, full.lost, str(full.error)) == (0, 0, "[Errno 28] No space left on device")
    # Nothing is left of the tries.
    assert len(os.listdir(tmp_path)) == 1
    disk.room = 10_000
    spool.append(lines(1, 10))

    assert drain(spool) == lines(0, 11)


def test_a_disk_that_is_full_halfway_has_what_fits(tmp_path: Path) -> None:
    disk = FullDisk(5000)
    spool = Spool(tmp_path, "a", limit=16_000, write=disk.write)

    done = spool.append(lines(0, 100, 90))

    assert (done.written, done.lost) == (50, 0)
    assert spool.size == sum(path.stat().st_size for path in tmp_path.iterdir())
    assert drain(spool) == lines(0, 50, 90)


def test_what_had_to_go_counts_also_if_the_disk_is_full_then(tmp_path: Path) -> None:
    disk = FullDisk(16_000)
    spool = Spool(tmp_path, "a", limit=16_000, write=disk.write)
    spool.append(lines(0, 160, 90))

    done = spool.append(lines(160, 10, 90))

    assert done.written == 0
    assert done.lost + spool.records == 160


def test_a_directory_that_cannot_be_made_is_an_error_each_time(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    spool = Spool(tmp_path / "file" / "spool", "a")

    with pytest.raises(OSError, match="Not a directory"):
        spool.adopt()
    assert str(spool.append(lines(0, 1)).error).startswith("[Errno 20] Not a directory")
    assert spool.read() == []


HOLD = """
import sys, time
from pathlib import Path
from inference_api.features.delivery.spool import Appended, Spool
spool = Spool(Path(sys.argv[1]), "held")
spool.append([b'{"id":"1"}'])
print("held", flush=True)
time.sleep(60)
"""


def test_the_lock_ends_with_the_process(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", HOLD, tmp_path], stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        spool = Spool(tmp_path, "a")
        before = spool.adopt()
        holder.kill()
        holder.wait()

    assert (before, spool.adopt()) == (0, 1)
    assert drain(spool) == [b'{"id":"1"}']


def test_a_new_file_that_another_process_took_first_is_left_to_it(tmp_path: Path) -> None:
    """It may be adopted between its creation and its lock."""
    taken: list[int] = []

    def open_file(path: Path, flags: int, mode: int) -> int:
        fd = os.open(path, flags, mode)
        if not taken:
            other = os.open(path, os.O_RDWR)
            fcntl.flock(other, fcntl.LOCK_EX)
            taken.append(other)
        return fd

    spool = Spool(tmp_path, "a", open_file=open_file)
    spool.append(lines(0, 1))

    assert [path.read_bytes() for path in sorted(tmp_path.iterdir())] == [b"", lines(0, 1)[0] + b"\n"]
    os.close(taken[0])
