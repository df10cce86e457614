"""How features run other models for a request: a variant, a fallback, a member of a race or of a vote."""

from collections.abc import Awaitable
from typing import Any, Protocol

from inference_api.models import NOTES, RAN, RESERVED, Call, Reply
from inference_api.routing.fleet import Model

# Under which the state of a leg has that of its request
PARENT = "parent"
# Under which the state of a shadow has that it is one: it has no request, and takes no limits and no budget.
SHADOW = "shadow"


class _Chains(Protocol):
    def send(self, call: Call, model: Model) -> Awaitable[Reply]: ...
    def variant(self, call: Call, model: Model) -> Awaitable[Reply]: ...
    def member(self, call: Call, model: Model) -> Awaitable[Reply]: ...


class Members:
    """Sends a Call through the layers of another model. `chains` is set when all features are built."""

    chains: _Chains

    def variant(self, call: Call, model: Model) -> Awaitable[Reply]:
        """With all of its layers but those that only what a client asks for has."""
        return self.chains.variant(call, model)

    def send(self, call: Call, model: Model) -> Awaitable[Reply]:
        """With its `Feature.member` layers only."""
        return self.chains.member(call, model)


def leg_of(call: Call) -> Call:
    """The Call of one of several runs of a request: it has attempts and a state of its own."""
    return call._replace(tried=[], state={PARENT: call.state}, answer_headers=[])


def request_state(state: "dict[str, Any] | Any") -> Any:
    """The state of the request itself, from that of a leg."""
    while PARENT in state:
        state = state[PARENT]
    return state


def may_get(call: Call, model: Model) -> bool:
    """Whether the model may get all fields of the body: the one that the client asked for may."""
    return RESERVED not in request_state(call.state) or model.entry.engine_fields == "allow"


def is_noted(state: "dict[str, Any] | Any", name: str) -> bool:
    """Whether the request has a note of this name: in the state of a leg, or in that of what it runs for."""
    while name not in state.get(NOTES, ()):
        if PARENT not in state:
            return False
        state = state[PARENT]
    return True


def is_shadow(state: "dict[str, Any] | Any") -> bool:
    """Whether a Call with this state is, or runs for, a copy that no client has asked for."""
    return SHADOW in request_state(state)


def take_over(call: Call, leg: Call, model: Model) -> None:
    """Make what `leg` did on `model` the request's own: its answer is the answer."""
    call.tried.extend(leg.tried)
    call.answer_headers.extend(leg.answer_headers)
    state: dict[str, Any] = call.state  # type: ignore[assignment]
    state[RAN] = model
    for name, value in leg.state.items():
        if name == PARENT:
            continue
        mine = state.get(name)
        if name == NOTES:
            state[NOTES] = {**(mine or {}), **value}
        elif isinstance(value, list) and isinstance(mine, list):
            mine += value
        else:
            state[name] = value
