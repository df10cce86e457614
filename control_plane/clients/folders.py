"""Folders of this machine below MODEL_ROOTS: which files are there, and parts of them.

Nothing outside of the roots is opened, wherever a link leads, and nothing but plain files. All of it runs in threads:
disks may be slow, and far away.
"""

import asyncio
import os
import stat
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

from control_plane.pure.reading import Reader, SourceError, Unreadable

# Folders within folders; entries of all of them
DEEPEST, MOST_ENTRIES = 4, 10_000
_TOLD = 5
_OUTSIDE: Final = "is not below a folder of CONTROL_PLANE_MODEL_ROOTS"


class Roots:
    """`most`: entries of a folder, with those of the folders in it."""

    def __init__(self, roots: Sequence[Path], most: int = MOST_ENTRIES) -> None:
        self._roots = roots
        self._most = most

    async def folder(self, ref: str) -> "LocalFolder":
        """The files of a folder, and of those in it. `ref`: an absolute path. Raises SourceError."""
        return await asyncio.to_thread(self._folder, ref)

    async def beside(self, ref: str) -> tuple["LocalFolder", str]:
        """The files beside a file, and its name. Raises SourceError."""
        return await asyncio.to_thread(self._beside, ref)

    def _folder(self, ref: str) -> "LocalFolder":
        path = self._resolved(ref)
        if not path.is_dir():
            raise SourceError("invalid", f"{ref[:200]!r} is no folder; give one, or the source `file`.")
        return self._listed(path, DEEPEST)

    def _beside(self, ref: str) -> tuple["LocalFolder", str]:
        # The name that was given: shards are known by it, whatever a link calls its target.
        given = Path(ref)
        self._resolved(ref)
        if not given.is_file():
            raise SourceError("invalid", f"{ref[:200]!r} is no file; give one, or the source `folder`.")
        return self._listed(self._resolved(str(given.parent)), 0), given.name

    def _resolved(self, ref: str) -> Path:
        """Where it is, without links. Raises SourceError."""
        if not ref.startswith("/") or ".." in ref.split("/") or "\0" in ref:
            raise SourceError("invalid", f"{ref[:200]!r} must be an absolute path without '..'.")
        if not any(Path(ref).is_relative_to(root) for root in self._roots):
            raise SourceError("invalid", f"{ref[:200]!r} {_OUTSIDE}.")
        try:
            found = Path(ref).resolve(strict=True)
        except (OSError, RuntimeError):
            raise SourceError("not_found", f"There is nothing at {ref[:200]!r}, or it cannot be read.") from None
        if not self.holds(found):
            raise SourceError("invalid", f"{ref[:200]!r} leads to a place that {_OUTSIDE}.")
        return found

    def holds(self, resolved: Path) -> bool:
        return any(resolved.is_relative_to(root.resolve()) for root in self._roots)

    def _listed(self, folder: Path, depth: int) -> "LocalFolder":
        left_out: list[str] = []
        files: dict[str, int] = {}
        for seen, (path, size, why) in enumerate(self._walk(folder, "", depth)):
            if seen == self._most:
                raise SourceError("invalid", f"More than {self._most:,} entries are in this folder: give one in it.")
            if why is None:
                files[path] = size
            elif why:
                left_out.append(f"{path[:80]!r} is left out: {why}")
        return LocalFolder(self, folder, files, tuple(left_out[:_TOLD]))

    def _walk(self, folder: Path, at: str, depth: int) -> Iterator[tuple[str, int, str | None]]:
        """Path, size, and why it is no file to read; empty: it is a folder."""
        try:
            entries = os.scandir(folder)
        except OSError as exc:
            if not at:
                raise SourceError("refused", f"The folder cannot be read: {exc.strerror}.") from None
            yield at, 0, f"{exc.strerror}"
            return
        with entries:
            for entry in entries:
                path = f"{at}{entry.name}"
                size, why = self._looked_at(entry)
                if not path.isprintable():
                    # Such as bytes that are no text: nothing could show them.
                    path, why = ascii(path)[1:-1], "its name has characters that cannot be shown"
                yield path, size, why
                if why == "" and depth:
                    yield from self._walk(folder / entry.name, f"{path}/", depth - 1)

    def _looked_at(self, entry: "os.DirEntry[str]") -> tuple[int, str | None]:
        try:
            if entry.is_symlink() and not self.holds(Path(entry.path).resolve(strict=True)):
                return 0, "the link leads out of the folders"
            found = entry.stat()
        except (OSError, RuntimeError):
            return 0, "the link leads nowhere"
        if stat.S_ISDIR(found.st_mode):
            return 0, ""
        return found.st_size, None if stat.S_ISREG(found.st_mode) else "it is no file"


class LocalFolder:
    commit: str | None = None
    counts: Mapping[str, int] = {}

    def __init__(self, roots: Roots, folder: Path, files: Mapping[str, int], notes: tuple[str, ...]) -> None:
        self._roots = roots
        self._folder = folder
        self.files = files
        self.notes = notes

    @asynccontextmanager
    async def open(self, path: str) -> AsyncIterator[Reader]:
        descriptor, size = await asyncio.to_thread(self._opened, path)
        try:
            yield _File(descriptor, size)
        finally:
            await asyncio.to_thread(os.close, descriptor)

    def _opened(self, path: str) -> tuple[int, int]:
        try:
            place = (self._folder / path).resolve(strict=True)
            # Without waiting for the other end, if a pipe has taken its place.
            descriptor = os.open(place, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
        except (OSError, RuntimeError) as exc:
            reason = getattr(exc, "strerror", None) or "it leads nowhere"
            raise SourceError("refused", f"{path[:200]!r} cannot be read: {reason}.") from None
        # Where it is, not where it was: a folder on the way may have become a link meanwhile.
        place = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        found = os.fstat(descriptor)
        if not self._roots.holds(place) or not stat.S_ISREG(found.st_mode):
            os.close(descriptor)
            raise SourceError("refused", f"{path[:200]!r} has become something else than a file below the roots.")
        return descriptor, found.st_size


class _File:
    def __init__(self, descriptor: int, size: int) -> None:
        self._descriptor = descriptor
        self.size = size

    async def read(self, offset: int, n: int) -> bytes:
        found = await asyncio.to_thread(self._read, offset, n)
        if len(found) != n:
            raise Unreadable(f"{self.size:,} bytes: it has become shorter while it was read")
        return found

    def _read(self, offset: int, n: int) -> bytes:
        try:
            parts = bytearray()
            while len(parts) < n and (part := os.pread(self._descriptor, n - len(parts), offset + len(parts))):
                parts += part
        except OSError as exc:
            raise SourceError("failed", f"A file cannot be read: {exc.strerror}.") from None
        return bytes(parts)
