"""A WebSocket session between a client and a backend, whose frames pass unchanged."""

import asyncio
from collections.abc import Callable
from typing import Literal, NamedTuple, Protocol

import httpx

from inference_api.models import Outcome
from inference_api.relay.frames import Frames, close_frame

Reason = Literal["client", "upstream", "drain", "time", "error"]
_GOING_AWAY, _TOO_LARGE, _LOST, _RESTART, _NORMAL = 1001, 1009, 1011, 1012, 1000


class SessionLimits(NamedTuple):
    """Bytes of a message. Seconds: of a session; until the other side has answered a close frame, or a frame that is
    being sent has ended; and without progress of a side that does not read."""

    message: int
    session: float = 3600.0
    close: float = 10.0
    stall: float = 60.0


class Side(Protocol):
    """One side, as the other one sees it."""

    def write(self, data: bytes) -> None: ...
    def pause(self) -> None: ...
    def resume(self) -> None: ...
    def close(self, cleanly: bool) -> None:
        """`cleanly`: after what was written has been read."""
        ...


class Tunnel:
    """Copies frames in both directions, until one side or the router ends the session.

    A side that does not read pauses the other one. `done` has the reason of the end, `outcome` what it was. As the
    client's `server.upgrade.Upgraded` and the backend's `upstream.response.Sink`, it must not raise.
    """

    def __init__(
        self, limits: SessionLimits, on_text: Callable[[bytes], None], loop: asyncio.AbstractEventLoop
    ) -> None:
        self._limits = limits
        self._loop = loop
        self._from_client = Frames(limits.message)
        self._from_backend = Frames(limits.message, on_text)
        self._client: Side | None = None
        self._backend: Side | None = None
        self.done: asyncio.Future[Reason] = loop.create_future()
        self.outcome = Outcome.OK
        # Who sent the first close frame
        self._first: Reason | None = None
        # A close frame of the router that waits for the end of the client's current frame
        self._due: tuple[int, Reason, Outcome] | None = None
        self._timers: dict[str, asyncio.TimerHandle] = {}

    def open(self, client: Side, backend: Side) -> None:
        self._client, self._backend = client, backend
        self._after("session", self._limits.session, lambda: self._stop(_NORMAL, "time", Outcome.OK))

    # From the client

    def received(self, data: bytes) -> None:
        if self._backend is None:
            return
        if passed := self._from_client.feed(data):
            self._backend.write(passed)
        if self._from_client.is_too_large:
            self._stop(_TOO_LARGE, "error", Outcome.REFUSED)
        elif self._from_client.closed:
            self._closing("client")

    def client_writable(self, is_writable: bool) -> None:
        # Its connection has a timer of its own for a client that does not read.
        if self._backend is not None:
            if is_writable:
                self._backend.resume()
            else:
                self._backend.pause()

    def lost(self) -> None:
        """The client has gone."""
        self._finish(self._first or "client", Outcome.OK if self._first else Outcome.CLIENT_GONE)

    def stop(self) -> None:
        """The router stops: the client is to connect to another one."""
        self._stop(_RESTART, "drain", Outcome.DRAIN_TIMEOUT)

    # From the backend

    def data_received(self, data: bytes, complete: bool, frame: bytes | None = None) -> None:
        if self._client is None:
            return
        if passed := self._from_backend.feed(data):
            self._client.write(passed)
        if self._from_backend.is_too_large:
            self._stop(_TOO_LARGE, "error", Outcome.PROTOCOL_ERROR)
        elif self._from_backend.closed:
            self._closing("upstream")
        elif self._due is not None and self._from_backend.at_boundary:
            self._say(*self._due)
        if complete:
            self._backend_lost()

    def broken(self, error: httpx.TransportError) -> None:
        self._backend_lost()

    def backend_writable(self, is_writable: bool) -> None:
        if self._client is None:
            return
        if is_writable:
            self._cancel("stall")
            self._client.resume()
        else:
            self._client.pause()
            self._after("stall", self._limits.stall, self._backend_lost)

    def _backend_lost(self) -> None:
        if self._first is not None:
            self._finish(self._first, Outcome.OK)
        else:
            self._stop(_LOST, "upstream", Outcome.RESET)

    # Ends

    def _closing(self, who: Reason) -> None:
        """A side has sent a close frame; the other one answers it."""
        if self._first is None:
            self._first = who
            self._after("close", self._limits.close, lambda: self._finish(who, Outcome.OK))
        elif self._from_client.closed and self._from_backend.closed:
            self._finish(self._first, Outcome.OK)

    def _stop(self, code: int, why: Reason, outcome: Outcome) -> None:
        """End the session with a close frame of the router, between two frames."""
        if self._client is None or self._due is not None:
            return
        if self._first is not None:
            self._finish(self._first, Outcome.OK)
        elif self._from_backend.at_boundary:
            self._say(code, why, outcome)
        elif why == "upstream":
            # The rest of the frame will not come.
            self._finish(why, outcome)
        else:
            self._due = code, why, outcome
            self._after("close", self._limits.close, lambda: self._finish(why, outcome))

    def _say(self, code: int, why: Reason, outcome: Outcome) -> None:
        assert self._client is not None
        self._client.write(close_frame(code))
        if self._backend is not None and self._from_client.at_boundary and why != "upstream":
            self._backend.write(close_frame(_GOING_AWAY, masked=True))
        self._finish(why, outcome, cleanly=True)

    def _finish(self, why: Reason, outcome: Outcome, cleanly: bool | None = None) -> None:
        client, self._client = self._client, None
        backend, self._backend = self._backend, None
        if client is None or backend is None:
            return
        for name in list(self._timers):
            self._cancel(name)
        self.outcome = outcome
        client.close(self._from_backend.closed if cleanly is None else cleanly)
        backend.close(True)
        if not self.done.done():
            self.done.set_result(why)

    def _after(self, name: str, seconds: float, call: Callable[[], None]) -> None:
        self._cancel(name)
        self._timers[name] = self._loop.call_later(seconds, call)

    def _cancel(self, name: str) -> None:
        if (timer := self._timers.pop(name, None)) is not None:
            timer.cancel()
