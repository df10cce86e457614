"""What a fallback, or a member of a race or of a vote, takes from limits beside the request itself.

Only limits of models count: those of the caller are the request's own, and a request takes one limit once.
"""

from collections.abc import Callable
from typing import Any

from inference_api.errors import LimitsUnavailable, RouterError
from inference_api.features.delivery.records import Metered
from inference_api.features.limiting.amounts import Estimates
from inference_api.features.limiting.plans import Plan, StreamLimit, Used, Wants, give_back, settle, take
from inference_api.features.limiting.refusals import refusal
from inference_api.members import PARENT
from inference_api.models import Call, Reply, Send
from inference_api.routing.fleet import Model

# Under which the state of a request, or of a leg, has what its members have taken: Taken
MEMBERS = "limits_of_members"
# What one that failed has used: a request
_FAILED: Used = (1, 0, 0, 0)
Taken = tuple[Plan, Wants, int, tuple[StreamLimit, ...], Model]


class MemberLimits:
    """Takes for a member, and settles. `now`: milliseconds; `touch`: for a change of counters that are shared."""

    def __init__(
        self, estimates: Estimates, now: Callable[[], int], touch: Callable[[Plan], None] | None = None
    ) -> None:
        self._estimates = estimates
        self._now = now
        self._touch = touch

    async def send(self, send: Send, call: Call, model: Model, plan: Plan) -> Reply:
        """Raises RateLimited, LimitsUnavailable. `plan`: what the member has beside the request."""
        if plan.is_closed:
            raise LimitsUnavailable
        # In a race or vote the request is one, and so is its stream; a fallback is a request of its own model.
        is_leg = PARENT in call.state
        read, made = self._estimates.of(call, model) if plan.metered else (0, 0)
        wants = (0 if is_leg else 1, read + made, read, made)
        streams = plan.all_streams if call.stream and not is_leg else ()
        now = self._now()
        found = refusal(plan.windows, streams, wants, now)
        if found is not None:
            raise found.error()
        take(plan.windows, wants, now)
        for limit in streams:
            limit.streams.own += 1
        self._changed(plan)
        taken: Taken = plan, wants, now, streams, model
        all_taken = call.state.setdefault(MEMBERS, [])  # type: ignore[attr-defined]
        all_taken.append(taken)
        try:
            reply = await send(call, model)
        except RouterError as error:
            all_taken.remove(taken)
            if error.status == LimitsUnavailable.status:
                # The router itself has refused it.
                give_back(plan.windows, wants, now)
                self._release(plan, streams)
            else:
                self._end(taken, _FAILED)
            raise
        if reply.status >= 400:
            # At once: another model may answer, and this one run again within it.
            all_taken.remove(taken)
            self._end(taken, _FAILED)
        return reply

    def settle(self, state: Any, answered: str, metered: Metered) -> None:
        """Release what the members of a request, or a leg, have taken. `answered`: the name of the one with tokens."""
        for taken in state.get(MEMBERS, ()):
            model = taken[4]
            self._end(taken, used_of(metered) if model.name == answered or answered in model.members else _FAILED)

    def add(self, plan: Plan, metered: Metered, taken_at: int, fell: str | None) -> None:
        """Add tokens of a leg to what the request itself has taken; `fell`: the model that has no part in them."""
        limits = [one for one in plan.metered if one.rule.scope != "model" or one.rule.holder != fell]
        settle(limits, (0, 0, 0, 0), used_of(metered), taken_at, self._now)
        self._changed(plan)

    def _end(self, taken: Taken, used: Used) -> None:
        plan, wants, taken_at, streams, _ = taken
        settle(plan.metered, wants, used, taken_at, self._now)
        self._release(plan, streams)

    def _release(self, plan: Plan, streams: tuple[StreamLimit, ...]) -> None:
        for limit in streams:
            limit.streams.own -= 1
        self._changed(plan)

    def _changed(self, plan: Plan) -> None:
        if self._touch is not None:
            self._touch(plan)


def used_of(metered: Metered) -> Used:
    read, made = metered[0], metered[2]
    return 1, None if read is None or made is None else read + made, read, made
