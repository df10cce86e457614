"""Prepares a call for its backends: the body, the header lines and the limits that all its attempts share."""

from collections.abc import Collection, Mapping
from time import monotonic
from typing import NamedTuple

from inference_api.headers import header_lines, without_lines
from inference_api.models import Call
from inference_api.routing.entries import CatalogueEntry
from inference_api.routing.fleet import Model
from inference_api.upstream.credentials import with_token
from inference_api.upstream.deadlines import Timeout
from inference_api.upstream.limits import Limits
from inference_api.upstream.rewrite import Content, edited, rewrite_json, size_of


class Prepared(NamedTuple):
    """The parts that all attempts of a call share.

    `lines`: the headers as lines of a head, without Host and X-Request-Id, which each attempt adds.
    `deadline`: loop time. `key`: for the balancer, see routing.affinity.
    """

    body: Content
    lines: bytes
    timeout: Timeout
    deadline: float
    key: str


class _Known(NamedTuple):
    """What follows from an entry; `fixed`: the lines of its `headers`, if it has any."""

    entry: CatalogueEntry
    timeout: Timeout
    fixed: bytes | None


class Prepare:
    """Makes the Prepared of a Call. `tokens`: maps the name of a variable, or the path of a file, to a token."""

    def __init__(self, limits: Limits, tokens: Mapping[str, str]) -> None:
        self._limits = limits
        self._tokens = tokens
        # Cached per model, until its entry changes
        self._known: dict[str, _Known] = {}

    def __call__(self, call: Call, model: Model) -> Prepared:
        entry = model.entry
        # Engines do not know the router's aliases.
        served = entry.served_model_name or model.name
        body: Content = call.body
        if served != call.model:
            body = _renamed(call, served)
        elif call.edits:
            body = edited(call.body, call.edits)
        deadline = call.deadline or self.deadline(call, model)
        size = len(body) if isinstance(body, bytes) else size_of(body)
        known = self._known.get(model.name)
        if known is None or known[0] is not entry:
            known = self._learn(model)
        lines = self._lines(call, entry, size)
        if known[2] is not None:
            lines = without_lines(lines, entry.headers) + known[2]
        return tuple.__new__(Prepared, (body, lines, known[1], deadline, call.prefix))

    def deadline(self, call: Call, model: Model, began: float | None = None) -> float:
        """Seconds of the loop's clock by which an answer that is asked for now, or at `began`, must have ended."""
        total = self._limits.total
        if call.stream:
            total = self._limits.stream_total
        elif model.entry.timeouts.total is not None:
            total = model.entry.timeouts.total
        # The clock of both event loops; asking for the running loop is a system call in Python 3.11.
        return (monotonic() if began is None else began) + total

    def retain(self, models: Collection[str]) -> None:
        """Forget all models but these, by name."""
        for name in self._known.keys() - models:
            del self._known[name]

    def _lines(self, call: Call, entry: CatalogueEntry, size: int) -> bytes:
        lines = call.lines
        if entry.priority != "client":
            lines = _prioritised(call, entry.priority)
        elif lines is None:
            lines = header_lines(call.headers)
        lines = b"accept-encoding: identity\r\ncontent-length: %d\r\n%b" % (size, lines)
        credentials = entry.credentials
        if credentials is not None:
            if credentials == "passthrough":
                if call.authorization is not None:
                    lines += header_lines([(b"authorization", call.authorization)])
            else:
                lines = with_token(lines, credentials, self._tokens.get(credentials.source))
        return lines

    def _learn(self, model: Model) -> _Known:
        limits, own, headers = self._limits, model.entry.timeouts, model.entry.headers
        timeout = Timeout(own.connect or limits.connect, own.first_byte or limits.first_byte, own.idle or limits.idle)
        pairs = [(name.encode("ascii"), value.encode("ascii")) for name, value in headers.items()]
        known = self._known[model.name] = _Known(model.entry, timeout, header_lines(pairs) if pairs else None)
        return known


def _renamed(call: Call, served: str) -> Content:
    if not call.route.multipart:
        return rewrite_json(call.body, served, call.model_at, call.edits)
    return call.body if call.model_at is None else edited(call.body, [(call.model_at, served.encode())])


def _prioritised(call: Call, priority: str | int) -> bytes:
    """The header overrides the body's `priority` in vLLM, so the body stays unchanged."""
    if not isinstance(priority, int):
        # Callers without a key, and those that are to be ignored, have the same.
        priority = int(getattr(call.caller, "priority", 0)) if priority == "caller" else 0
    own = (b"x-vllm-priority", b"%d" % priority)
    return header_lines([own, *(pair for pair in call.headers if pair[0] != own[0])])
