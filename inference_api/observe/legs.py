"""Legs: runs of models beside a request's own, which no client got. Each has a Record for the parts that want it."""

import logging
from collections.abc import Callable, Mapping, Sequence
from time import perf_counter
from types import MappingProxyType
from typing import Any

from inference_api.errors import RouterError
from inference_api.models import ENDED, NOTES, RAN, Call, Outcome, Reply
from inference_api.observe.account import NO_COUNTS, Annotate, Record
from inference_api.relay.usage import Counts
from inference_api.routing.fleet import Fleet, Model

logger = logging.getLogger(__name__)

# Field of `Record.extra`: race, vote, hedge or shadow
KIND = "kind"
# Kinds of legs that the caller pays for
BILLED = frozenset({"race", "vote"})
_NOTHING: Mapping[str, Any] = MappingProxyType({})


class Legs:
    """Makes the Record of a leg, and gives it to `parts`, in order. `fleet` has the models that clients ask for."""

    def __init__(self, fleet: Fleet, clock: Callable[[], float] = perf_counter) -> None:
        self.parts: Sequence[Annotate] = ()
        self._fleet = fleet
        self.clock = clock

    def end(
        self,
        kind: str,
        call: Call,
        model: Model,
        began: float,
        outcome: Outcome,
        reply: Reply | None = None,
        error: RouterError | None = None,
        tokens: Counts = NO_COUNTS,
        events: int = 0,
    ) -> None:
        """A leg has ended: `call` ran on `model` from `began`, in seconds of the clock."""
        if not self.parts:
            return
        extra: dict[str, Any] = {KIND: kind, **call.state.get(NOTES, _NOTHING)}
        status, code = (0 if reply is None else reply.status), None
        if error is not None:
            status, code = error.status, error.code
        record = Record(
            model_name=call.state.get(RAN, model).name,
            model=self._fleet.by_name.get(call.model),
            backend=_backend(call, reply),
            status=status,
            outcome=outcome,
            code=code,
            took=self.clock() - began,
            tokens=tokens,
            events=events,
            extra=extra,
            answered=0 if reply is None else reply.status,
            **_facts(call),
        )
        ended = [lambda record, extra, end=end: end(record) for end in call.state.get(ENDED, ())]
        for part in (*self.parts, *ended):
            try:
                part(record, extra)
            except Exception:
                logger.exception("a part failed", extra={"fields": {"request_id": record.request_id}})


def _backend(call: Call, reply: Reply | None) -> str | None:
    backend = None if reply is None else reply.backend
    if backend is None and call.tried:
        backend = call.tried[-1]
    return None if backend is None else backend.label


def _facts(call: Call) -> dict[str, Any]:
    """What a Record has of its Call. No client got an answer, so there are no bytes, and no first token."""
    return {
        "request_id": call.request_id,
        "route": call.route.label,
        "asked": call.model,
        "attempts": len(call.tried),
        "stream": call.stream,
        "first": None,
        "overhead": None,
        "size": 0,
        "caller": call.caller,
        "client": call.client,
        "path": call.route.path,
        "state": call.state,
        "body_size": len(call.body),
        "fields": call.fields,
        "accepted": 0.0,
    }
