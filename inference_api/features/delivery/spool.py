"""Records on disk, as JSON lines, while the control plane is away. Blocking: for a thread, one call at a time.

Each process writes files of its own and holds a lock on each. The kernel ends the lock with the process, so a file that
can be locked was left behind, and is adopted. Files end with their last delivered line; a line that kill -9 tore, and
only the last one can be, is skipped.
"""

import fcntl
import logging
import os
import stat
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import orjson

from inference_api.features.delivery.outbox import BATCH, BATCH_BYTES, fitting

logger = logging.getLogger(__name__)

LIMIT = 64 * 1024 * 1024
# The oldest file goes if the spool is full: several, so that not all goes at once.
_FILES = 16
# Bytes of one write: joining more of them would hold the interpreter, and with it all requests, too long.
_PIECE = 256 * 1024
_SUFFIX = ".jsonl"

Open = Callable[[Path, int, int], int]
Write = Callable[[int, memoryview], int]


class Appended(NamedTuple):
    """What became of lines: so many of the first ones are written, and so many older ones had to go for them.

    `error`: why the others are not written.
    """

    written: int
    lost: int
    error: OSError | None


class _Full(Exception):
    """The disk does not take more."""

    def __init__(self, reason: OSError, lost: int) -> None:
        super().__init__(str(reason))
        self.reason = reason
        self.lost = lost


class _File:
    """One file: `size` bytes of whole lines, of which those before `at` were delivered; `lines` were not."""

    __slots__ = ("at", "fd", "lines", "path", "size")

    def __init__(self, path: Path, fd: int, size: int, lines: int) -> None:
        self.path = path
        self.fd = fd
        self.size = size
        self.lines = lines
        self.at = 0


class Spool:
    """A directory of files. `name`: of this process, unique. `limit`: bytes of its own and of adopted files.

    `open_file` and `write` are the system's.
    """

    def __init__(
        self, directory: Path, name: str, limit: int = LIMIT, open_file: Open = os.open, write: Write = os.write
    ) -> None:
        self._directory = directory
        self._name = name
        self._limit = limit
        self._open = open_file
        self._write = write
        # The oldest first
        self._files: list[_File] = []
        # The last of them, if it still grows
        self._growing: _File | None = None
        self._number = 0
        # What `read` gave: the file, the offset behind, and the lines of it
        self._given: tuple[_File, int, int] | None = None
        # Read by the metrics of another thread
        self.size = 0
        self.records = 0

    def adopt(self) -> int:
        """Take over the files of processes that ended. Returns the records in them. Raises OSError."""
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        known = {file.path for file in self._files}
        found = [path for path in self._directory.glob("*" + _SUFFIX) if path not in known]
        adopted = [file for path in found if (file := self._locked(path)) is not None]
        adopted.sort(key=lambda file: os.fstat(file.fd).st_mtime)
        self._files[:0] = adopted
        self._count()
        return sum(file.lines for file in adopted)

    def append(self, lines: list[bytes]) -> "Appended":
        """Write them, as far as the disk has room."""
        count = lost = 0
        try:
            while count < len(lines):
                more = fitting(lines[count:], len(lines), min(self._limit // _FILES, _PIECE))
                lost += self._write_some(lines[count : count + more])
                count += more
        except _Full as exc:
            return Appended(count, lost + exc.lost, exc.reason)
        finally:
            self._count()
        return Appended(count, lost, None)

    def _write_some(self, lines: list[bytes]) -> int:
        """Write them into one file. Returns how many others had to go. Raises _Full, and then none is written."""
        data = memoryview(b"\n".join(lines) + b"\n")
        lost = self._make_room(len(data))
        try:
            file = self._growing
            if file is None or (file.size and file.size + len(data) > self._limit // _FILES):
                self._growing = None
                file = self._create()
        except OSError as exc:
            raise _Full(exc, lost) from exc
        try:
            _write_all(self._write, file.fd, data)
        except OSError as exc:
            # The part that was written is no line: the next one must not continue it.
            self._growing = None
            with suppress(OSError):
                os.ftruncate(file.fd, file.size)
                self._growing = file
            raise _Full(exc, lost) from exc
        file.size += len(data)
        file.lines += len(lines)
        self.size += len(data)
        return lost

    def read(self, most: int = BATCH, size: int = BATCH_BYTES) -> list[bytes]:
        """The oldest records, whole and at most so many; none: the spool is empty. Raises OSError."""
        while self._files:
            file = self._files[0]
            data = os.pread(file.fd, size, file.at)[: file.size - file.at]
            whole = data[: data.rfind(b"\n") + 1].split(b"\n")[:-1]
            if whole:
                whole = whole[: fitting(whole, most, size)]
                self._given = file, sum(map(len, whole)) + len(whole), len(whole)
                if lines := [line for line in whole if line[:1] == b"{" and line[-1:] == b"}"]:
                    return lines
                self.settle()
            elif data and file.at + len(data) < file.size:
                # No line of ours is as long.
                file.at += len(data)
            elif data and _is_record(data):
                self._given = file, len(data), 1
                return [data]
            else:
                self._remove(file)
        return []

    def settle(self) -> None:
        """What was read last has been delivered, or dropped."""
        if self._given is None:
            # Its file had to go meanwhile.
            return
        file, size, lines = self._given
        self._given = None
        file.at += size
        file.lines -= lines
        if file.at >= file.size:
            self._remove(file)
        self._count()

    def drop(self) -> int:
        """Give up the oldest file, which cannot be read. Returns how many records were in it."""
        lines = self._files[0].lines if self._files else 0
        if self._files:
            self._remove(self._files[0])
        return lines

    def close(self) -> None:
        """Leave the files to whoever comes next."""
        for file in self._files:
            os.close(file.fd)
        self._files, self._growing = [], None

    def _make_room(self, size: int) -> int:
        lost = 0
        while self._files and self.size + size > self._limit:
            lost += self._files[0].lines
            self._remove(self._files[0])
        return lost

    def _create(self) -> _File:
        while True:
            self._number += 1
            path = self._directory / f"usage-{self._name}-{self._number:06d}{_SUFFIX}"
            fd = self._open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC, 0o600)
            # Another process may adopt it before it is locked; then it is empty, and is removed there.
            if _lock(fd, path):
                self._growing = file = _File(path, fd, 0, 0)
                self._files.append(file)
                return file
            os.close(fd)

    def _locked(self, path: Path) -> _File | None:
        """A file that nobody holds; None: somebody does, it cannot be read, or it was empty."""
        try:
            fd = self._open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC, 0)
        except OSError as exc:
            if exc.errno is not None and path.exists():
                logger.warning("usage records in %s cannot be read: %s", path, exc.strerror)
            return None
        try:
            if stat.S_ISREG(os.fstat(fd).st_mode) and _lock(fd, path):
                if size := os.fstat(fd).st_size:
                    return _File(path, fd, size, _lines_in(fd))
                path.unlink()
        except OSError as exc:
            logger.warning("usage records in %s cannot be adopted: %s", path, exc.strerror)
        os.close(fd)
        return None

    def _remove(self, file: _File) -> None:
        self._files.remove(file)
        if file is self._growing:
            self._growing = None
        if self._given is not None and self._given[0] is file:
            self._given = None
        with suppress(FileNotFoundError):
            file.path.unlink()
        os.close(file.fd)
        self._count()

    def _count(self) -> None:
        self.size = sum(file.size for file in self._files)
        self.records = sum(file.lines for file in self._files)


def _lock(fd: int, path: Path) -> bool:
    """Whether the lock is ours, and the file is still the one with this name."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.path.samestat(os.stat(path), os.fstat(fd))
    except (BlockingIOError, FileNotFoundError):
        return False


def _write_all(write: Write, fd: int, data: memoryview) -> None:
    while data:
        data = data[write(fd, data) :]


def _lines_in(fd: int) -> int:
    at = count = 0
    while data := os.pread(fd, 1 << 20, at):
        at += len(data)
        count += data.count(b"\n")
    return count


def _is_record(text: bytes) -> bool:
    try:
        return isinstance(orjson.loads(text), dict)
    except orjson.JSONDecodeError:
        return False
