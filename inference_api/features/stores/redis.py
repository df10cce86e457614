"""Counters in Redis or Valkey, shared by all routers; the extra `redis`.

One task owns the one connection. Every 200 ms it sends what was counted since, and reads the sums; requests decide by
what they find in memory. Only a request with a precise limit waits, for a future, and one call carries all that wait.
A request that is cancelled drops its future, never the connection.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from hashlib import sha1
from itertools import islice
from secrets import token_hex
from typing import Any, NamedTuple

from redis.asyncio.connection import AbstractConnection, ConnectionPool
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import (
    AuthenticationError,
    ConnectionError,
    NoScriptError,
    RedisError,
    ResponseError,
    TimeoutError,
)

from inference_api.features.limiting.plans import Plan, StreamLimit, Wants, WindowLimit
from inference_api.features.stores.memory import COUNTERS, Counters, unix_ms
from inference_api.features.stores.script import SCRIPT
from inference_api.features.stores.shared import SharedStreams, SharedWindow

logger = logging.getLogger(__name__)

PREFIX = "{ia}:1:"
_SHA = sha1(SCRIPT.encode(), usedforsecurity=False).hexdigest()
# Windows of one call: each takes Redis a few microseconds, and this process, too.
_CHUNK = 500
# Rounds in which a window that is not asked for is still read
_ROUNDS = 5
# Milliseconds after which another router's counts are not counted
_ALIVE = 10_000
_FAILURES_TO_LEAVE = 3
# The script's answers to a request that waits
_GRANTED, _TOO_LATE = 1, 2

Limits = Sequence[WindowLimit | StreamLimit]


class SyncTiming(NamedTuple):
    """Seconds: between two syncs, and between two tries while Redis is away; for a connection, for an answer, and until
    a request that waits is answered otherwise.
    """

    every: float = 0.2
    retry: float = 1.0
    connect: float = 0.2
    answer: float = 0.05
    patience: float = 0.025


class Waiting(NamedTuple):
    """A request with precise limits. Its future gets whether it is let through, None: no answer in time."""

    limits: Limits
    wants: Wants
    granted: "asyncio.Future[bool | None]"


class _Sent(NamedTuple):
    """One call, for its answer: each window with its start and what was added; streams.

    `id`: "" if nothing was added.
    """

    windows: Sequence[tuple[SharedWindow, int, tuple[int, int]]] = ()
    streams: Sequence[SharedStreams] = ()
    id: str = ""


_TIMING = SyncTiming()

# Requests that wait, with the starts of the windows of their limits
_Asked = list[tuple[Waiting, list[int]]]


class RedisStore:
    """A Store that several routers share. `instance`: the name of this router. `clock`: Unix time in milliseconds.

    `routers`: how many there are, as last known, 0: never known. `is_away`: Redis has not answered for several times in
    a row. `failures`: calls that failed, by reason. Raises ValueError for a URL that is none.
    """

    def __init__(
        self,
        url: str,
        instance: str,
        size: int = COUNTERS,
        clock: Callable[[], int] = unix_ms,
        timing: SyncTiming = _TIMING,
    ) -> None:
        self._connection = _connection(url, timing)
        self._instance = instance
        self._clock = clock
        self._timing = timing
        self._windows: Counters[SharedWindow] = Counters(size)
        self._streams: Counters[SharedStreams] = Counters(size)
        self._size = size
        # Redis' clock minus this one
        self._offset = 0
        self._touched: set[Plan] = set()
        # To read and send; of windows the rounds that are left
        self._live: dict[SharedWindow, int] = {}
        self._live_streams: dict[SharedStreams, int] = {}
        self._waiting: list[Waiting] = []
        # Sent without an answer: sent again as it is, before anything else is added
        self._unanswered: _Sent | None = None
        self._boot, self._calls = token_hex(4), 0
        self._wake = asyncio.Event()
        self._uses_sha = True
        self._failed = 0
        # Milliseconds after which Redis does not grant a request that waits
        self._late = int(2000 * timing.answer)
        self.routers = 0
        self.is_away = False
        self.failures = {"connect": 0, "timeout": 0, "error": 0}
        self._changed: Callable[[], None] = lambda: None
        # The plan of a request is noted when it takes, and when it is settled.
        self.touch = self._touched.add

    def now(self) -> int:
        return self._clock() + self._offset

    def on_evict(self, forget: Callable[[], None]) -> None:
        """Call `forget` after counters have gone."""
        self._windows.on_evict = self._streams.on_evict = forget

    def on_change(self, changed: Callable[[], None]) -> None:
        """Call `changed` when Redis is away, and when it is back."""
        self._changed = changed

    def window(self, name: str, per: int) -> SharedWindow:
        found = self._windows.get(name, lambda: SharedWindow(name, per))
        if self.is_away:
            found.part_with()
        return found

    def streams(self, name: str) -> SharedStreams:
        found = self._streams.get(name, lambda: SharedStreams(name))
        if self.is_away:
            found.others = 0
        return found

    async def ask(self, limits: Limits, wants: Wants) -> bool | None:
        """Take from precise limits, from all or none: whether it was done. None: no answer in time."""
        loop = asyncio.get_running_loop()
        granted: asyncio.Future[bool | None] = loop.create_future()
        self._waiting.append(Waiting(limits, wants, granted))
        self._wake.set()
        timer = loop.call_later(self._timing.patience, _give_up, granted)
        try:
            return await granted
        except asyncio.CancelledError:
            if granted.done() and not granted.cancelled() and granted.result():
                # Granted in the same moment
                self._return(limits, wants)
            raise
        finally:
            timer.cancel()

    async def run(self) -> None:
        """Sync until cancelled; then a last time."""
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        due = loop.time()
        try:
            # `asyncio.wait_for`, which redis-py uses, may swallow the cancellation in Python 3.11.
            while task is None or not task.cancelling():
                await self._sleep(due - loop.time())
                if loop.time() >= due:
                    due = loop.time() + (self._timing.retry if self.is_away else self._timing.every)
                    await self._attempt(self.sync)
                elif self._can_ask():
                    await self._attempt(self._answer)
        finally:
            with suppress(RedisError, OSError):
                await self.sync()
            await self.aclose()

    async def aclose(self) -> None:
        await self._connection.disconnect()

    async def _sleep(self, seconds: float) -> None:
        if seconds > 0 and not self._can_ask():
            self._wake.clear()
            with suppress(asyncio.TimeoutError):
                async with asyncio.timeout(seconds):
                    await self._wake.wait()

    def _can_ask(self) -> bool:
        """Whether requests wait, and an answer may be in time for them."""
        return bool(self._waiting and self.routers) and not self.is_away

    async def _attempt(self, call: Callable[[], Awaitable[None]]) -> None:
        try:
            await call()
        except (RedisError, OSError) as exc:
            await self._has_failed(exc)
        else:
            self._has_answered()

    async def _answer(self) -> None:
        """Ask for those that wait, and nothing else."""
        await self._call(_Sent())

    def _touched_to_live(self) -> None:
        live, streams = self._live, self._live_streams
        while self._touched:
            plan = self._touched.pop()
            for limit in plan.windows:
                live[limit.window] = _ROUNDS  # type: ignore[index]
            for held in plan.all_streams:
                streams[held.streams] = _ROUNDS  # type: ignore[index]
        for excess in list(islice(live, max(len(live) - self._size, 0))):
            del live[excess]

    async def sync(self) -> None:
        """Send and read all live counters, in chunks, between which requests and other tasks run.

        Raises RedisError or OSError.
        """
        self._touched_to_live()
        if self._unanswered is not None:
            await self._call(self._unanswered)
        windows, streams = list(self._live), list(self._live_streams)
        await self._call(self._take(windows[:_CHUNK], streams))
        for start in range(_CHUNK, len(windows), _CHUNK):
            await self._call(self._take(windows[start : start + _CHUNK]))
        for counter in streams:
            if counter.own:
                self._live_streams[counter] = _ROUNDS
            elif not _age(self._live_streams, counter):
                # It is not read any more: an old count must not refuse anybody.
                counter.others = 0

    def _take(self, windows: Iterable[SharedWindow], streams: Sequence[SharedStreams] = ()) -> _Sent:
        now, taken, adds = self.now(), [], False
        for window in windows:
            window.roll(now)
            added = window.unsent()
            taken.append((window, window.start, added))
            if any(added):
                adds = True
            else:
                _age(self._live, window)
        self._calls += 1
        return _Sent(taken, streams, f"{self._boot}{self._calls}" if adds else "")

    async def _call(self, sent: _Sent) -> None:
        """One call of the script, which also carries all requests that wait. Raises RedisError or OSError."""
        # Whoever has given up, or left, is not asked for.
        waiting = [one for one in self._waiting if not one.granted.done()]
        self._waiting.clear()
        asked: _Asked = []
        if self.routers:
            now = self.now()
            asked = [(one, [_start_of(limit, now) for limit in one.limits]) for one in waiting]
        else:
            # The clock of Redis is not known yet.
            self._waiting += waiting
        keys, args = self._request(sent, asked)
        began = self._clock()
        try:
            answer = await self._run_script(keys, args)
        except BaseException:
            if sent.id:
                self._unanswered = sent
            for one, _ in asked:
                _give_up(one.granted)
            raise
        if sent.id:
            self._unanswered = None
        self._offset = int(answer[0]) - (began + self._clock()) // 2
        self.routers = answer[1]
        self._learn(sent, asked, iter(answer[2:]))

    def _request(self, sent: _Sent, asked: _Asked) -> tuple[list[str], list[str | int]]:
        keys: list[str] = [f"{PREFIX}routers"]
        args: list[str | int] = [self._instance, _ALIVE, sent.id, self.now() + self._late, len(sent.windows)]
        for window, start, added in sent.windows:
            keys += _window_keys(window, start)
            args += (*added, _ttl(window))
        args.append(len(sent.streams))
        for counter in sent.streams:
            keys.append(f"{PREFIX}s:{counter.name}")
            args.append(counter.own)
        args.append(len(asked))
        for one, starts in asked:
            args.append(len(one.limits))
            for limit, start in zip(one.limits, starts, strict=True):
                if isinstance(limit, StreamLimit):
                    keys.append(f"{PREFIX}s:{limit.streams.name}")
                    args += ("s", limit.amount, limit.streams.own)
                else:
                    keys += _window_keys(limit.window, start)
                    args += ("w", limit.wanted(one.wants), limit.amount, limit.per, start, _ttl(limit.window))
        return keys, args

    async def _run_script(self, keys: list[str], args: list[str | int]) -> list[int]:
        connection = self._connection
        if not connection.is_connected:
            await connection.connect()  # type: ignore[no-untyped-call]
        try:
            if self._uses_sha:
                await connection.send_command("EVALSHA", _SHA, len(keys), *keys, *args)
                answer: list[int] = await connection.read_response()
                return answer
        except NoScriptError:
            # A new Redis, or one that was restarted: EVAL stores the script there.
            pass
        except ResponseError:
            # Some proxies know EVAL only. If that is refused, too, Redis cannot be used.
            self._uses_sha = False
        await connection.send_command("EVAL", SCRIPT, len(keys), *keys, *args)
        answer = await connection.read_response()
        return answer

    def _learn(self, sent: _Sent, asked: _Asked, answer: Iterator[int]) -> None:
        for window, start, added in sent.windows:
            window.learn(start, added, (next(answer), next(answer)))
        for held in sent.streams:
            held.others = next(answer)
        for one, starts in asked:
            code, in_time = next(answer), not one.granted.done()
            for limit, start in zip(one.limits, starts, strict=True):
                counts = (next(answer), next(answer))
                if isinstance(limit, StreamLimit):
                    limit.streams.others = counts[1]
                    self._live_streams[limit.streams] = _ROUNDS  # type: ignore[index]
                    if code == _GRANTED and in_time:
                        limit.streams.own += 1
                else:
                    more = limit.wanted(one.wants) if code == _GRANTED else 0
                    self._learn_precise(limit, start, more, counts, in_time)
            if in_time:
                one.granted.set_result(None if code == _TOO_LATE else code == _GRANTED)

    def _learn_precise(
        self, limit: WindowLimit, start: int, added: int, counts: tuple[int, int], in_time: bool
    ) -> None:
        """`added` came on top of what this router had counted, and goes back if nobody waits for it any more."""
        window = limit.window
        assert isinstance(window, SharedWindow)
        window.roll(start)
        if window.start == start:
            window.current += added
        elif window.start == start + window.per:
            window.previous += added
        window.learn(start, (added, 0), counts)
        if not in_time:
            window.give_back(added, start)
        self._live[window] = _ROUNDS

    def _return(self, limits: Limits, wants: Wants) -> None:
        """Give back what was granted."""
        for limit in limits:
            if isinstance(limit, StreamLimit):
                limit.streams.own -= 1
            else:
                limit.window.give_back(limit.wanted(wants), self.now())
                self._live[limit.window] = _ROUNDS  # type: ignore[index]

    async def _has_failed(self, exc: BaseException) -> None:
        self.failures[_reason(exc)] += 1
        self._failed += 1
        # A new connection may lead to another Redis.
        self._uses_sha = True
        await self._connection.disconnect(nowait=True)
        if self._failed == _FAILURES_TO_LEAVE:
            self.is_away = True
            logger.warning("Redis cannot be used for limits", extra={"fields": {"reason": _reason(exc)}})
            self._changed()
        if self.is_away:
            for window in [each for each in self._live if self.now() >= each.empty_at()]:
                # Nobody needs to know any more.
                del self._live[window]

    def _has_answered(self) -> None:
        self._failed = 0
        if self.is_away:
            self.is_away = False
            logger.info("Redis can be used for limits again", extra={"fields": {"routers": self.routers}})
            self._changed()


def _connection(url: str, timing: SyncTiming) -> AbstractConnection:
    """Not connected yet. RESP2, as a proxy may know no other; no retries, as the task tries again."""
    pool: Any = ConnectionPool.from_url(
        url,
        socket_timeout=timing.answer,
        socket_connect_timeout=timing.connect,
        retry=Retry(NoBackoff(), 0),
        protocol=2,
        driver_info=None,
    )
    made: AbstractConnection = pool.make_connection()
    return made


def _window_keys(window: SharedWindow | Any, start: int) -> tuple[str, str]:
    number = start // window.per
    return f"{PREFIX}w:{window.name}:{number}", f"{PREFIX}w:{window.name}:{number - 1}"


def _ttl(window: Any) -> int:
    seconds: int = 2 * window.per // 1000 + 10
    return seconds


def _start_of(limit: WindowLimit | StreamLimit, now: int) -> int:
    if isinstance(limit, StreamLimit):
        return 0
    limit.window.roll(now)
    return limit.window.start


def _age(live: dict[Any, int], counter: Any) -> int:
    """Count a round in which it was not used. Returns those that are left."""
    left = live.get(counter, 1) - 1
    if left:
        live[counter] = left
    else:
        live.pop(counter, None)
    return left


def _give_up(granted: "asyncio.Future[bool | None]") -> None:
    if not granted.done():
        granted.set_result(None)


def _reason(exc: BaseException) -> str:
    if isinstance(exc, TimeoutError):
        return "timeout"
    if isinstance(exc, OSError) or (isinstance(exc, ConnectionError) and not isinstance(exc, AuthenticationError)):
        return "connect"
    return "error"
