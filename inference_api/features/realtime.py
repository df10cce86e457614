"""REALTIME=on: sessions over a WebSocket, GET /v1/realtime?model=NAME, passed through frame by frame.

The session is a request: it has a caller, limits, budgets and admission, and a backend by the model's balancer, and
ends with one Record. The backend is connected first, so that whatever refuses it is an HTTP status.
"""

import asyncio
import base64
import hashlib
import re
from collections import Counter
from collections.abc import Awaitable, Iterator, Mapping
from typing import Any, Literal, NamedTuple, cast
from urllib.parse import parse_qsl, quote

import orjson
from pydantic import Field
from starlette.routing import Route as PageRoute
from starlette.types import Receive, Scope
from starlette.types import Send as ASGISend

from inference_api.core import Core
from inference_api.errors import (
    BadRequest,
    ClientGone,
    InvalidRequest,
    MethodNotAllowed,
    UpgradeRequired,
    UpstreamProtocolError,
)
from inference_api.feature import Feature, Switch
from inference_api.features.delivery.records import METERED, NOTHING, UNKNOWN
from inference_api.headers import extra_pairs, header_lines, without_lines
from inference_api.http.accounts import ACCOUNT
from inference_api.http.routes import REALTIME
from inference_api.members import request_state
from inference_api.models import INTERNAL_ERROR, OK, RAN, Call, Outcome, RawHeaders, Reply, answered_by
from inference_api.observe.account import Account
from inference_api.observe.exposition import Family
from inference_api.observe.families import counter, gauge
from inference_api.relay.relay import Relay
from inference_api.relay.tunnel import SessionLimits, Tunnel
from inference_api.routing.fleet import Model
from inference_api.server.cycle import Connection, Cycle
from inference_api.settings import Group, Settings
from inference_api.upstream.attempt import Attempt, SendAttempt
from inference_api.upstream.connection import OFFER, BackendConnection
from inference_api.upstream.response import ResponseStream

# Under which the state of a request has its Offer
_NAME = "realtime"
_GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
_KEY = re.compile(rb"[A-Za-z0-9+/]{22}==")
_PROTOCOL = b"realtime"
# Browsers cannot set headers: OpenAI's client names a version of the API here.
_PASSED_ON = (b"openai-beta.",)
# Of the handshake, or of a body
_NOT_OFFERED = ("accept-encoding", "content-length", "content-type")
# The events that report tokens: of OpenAI, and of vLLM's transcriptions
_DONE = {"response.done": ("response", "usage"), "transcription.done": ("usage",)}
_MARKS = tuple(f'"{kind}"'.encode() for kind in _DONE)


class Options(Group):
    realtime: Literal["off", "on"] = Field(
        default="off", description="on: sessions over a WebSocket, GET /v1/realtime?model=NAME"
    )


def build(core: Core, settings: Settings) -> Feature | None:
    """Off unless it is on."""
    if settings.of(Options).realtime == "off":
        return None
    realtime = Realtime(core, SessionLimits(settings.max_body_bytes, stall=settings.write_stall_timeout))
    page = PageRoute(REALTIME.path, realtime, methods=["GET"])
    return Feature("realtime", attempt=realtime.attempt, collect=realtime.collect, pages=(page,))


class Offer(NamedTuple):
    """What a client offers. `query`: the pairs of its query but the model."""

    key: bytes
    protocols: tuple[bytes, ...]
    query: str

    def lines(self) -> bytes:
        """The offer to the backend. Without extensions: compressed frames would hide the tokens."""
        named = [one for one in self.protocols if one == _PROTOCOL or one.startswith(_PASSED_ON)]
        protocols = [(b"sec-websocket-protocol", b", ".join(named))] if named else []
        handshake = [(b"sec-websocket-key", self.key), (b"sec-websocket-version", b"13"), *protocols]
        return header_lines([(b"connection", b"Upgrade"), (b"upgrade", b"websocket"), *handshake])

    def suffix(self, served: str) -> bytes:
        return f"?model={quote(served, safe='')}{self.query}".encode()

    def accepted(self) -> RawHeaders:
        """The headers of the 101 to the client: never a protocol that holds its key."""
        protocols = [(b"sec-websocket-protocol", _PROTOCOL)] if _PROTOCOL in self.protocols else []
        accept = [(b"sec-websocket-accept", self.accept), *protocols]
        return [(b"upgrade", b"websocket"), (b"connection", b"Upgrade"), *accept]

    @property
    def accept(self) -> bytes:
        return base64.b64encode(hashlib.sha1(self.key + _GUID, usedforsecurity=False).digest())


def read_offer(headers: RawHeaders, query: bytes) -> tuple[str, Offer]:
    """The model's name, and the offer. Raises UpgradeRequired, BadRequest or InvalidRequest."""
    if b"websocket" not in _tokens(headers, b"upgrade") or b"upgrade" not in _tokens(headers, b"connection"):
        raise UpgradeRequired("/v1/realtime is a WebSocket: connect to it with a WebSocket client.")
    if _values(headers, b"sec-websocket-version") != [b"13"]:
        raise UpgradeRequired("The WebSocket's version must be 13.")
    keys = _values(headers, b"sec-websocket-key")
    if len(keys) != 1 or not _KEY.fullmatch(keys[0]):
        raise BadRequest("The header Sec-WebSocket-Key must be 16 bytes in base64, once.")
    pairs = parse_qsl(query.decode("latin-1"), keep_blank_values=True)
    names = [value for name, value in pairs if name == "model"]
    if len(names) != 1 or not names[0]:
        raise InvalidRequest("The query must name one model: /v1/realtime?model=NAME.", param="model")
    others = "".join(f"&{quote(name, safe='')}={quote(value, safe='')}" for name, value in pairs if name != "model")
    return names[0], Offer(keys[0], tuple(_listed(headers, b"sec-websocket-protocol")), others)


def _values(headers: RawHeaders, name: bytes) -> list[bytes]:
    return [value.strip() for key, value in headers if key == name]


def _listed(headers: RawHeaders, name: bytes) -> list[bytes]:
    return [part.strip() for part in b",".join(_values(headers, name)).split(b",") if part.strip()]


def _tokens(headers: RawHeaders, name: bytes) -> list[bytes]:
    return [token.lower() for token in _listed(headers, name)]


class SessionTokens:
    """Sums the tokens that the events of a session report."""

    def __init__(self) -> None:
        self.reports = self.unknown = 0
        self.read = self.cached = self.made = 0

    def message(self, text: bytes) -> None:
        """A text message of the backend."""
        if not any(mark in text for mark in _MARKS):
            return
        try:
            event = orjson.loads(text)
        except orjson.JSONDecodeError:
            return
        path = _DONE.get(str(event.get("type"))) if isinstance(event, dict) else None
        if path is None:
            return
        for name in path:
            event = event.get(name) if isinstance(event, dict) else None
        self._count(event if isinstance(event, dict) else {})

    def _count(self, usage: Mapping[str, Any]) -> None:
        read = _whole(usage, "input_tokens", "prompt_tokens")
        made = _whole(usage, "output_tokens", "completion_tokens")
        if read is None or made is None:
            self.unknown += 1
            return
        self.reports += 1
        self.read += read
        self.made += made
        details = usage.get("input_token_details") or usage.get("prompt_tokens_details")
        self.cached += (_whole(details, "cached_tokens") or 0) if isinstance(details, dict) else 0

    def metered(self) -> Any:
        """As the features count tokens: nothing for a session without an answer, unknown without a report."""
        if self.reports:
            return self.read, self.cached, self.made, None, "reported"
        return UNKNOWN if self.unknown else NOTHING

    def usage(self) -> Mapping[str, Any] | None:
        """In the shape of the Responses API."""
        details = {"cached_tokens": self.cached}
        sums = {"input_tokens": self.read, "input_tokens_details": details, "output_tokens": self.made}
        return sums if self.reports else None


def _whole(usage: Mapping[str, Any], *names: str) -> int | None:
    value = next((usage[name] for name in names if name in usage), None)
    return value if type(value) is int and value >= 0 else None


class _Client:
    """The client's end: a connection that has left HTTP."""

    def __init__(self, cycle: Cycle, connection: Connection) -> None:
        self._cycle = cycle
        self._connection = connection
        self.size = 0

    def write(self, data: bytes) -> None:
        self.size += len(data)
        self._connection.write(data)

    def pause(self) -> None:
        self._connection.pause_reading()

    def resume(self) -> None:
        self._connection.resume_reading()

    def close(self, cleanly: bool) -> None:
        self._connection.leave(self._cycle, cleanly)


class _Backend:
    """The backend's end: the body of a 101."""

    def __init__(self, stream: ResponseStream, connection: BackendConnection) -> None:
        self._stream = stream
        self._connection = connection

    def write(self, data: bytes) -> None:
        self._connection.write(data)

    def pause(self) -> None:
        self._stream.pause()

    def resume(self) -> None:
        self._stream.resume()

    def close(self, cleanly: bool) -> None:
        self._connection.abandon(self._stream)


class Session:
    """A session that runs, for its Account: in the place of a Relay."""

    started = True
    status = 101
    streamed_events = 0
    first_at = 0.0

    def __init__(self, tunnel: Tunnel, tokens: SessionTokens, client: _Client) -> None:
        self._tunnel = tunnel
        self._client = client
        self.usage = tokens.usage

    @property
    def size(self) -> int:
        return self._client.size

    @property
    def outcome(self) -> Outcome:
        return self._tunnel.outcome

    async def interrupt(self, send: ASGISend) -> Outcome:
        """The end of the drain: see `Relay.interrupt`."""
        return Outcome.DRAIN_TIMEOUT


class Realtime:
    """The page of the sessions."""

    def __init__(self, core: Core, limits: SessionLimits) -> None:
        self._core = core
        self._limits = limits
        self._open: Counter[str] = Counter()
        self._closed: Counter[tuple[str, str]] = Counter()

    async def __call__(self, scope: Scope, receive: Receive, send: ASGISend) -> None:
        account: Account = scope[ACCOUNT]
        account.route = REALTIME.label
        if scope["method"] != "GET":
            # HEAD, which comes with GET
            raise MethodNotAllowed(scope["method"], scope["path"], "GET")
        name, offer = read_offer(account.head.headers, scope["query_string"])
        cycle, admission = account.cycle, self._core.admission
        if cycle is None or scope["http_version"] != "1.1":
            raise UpgradeRequired("A WebSocket needs HTTP/1.1.")
        account.asked, account.stream = name, True
        scope["state"][_NAME] = offer
        admission.in_flight += 1
        try:
            model = self._core.look_up(name, account.caller)
            account.model_name = model.name
            call = self._call(scope, account, name)
            account.accepted(call, model)
            with cycle as watcher:
                account.reply = reply = await self._core.members.chains.send(call, model)
                if RAN in account.state:
                    reply.extra += answered_by(account.state[RAN], model)
                if reply.status != 101:
                    await self._refused(account, call, reply, watcher, send)
                    return
            await self._run(account, cycle, offer, reply)
        finally:
            admission.in_flight -= 1

    def _call(self, scope: Scope, account: Account, name: str) -> Call:
        head = account.head
        return Call(
            REALTIME,
            name,
            True,
            b"",
            [pair for pair in head.forwarded if pair[0] != b"content-type"],
            account.request_id,
            [],
            fields={"model": name},
            authorization=head.authorization,
            caller=account.caller,
            state=scope["state"],
            answer_headers=account.answer_headers,
            client=account.client,
            head=head,
        )

    async def _refused(self, account: Account, call: Call, reply: Reply, watcher: Cycle, send: ASGISend) -> None:
        """Pass on what a backend answers that does not take the offer."""
        if reply.status < 400:
            await reply.aclose(Outcome.PROTOCOL_ERROR)
            raise _no_websocket()
        account.stream = False
        account.relay = relay = Relay(reply, call._replace(stream=False), before_end=watcher.close, clock=account.clock)
        account.outcome = await relay(send)

    async def _run(self, account: Account, cycle: Cycle, offer: Offer, reply: Reply) -> None:
        """Open the session, and await its end."""
        tokens, stream, loop = SessionTokens(), reply.stream, asyncio.get_running_loop()
        tunnel = Tunnel(self._limits, tokens.message, loop)
        outcome = INTERNAL_ERROR
        assert reply.backend is not None
        origin, model = reply.backend.origin, reply.backend.model
        origin.sessions += 1
        self._open[model] += 1
        try:
            if not isinstance(stream, ResponseStream) or _values(reply.headers, b"sec-websocket-accept") != [
                offer.accept
            ]:
                outcome = Outcome.PROTOCOL_ERROR
                raise _no_websocket()
            headers = [*offer.accepted(), (b"x-request-id", account.request_id.encode())]
            extra = [*account.answer_headers, *reply.extra]
            connection = cycle.upgrade(header_lines([*headers, *extra_pairs(extra)]), tunnel)
            if connection is None:
                outcome = Outcome.CLIENT_GONE
                raise ClientGone
            client = _Client(cycle, connection)
            account.relay = cast(Relay, Session(tunnel, tokens, client))
            reason = await self._follow(tunnel, client, stream)
            account.outcome = outcome = tunnel.outcome
            self._closed[model, reason] += 1
        except asyncio.CancelledError:
            # The end of the drain
            tunnel.stop()
            outcome = Outcome.DRAIN_TIMEOUT
            self._closed[model, "drain"] += 1
            raise
        finally:
            origin.sessions -= 1
            self._open[model] -= 1
            cast(dict[str, Any], account.state)[METERED] = tokens.metered()
            # What a client did wrong is no failure of the attempt.
            await reply.aclose(OK if outcome is Outcome.REFUSED else outcome)

    async def _follow(self, tunnel: Tunnel, client: _Client, stream: ResponseStream) -> str:
        connection = stream.connection
        assert isinstance(connection, BackendConnection)
        tunnel.open(client, _Backend(stream, connection))
        connection.on_writable = tunnel.backend_writable
        stream.push_to(tunnel)
        try:
            return await asyncio.shield(tunnel.done)
        finally:
            connection.on_writable = None

    def attempt(self, send: SendAttempt) -> SendAttempt:
        """Makes the attempts of a session offers."""

        def offering(attempt: Attempt) -> Awaitable[Reply]:
            if attempt[0][0] is not REALTIME:
                return send(attempt)
            return send(_offered(attempt))

        return offering

    def collect(self) -> Iterator[Family]:
        names = self._core.fleet.models
        opened = {name: count for name, count in dict(self._open).items() if count or name in names}
        closed = {labels: count for labels, count in dict(self._closed).items() if labels[0] in names}
        yield from families(opened, closed)


def families(opened: Mapping[str, int], closed: Mapping[tuple[str, str], int]) -> Iterator[Family]:
    """`opened`: sessions by model. `closed`: ended ones, by model and reason."""
    series = [((model,), count) for model, count in opened.items()]
    yield gauge("realtime_sessions", "Sessions over a WebSocket.", ("model_name",), series)
    text = "Ended sessions, by who ended them."
    yield counter("realtime_closed", text, ("model_name", "reason"), closed.items())


def _offered(attempt: Attempt) -> Attempt:
    call, model, prepared = attempt.call, attempt.model, attempt.prepared
    offer: Offer = request_state(call.state)[_NAME]
    suffix = offer.suffix(_served(model))
    lines = without_lines(prepared.lines, _NOT_OFFERED) + offer.lines()
    return attempt._replace(
        call=call._replace(suffix=suffix), prepared=prepared._replace(body=OFFER, lines=lines), fresh=True
    )


def _served(model: Model) -> str:
    return model.entry.served_model_name or model.name


def _no_websocket() -> UpstreamProtocolError:
    text = "The model's backend did not take the offer of a WebSocket."
    return UpstreamProtocolError(text, Outcome.PROTOCOL_ERROR, final=True)


FEATURE = Switch(build, Options)
