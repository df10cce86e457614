"""The ASGI response that owns a Reply: it passes the bytes on as they come, feeds the taps, and says how it ended.

The pushing itself, chunk by chunk, is in `pump`; here is what is decided once per answer.
"""

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from time import perf_counter
from typing import Any

import httpx
import orjson
from starlette.types import Send

from inference_api.errors import RouterError, UpstreamProtocolError, UpstreamReset, UpstreamTimeout, error_event
from inference_api.models import Call, Direct, Outcome, RawHeaders, Reply, Tap
from inference_api.outbound.connection import ResponseStream
from inference_api.outbound.events import EventTracker, find_usage
from inference_api.outbound.forward import outcome_of
from inference_api.outbound.headers import ReturnedHead
from inference_api.outbound.pump import Pump

# An answer of up to 1 MiB is complete before its head goes out, so that a broken one can still become an error.
_HELD = 1 << 20
# Up to here an answer that claims to be JSON is parsed to see whether it is (2 us per KiB); above, at its ends.
_PARSED = 1 << 16

# What the client is told in the stream, when the stream stops before its end.
_BREAKS = {
    Outcome.RESET: ("upstream_stream_interrupted", "The model's backend closed the connection during the stream."),
    Outcome.PROTOCOL_ERROR: ("upstream_stream_interrupted", "The model's backend broke the stream."),
    Outcome.TRUNCATED: ("upstream_stream_truncated", "The stream stopped before the model said that it was complete."),
    Outcome.IDLE_TIMEOUT: ("upstream_idle_timeout", "The model's backend sent nothing for too long."),
    Outcome.TOTAL_TIMEOUT: ("upstream_timeout", "The stream took longer than the router allows."),
}


_OURS_IN_A_STREAM = frozenset({b"cache-control", b"x-accel-buffering"})


class Relay:
    """Relays one Reply and closes it.

    `taps` see the answer as the client does. `write_stall`: seconds for which a client may not read before it is given
    up. `before_end` is called just before the last byte goes out: from then on a client that leaves has not left early.
    """

    __slots__ = (
        "_before_end", "_call", "_clock", "_direct", "_events", "_first_at", "_pumping", "_reply", "_size", "_taps",
        "_usage", "_write_stall", "outcome", "started",
    )  # fmt: skip

    def __init__(
        self,
        reply: Reply,
        call: Call,
        taps: Sequence[Tap],
        write_stall: float = 60.0,
        before_end: Callable[[], None] = lambda: None,
        direct: Direct | None = None,
        clock: Callable[[], float] = perf_counter,
    ) -> None:
        self._reply = reply
        self._call = call
        self._taps = taps
        self._write_stall = write_stall
        self._before_end = before_end
        self._direct = direct
        self._clock = clock
        # Per answer
        self.started = False
        self.outcome = Outcome.CLIENT_GONE
        self._events: EventTracker | None = None
        self._usage: dict[str, Any] | None = None
        self._pumping: Pump | None = None
        self._first_at = 0.0
        self._size = 0

    async def __call__(self, send: Send) -> Outcome:
        """Relay, and return how it ended. Raises RouterError when nothing went out and the answer was unusable.

        After an outcome that is not an end in the sense of HTTP the response is left incomplete: the caller returns,
        the server cuts the connection, and no truncated answer looks whole.
        """
        reply = self._reply
        head = self._head()
        try:
            if 300 <= reply.status < 400 and reply.status != 304:
                # It points into the cluster, and SDKs would follow.
                raise UpstreamProtocolError("The model's backend sent a redirect.", Outcome.PROTOCOL_ERROR)
            if head.is_stream:
                self.outcome = await self._stream(send, head)
            else:
                self.outcome = await self._whole(send, head)
        except httpx.TransportError as exc:
            self.outcome = outcome_of(exc)
            raise _unusable(self.outcome) from exc
        except RouterError:
            self.outcome = Outcome.PROTOCOL_ERROR
            raise
        finally:
            events = self._events
            if self.outcome is Outcome.CLIENT_GONE and events is not None and events.ended:
                # The last event went out; the synchronous OpenAI SDK hangs up there, before the end of the body.
                self.outcome = Outcome.ERROR_EVENT if events.failed else Outcome.OK
            stream = reply.stream
            if isinstance(stream, ResponseStream) and stream.complete:
                reply.end(self.outcome)
            else:
                await reply.aclose(self.outcome)
        return self.outcome

    async def interrupt(self, send: Send) -> Outcome:
        """The router stops, and this stream has had all the time there is: say so, if an event can be put here."""
        if self.outcome is Outcome.CLIENT_GONE:
            # Nobody left, and no backend is to blame.
            self.outcome = Outcome.DRAIN_TIMEOUT
        stalled = self._pumping is not None and self._pumping.stalled
        if self._events is not None and self._events.at_boundary and not self._events.ended and not stalled:
            text = "The router is shutting down before the stream is complete."
            event = error_event("router_shutting_down", text)
            await send({"type": "http.response.body", "body": event, "more_body": True})
        return self.outcome

    @property
    def status(self) -> int:
        return self._reply.status

    @property
    def first_at(self) -> float:
        """When the first byte of the body was passed on, in seconds of the clock; 0 if none was."""
        return self._first_at if self._pumping is None else self._pumping.first_at

    @property
    def size(self) -> int:
        """Bytes of the backend's body that were passed on."""
        return self._size if self._pumping is None else self._pumping.size

    @property
    def streamed_events(self) -> int:
        return 0 if self._events is None else self._events.events

    def usage(self) -> dict[str, Any] | None:
        """The `usage` object of the answer, if it has one."""
        return self._usage if self._events is None else self._events.usage()

    def _head(self) -> ReturnedHead:
        reply, stream = self._reply, self._reply.stream
        known = stream.known if isinstance(stream, ResponseStream) else None
        if known is None:
            return ReturnedHead(reply.status, reply.headers)
        if known.memo is None:
            known.memo = ReturnedHead(reply.status, reply.headers)
        head: ReturnedHead = known.memo
        return head

    async def _whole(self, send: Send, head: ReturnedHead) -> Outcome:
        """An answer with an end of its own: held until it is complete, if it is not too large for that."""
        status = self._reply.status
        stream = self._reply.stream
        rest: AsyncIterator[bytes] | ResponseStream | None = None
        if isinstance(stream, ResponseStream) and stream.complete and stream.size <= _HELD:
            body = stream.take()
        else:
            body, rest = await _hold(stream)
        if rest is not None:
            await self._start(send, head.headers, head.length)
            return await self._pump(send, None).run(rest, body)
        if head.is_json and status == 200:
            self._usage = _usage_of(body)
        self._first_at = self._clock()
        self._size = len(body)
        length = head.length if status in (204, 304) else b"%d" % len(body)
        direct = self._direct
        if direct is not None and length is not None and not self._taps:
            request_id = self._call.request_id.encode()
            lines = b"%bcontent-length: %b\r\nx-request-id: %b\r\n" % (head.lines, length, request_id)
            if direct.respond(status, lines, body):
                self.started = True
                # Nobody could leave in between: all of it was one turn of the event loop.
                self._before_end()
                return Outcome.of_status(status)
        await self._start(send, head.headers, length)
        for tap in self._taps:
            tap.chunk(body)
        self._before_end()
        await send({"type": "http.response.body", "body": body, "more_body": False})
        return Outcome.of_status(status)

    async def _stream(self, send: Send, head: ReturnedHead) -> Outcome:
        """Server-sent events: relayed as they come; if they break off at the end of one, one more says so."""
        events = self._events = EventTracker(self._call.route.end_marks)
        # Without these nginx and its kin hold events back.
        headers = [pair for pair in head.headers if pair[0] not in _OURS_IN_A_STREAM]
        headers += [(b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no")]
        # A length would leave no room for an error event.
        await self._start(send, headers, None)
        pump = self._pump(send, events)
        # An empty first piece: the head goes out now, and not with the first event.
        outcome = await pump.run(self._reply.stream, b"")
        # After the last event nothing is missing but the end of the body, which the cut tells.
        if outcome in _BREAKS and events.at_boundary and not events.ended:
            with suppress(TimeoutError):
                await pump.write(error_event(*_BREAKS[outcome]))
        return outcome

    def _pump(self, send: Send, events: EventTracker | None) -> Pump:
        pump = self._pumping = Pump(
            send, self._taps, events, self._reply.status, self._write_stall, self._before_end, self._direct, self._clock
        )
        return pump

    async def _start(self, send: Send, headers: RawHeaders, length: bytes | None) -> None:
        self.started = True
        headers = [*headers, (b"x-request-id", self._call.request_id.encode())]
        if length is not None:
            headers.append((b"content-length", length))
        for tap in self._taps:
            tap.start(self._reply.status, headers)
        await send({"type": "http.response.start", "status": self._reply.status, "headers": headers})


async def _hold(stream: httpx.AsyncByteStream) -> tuple[bytes, AsyncIterator[bytes] | ResponseStream | None]:
    """The whole body and None; or, of a large one, what has come so far and where the rest will come from."""
    if isinstance(stream, ResponseStream):
        body, complete = await stream.collect(_HELD)
        return body, None if complete else stream
    chunks, size = [], 0
    rest = aiter(stream)
    async for chunk in rest:
        chunks.append(chunk)
        size += len(chunk)
        if size > _HELD:
            return b"".join(chunks), rest
    return b"".join(chunks), None


def _usage_of(body: bytes) -> dict[str, Any] | None:
    """The `usage` of a JSON answer. Raises UpstreamProtocolError if it is not JSON."""
    if len(body) > _PARSED:
        if body[:64].lstrip()[:1] in (b"{", b"[") and body[-64:].rstrip()[-1:] in (b"}", b"]"):
            return find_usage(body)
    else:
        try:
            document = orjson.loads(body)
        except orjson.JSONDecodeError:
            # The engines' encoders may write NaN, which orjson refuses.
            if b"NaN" in body or b"Infinity" in body:
                return find_usage(body)
        else:
            usage = document.get("usage") if isinstance(document, dict) else None
            return usage if isinstance(usage, dict) else None
    raise UpstreamProtocolError("The model's backend gave an answer that is not JSON.", Outcome.PROTOCOL_ERROR)


def _unusable(outcome: Outcome) -> RouterError:
    if outcome in (Outcome.IDLE_TIMEOUT, Outcome.TOTAL_TIMEOUT, Outcome.FIRST_BYTE_TIMEOUT):
        return UpstreamTimeout("The model did not finish its answer in time.", outcome, final=True)
    if outcome is Outcome.PROTOCOL_ERROR:
        return UpstreamProtocolError("The model's backend gave an answer that is not valid HTTP.", outcome)
    return UpstreamReset("The model's backend closed the connection in the middle of its answer.", outcome)
