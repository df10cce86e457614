"""Answers that are shown again for a moment, so that many who look at the same time cost one question."""

import asyncio
import logging
import math
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Container, Hashable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar

log = logging.getLogger(__name__)
T = TypeVar("T")
_NONE = object()


@dataclass
class _Answer:
    """`version`: of what it was made of, where that says how long it holds."""

    until: int = 0
    version: Any = None
    value: Any = None
    making: asyncio.Lock = field(default_factory=asyncio.Lock)


class Kept:
    """`most`: answers in memory; others are made each time. `timer`: seconds."""

    def __init__(self, most: int = 500, timer: Callable[[], float] = time.perf_counter) -> None:
        self._most = most
        self._timer = timer
        self._answers: dict[Hashable, _Answer] = {}
        self._versions: dict[Hashable, _Answer] = {}

    async def get(
        self,
        key: Hashable,
        now: int,
        milliseconds: int,
        make: Callable[[], Awaitable[T]],
        repeats: float = math.inf,
    ) -> T:
        """The answer, at most so old; who asks while it is made waits for it. `now`: Unix milliseconds.

        `repeats`: of what it took to make it: what is cheap is made anew sooner.
        """
        answer = self._answers.get(key)
        if answer is None:
            self._forget(now)
            answer = _Answer()
            if len(self._answers) < self._most:
                self._answers[key] = answer
        async with answer.making:
            if answer.until <= now:
                began = self._timer()
                answer.value = await make()
                took = (self._timer() - began) * 1000
                answer.until = now + round(min(milliseconds, repeats * took))
            found: T = answer.value
            return found

    async def made_of(self, key: Hashable, version: Any, make: Callable[[], Awaitable[T]]) -> T:
        """What was made of this version of something, or is made of it now. One version of each key is in memory."""
        answer = self._versions.setdefault(key, _Answer(version=_NONE))
        async with answer.making:
            if answer.version != version:
                answer.value = await make()
                answer.version = version
            found: T = answer.value
            return found

    def retain(self, kind: str, names: Container[str]) -> None:
        """Forget what `made_of` has for the keys (kind, name) of other names."""
        gone = [key for key in self._versions if isinstance(key, tuple) and key[0] == kind and key[1] not in names]
        for key in gone:
            del self._versions[key]

    def drop(self, key: Hashable) -> None:
        """Make it anew for the next one who asks."""
        self._answers.pop(key, None)

    def clear(self) -> None:
        self._answers.clear()

    def _forget(self, now: int) -> None:
        for key in [key for key, one in self._answers.items() if one.until <= now and not one.making.locked()]:
            del self._answers[key]


class Told:
    """An answer that a task makes once somebody asks: who asks waits a moment at most. `timer`: seconds."""

    def __init__(self, timer: Callable[[], float] = time.monotonic) -> None:
        self._timer = timer
        self._answer: tuple[float, Any] | None = None
        self._asked, self._made = asyncio.Event(), asyncio.Event()

    @property
    def idle(self) -> bool:
        """Whether nobody has asked yet."""
        return self._answer is None and not self._asked.is_set()

    async def get(self, fresh: float, patience: float) -> tuple[float, Any] | None:
        """Its age in seconds, and the last answer; None: there was none. One older than `fresh` is waited for."""
        if self._answer is None or self._timer() - self._answer[0] > fresh:
            made = self._made
            self._asked.set()
            with suppress(TimeoutError):
                await asyncio.wait_for(made.wait(), patience)
        return None if self._answer is None else (self._timer() - self._answer[0], self._answer[1])

    async def keep(self, make: Callable[[], Awaitable[Any]]) -> None:
        """Answer who asks, until it is cancelled. What `make` raises is logged, and leaves the last answer."""
        while True:
            await self._asked.wait()
            self._asked.clear()
            try:
                self._answer = self._timer(), await make()
            except Exception:
                log.exception("nothing new is known")
            made, self._made = self._made, asyncio.Event()
            made.set()


class Pieces:
    """Parts of answers, each of a version of what it was made of; the last used ones, of `most` entries together."""

    def __init__(self, most: int = 60_000) -> None:
        self._most = most
        self._size = 0
        self._found: OrderedDict[Hashable, tuple[Any, Any, int]] = OrderedDict()

    def get(self, key: Hashable, version: Any) -> Any:
        """None: it is not there, or of another version."""
        found = self._found.get(key)
        if found is None or found[0] != version:
            return None
        self._found.move_to_end(key)
        return found[1]

    def put(self, key: Hashable, version: Any, value: Any, size: int) -> None:
        if (old := self._found.pop(key, None)) is not None:
            self._size -= old[2]
        self._found[key] = version, value, size
        self._size += size
        while self._size > self._most:
            self._size -= self._found.popitem(last=False)[1][2]
