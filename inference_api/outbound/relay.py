"""The ASGI response that owns a Reply: it passes the bytes on as they come, feeds the taps, and says how it ended.

The pushing itself, chunk by chunk, is in `pump`; here is what is decided once per answer.
"""

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from typing import Any

import httpx
import orjson
from starlette.types import Send

from inference_api.errors import RouterError, UpstreamProtocolError, UpstreamReset, UpstreamTimeout, error_event
from inference_api.models import Call, Direct, Outcome, RawHeaders, Reply, Tap
from inference_api.outbound.connection import ResponseStream
from inference_api.outbound.events import EventTracker, find_usage
from inference_api.outbound.forward import outcome_of
from inference_api.outbound.headers import returned
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


_OURS_IN_A_STREAM = frozenset({b"cache-control", b"x-accel-buffering", b"content-length"})


class Relay:
    """Relays one Reply and closes it.

    `write_stall`: seconds for which a client may not read before it is given up. `before_end` is called just before
    the last byte goes out: from then on a client that leaves has not left early.
    """

    def __init__(
        self,
        reply: Reply,
        call: Call,
        taps: Sequence[Tap],
        write_stall: float = 60.0,
        before_end: Callable[[], None] = lambda: None,
        direct: Direct | None = None,
    ) -> None:
        self._reply = reply
        self._call = call
        self._taps = taps
        self._write_stall = write_stall
        self._before_end = before_end
        self._direct = direct
        # Per answer
        self.started = False
        self.outcome = Outcome.CLIENT_GONE
        self._events: EventTracker | None = None
        self._usage: dict[str, Any] | None = None

    async def __call__(self, send: Send) -> Outcome:
        """Relay, and return how it ended. Raises RouterError when nothing went out and the answer was unusable.

        After an outcome that is not an end in the sense of HTTP the response is left incomplete: the caller returns,
        the server cuts the connection, and no truncated answer looks whole.
        """
        reply = self._reply
        headers = returned(reply.status, reply.headers)
        kind = dict(headers).get(b"content-type", b"").lower()
        try:
            if 300 <= reply.status < 400 and reply.status != 304:
                # It points into the cluster, and SDKs would follow.
                raise UpstreamProtocolError("The model's backend sent a redirect.", Outcome.PROTOCOL_ERROR)
            if kind.startswith(b"text/event-stream"):
                self.outcome = await self._stream(send, headers)
            else:
                self.outcome = await self._whole(send, headers, b"json" in kind)
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

    async def interrupt(self, send: Send) -> None:
        """The router stops, and this stream has had all the time there is: say so, if an event can be put here."""
        if self._events is not None and self._events.at_boundary and not self._events.ended:
            text = "The router is shutting down before the stream is complete."
            event = error_event("router_shutting_down", text)
            await send({"type": "http.response.body", "body": event, "more_body": True})

    @property
    def streamed_events(self) -> int:
        return 0 if self._events is None else self._events.events

    def usage(self) -> dict[str, Any] | None:
        """The `usage` object of the answer, if it has one."""
        return self._usage if self._events is None else self._events.usage()

    async def _whole(self, send: Send, headers: RawHeaders, is_json: bool) -> Outcome:
        """An answer with an end of its own: held until it is complete, if it is not too large for that."""
        status = self._reply.status
        stream = self._reply.stream
        rest: AsyncIterator[bytes] | ResponseStream | None = None
        if isinstance(stream, ResponseStream) and stream.complete and stream.size <= _HELD:
            body = stream.take()
        else:
            body, rest = await _hold(stream)
        if rest is not None:
            await self._start(send, headers)
            pump = Pump(send, self._taps, None, status, self._write_stall, self._before_end, self._direct)
            return await pump.run(rest, body)
        if is_json and status == 200:
            self._usage = _usage_of(body)
        if status not in (204, 304):
            _set_length(headers, len(body))
        self._begin(headers)
        for tap in self._taps:
            tap.chunk(body)
        direct = self._direct
        if direct is not None:
            self._before_end()
            if direct.respond(status, headers, body):
                return Outcome.of_status(status)
        await send({"type": "http.response.start", "status": status, "headers": headers})
        self._before_end()
        await send({"type": "http.response.body", "body": body, "more_body": False})
        return Outcome.of_status(status)

    async def _stream(self, send: Send, headers: RawHeaders) -> Outcome:
        """Server-sent events: relayed as they come; if they break off at the end of one, one more says so."""
        events = self._events = EventTracker(self._call.route.end_marks)
        # Without these nginx and its kin hold events back.
        # A length would leave no room for an error event.
        headers = [pair for pair in headers if pair[0] not in _OURS_IN_A_STREAM]
        headers += [(b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no")]
        await self._start(send, headers)
        pump = Pump(send, self._taps, events, self._reply.status, self._write_stall, self._before_end, self._direct)
        # An empty first piece: the head goes out now, and not with the first event.
        outcome = await pump.run(self._reply.stream, b"")
        if outcome in _BREAKS and events.at_boundary:
            with suppress(TimeoutError):
                await pump.write(error_event(*_BREAKS[outcome]))
        return outcome

    async def _start(self, send: Send, headers: RawHeaders) -> None:
        self._begin(headers)
        await send({"type": "http.response.start", "status": self._reply.status, "headers": headers})

    def _begin(self, headers: RawHeaders) -> None:
        self.started = True
        for tap in self._taps:
            tap.start(self._reply.status, headers)
        headers.append((b"x-request-id", self._call.request_id.encode()))


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


def _set_length(headers: RawHeaders, length: int) -> None:
    if b"content-length" not in dict(headers):
        headers.append((b"content-length", b"%d" % length))


def _unusable(outcome: Outcome) -> RouterError:
    if outcome in (Outcome.IDLE_TIMEOUT, Outcome.TOTAL_TIMEOUT, Outcome.FIRST_BYTE_TIMEOUT):
        return UpstreamTimeout("The model did not finish its answer in time.", outcome, final=True)
    if outcome is Outcome.PROTOCOL_ERROR:
        return UpstreamProtocolError("The model's backend gave an answer that is not valid HTTP.", outcome)
    return UpstreamReset("The model's backend closed the connection in the middle of its answer.", outcome)
