"""Delivers usage records to the control plane: in batches, each removed after its 200 only; to the spool meanwhile.

One task does it all, so that there is one batch on its way and one call to the disk at a time. `put` is the only thing
that a request does.
"""

import asyncio
import gzip
import logging
import random
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import NamedTuple, TypeVar

import httpx
import orjson

from inference_api.errors import printable
from inference_api.features.delivery.outbox import BATCH, BATCH_BYTES, Outbox, Verdict, verdict
from inference_api.features.delivery.spool import Appended, Spool
from inference_api.pace import back_off
from inference_api.routing.causes import cause_of
from inference_api.threads import in_thread

logger = logging.getLogger(__name__)

T = TypeVar("T")
# Seconds until a batch goes that is not full
_AGE = 1.0
# Seconds for one batch; and between two looks for the files of other processes that ended.
_TIMEOUT = 10.0
# Seconds between two looks at the queue while a batch is on its way
_LOOK = 0.1
_ADOPT_EVERY = 30.0
# Seconds until the next try after failures in a row: any time up to 1, 2, 4 ... 30
_FIRST_PAUSE, _LONGEST_PAUSE = 1.0, 30.0
# Seconds beyond the end of the drain for a batch that is on its way
_GRACE = 1.0
_NEVER = sys.maxsize
# Bytes of an answer
_MAX_ANSWER = 1 << 20
# The fastest of gzip's levels: a record has the same keys as the one before it.
_LEVEL = 1


class Answer(NamedTuple):
    """Of the control plane to a batch; status 0: there was none, and `reason` says why."""

    status: int
    reason: str = ""
    refused: int = 0


Post = Callable[[bytes], Awaitable[Answer]]


class Delivery:
    """Takes records, each an encoded JSON object, and brings them to `post`.

    `spool`: None without one. `seconds_left` of the process, once it stops. `clock`: monotonic seconds. `on_delivered`
    gets each batch that the control plane has taken.
    """

    def __init__(
        self,
        post: Post,
        spool: Spool | None = None,
        outbox: Outbox | None = None,
        seconds_left: Callable[[], float] = lambda: 0.0,
        clock: Callable[[], float] = time.monotonic,
        rand: Callable[[], float] = random.random,
        age: float = _AGE,
        adopt_every: float = _ADOPT_EVERY,
        on_delivered: Callable[[list[bytes]], None] = lambda lines: None,
    ) -> None:
        # Configuration
        self._post = post
        self.spool = spool
        self.outbox = Outbox() if outbox is None else outbox
        self._seconds_left = seconds_left
        self._clock = clock
        self._rand = rand
        self._age = age
        self._adopt_every = adopt_every
        self._on_delivered = on_delivered
        # What became of records; shown from the start
        self.results: Counter[str] = Counter(delivered=0, spooled=0)
        self.dropped: Counter[str] = Counter(queue_full=0, spool_full=0, spool_error=0, refused=0)
        # Records of the next batch: fewer after one that was refused as a whole
        self._most = BATCH
        self._failures = 0
        self._try_at = self._spill_at = 0.0
        self._sent_at = self._adopted_at = float("-inf")
        self.spool_broken = False
        self._logged: set[str] = set()
        self._wake = asyncio.Event()
        self._stopping = False
        # At the end: all that could be sent was.
        self.flushed = asyncio.Event()
        # `put` wakes the task at so many waiting records.
        self._wake_at = BATCH

    def put(self, line: str) -> None:
        """Take a record. Never waits; the newest goes if there is no room."""
        outbox = self.outbox
        if not outbox.put(line.encode()):
            self.dropped["spool_error" if self.spool_broken else "queue_full"] += 1
        elif outbox.waiting >= self._wake_at:
            self._wake.set()

    async def run(self) -> None:
        """Deliver until it is cancelled; then what is left, as long as the process has time."""
        work = asyncio.create_task(self._work())
        try:
            await asyncio.shield(work)
        except asyncio.CancelledError:
            self._stopping = True
            self._wake.set()
            await work
            raise

    def close(self) -> None:
        """At the end of the process: what is still here goes to the spool. Blocks."""
        lines = self.outbox.take(len(self.outbox))
        left = len(lines)
        if self.spool is not None:
            left -= self._spooled(self.spool.append(lines))
            self.spool.close()
        self.outbox.settle(len(lines))
        if left:
            logger.error("usage records were lost at the end", extra={"fields": {"records": left}})

    # The task

    @property
    def away(self) -> bool:
        """Whether the last try failed for a reason that is not the batch's."""
        return self._failures > 0

    async def _work(self) -> None:
        while not self._stopping:
            try:
                await self._adopt()
                await self._wait()
                await self._deliver()
                # Whatever it found to do, requests have their turn.
                await asyncio.sleep(0)
            except Exception:
                logger.exception("the delivery of usage records failed")
                await asyncio.sleep(self._age)
        try:
            await self._flush()
        except Exception:
            logger.exception("the delivery of usage records failed")
        self.flushed.set()

    async def _wait(self) -> None:
        """Wait for what can be done: a full batch, a queue that is half full, the next try, the end; at most `age`."""
        now, half, seconds = self._clock(), self.outbox.capacity // 2, self._age
        self._wake_at = _NEVER
        if self.spool is not None:
            if now >= self._spill_at:
                self._wake_at = half
            else:
                seconds = min(seconds, self._spill_at - now)
        if now >= self._try_at:
            self._wake_at = min(BATCH, half)
        else:
            seconds = min(seconds, self._try_at - now)
        if not self._stopping and self.outbox.waiting < self._wake_at:
            self._wake.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await self._wake.wait()
        self._wake_at = _NEVER

    async def _deliver(self) -> None:
        """Send what is due, and spool what must not wait here."""
        while True:
            if self.away or self._is_half_full:
                await self._spill()
            if self._clock() < self._try_at or not await self._send_one():
                return

    async def _send_one(self) -> bool:
        """Send a batch: of the queue if one is due, else of the spool. False: there is none, or it failed."""
        waiting = self.outbox.waiting
        is_due = waiting >= min(self._most, self.outbox.capacity // 2) or (
            waiting > 0 and self._clock() >= self._sent_at + self._age
        )
        if (is_due or self._stopping) and (lines := self.outbox.take(self._most, BATCH_BYTES)):
            return await self._send_queued(lines)
        return await self._send_spooled()

    async def _send_queued(self, lines: list[bytes]) -> bool:
        gone = 0
        try:
            gone = await self._send(lines)
        finally:
            self.outbox.settle(gone)
            if gone < len(lines):
                self.outbox.give_back(lines[gone:])
        self._sent_at = self._clock()
        return not self.away

    async def _send_spooled(self) -> bool:
        spool, most = self.spool, self._most
        if spool is None or not spool.size:
            return False
        lines: list[bytes] = []
        try:
            lines = await _on_disk(lambda: spool.read(most))
            if lines and await self._send(lines):
                await _on_disk(spool.settle)
        except OSError as exc:
            self._complain("the spool of usage records cannot be read", exc)
            self.dropped["spool_error"] += await _on_disk(spool.drop)
        return bool(lines) and not self.away

    async def _send(self, lines: list[bytes]) -> int:
        """Send a batch. Returns how many of its records are done with: all, or none."""
        sending = asyncio.ensure_future(self._answer(lines))
        try:
            while not sending.done():
                # A slow control plane must not fill the queue.
                await asyncio.wait([sending], timeout=_LOOK)
                if self._is_half_full:
                    await self._spill()
                if self._stopping and self._seconds_left() < -_GRACE and sending.cancel():
                    await asyncio.wait([sending])
        finally:
            sending.cancel()
        return self._done(lines, Answer(0, "the process ends") if sending.cancelled() else sending.result())

    async def _answer(self, lines: list[bytes]) -> Answer:
        body = await in_thread(lambda: gzip.compress(b'{"records":[%b]}' % b",".join(lines), _LEVEL, mtime=0), "usage")
        try:
            async with asyncio.timeout(_TIMEOUT):
                return await self._post(body)
        except TimeoutError:
            return Answer(0, f"no answer in {_TIMEOUT:.0f} s")

    def _done(self, lines: list[bytes], answer: Answer) -> int:
        what = verdict(answer.status)
        if what is Verdict.KEPT:
            self._failed(answer)
            return 0
        self._reached()
        if what is Verdict.SPLIT and len(lines) > 1:
            self._most = max(len(lines) // 2, 1)
            return 0
        refused = 1 if what is Verdict.SPLIT else min(answer.refused, len(lines))
        if refused:
            self.dropped["refused"] += refused
            self._log_once(f"refused: {answer.reason}", "the control plane refused usage records: %s", answer.reason)
        self.results["delivered"] += len(lines) - refused
        if what is Verdict.TAKEN:
            self._on_delivered(lines)
            self._most = min(self._most * 2, BATCH)
        return len(lines)

    def _failed(self, answer: Answer) -> None:
        self._failures += 1
        self._try_at = self._clock() + back_off(self._failures, _FIRST_PAUSE, _LONGEST_PAUSE, self._rand())
        reason = answer.reason or f"answered {answer.status}"
        if self._failures == 1:
            logger.warning("usage records cannot be delivered, and are kept: %s", reason)

    def _reached(self) -> None:
        if self._failures:
            logger.info("usage records are delivered again, after %d failures", self._failures)
        self._failures, self._try_at = 0, 0.0

    # The spool

    @property
    def _is_half_full(self) -> bool:
        return self.spool is not None and 2 * len(self.outbox) >= self.outbox.capacity

    async def _spill(self) -> None:
        """Move the records that nobody is sending from the queue to the spool."""
        spool = self.spool
        if spool is None or self._clock() < self._spill_at or not (lines := self.outbox.take(self.outbox.capacity)):
            return
        count = self._spooled(await _on_disk(lambda: spool.append(lines)))
        self.outbox.settle(count)
        self.outbox.give_back(lines[count:])

    def _spooled(self, done: Appended) -> int:
        self.results["spooled"] += done.written
        if done.lost:
            self.dropped["spool_full"] += done.lost
            self._log_once("full", "the spool of usage records is full: its oldest ones are lost")
        if done.error is not None:
            self.spool_broken, self._spill_at = True, self._clock() + self._age
            self._complain("usage records cannot be spooled", done.error)
        elif self.spool_broken:
            self.spool_broken = False
            self._logged.discard("usage records cannot be spooled")
            logger.info("usage records are spooled again")
        return done.written

    async def _adopt(self) -> None:
        spool = self.spool
        if spool is None or self._clock() < self._adopted_at + self._adopt_every:
            return
        self._adopted_at = self._clock()
        try:
            if adopted := await _on_disk(spool.adopt):
                logger.info("%d usage records of an earlier process are in the spool", adopted)
        except OSError as exc:
            self._complain("the spool of usage records cannot be used", exc)

    async def _flush(self) -> None:
        """Send what is left. With a spool, one failure is enough: the rest is safe there."""
        while len(self.outbox) or (self.spool is not None and self.spool.size):
            if self._clock() >= self._try_at and await self._send_one():
                continue
            left = self._seconds_left()
            if left <= 0 or not self.away or (self.spool is not None and not self.spool_broken):
                break
            await asyncio.sleep(min(max(self._try_at - self._clock(), 0.05), left, 0.25))
        self._spill_at = 0.0
        await self._spill()

    def _complain(self, text: str, exc: OSError) -> None:
        self._log_once(text, f"{text}: %s", exc.strerror or exc)

    def _log_once(self, key: str, text: str, *args: object) -> None:
        if key not in self._logged:
            self._logged.add(key)
            logger.warning(text, *args)


async def _on_disk(call: Callable[[], T]) -> T:
    return await in_thread(call, "usage")


def posting(client: httpx.AsyncClient) -> Post:
    """POST /usage by this client."""

    async def post(body: bytes) -> Answer:
        headers = {"content-type": "application/json", "content-encoding": "gzip"}
        try:
            async with client.stream("POST", "/usage", content=body, headers=headers) as response:
                text = b""
                async for part in response.aiter_bytes():
                    text += part
                    if len(text) > _MAX_ANSWER:
                        return Answer(0, "the answer is too large")
                return read_answer(response.status_code, text)
        except (httpx.HTTPError, ValueError) as exc:
            return Answer(0, cause_of(exc) if isinstance(exc, httpx.HTTPError) else "the answer is not valid HTTP")

    return post


def read_answer(status: int, text: bytes) -> Answer:
    """A 200 without a JSON object is none of the control plane's, but of something in between."""
    try:
        document = orjson.loads(text)
    except orjson.JSONDecodeError:
        document = None
    if not isinstance(document, dict):
        return Answer(0 if status == 200 else status, f"answered {status} without a JSON object")
    if status != 200:
        error = document.get("error")
        code = error.get("code") if isinstance(error, dict) else None
        return Answer(status, f"answered {status}" + (f" {printable(code)}" if isinstance(code, str) else ""))
    refused = document.get("refused")
    if not isinstance(refused, list) or not refused:
        return Answer(status)
    first = refused[0] if isinstance(refused[0], dict) else {}
    return Answer(status, printable(str(first.get("code"))), len(refused))
