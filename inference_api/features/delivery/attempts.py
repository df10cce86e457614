"""Notes the attempts of each request, for the `attempt_details` of its usage record."""

from collections.abc import Callable, MutableMapping
from time import perf_counter
from typing import Any, cast

from inference_api.features.delivery.records import TRIES, Try
from inference_api.models import Outcome, Reply
from inference_api.upstream.attempt import Attempt, SendAttempt
from inference_api.upstream.failures import outcome_of


def noting(clock: Callable[[], float] = perf_counter) -> Callable[[SendAttempt], SendAttempt]:
    """Wraps each attempt. `clock`: the account's."""

    def wrap(send: SendAttempt) -> SendAttempt:
        async def noted(attempt: Attempt) -> Reply:
            state = cast(MutableMapping[str, Any], attempt[0].state)
            tries: list[Try] | None = state.get(TRIES)
            if tries is None:
                tries = state[TRIES] = []
            label, start = attempt[2].label, clock()
            place = len(tries)
            try:
                reply = await send(attempt)
            except BaseException as exc:
                tries.append((label, start, outcome_of(exc)._value_, 0, clock()))
                raise
            # Of a good answer the end is that of the request: nothing is kept, and nothing called.
            tries.append((label, start, None, reply.status, 0.0))
            if reply.status >= 400:
                reply.on_end(_ending(tries, place, clock))
            return reply

        return noted

    return wrap


def _ending(tries: list[Try], place: int, clock: Callable[[], float]) -> Callable[[Reply, Outcome], None]:
    def ended(reply: Reply, outcome: Outcome) -> None:
        label, start, _, status, _ = tries[place]
        tries[place] = label, start, outcome._value_, status, clock()

    return ended
