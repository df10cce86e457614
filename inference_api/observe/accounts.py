"""What is noted about one request from its head to the end of its answer: the tap that feeds metrics and access log."""

from collections.abc import Callable, Mapping, Sequence
from time import perf_counter
from typing import Any

from inference_api.errors import RouterError
from inference_api.models import Outcome, RawHeaders, Reply
from inference_api.observe.log import Fields
from inference_api.observe.metrics import Metrics
from inference_api.relay.relay import Relay
from inference_api.relay.usage import Counts, counts
from inference_api.routing.backend import Backend, Model

_UNKNOWN: Counts = (None, None, None, None)
# The address and port that a request came from
Client = tuple[str, int]


class Accounts:
    """Makes the Account of each request; holds what they all write to."""

    def __init__(
        self, metrics: Metrics, access_log: Callable[[Fields], None] | None, clock: Callable[[], float] = perf_counter
    ) -> None:
        self.metrics = metrics
        self.access_log = access_log
        self.clock = clock

    def begin(self, route: str, client: Client | None = None) -> "Account":
        return Account(self, route, client)


class Account:
    """A Tap. Times are seconds of a monotonic clock; `end` counts and logs, once."""

    __slots__ = (
        "_accounts",
        "_began",
        "_first",
        "_model",
        "_received",
        "_tried",
        "attempts",
        "backend",
        "body_bytes",
        "client",
        "code",
        "events",
        "model_name",
        "more",
        "request_id",
        "route",
        "status",
        "stream",
        "usage",
    )  # fmt: skip

    def __init__(self, accounts: Accounts, route: str, client: Client | None = None) -> None:
        self._accounts = accounts
        self._began = self._received = accounts.clock()
        self._first = 0.0
        self._model: Model | None = None
        self._tried: Sequence[Backend] = ()
        self.route = route
        self.request_id = ""
        self.client = client
        # Only names of the catalogue become labels, so that clients cannot make series.
        self.model_name = "unknown"
        self.stream = False
        self.status = 0
        self.code: str | None = None
        # What the line has beside its usual fields
        self.more: Mapping[str, str] | None = None
        self.backend: str | None = None
        self.attempts = 0
        self.body_bytes = 0
        self.events = 0
        # As the engine reported it; `usage_of` reads it.
        self.usage: Mapping[str, Any] | None = None

    def received(self) -> None:
        """The rest of the body took its time to come; that time is not the router's."""
        self._received = self._accounts.clock()

    def resolved(self, model: Model, tried: Sequence[Backend] = ()) -> None:
        """The request is now one of this model's; `tried` has the backends of its attempts as they are made."""
        self._model = model
        self._tried = tried
        self.model_name = model.name
        model.in_flight += 1
        self._accounts.metrics.overhead(self.route, self._accounts.clock() - self._received)

    def answered(self, reply: Reply) -> None:
        """A backend has answered; what follows is its body."""
        self.backend = None if reply.backend is None else reply.backend.label
        self.attempts = reply.attempts

    def interrupted(self, relay: Relay | None) -> Outcome:
        """Somebody does not want it any more."""
        if relay is not None:
            return relay.outcome
        if self._tried:
            self.backend, self.attempts = self._tried[-1].label, len(self._tried)
        return Outcome.CLIENT_GONE

    def refused(self, error: RouterError, status: int, size: int) -> None:
        """The router itself answers, with an error of `size` bytes."""
        self.status, self.body_bytes = status, size
        self.rejected(error)
        if error.attempts:
            self.attempts, self.backend = error.attempts, error.backend

    def rejected(self, error: RouterError) -> None:
        """Why the router itself answers as it does; the answer is still to be seen."""
        self.code = error.code
        if error.logged:
            self.more = {**(self.more or {}), **error.logged}
        self._accounts.metrics.refused(self.model_name, error.code)

    def finished(self, relay: Relay | None) -> None:
        """Take from the relay what was passed on; nothing if the router itself had to answer."""
        if relay is not None and relay.started:
            self.status = relay.status
            self.usage = relay.usage()
            self.events = relay.streamed_events
            self.body_bytes = relay.size
            self._first = relay.first_at

    # Tap

    def start(self, status: int, headers: RawHeaders) -> None:
        self.status = status

    def chunk(self, data: bytes) -> None:
        if not self._first:
            self._first = self._accounts.clock()
        self.body_bytes += len(data)

    def end(self, outcome: Outcome) -> None:
        if self._model is not None:
            self._model.in_flight -= 1
            self._model = None
        took = self._accounts.clock() - self._began
        metrics, status = self._accounts.metrics, self.status
        if outcome is not Outcome.OK:
            if 0 < status < 300:
                metrics.stream_ended(self.model_name, outcome)
            if outcome is Outcome.CLIENT_GONE:
                # nginx's word for a client that did not wait; the client itself never sees it.
                status = 499
        metrics.request(self.model_name, self.route, status, self.stream, took)
        first = self._first - self._began if self._first and self.stream else None
        if first is not None and self.status < 300:
            metrics.first_token(self.model_name, self.route, first)
        tokens = self._count_tokens(took, first)
        if self._accounts.access_log is not None:
            self._accounts.access_log(self._line(outcome, status, took, first, tokens))

    def _count_tokens(self, took: float, first: float | None) -> Counts:
        metrics, usage = self._accounts.metrics, self.usage
        if usage is None:
            if self.events:
                metrics.tokens(self.model_name, "output_estimate", self.events)
            return _UNKNOWN
        tokens = prompt, cached, completion, _ = counts(usage)
        if prompt:
            metrics.tokens(self.model_name, "input", prompt)
        if cached:
            metrics.tokens(self.model_name, "cached_input", cached)
        if completion:
            metrics.tokens(self.model_name, "output", completion)
            if first is not None and completion > 1:
                metrics.per_token(self.model_name, self.route, (took - first) / (completion - 1))
        return tokens

    def _line(self, outcome: Outcome, status: int, took: float, first: float | None, tokens: Counts) -> Fields:
        prompt, cached, completion, _ = tokens
        line = {
            "request_id": self.request_id,
            "route": self.route,
            "model": self.model_name,
            "backend": self.backend,
            "client": None if self.client is None else self.client[0],
            "status": status,
            # `value` goes through a descriptor that costs more than the rest of the line.
            "outcome": outcome._value_,
            "attempts": self.attempts,
            "stream": self.stream,
            "latency_ms": int(took * 1e5) / 100,
            "ttft_ms": None if first is None else int(first * 1e5) / 100,
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "bytes": self.body_bytes,
        }
        if self.code is not None:
            line["code"] = self.code
        if self.more is not None:
            line.update(self.more)
        if cached is not None:
            line["cached_tokens"] = cached
        if self.usage is None and self.events:
            line["events"] = self.events
        return line
