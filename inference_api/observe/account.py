"""The Account of one request while it is processed, and the Record that the sinks get at its end."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

from inference_api.errors import RouterError
from inference_api.models import CLIENT_GONE, INTERNAL_ERROR, OK, RAN, Call, Caller, Extra, Outcome, Reply
from inference_api.relay.relay import Relay
from inference_api.relay.usage import Counts, counts
from inference_api.routing.fleet import Model

if TYPE_CHECKING:
    from inference_api.http.head import RequestHead
    from inference_api.server.cycle import Cycle

# The model label of a request whose model is not in the catalogue
UNKNOWN = "unknown"
# Under which the state of a rejected request has the reason, if the code of the error does not say it
REJECTED = "rejected"
_NOTHING: Mapping[str, Any] = MappingProxyType({})
NO_COUNTS: Counts = (None, None, None, None)


class Record(NamedTuple):
    """The facts of a finished request, also of a rejected one. Contains no prompt, answer or secret.

    Times are seconds: `took` from the request head to the end of the answer, `first` to the first token of a stream,
    `overhead` from the whole request to its first attempt. `status` is the one that the client got, 0 if none;
    `tokens`: (input, cached input, output, reasoning) as counted by the engine, None if not reported. `model` is the
    one that was asked for, `model_name` the one that answered, or was tried last.
    """

    request_id: str
    route: str
    model_name: str
    asked: str | None
    backend: str | None
    status: int
    outcome: Outcome
    attempts: int
    stream: bool
    code: str | None
    took: float
    first: float | None
    overhead: float | None
    tokens: Counts
    events: int
    size: int
    caller: Caller | None
    model: Model | None
    # From the server: (host, port) of the client, and the path as requested
    client: tuple[str, int] | None
    path: str
    # More fields of the access line, also from `Feature.annotate`, and `models.note`
    extra: Mapping[str, Any]
    state: Mapping[str, Any]
    # Bytes of the request body, and its small fields: those of the route and of `Feature.fields`
    body_size: int
    fields: Mapping[str, Any]
    # The status that a backend answered with, 0 if none did; the client may have got another one.
    answered: int
    # From the request head until the request was accepted: the first attempt follows at once, or after a queue.
    accepted: float | None

    @property
    def cost(self) -> int | None:
        """10^-9 of CURRENCY; None: unknown, or no feature computes it."""
        found: int | None = self.extra.get("cost_nanos")
        return found


Sink = Callable[[Record], None]
# Adds fields to `Record.extra`, the second argument
Annotate = Callable[[Record, dict[str, Any]], None]


def shown_status(status: int, outcome: Outcome) -> int:
    """The status for metrics and log: nginx's 499 if the client disconnected."""
    return 499 if outcome is CLIENT_GONE else status


class Account:
    """The notes of one request, written by every stage. `end` makes the Record, once.

    `clock` gives seconds.
    """

    # Slots, all set at once: reading a default of the class costs ten times as much.
    __slots__ = (
        "_accepted", "_received", "answer_headers", "asked", "began", "call", "caller", "client", "clock", "code",
        "cycle", "extra", "head", "model", "model_name", "outcome", "path", "relay", "reply", "request_id", "route",
        "silent", "size", "state", "status", "stream",
    )  # fmt: skip

    def __init__(
        self,
        request_id: str,
        clock: Callable[[], float],
        scope: Mapping[str, Any],
        head: "RequestHead",
        cycle: "Cycle | None" = None,
    ) -> None:
        self.request_id = request_id
        self.clock = clock
        self.began = self._received = clock()
        # Not the scope itself, which refers to this object: avoids a reference cycle.
        self.client: tuple[str, int] | None = scope.get("client")
        self.path: str = scope["path"]
        self.state: Mapping[str, Any] = scope["state"]
        self.head = head
        # The Cycle of the router's own server; `receive` and `send` are its methods, unless a layer wraps them.
        self.cycle = cycle
        # Defaults. Only names of the catalogue become labels, so that clients cannot make series.
        self.route = "other"
        self.model_name = UNKNOWN
        self.asked: str | None = None
        self.stream = False
        self.status = self.size = 0
        self.code: str | None = None
        self.caller: Caller | None = None
        self.call: Call | None = None
        self.model: Model | None = None
        self.reply: Reply | None = None
        self.relay: Relay | None = None
        self.outcome = INTERNAL_ERROR
        self.extra: Mapping[str, Any] = _NOTHING
        # Headers that a layer adds to the answer, whoever gives it: a backend, a page, or the router with an error.
        self.answer_headers: list[Extra] = []
        # Probes: neither counted nor logged.
        self.silent = False
        self._accepted: float | None = None

    def received(self) -> None:
        """Note that the body is complete: its arrival does not count as overhead."""
        self._received = self.clock()

    def accepted(self, call: Call, model: Model) -> None:
        """Note a valid request, and its model."""
        self.call = call
        self.model = model
        self._accepted = self.clock()

    @property
    def started(self) -> bool:
        """Whether an answer to the client has begun."""
        return self.status > 0 if self.relay is None else self.relay.started

    def responded(self, status: int, size: int) -> None:
        """Note an answer of a layer or page, with a body of `size` bytes."""
        self.status, self.size = status, size
        self.outcome = OK if status < 400 else Outcome.REFUSED

    def rejected(self, error: RouterError, status: int, size: int) -> None:
        """Note an error answer of the router, of `size` bytes."""
        self.outcome, self.status, self.size = error.outcome, status, size
        self.relay = None
        self.code = error.code
        if error.reason:
            self.state[REJECTED] = error.reason  # type: ignore[index]
        if error.logged:
            self.extra = {**self.extra, **error.logged}

    def end(self) -> Record:
        """Make the Record, at the end of the answer."""
        relay, reply, call, first, events, tokens = self.relay, self.reply, self.call, None, 0, NO_COUNTS
        took = self.clock() - self.began
        attempts, backend, body_size, fields, answered = 0, None, 0, _NOTHING, 0
        if call is not None:
            # By their places, which costs less.
            body_size, fields, tried = len(call[3]), call[8], call[6]
            if tried:
                attempts, backend = len(tried), tried[-1].label
        if reply is not None:
            answered = reply.status
            backend = None if reply.backend is None else reply.backend.label
        if relay is not None and relay.started:
            self.status, self.size, events = relay.status, relay.size, relay.streamed_events
            usage = relay.usage()
            if usage is not None:
                tokens = counts(usage)
            if self.stream and relay.first_at:
                first = relay.first_at - self.began
        accepted = self._accepted
        overhead = None if accepted is None else accepted - self._received
        state, model_name = self.state, self.model_name
        if RAN in state:
            model_name = state[RAN].name
        facts = (
            self.request_id, self.route, model_name, self.asked, backend, self.status, self.outcome, attempts,
            self.stream, self.code, took, first, overhead, tokens, events, self.size, self.caller, self.model,
            self.client, self.path, self.extra, state, body_size, fields, answered,
            None if accepted is None else accepted - self.began,
        )  # fmt: skip
        # Avoids the NamedTuple's constructor, which is a call in Python.
        return tuple.__new__(Record, facts)
