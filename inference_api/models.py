"""The values that pass through the stages: Route, Call, Reply, and the Outcome of attempts and requests."""

import logging
from collections.abc import Awaitable, Callable, Collection, Generator, Mapping
from enum import StrEnum
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import httpx

if TYPE_CHECKING:
    from inference_api.http.head import RequestHead
    from inference_api.observe.account import Record
    from inference_api.routing.backend import Backend
    from inference_api.routing.fleet import Model

logger = logging.getLogger(__name__)

RawHeaders = list[tuple[bytes, bytes]]
# A header that a feature adds to an answer; bytes: one or more, as lines of a head, each with its line break
Extra = tuple[bytes, bytes] | bytes


class Outcome(StrEnum):
    """How an attempt or a request ended; shared by metrics, breaker, retries and log."""

    OK = "ok"
    CLIENT_GONE = "client_gone"
    UPSTREAM_4XX = "upstream_4xx"
    UPSTREAM_5XX = "upstream_5xx"
    # The backend refused the router's credentials.
    AUTH_FAILED = "auth_failed"
    CONNECT_FAILED = "connect_failed"
    RESET = "reset"
    # The backend had closed a reused connection before the request: not its fault.
    STALE = "stale"
    PROTOCOL_ERROR = "protocol_error"
    FIRST_BYTE_TIMEOUT = "first_byte_timeout"
    IDLE_TIMEOUT = "idle_timeout"
    TOTAL_TIMEOUT = "total_timeout"
    # The router cut the stream at the end of DRAIN_TIMEOUT.
    DRAIN_TIMEOUT = "drain_timeout"
    TRUNCATED = "truncated"
    ERROR_EVENT = "error_event"
    # The engine ended the generation early, and reported that as the reason to stop.
    ABORTED = "aborted"
    SHED = "shed"
    NO_BACKEND = "no_backend"
    # The request never reached a backend: it was invalid, or the router failed.
    REFUSED = "refused"
    INTERNAL_ERROR = "internal_error"
    # Another answer to the same request was taken: the backend is not to blame.
    HEDGE_LOST = "hedge_lost"
    RACE_LOST = "race_lost"
    VOTE_LOST = "vote_lost"

    @classmethod
    def of_status(cls, status: int) -> "Outcome":
        if status < 400:
            return OK
        return cls.UPSTREAM_4XX if status < 500 else cls.UPSTREAM_5XX


# For the hot path: reading a member of an enumeration costs 0.2 us in Python 3.11.
OK = Outcome.OK
CLIENT_GONE = Outcome.CLIENT_GONE
INTERNAL_ERROR = Outcome.INTERNAL_ERROR
AUTH_FAILED = Outcome.AUTH_FAILED
of_status = Outcome.of_status
# By the message that a task is cancelled with: `task.cancel("race_lost")`
LOST = {one.value: one for one in (Outcome.HEDGE_LOST, Outcome.RACE_LOST, Outcome.VOTE_LOST)}


class Prompt(Protocol):
    """The fields of a body with the prompt, or its beginning, for prefix affinity."""

    def get(self, name: str, /) -> Any: ...


# The result of reading a body: the checked fields of the route; the prompt; the span of the value of `model`, quotes
# included, or None if not searched for. A plain tuple, since one is made for every request.
Asked = tuple[dict[str, Any], Prompt, tuple[int, int] | None]


# A span of a body, and the bytes that stand there instead
Edit = tuple[tuple[int, int], bytes]


class Reader(Protocol):
    """Reads the bodies of a route; both methods raise RouterError."""

    # The fields that may contain a prompt, or data as large as one
    bulky: frozenset[str]

    def at_once(self, body: bytes) -> Asked | None:
        """Read a body at once. None: too large, or not certainly valid; use the slices."""
        ...

    def slices(self, body: bytes, content_type: bytes) -> Generator[None, None, Asked]: ...

    def keeping(self, names: Collection[str]) -> "Reader":
        """The same, and these fields of JSON bodies are kept, whatever their values are."""
        ...

    def schema(self) -> dict[str, Any]:
        """The JSON Schema of the fields that are read."""
        ...


class Route(NamedTuple):
    """One inference route of the HTTP API; client and backend use the same path."""

    path: str
    label: str
    reader: Reader
    multipart: bool = False
    # A second execution only costs GPU time, so a silent reset may be retried once.
    repeatable: bool = True
    # Marks of the last event of a complete stream; () if the route has none.
    end_marks: tuple[bytes, ...] = ()
    # For typed events: the JSON text at the end of the types that carry a token.
    token_type: bytes = b""
    method: str = "POST"


class Call(NamedTuple):
    """A parsed request: its fields, and the bytes and headers for the backend."""

    route: Route
    model: str
    stream: bool
    body: bytes
    headers: RawHeaders
    request_id: str
    # The backends of its attempts, in order.
    tried: "list[Backend]"
    # The request target after the route's path: `?a=b`
    suffix: bytes = b""
    # The small fields of the body, without the prompt: `model`, `stream`, those of the route and of `Feature.fields`
    fields: Mapping[str, Any] = {}
    # For balancing: equal for requests with the same beginning of a prompt; "" without prefix affinity.
    prefix: str = ""
    authorization: bytes | None = None
    # `headers` as lines of a request head, if already rendered.
    lines: bytes | None = None
    # Span of the model's name in the body, quotes included, if already found.
    model_at: tuple[int, int] | None = None
    # The caller; None: no feature identifies callers.
    caller: "Caller | None" = None
    # The ASGI `state` of the request: data of features, under their own names. The Record has it, too.
    state: "Mapping[str, Any]" = {}
    # Headers for every answer to the request, whoever gives it; shared with the Account.
    answer_headers: "list[Extra]" = []
    # (host, port) of the client
    client: tuple[str, int] | None = None
    # What the client sent: all headers, also those that do not go to the backend, and notes of features
    head: "RequestHead | None" = None
    # Seconds of the loop's clock by which the answer must have ended; 0: by the timeouts of the model that runs.
    deadline: float = 0.0
    # Changes of the body, for the backend only. Last: a layer adds them by `tuple.__new__`.
    edits: "tuple[Edit, ...]" = ()


# Under which the state of a request has what features noted, whom they want told of its end, and, if models run for
# another one: the Model that was asked for, the one that answered, or was tried last, and the name of the one that a
# fallback answered for
NOTES, ENDED, ASKED, RAN, FELL = "notes", "ended", "asked", "ran", "fell"

# Under which the state of a request has the name of a field of its body that only some models may get
RESERVED = "reserved"


def answered_by(ran: "Model", asked: "Model") -> "tuple[Extra, ...]":
    """The header with the name of the model that answered, if it is not the one that was asked for."""
    return () if ran is asked else ((b"x-inference-model", ran.name.encode()),)


def note(state: "Mapping[str, Any]", name: str, value: Any) -> None:
    """Add a field to the Record of the request with this state (`Record.extra`), and so to its access line."""
    notes: dict[str, Any] | None = state.get(NOTES)
    if notes is None:
        # The state is the request's own dictionary.
        notes = state[NOTES] = {}  # type: ignore[index]
    notes[name] = value


def at_end(state: "Mapping[str, Any]", ended: "Callable[[Record], None]") -> None:
    """Call `ended` with the Record of the request with this state, after the annotators."""
    state.setdefault(ENDED, []).append(ended)  # type: ignore[attr-defined]


def header_of(call: Call, name: bytes) -> bytes:
    """The client's header of this name, in lower case; b"" without it. The first one counts."""
    return b"" if call.head is None else next((value for key, value in call.head.headers if key == name), b"")


class Caller(Protocol):
    """The identity that a feature derived from the credentials of a request head."""

    @property
    def id(self) -> str:
        """The public name for logs and records; never a secret."""
        ...

    def may_use(self, model: str) -> bool:
        """Whether this caller may see and use the model."""
        ...


class Usage(NamedTuple):
    """The tokens of one answer, as counted by its engine, in one shape for all APIs; None: not reported.

    `input_tokens` includes cached ones.
    """

    input_tokens: int | None = None
    cached_input_tokens: int | None = None
    output_tokens: int | None = None
    reasoning_tokens: int | None = None


class Reply:
    """An open answer. Code that gets one must return it or close it; closing is idempotent.

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
        self.extra: tuple[Extra, ...] = ()
        self.taps: tuple[Tap, ...] = ()
        self.filter: EventFilter | None = None
        self.ended = False
        # The model that counts it in flight
        self.model: Model | None = None
        self._on_end = on_end
        self._more: list[Callable[[Reply, Outcome], None]] | None = None

    def on_end(self, ended: "Callable[[Reply, Outcome], None]") -> None:
        """Call `ended` once, when the exchange ends; callbacks run in reverse order."""
        self._more = [ended, *(self._more or ())]

    async def aclose(self, outcome: Outcome) -> None:
        """End the exchange with the backend, if it has not ended."""
        if self.end(outcome):
            await self.stream.aclose()

    def end(self, outcome: Outcome) -> bool:
        """End the exchange: only here the in-flight counts fall. False: it had already ended.

        The caller must then close the stream, unless it is at its end.
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
        model = self.model
        if model is not None:
            model.in_flight -= 1
            if model.waiting:
                model.wake()
        if self._on_end is not None:
            self._on_end(self, outcome)
        return True

    def __repr__(self) -> str:
        by = "no backend" if self.backend is None else self.backend.label
        return f"<Reply {self.status} from {by}{' closed' if self.ended else ''}>"


class EventFilter(NamedTuple):
    """Removes single events of a stream: those that contain `marker`, unless `keeps` returns True.

    `keeps` gets the bytes of one whole event, and may record their content.
    """

    marker: bytes
    keeps: Callable[[bytes], bool]


class Direct(Protocol):
    """A server's short cuts for ASGI's `send`, without a coroutine. False: not possible now, use `send`."""

    # Writes one whole chunk of HTTP/1.1 as received, without new framing. None: not possible now, use `push`.
    frames: Callable[[bytes], None] | None

    def respond(self, status: int, lines: bytes, body: bytes) -> bool:
        """Send a whole answer to a POST. `lines`: the headers as lines of a head, with Content-Length."""
        ...

    def push(self, body: bytes, more_body: bool) -> bool: ...


class Send(Protocol):
    """The outbound seam: takes a Call to a Reply. A layer wraps one Send into another."""

    def __call__(self, call: Call, model: "Model") -> Awaitable[Reply]: ...


class Tap(Protocol):
    """Gets the bytes of an answer to the client; synchronous, must not raise, must not keep the bytes."""

    def start(self, status: int, headers: RawHeaders) -> None: ...
    def chunk(self, data: bytes) -> None: ...
    def end(self, outcome: Outcome) -> None: ...
