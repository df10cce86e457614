"""Documents of the registry beside its catalogue: polled with conditional GETs, and kept in a file for the next start.

A registry that waits (`Preference-Applied`) is asked again at once, so that a change arrives within a second; another
one every REGISTRY_REFRESH seconds.
"""

import asyncio
import json
import logging
import os
import random
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import BinaryIO, NamedTuple, Protocol

import httpx

from inference_api.pace import back_off, spread
from inference_api.routing.causes import cause_of
from inference_api.routing.registry import (
    CHUNK,
    FIRST_BACKOFF,
    LONGEST_BACKOFF,
    Pause,
    RegistryError,
    etag_of,
    read_body,
)
from inference_api.threads import in_thread

logger = logging.getLogger(__name__)

# Seconds that the registry is asked to wait for a change
_WAIT = 25
# Seconds between two polls that changed nothing: a registry that is being stopped answers at once.
_SHORTEST = 1.0
# Bytes of the first line of the file
_MAX_HEAD = 4096


class Polled(NamedTuple):
    """`content`: in chunks; None if it has not changed. `waits`: the registry waits for changes."""

    content: Sequence[bytes] | None
    waits: bool
    etag: str | None


class Follower(Protocol):
    """What is made of the answers. All methods run on the event loop."""

    async def take(self, content: Sequence[bytes]) -> bool:
        """Use new content. False: not yet, ask for it once more. Raises ValueError if it is not valid."""
        ...

    def confirm(self) -> None:
        """The registry has said that the content is the newest one."""
        ...

    def failed(self, error: RegistryError) -> None: ...


class Snapshot:
    """Polls one document at `path`. `refresh`: seconds between two polls, +-20 %; less after a failure.

    `waits`: whether to ask for long polls. Seconds, beside the wait: `late` until an answer begins, or goes on;
    `timeout` for the whole of it. `clock` is monotonic seconds, `rand` gives [0, 1).
    """

    def __init__(
        self,
        client: httpx.AsyncClient,
        path: str,
        follower: Follower,
        refresh: float,
        max_bytes: int,
        waits: bool = True,
        late: float = 10.0,
        timeout: float = 40.0,
        clock: Callable[[], float] = time.monotonic,
        rand: Callable[[], float] = random.random,
    ) -> None:
        self._client = client
        self._path = path
        self._follower = follower
        self._refresh = refresh
        self._max_bytes = max_bytes
        self._waits = waits
        self._late, self._timeout = late, timeout
        self._clock = clock
        self._rand = rand
        self.etag: str | None = None
        self._failed_in_a_row = 0
        self._first: asyncio.Task[float] | None = None
        self._between = Pause()
        # The question under way; whether it is a long poll without an answer yet; whether the registry waits, which is
        # assumed until it was asked to.
        self._asking: asyncio.Task[Polled] | None = None
        self._is_waiting = False
        self._waited = waits

    def poll_now(self) -> None:
        """Poll without further wait: the registry has another document. Ends a long poll that has no answer yet."""
        self._between.end()
        if self._is_waiting and self._asking is not None:
            self._asking.cancel()

    async def start(self, patience: float) -> None:
        """Poll once, and wait for the answer at most `patience` seconds."""
        self._first = asyncio.create_task(self._poll())
        with suppress(TimeoutError):
            async with asyncio.timeout(patience):
                await asyncio.shield(self._first)

    async def run(self) -> None:
        """Poll until cancelled."""
        try:
            pause = 0.0 if self._first is None else await self._first
            while True:
                pause = await self._poll(at_once=await self._between.wait(pause))
        finally:
            if self._first is not None:
                self._first.cancel()

    async def _poll(self, at_once: bool = False) -> float:
        """Poll once. Returns the seconds until the next poll. `at_once`: not a long poll."""
        began = self._clock()
        was_asked = self.etag is not None and self._waits and not at_once
        self._asking = asking = asyncio.create_task(self._get(_WAIT if was_asked else 0))
        try:
            try:
                answer = await asking
            except asyncio.CancelledError:
                task = asyncio.current_task()
                if not asking.cancelled() or task is None or task.cancelling():
                    raise
                # By `poll_now`
                return 0.0
            try:
                accepted = answer.content is None or await self._follower.take(answer.content)
            except ValueError as exc:
                raise RegistryError("garbage", str(exc)) from None
        except RegistryError as exc:
            self._failed_in_a_row += 1
            self._follower.failed(exc)
            first = min(FIRST_BACKOFF, self._refresh)
            return back_off(self._failed_in_a_row, first, LONGEST_BACKOFF, self._rand())
        self._failed_in_a_row = 0
        if not accepted:
            return spread(self._refresh, self._rand())
        if answer.content is not None:
            self.etag = answer.etag
        self._follower.confirm()
        if not answer.waits:
            return spread(self._refresh, self._rand())
        if not was_asked:
            return spread(min(_SHORTEST, self._refresh), self._rand())
        return 0.0 if self._clock() - began >= _SHORTEST else spread(_SHORTEST, self._rand())

    async def _get(self, wait: int) -> Polled:
        # Not compressed: a few KB could expand to more than the memory.
        headers = {"accept-encoding": "identity"}
        if self.etag is not None:
            headers["if-none-match"] = self.etag
        if wait:
            headers["prefer"] = f"wait={wait}"
        late, first = self._late, wait + self._late
        timeout = {"connect": late, "read": first, "first_byte": first, "idle": late, "write": late, "pool": late}
        asked = self._client.stream(
            "GET", self._path, headers=headers, follow_redirects=False, extensions={"timeout": timeout}
        )
        self._is_waiting = wait > 0
        try:
            async with asyncio.timeout(wait + self._timeout), asked as response:
                self._is_waiting = False
                content = await read_body(response, self._max_bytes)
        except (TimeoutError, httpx.TimeoutException) as exc:
            raise RegistryError("timeout", "it did not answer in time") from exc
        except (httpx.HTTPError, httpx.InvalidURL) as exc:
            raise RegistryError("connect", f"it cannot be reached ({cause_of(exc)})") from exc
        finally:
            self._is_waiting = False
        waits = "preference-applied" in response.headers
        if response.status_code == 304 and self.etag is not None:
            return Polled(None, self._may_be_asked(waits, wait, self.etag), self.etag)
        if response.status_code != 200:
            raise RegistryError("status", f"it answered with the status {response.status_code}")
        etag = etag_of(response)
        return Polled(content, self._may_be_asked(waits, wait, etag), etag)

    def _may_be_asked(self, waits: bool, wait: int, etag: str | None) -> bool:
        """Whether the next question may be a long poll. `waits`: the answer says so; `wait`: it was asked to."""
        if waits or wait:
            self._waited = waits
        # One that was not asked to need not say it.
        return self._waited and (waits or etag is not None)


class SnapshotFile:
    """A file with the last good content of each document, readable by its owner only, and replaced as a whole.

    Its first line has the sizes of the contents, which follow in that order. All methods block.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()

    def load(self, name: str) -> tuple[Sequence[bytes], float]:
        """The content of a document, and the time of the file in Unix seconds. Raises OSError or ValueError."""
        found = self._read().get(name)
        if found is None:
            raise ValueError(f"it has no {name}")
        return found, self._path.stat().st_mtime

    def save(self, name: str, content: Sequence[bytes], is_dated: bool = True) -> None:
        """Replace the content of one document; without `is_dated` the file keeps its time. Raises OSError."""
        with self._lock:
            parts: Mapping[str, Sequence[bytes]] = {}
            written = None
            with suppress(OSError, ValueError):
                parts = self._read()
                written = None if is_dated else self._path.stat()
            self._write({**parts, name: content}, written)

    def touch(self) -> None:
        """Note that the contents are still the newest. Raises OSError."""
        os.utime(self._path)

    def _read(self) -> dict[str, list[bytes]]:
        with self._path.open("rb") as file:
            sizes = json.loads(file.readline(_MAX_HEAD))
            if not isinstance(sizes, dict) or not all(isinstance(size, int) for size in sizes.values()):
                raise ValueError("its first line does not have the sizes of its parts")
            parts = {name: list(_chunks(file, size)) for name, size in sizes.items()}
            if any(_size(part) != sizes[name] for name, part in parts.items()) or file.read(1):
                raise ValueError("its parts do not have the sizes of its first line")
        return parts

    def _write(self, parts: Mapping[str, Sequence[bytes]], written: os.stat_result | None) -> None:
        # mkstemp makes it readable by the owner only.
        number, temporary = tempfile.mkstemp(prefix=f".{self._path.name}.", dir=self._path.parent)
        try:
            with open(number, "wb") as file:
                file.write(json.dumps({name: _size(content) for name, content in parts.items()}).encode() + b"\n")
                for content in parts.values():
                    file.writelines(content)
                file.flush()
                os.fsync(file.fileno())
            if written is not None:
                os.utime(temporary, ns=(written.st_atime_ns, written.st_mtime_ns))
            os.replace(temporary, self._path)
        except BaseException:
            with suppress(OSError):
                os.unlink(temporary)
            raise


class Keeper:
    """Writes the newest content of one document into a SnapshotFile. A disk that hangs delays nothing else.

    `is_dated`: the time of the file is that of the last confirmation of this document.
    """

    def __init__(self, file: SnapshotFile, name: str, is_dated: bool = True) -> None:
        self.file = file
        self._name = name
        self._is_dated = is_dated
        # Content; () for what is there already, None for nothing
        self._unsaved: Sequence[bytes] | None = None
        self._to_save = asyncio.Event()

    def keep(self, content: Sequence[bytes]) -> None:
        """Write this at the next confirmation."""
        self._unsaved = content

    def confirm(self) -> None:
        """The newest content is still the registry's."""
        if self._unsaved is None and self._is_dated:
            self._unsaved = ()
        if self._unsaved is not None:
            self._to_save.set()

    async def load(self) -> tuple[Sequence[bytes], float]:
        """As SnapshotFile.load, in a thread."""
        return await in_thread(partial(self.file.load, self._name), self._name)

    async def run(self) -> None:
        """Write until cancelled."""
        failed = False
        while True:
            await self._to_save.wait()
            self._to_save.clear()
            content, self._unsaved = self._unsaved, None
            if content is None:
                continue
            call = partial(self.file.save, self._name, content, self._is_dated) if content else self.file.touch
            try:
                await in_thread(call, self._name)
                failed = False
            except OSError as exc:
                if not failed:
                    logger.warning("INFERENCE_API_POLICY_CACHE cannot be written: %s", exc.strerror or exc)
                failed = True
                # Tried again at the next confirmation.
                self._unsaved = self._unsaved or content


def _size(content: Sequence[bytes]) -> int:
    return sum(map(len, content))


def _chunks(file: BinaryIO, size: int) -> Iterator[bytes]:
    while size > 0 and (chunk := file.read(min(size, CHUNK))):
        size -= len(chunk)
        yield chunk
