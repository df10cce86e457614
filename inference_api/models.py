"""The values that travel through the stages: Route, Call, Model, Reply, and the one Outcome that all accounts share."""

import logging
from collections.abc import Awaitable, Callable, Generator, Mapping
from enum import StrEnum
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import httpx

if TYPE_CHECKING:
    from inference_api.routing.backend import Backend
    from inference_api.routing.fleet import Model

logger = logging.getLogger(__name__)

RawHeaders = list[tuple[bytes, bytes]]


class Outcome(StrEnum):
    """How an attempt, or a whole request, ended; metrics, breaker, retry and log speak of nothing else."""

    OK = "ok"
    CLIENT_GONE = "client_gone"
    UPSTREAM_4XX = "upstream_4xx"
    UPSTREAM_5XX = "upstream_5xx"
    CONNECT_FAILED = "connect_failed"
    RESET = "reset"
    # A reused connection that the backend had closed before the request came: no fault of the backend.
    STALE = "stale"
    PROTOCOL_ERROR = "protocol_error"
    FIRST_BYTE_TIMEOUT = "first_byte_timeout"
    IDLE_TIMEOUT = "idle_timeout"
    TOTAL_TIMEOUT = "total_timeout"
    # The router stopped, and the stream had had all the time there was.
    DRAIN_TIMEOUT = "drain_timeout"
    TRUNCATED = "truncated"
    ERROR_EVENT = "error_event"
    # The engine ended the generation early, and said so in the place of a reason to stop.
    ABORTED = "aborted"
    SHED = "shed"
    NO_BACKEND = "no_backend"
    # The request never reached a backend: it was refused as invalid, or the router itself failed.
    REFUSED = "refused"
    INTERNAL_ERROR = "internal_error"

    @classmethod
    def of_status(cls, status: int) -> "Outcome":
        if status < 400:
            return OK
        return cls.UPSTREAM_4XX if status < 500 else cls.UPSTREAM_5XX


# For the hot path: in Python 3.11 a member of an enumeration costs 0.2 us to look up.
OK = Outcome.OK
CLIENT_GONE = Outcome.CLIENT_GONE
INTERNAL_ERROR = Outcome.INTERNAL_ERROR
of_status = Outcome.of_status


class Prompt(Protocol):
    """The fields of a body that hold a prompt, at least the beginning of it: what prefix affinity goes by."""

    def get(self, name: str, /) -> Any: ...


# What the router reads of a body: the fields that the route names, checked; the prompt among them; and where the value
# of `model` stands, quotes included, if that was looked for. A plain tuple, as one is made for every request.
Asked = tuple[dict[str, Any], Prompt, tuple[int, int] | None]


class Reader(Protocol):
    """Reads the bodies of a route; both ways raise RouterError."""

    # The fields that hold a prompt, or as much as one
    bulky: frozenset[str]

    def at_once(self, body: bytes) -> Asked | None:
        """None: it would take long, or is not for sure what it should be; then it is to be read in slices."""
        ...

    def slices(self, body: bytes, content_type: bytes) -> Generator[None, None, Asked]: ...

    def schema(self) -> dict[str, Any]:
        """Of the body, as JSON Schema: the fields that are read."""
        ...


class Route(NamedTuple):
    """One inference route of the HTTP API; the path is the same for the client and for the backend."""

    path: str
    label: str
    reader: Reader
    multipart: bool = False
    # A second execution costs GPU time and nothing else, so a silent reset may be tried once more.
    repeatable: bool = True
    # What the last event of a complete stream says; () when the route has no such mark.
    end_marks: tuple[bytes, ...] = ()
    # Where every event has a type: what the types of those that carry a token end with, as they are written in JSON.
    token_type: bytes = b""
    method: str = "POST"


class Call(NamedTuple):
    """A parsed request: what the client asked for, and the bytes and headers that go to the backend."""

    route: Route
    model: str
    stream: bool
    body: bytes
    headers: RawHeaders
    request_id: str
    # The backends of its attempts, in order: each attempt adds its own.
    tried: "list[Backend]"
    # What follows the route's path in the request target: `?a=b`
    suffix: bytes = b""
    # What it said in the fields that are no prompt
    fields: Mapping[str, Any] = {}
    # For balancing: equal for requests that share the beginning of a prompt; "" unless the model goes by that.
    prefix: str = ""
    authorization: bytes | None = None
    # `headers` as lines of a request head, if somebody has rendered them already.
    lines: bytes | None = None
    # Where the model's name is in the body, quotes included, if somebody has looked.
    model_at: tuple[int, int] | None = None
    # Who asks; None: everybody is anonymous.
    caller: "Caller | None" = None
    # The ASGI `state` of the request: what features keep of it between their parts, by a name of their own.
    state: "Mapping[str, Any]" = {}


class Caller(Protocol):
    """Who asks: what a feature made of the credentials in a request head."""

    @property
    def id(self) -> str:
        """A public name for logs and records; never a secret."""
        ...

    def may_use(self, model: str) -> bool:
        """Whether the name may be shown to this caller, and asked for."""
        ...


class Usage(NamedTuple):
    """The tokens of one answer as its engine counted them, in one shape for all APIs; None: it did not say.

    `input_tokens` includes those that were in the engine's cache.
    """

    input_tokens: int | None = None
    cached_input_tokens: int | None = None
    output_tokens: int | None = None
    reasoning_tokens: int | None = None


class Reply:
    """An open answer. Whoever does not return it closes it; closing twice is closing once.

    `backend` is None where no backend gave it (a cached answer, a vote). `extra`: headers for this client only, beside
    those of the backend. `taps`: who sees the bytes of this answer; none: the fast path stays open. `filter`: which
    events of a stream the client does not get. `attempts`: how many backends were tried.
    """

    __slots__ = (
        "_more", "_on_end", "attempts", "backend", "ended", "extra", "filter", "headers", "model", "status", "stream",
        "taps",
    )  # fmt: skip

    def __init__(
        self,
        status: int,
        headers: RawHeaders,
        stream: httpx.AsyncByteStream,
        backend: "Backend | None" = None,
        on_end: "Callable[[Reply, Outcome], None] | None" = None,
        attempts: int = 1,
    ) -> None:
        self.status = status
        self.headers = headers
        self.stream = stream
        self.backend = backend
        self.attempts = attempts
        self.extra: tuple[tuple[bytes, bytes], ...] = ()
        self.taps: tuple[Tap, ...] = ()
        self.filter: EventFilter | None = None
        self.ended = False
        # The model that has it in flight
        self.model: Model | None = None
        self._on_end = on_end
        self._more: list[Callable[[Reply, Outcome], None]] | None = None

    def on_end(self, ended: "Callable[[Reply, Outcome], None]") -> None:
        """Call `ended` once, when the exchange ends; the last one added is called first."""
        self._more = [ended, *(self._more or ())]

    async def aclose(self, outcome: Outcome) -> None:
        """End the exchange with the backend, if it has not ended."""
        if self.end(outcome):
            await self.stream.aclose()

    def end(self, outcome: Outcome) -> bool:
        """Count the exchange as ended: the in-flight counts fall here and nowhere else. False: it was already.

        The stream is the caller's to close then, unless it is at its end.
        """
        if self.ended:
            return False
        self.ended = True
        for ended in self._more or ():
            try:
                ended(self, outcome)
            except Exception:
                # Contained: the counts fall and the answer ends all the same.
                logger.exception("a callback for the end of an answer failed")
        if self.model is not None:
            self.model.in_flight -= 1
        if self._on_end is not None:
            self._on_end(self, outcome)
        return True

    def __repr__(self) -> str:
        by = "no backend" if self.backend is None else self.backend.label
        return f"<Reply {self.status} from {by}{' closed' if self.ended else ''}>"


class EventFilter(NamedTuple):
    """Keeps single events of a stream from the client: those with `marker` in them, unless `keeps` says otherwise.

    `keeps` gets the bytes of one whole event, and may remember what it says.
    """

    marker: bytes
    keeps: Callable[[bytes], bool]


class Direct(Protocol):
    """What a server may offer beside ASGI's `send`: the same without a coroutine. False: not now, it is to be sent."""

    # Takes a piece of the body as one whole chunk of HTTP/1.1, if it came as one: it need not be taken apart and framed
    # again. None: not now, it is to be pushed.
    frames: Callable[[bytes], None] | None

    def respond(self, status: int, lines: bytes, body: bytes) -> bool:
        """`lines`: the headers as lines of a head, Content-Length among them; a whole answer to a POST."""
        ...

    def push(self, body: bytes, more_body: bool) -> bool: ...


class Send(Protocol):
    """The outbound seam: takes a Call to a Reply. A layer wraps one Send into another."""

    def __call__(self, call: Call, model: "Model") -> Awaitable[Reply]: ...


class Tap(Protocol):
    """Sees an answer on its way to the client; synchronous, must not raise, must not keep the bytes."""

    def start(self, status: int, headers: RawHeaders) -> None: ...
    def chunk(self, data: bytes) -> None: ...
    def end(self, outcome: Outcome) -> None: ...
