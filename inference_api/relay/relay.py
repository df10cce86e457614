"""The ASGI response that owns a Reply: relays the bytes, feeds the taps, and returns the outcome.

`pump` moves the chunks; this module decides once per answer.
"""

import re
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import suppress
from time import perf_counter
from typing import Any

import httpx
from starlette.types import Send

from inference_api.errors import RouterError, UpstreamProtocolError, UpstreamReset, UpstreamTimeout, error_event
from inference_api.headers import extra_lines, extra_pairs
from inference_api.models import CLIENT_GONE, Call, Direct, Outcome, RawHeaders, Reply, of_status
from inference_api.relay.answers import first_bytes, hold, read_answer
from inference_api.relay.dialects import Body, body_kind
from inference_api.relay.events import EventTracker
from inference_api.relay.filter import FilteringPump
from inference_api.relay.head import ReturnedHead
from inference_api.relay.pump import Pump
from inference_api.relay.replay import Replay
from inference_api.relay.typed_events import follow
from inference_api.upstream.failures import outcome_of
from inference_api.upstream.response import ResponseStream

# An answer of up to 1 MiB is buffered before its head is sent, so that a broken one can become an error.
_HELD = 1 << 20

# Messages of the error event for a stream that stops before its end.
_BREAKS = {
    Outcome.RESET: ("upstream_stream_interrupted", "The model's backend closed the connection during the stream."),
    Outcome.PROTOCOL_ERROR: ("upstream_stream_interrupted", "The model's backend broke the stream."),
    Outcome.TRUNCATED: ("upstream_stream_truncated", "The model's backend ended the stream before it was complete."),
    Outcome.IDLE_TIMEOUT: ("upstream_idle_timeout", "The model's backend sent nothing for too long."),
    Outcome.TOTAL_TIMEOUT: ("upstream_timeout", "The stream exceeded the router's time limit."),
}

# Matches requests that may ask for more than one choice.
_CHOICES = re.compile(rb'"(?:n|best_of)"\s*:\s*(?!1\b)|"prompt"\s*:\s*\[')


class Relay:
    """Relays one Reply and closes it.

    The taps of the Reply get the client's bytes. `write_stall`: seconds without progress until a client that does not
    read is reset. `before_end` is called just before the last byte is sent: a later disconnect is not premature.
    """

    __slots__ = (
        "_before_end", "_call", "_clock", "_direct", "_events", "_first_at", "_pumping", "_reply", "_size", "_usage",
        "_write_stall", "outcome", "started",
    )  # fmt: skip

    def __init__(
        self,
        reply: Reply,
        call: Call,
        write_stall: float = 60.0,
        before_end: Callable[[], None] = lambda: None,
        direct: Direct | None = None,
        clock: Callable[[], float] = perf_counter,
    ) -> None:
        self._reply = reply
        self._call = call
        self._write_stall = write_stall
        self._before_end = before_end
        self._direct = direct
        self._clock = clock
        # Per answer
        self.started = False
        self.outcome = CLIENT_GONE
        self._events: EventTracker | None = None
        self._usage: Mapping[str, Any] | None = None
        self._pumping: Pump | None = None
        self._first_at = 0.0
        self._size = 0

    async def __call__(self, send: Send) -> Outcome:
        """Relay, and return the outcome. Raises RouterError if the answer is unusable and no byte was sent.

        A broken answer stays incomplete: the caller returns, and the server cuts the connection, so that no truncated
        answer looks complete.
        """
        reply = self._reply
        try:
            if type(reply.stream) is Replay:
                self.outcome = await self._again(send, reply.stream)
                return self.outcome
            head = self._head()
            if 300 <= reply.status < 400 and reply.status != 304:
                # A redirect points into the cluster, and SDKs would follow.
                raise UpstreamProtocolError("The model's backend sent a redirect.", Outcome.PROTOCOL_ERROR)
            if head.is_stream:
                self.outcome = await self._stream(send, head.unbuffered())
            elif self._call.stream and reply.status < 300 and reply.status != 204:
                self.outcome = await self._unlabelled(send, head)
            else:
                self.outcome = await self._whole(send, head)
        except httpx.TransportError as exc:
            self.outcome = outcome_of(exc)
            raise unusable(self.outcome) from exc
        except RouterError:
            self.outcome = Outcome.PROTOCOL_ERROR
            raise
        finally:
            events = self._events
            if self.outcome is CLIENT_GONE and events is not None and events.over:
                # The last event was sent; the OpenAI SDKs disconnect there, and at an error, before the body ends.
                self.outcome = events.verdict()
            stream = reply.stream
            try:
                if isinstance(stream, ResponseStream) and stream.complete:
                    reply.end(self.outcome)
                else:
                    await reply.aclose(self.outcome)
            finally:
                # Last: one that fails must not keep the counts from falling.
                for tap in reply.taps:
                    tap.end(self.outcome)
        return self.outcome

    async def interrupt(self, send: Send) -> Outcome:
        """End a stream at the end of the drain timeout: with an error event, if it stands between two events."""
        if self.outcome is CLIENT_GONE:
            # Neither client nor backend ended the stream.
            self.outcome = Outcome.DRAIN_TIMEOUT
        stalled = self._pumping is not None and self._pumping.stalled
        if self._events is not None and self._events.at_boundary and not self._events.over and not stalled:
            text = "The router is shutting down; the stream is incomplete."
            event = error_event("router_shutting_down", text)
            await send({"type": "http.response.body", "body": event, "more_body": True})
        return self.outcome

    @property
    def status(self) -> int:
        return self._reply.status

    @property
    def first_at(self) -> float:
        """Time of the first byte of the body, or of a stream's first token, in seconds of the clock.

        0 without one.
        """
        return self._first_at if self._pumping is None else self._pumping.first_at

    @property
    def size(self) -> int:
        """Bytes of the backend's body that were relayed."""
        return self._size if self._pumping is None else self._pumping.size

    @property
    def streamed_events(self) -> int:
        """The number of events with a token."""
        return 0 if self._events is None else self._events.tokens

    def usage(self) -> Mapping[str, Any] | None:
        """The usage that the answer reports, or None."""
        return self._usage if self._events is None else self._events.usage()

    def _head(self) -> ReturnedHead:
        reply, stream = self._reply, self._reply.stream
        known = stream.known if isinstance(stream, ResponseStream) else None
        if known is None:
            return ReturnedHead(reply.status, reply.headers)
        if known.returned is None:
            known.returned = ReturnedHead(reply.status, reply.headers)
        head: ReturnedHead = known.returned
        return head

    async def _whole(self, send: Send, head: ReturnedHead) -> Outcome:
        """Relay an answer other than a stream: buffered until complete, unless it is too large."""
        status = self._reply.status
        stream = self._reply.stream
        rest: AsyncIterator[bytes] | ResponseStream | None = None
        if isinstance(stream, ResponseStream) and stream.complete and stream.size <= _HELD:
            body = stream.take()
        else:
            body, rest = await hold(stream, _HELD)
        if rest is not None:
            await self._start(send, head.headers, head.length)
            return await self._pump(send, None).run(rest, body)
        outcome = of_status(status)
        if head.is_json and status == 200:
            self._usage, aborted = read_answer(body)
            if aborted:
                outcome = Outcome.ABORTED
        self._first_at = self._clock()
        self._size = len(body)
        length = head.length if status in (204, 304) else b"%d" % len(body)
        if length is not None and self._respond(b"%bcontent-length: %b\r\n" % (head.lines, length), body):
            return outcome
        await self._start(send, head.headers, length)
        for tap in self._reply.taps:
            tap.chunk(body)
        self._before_end()
        await send({"type": "http.response.body", "body": body, "more_body": False})
        return outcome

    async def _again(self, send: Send, replay: Replay) -> Outcome:
        """Relay an answer that is known to be whole and valid: neither read again, nor counted again."""
        self._first_at, self._size = self._clock(), len(replay.body)
        if self._respond(replay.lines, replay.body):
            return of_status(self._reply.status)
        await self._start(send, replay.headers, b"%d" % len(replay.body))
        return await self._pump(send, None).run(replay)

    def _respond(self, lines: bytes, body: bytes) -> bool:
        """Send a whole answer at once, `lines`: its headers and length. False: not possible now."""
        direct, reply = self._direct, self._reply
        if direct is None or reply.taps:
            return False
        lines = b"%bx-request-id: %b\r\n" % (lines, self._call.request_id.encode())
        if reply.extra:
            lines += extra_lines(reply.extra)
        if not direct.respond(reply.status, lines, body):
            return False
        self.started = True
        # No disconnect in between: it was one turn of the event loop.
        self._before_end()
        return True

    async def _unlabelled(self, send: Send, head: ReturnedHead) -> Outcome:
        """Relay the answer to a stream request with another content type, by its first bytes."""
        kind = Body.OTHER if head.is_coded else await self._body_kind()
        if kind is Body.EVENTS:
            return await self._stream(send, head.of_events())
        if head.is_json or (kind is Body.JSON and not head.is_sequence):
            return await self._whole(send, head)
        # Lines of JSON, audio, or a compressed body: relayed as it arrives.
        await self._start(send, head.unbuffered(), head.length)
        return await self._pump(send, None).run(self._reply.stream, b"")

    async def _body_kind(self) -> Body:
        wanted = 0
        while True:
            first = await first_bytes(self._reply, wanted)
            kind = body_kind(first)
            if kind is not None or len(first) <= wanted:
                return kind or Body.OTHER
            wanted = len(first)

    async def _stream(self, send: Send, headers: RawHeaders) -> Outcome:
        """Relay server-sent events as they arrive; if they break off between two, add an error event."""
        events = self._events = follow(self._call.route, self._finish_ends())
        # A length would leave no room for an error event.
        await self._start(send, headers, None)
        pump = self._pump(send, events)
        # An empty first piece sends the head now, not with the first event.
        outcome = await pump.run(self._reply.stream, b"")
        if outcome in _BREAKS:
            events.finish()
            with suppress(TimeoutError):
                if events.over:
                    # Only the end of the body is missing: complete it for the client.
                    return await pump.end()
                if events.at_boundary:
                    await pump.write(error_event(*_BREAKS[outcome]))
        return outcome

    def _finish_ends(self) -> bool:
        """Whether a reason to finish at the end of the body completes the stream: some engines send no `[DONE]`.

        Not if the connection's end is the body's end, and another choice may be missing.
        """
        stream = self._reply.stream
        return (isinstance(stream, ResponseStream) and stream.framed) or not _CHOICES.search(self._call.body)

    def _pump(self, send: Send, events: EventTracker | None) -> Pump:
        reply = self._reply
        common = send, reply.taps, events, reply.status, self._write_stall, self._before_end, self._direct, self._clock
        pump = Pump(*common) if reply.filter is None or events is None else FilteringPump(reply.filter, *common)
        self._pumping = pump
        return pump

    async def _start(self, send: Send, headers: RawHeaders, length: bytes | None) -> None:
        self.started = True
        headers = [*headers, (b"x-request-id", self._call.request_id.encode()), *extra_pairs(self._reply.extra)]
        if length is not None:
            headers.append((b"content-length", length))
        for tap in self._reply.taps:
            tap.start(self._reply.status, headers)
        await send({"type": "http.response.start", "status": self._reply.status, "headers": headers})


def unusable(outcome: Outcome) -> RouterError:
    """The error for an answer that broke off before a byte of it was sent."""
    if outcome in (Outcome.IDLE_TIMEOUT, Outcome.TOTAL_TIMEOUT, Outcome.FIRST_BYTE_TIMEOUT):
        return UpstreamTimeout("The model did not finish its answer in time.", outcome, final=True)
    if outcome is Outcome.PROTOCOL_ERROR:
        return UpstreamProtocolError("The model's backend gave an answer that is not valid HTTP.", outcome)
    return UpstreamReset("The model's backend closed the connection in the middle of its answer.", outcome)
