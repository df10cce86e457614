"""Which limit refuses a request, for how long, and the headers that say what is left of limits."""

from collections.abc import Iterable, Sequence

from inference_api.errors import RateLimited
from inference_api.features.limiting.plans import Plan, StreamLimit, Wants, WindowLimit
from inference_api.features.limiting.wording import KINDS, message
from inference_api.policy.rules import Rule

# Milliseconds: a stream may end at any time.
_NEXT_STREAM = 1000


def standing(plan: Plan, now: int) -> bytes:
    """The headers of a request for which nothing is taken, or everything is, as lines."""
    lines = b""
    for limits in ([limit for limit in plan.windows if not limit.place], plan.metered):
        if limits:
            left = [max(limit.amount - limit.window.used(now), 0) for limit in limits]
            place = min(range(len(limits)), key=lambda place: left[place] / limits[place].amount)
            lines += limits[place].lines(left[place], now)
    return lines


class Refusal:
    """A limit that refuses a request; `wait`: milliseconds."""

    def __init__(self, rule: Rule, amount: int, wanted: int, wait: int) -> None:
        self.rule = rule
        self.amount = amount
        self.wanted = wanted
        self.wait = wait

    def error(self) -> RateLimited:
        kind = KINDS.get(self.rule.unit, "tokens")
        return RateLimited(message(self.rule, self.amount, self.wanted, self.wait), kind, self.wait)


def refusal(windows: Iterable[WindowLimit], streams: Sequence[StreamLimit], wants: Wants, now: int) -> Refusal | None:
    """Of all limits that refuse the request, the one with the longest wait."""
    longest: Refusal | None = None
    for limit in windows:
        want = limit.wanted(wants)
        wait = limit.window.wait(limit.amount - want, now)
        if wait and (longest is None or wait > longest.wait):
            longest = Refusal(limit.rule, limit.amount, want, wait)
    for stream in streams:
        if stream.streams.used(now) >= stream.amount and (longest is None or longest.wait < _NEXT_STREAM):
            longest = Refusal(stream.rule, stream.amount, 1, _NEXT_STREAM)
    return longest
