"""Files of models, read in parts: what a reader, a folder and a tensor are, and a window over a file.

Lengths in these files are anyone's, so each is looked at before anything of that length is read or built.
"""

import struct
from collections.abc import Mapping
from contextlib import AbstractAsyncContextManager
from typing import Literal, NamedTuple, Protocol

MIB = 1024 * 1024
# Bytes of a file that are no tensor, and tensors of one model, at most
LARGEST_HEADER, MOST_TENSORS = 64 * MIB, 100_000
# Bytes that a window reads at once, at first and at most
_STEP, _LARGEST_STEP = 256 * 1024, 2 * MIB


class Unreadable(ValueError):
    """No model, or not a whole one. The message is a clause that begins with the value that is wrong."""


class SourceError(Exception):
    """A hub or folder does not give what it is asked for. The message is a sentence.

    `reason`: not_found; refused: a token or a permission is missing; invalid: of the reference; away, busy: later;
    failed: the answer cannot be used. `seconds`: after which to try again.
    """

    def __init__(
        self,
        reason: Literal["not_found", "refused", "invalid", "away", "busy", "failed"],
        message: str,
        seconds: int | None = None,
    ) -> None:
        super().__init__(message)
        self.reason = reason
        self.seconds = seconds


class Reader(Protocol):
    """A file. `size`: bytes."""

    @property
    def size(self) -> int: ...

    async def read(self, offset: int, n: int) -> bytes:
        """These `n` bytes, all within the file. Raises Unreadable, SourceError."""


class Folder(Protocol):
    """Files that belong together. `files`: sizes by path, `/` between folders. `commit`: which names their content.

    `counts`: numbers in all tensors by dtype, where somebody has counted them. `notes`: what is left out.
    """

    files: Mapping[str, int]
    commit: str | None
    counts: Mapping[str, int]
    notes: tuple[str, ...]

    def open(self, path: str) -> AbstractAsyncContextManager[Reader]: ...


class Tensor(NamedTuple):
    """`numbers`: how many it has. `size`: bytes in the file."""

    name: str
    dtype: str
    numbers: int
    size: int


class Window:
    """The bytes of a file in their order. Many small values are few reads: it reads ahead.

    `most`: bytes that are read in all, each read counted as one step at least, so that reads are few, too.
    """

    def __init__(self, reader: Reader, most: int = LARGEST_HEADER, step: int = _STEP) -> None:
        self._reader = reader
        self._most = self._left = most
        self._smallest = self._step = step
        # Bytes that are here: those of the file from `_start`; `_at`: the place among them
        self._bytes, self._start, self._at = b"", 0, 0

    @property
    def offset(self) -> int:
        return self._start + self._at

    async def take(self, n: int) -> bytes:
        await self._need(n)
        self._at += n
        return self._bytes[self._at - n : self._at]

    async def number(self, form: struct.Struct) -> int:
        """One value of this form. `form`: of an integer."""
        await self._need(form.size)
        (found,) = form.unpack_from(self._bytes, self._at)
        self._at += form.size
        return int(found)

    def skip(self, n: int) -> None:
        """Go on after `n` bytes, which are not read. Raises Unreadable."""
        if n > self._reader.size - self.offset:
            raise self._short()
        self._at += n
        if self._at > len(self._bytes):
            self._bytes, self._start, self._at = b"", self.offset, 0

    async def skip_prefixed(self, count: int, length: struct.Struct, longest: int) -> None:
        """Skip so many values, each after its length; none is built. Raises Unreadable."""
        size, unpack = length.size, length.unpack_from
        while count:
            await self._need(size)
            found, at, end, n = self._bytes, self._at, len(self._bytes) - size, 0
            while count and at <= end:
                (n,) = unpack(found, at)
                if n > longest:
                    raise Unreadable(f"a text of {n:,} bytes: at most {longest:,} are read")
                if at + size + n > len(found):
                    break
                at += size + n
                count -= 1
            if at > self._at:
                self._at = at
            else:
                # One that is not whole yet
                await self._need(size + n)

    async def _need(self, n: int) -> None:
        missing = n - (len(self._bytes) - self._at)
        if missing <= 0:
            return
        here = self._start + len(self._bytes)
        length = min(max(missing, self._step), self._reader.size - here)
        if length < missing:
            raise self._short()
        self._left -= max(length, self._smallest)
        if self._left < 0:
            raise Unreadable(f"what comes before its tensors: more than {self._most // MIB} MiB, which is no model's")
        self._step = min(2 * self._step, _LARGEST_STEP)
        found = await self._reader.read(here, length)
        self._bytes, self._start, self._at = self._bytes[self._at :] + found, self.offset, 0

    def _short(self) -> Unreadable:
        return Unreadable(f"{self._reader.size:,} bytes: the file ends before what it says is in it; download it again")
