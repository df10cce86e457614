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
from pathlib import Path
from typing import BinaryIO, NamedTuple, Protocol

import httpx

from inference_api.pace import back_off, spread
from inference_api.routing.causes import cause_of
from inference_api.routing.registry import CHUNK, FIRST_BACKOFF, LONGEST_BACKOFF, RegistryError, etag_of, read_body

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
                await asyncio.sleep(pause)
                pause = await self._poll()
        finally:
            if self._first is not None:
                self._first.cancel()

    async def _poll(self) -> float:
        """Poll once. Returns the seconds until the next poll."""
        began = self._clock()
        is_first = self.etag is None
        try:
            answer = await self._get()
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
            # The first time it was not asked to wait: the answer does not say whether it would.
            pause = min(_SHORTEST, self._refresh) if is_first and self._waits and self.etag else self._refresh
            return spread(pause, self._rand())
        return 0.0 if self._clock() - began >= _SHORTEST else spread(_SHORTEST, self._rand())

    async def _get(self) -> Polled:
        # Not compressed: a few KB could expand to more than the memory.
        headers = {"accept-encoding": "identity"}
        wait = 0
        if self.etag is not None:
            headers["if-none-match"] = self.etag
            if self._waits:
                headers["prefer"] = f"wait={_WAIT}"
                wait = _WAIT
        late, first = self._late, wait + self._late
        timeout = {"connect": late, "read": first, "first_byte": first, "idle": late, "write": late, "pool": late}
        asked = self._client.stream(
            "GET", self._path, headers=headers, follow_redirects=False, extensions={"timeout": timeout}
        )
        try:
            async with asyncio.timeout(wait + self._timeout), asked as response:
                content = await read_body(response, self._max_bytes)
        except (TimeoutError, httpx.TimeoutException) as exc:
            raise RegistryError("timeout", "it did not answer in time") from exc
        except (httpx.HTTPError, httpx.InvalidURL) as exc:
            raise RegistryError("connect", f"it cannot be reached ({cause_of(exc)})") from exc
        waits = "preference-applied" in response.headers
        if response.status_code == 304 and self.etag is not None:
            return Polled(None, waits, self.etag)
        if response.status_code != 200:
            raise RegistryError("status", f"it answered with the status {response.status_code}")
        return Polled(content, waits, etag_of(response))


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

    def save(self, name: str, content: Sequence[bytes]) -> None:
        """Replace the content of one document. Raises OSError."""
        with self._lock:
            parts: Mapping[str, Sequence[bytes]] = {}
            with suppress(OSError, ValueError):
                parts = self._read()
            self._write({**parts, name: content})

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

    def _write(self, parts: Mapping[str, Sequence[bytes]]) -> None:
        # mkstemp makes it readable by the owner only.
        number, temporary = tempfile.mkstemp(prefix=f".{self._path.name}.", dir=self._path.parent)
        try:
            with open(number, "wb") as file:
                file.write(json.dumps({name: _size(content) for name, content in parts.items()}).encode() + b"\n")
                for content in parts.values():
                    file.writelines(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, self._path)
        except BaseException:
            with suppress(OSError):
                os.unlink(temporary)
            raise


def _size(content: Sequence[bytes]) -> int:
    return sum(map(len, content))


def _chunks(file: BinaryIO, size: int) -> Iterator[bytes]:
    while size > 0 and (chunk := file.read(min(size, CHUNK))):
        size -= len(chunk)
        yield chunk
