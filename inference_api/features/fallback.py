"""`fallbacks`, `context_fallbacks`: models that answer in the place of one that cannot, before the first byte.

The second model is limited, admitted and counted as itself. Nothing is glued together: once a byte of an answer has
gone out, no other model continues it.
"""

import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from time import monotonic
from typing import Annotated, Any

import httpx
from pydantic import AfterValidator, Field

from inference_api.core import Core
from inference_api.errors import (
    NoBackend,
    Overloaded,
    RouterError,
    UpstreamReset,
)
from inference_api.feature import Feature, Switch
from inference_api.features.delivery.records import FAILED
from inference_api.members import Members, may_get
from inference_api.models import FELL, RAN, Call, Outcome, Reply, Send, header_of, note, of_status
from inference_api.observe.exposition import Family
from inference_api.observe.families import counter
from inference_api.observe.series import Count, Series
from inference_api.relay.answers import Readable
from inference_api.routing.backend import Backend
from inference_api.routing.entries import CatalogueEntry, EntryKey, ModelName
from inference_api.routing.fleet import Fleet, Model, may_use
from inference_api.routing.references import Refers
from inference_api.settings import Settings
from inference_api.upstream.prepare import Prepare
from inference_api.upstream.response import ResponseStream

# In the state of a request: which model runs, for which other one, and its attempts that failed
_OF_ATTEMPTS = (RAN, FELL, FAILED)
_OFF = b"x-inference-fallback"
_HEADER = b"x-inference-fallback"
# Statuses of a backend that say: not here, not now.
_STATUSES = frozenset({429, 502, 503, 504})
# How engines say that a prompt is longer than the context of the model. vLLM and OpenAI: 400, TGI: 422.
_REFUSALS = frozenset({400, 422})
_TOO_LONG = re.compile(
    rb'"context_length_exceeded"'  # OpenAI, and engines that follow it
    rb"|maximum context length"  # vLLM
    rb"|max_new_tokens` must be <="  # TGI
    rb"|longer than the model's context length"  # SGLang
    rb'|"exceed_context_size_error"',  # llama.cpp
)
# Bytes of an error that are searched
_LOOKED_AT = 16 * 1024


def _distinct(names: tuple[str, ...]) -> tuple[str, ...]:
    if len(set(names)) < len(names):
        raise ValueError("a name is given twice")
    return names


_Names = Annotated[tuple[ModelName, ...], Field(min_length=1, max_length=3), AfterValidator(_distinct)]
FALLBACKS: EntryKey[tuple[str, ...] | None] = EntryKey(
    "fallbacks", _Names | None, None, Refers(lambda names: names, "fallbacks")
)
CONTEXT_FALLBACKS: EntryKey[tuple[str, ...] | None] = EntryKey(
    "context_fallbacks", _Names | None, None, Refers(lambda names: names, "context_fallbacks")
)


def build(core: Core, settings: Settings) -> Feature:
    """Always built, and only on the way of models with fallbacks."""
    fallbacks = Fallbacks(core.fleet, core.members, core.prepare)
    return Feature("fallback", send=fallbacks.send, for_model=has_fallbacks, collect=fallbacks.collect)


def has_fallbacks(entry: CatalogueEntry) -> bool:
    return FALLBACKS.of(entry) is not None or CONTEXT_FALLBACKS.of(entry) is not None


class Fallbacks:
    """Sends a request to the next model in the list while none has answered."""

    def __init__(self, fleet: Fleet, members: Members, prepare: Prepare) -> None:
        self._fleet = fleet
        self._members = members
        self._prepare = prepare
        self._counts: Series[tuple[str, str, str], Count] = Series(
            lambda key: Count(), lambda key: key[0] in fleet.by_name and key[1] in fleet.by_name
        )

    def send(self, send: Send) -> Send:
        async def with_fallbacks(call: Call, model: Model) -> Reply:
            began = monotonic()
            try:
                reply = await send(call, model)
            except RouterError as error:
                reason = _reason(call, error)
                found = None if reason is None else await self._others(call, model, reason, began)
                if found is None:
                    raise
                return found
            # Nearly every answer
            if reply.status < 400:
                return reply
            try:
                reason = await _reason_of(reply, model)
                found = None if reason is None else await self._others(call, model, reason, began)
            except BaseException:
                await reply.aclose(Outcome.CLIENT_GONE)
                raise
            if found is None:
                return reply
            await reply.aclose(of_status(reply.status))
            return found

        return with_fallbacks

    async def _others(self, call: Call, model: Model, reason: str, began: float) -> Reply | None:
        """The answer of the first fallback that gives one, or None. `began`: loop time, for the one deadline of all."""
        if header_of(call, _OFF).lower() == b"off":
            return None
        call = call._replace(deadline=call.deadline or self._prepare.deadline(call, model, began))
        state: dict[str, Any] = call.state  # type: ignore[assignment]
        before = list(call.tried), {name: state[name] for name in _OF_ATTEMPTS if name in state}
        for place, member in self._listed(call, model, reason):
            # The Record has the attempts of the model that answers.
            _forget(call.tried, state)
            state[RAN], state[FELL] = member, model.name
            try:
                reply = await self._members.send(call, member)
            except RouterError as error:
                if call.tried and _reason(call, error) is None:
                    # It may have been executed. What no backend got is skipped: a limit, a budget, a route.
                    break
                continue
            if reply.status in _STATUSES:
                await reply.aclose(of_status(reply.status))
                continue
            reply.extra += ((_HEADER, b"%d" % place),)
            note(state, "fallback", place)
            self._counts[model.name, member.name, reason].count += 1
            return reply
        _forget(call.tried, state)
        call.tried.extend(before[0])
        state.update(before[1])
        return None

    def _listed(self, call: Call, model: Model, reason: str) -> Iterator[tuple[int, Model]]:
        """(place, fallback), of those that exist and that the caller may use."""
        is_context = reason == "context"
        names = (CONTEXT_FALLBACKS if is_context else FALLBACKS).of(model.entry) or ()
        for place, name in enumerate(names, 1):
            member = self._fleet.by_name.get(name)
            if member is None or not may_use(call.caller, member) or not may_get(call, member):
                continue
            if is_context and not _is_larger(member, model):
                continue
            yield place, member

    def collect(self) -> Iterator[Family]:
        if self._counts:
            yield from families({labels: cell.count for labels, cell in self._counts.snapshot().items()})


def families(counts: Mapping[tuple[str, str, str], int]) -> Iterator[Family]:
    """`counts`: by (model_name, to, reason)."""
    text = "Answers of another model than the one that was asked for, which could not give one."
    series = [(labels, float(count)) for labels, count in counts.items()]
    yield counter("fallbacks", text, ("model_name", "to", "reason"), series)


def _reason(call: Call, error: RouterError) -> str | None:
    """Why another model may answer, or None: the request failed by its own fault, or may have been executed."""
    if isinstance(error, NoBackend):
        return "connect_failed" if call.tried else "no_backend"
    if isinstance(error, Overloaded):
        return "overloaded"
    if error.outcome is Outcome.FIRST_BYTE_TIMEOUT and call.route.repeatable:
        return "first_byte_timeout"
    if isinstance(error, UpstreamReset) and call.route.repeatable:
        return "reset"
    return _BY_CODE.get(error.code)


# Errors of other features
_BY_CODE = {"model_loading": "no_backend", "upstream_auth_failed": "auth_failed"}


async def _reason_of(reply: Reply, model: Model) -> str | None:
    """The same, of an answer of a backend."""
    if reply.status in _STATUSES:
        return "status"
    if reply.status in _REFUSALS and CONTEXT_FALLBACKS.of(model.entry) is not None:
        if not isinstance(reply.stream, ResponseStream):
            reply.stream = Readable(reply.stream)
        body = b""
        # One that breaks off is the relay's to judge.
        with suppress(httpx.TransportError):
            while len(body) < _LOOKED_AT and len(more := await reply.stream.peek(len(body))) > len(body):
                body = more
        if _TOO_LONG.search(body):
            return "context"
    return None


def _forget(tried: list[Backend], state: dict[str, Any]) -> None:
    """Forget the attempts of a model: another one answers."""
    tried.clear()
    for name in _OF_ATTEMPTS:
        state.pop(name, None)


def _is_larger(member: Model, model: Model) -> bool:
    """Whether its context is larger, or may be."""
    return member.max_model_len is None or model.max_model_len is None or member.max_model_len > model.max_model_len


FEATURE = Switch(build, keys=(FALLBACKS, CONTEXT_FALLBACKS))
