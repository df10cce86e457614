"""Which limits apply to a request, and the one step that takes from all of them or from none.

A Plan is made once for a caller, an address and a model, and used for all their requests.
"""

from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from hashlib import sha256
from ipaddress import IPv6Address, ip_address

from inference_api.features.limiting.windows import Store, Streams, Window
from inference_api.policy.rules import Rule, matcher

# Places of the units in what a request wants
_PLACES = {"requests": 0, "tokens": 1, "input_tokens": 2, "output_tokens": 3}
Wants = tuple[int, int, int, int]
# What a request has used, None: not known
Used = tuple[int, int | None, int | None, int | None]
# What a request without token limits wants
ONE: Wants = (1, 0, 0, 0)


class WindowLimit:
    """One limit of one holder, of requests or tokens, and its counter.

    `amount`: as it is enforced, perhaps a share of the rule's.
    """

    __slots__ = ("amount", "header", "per", "place", "precise", "rule", "window")

    def __init__(self, rule: Rule, amount: int, window: Window, precise: bool) -> None:
        self.rule = rule
        self.amount = amount
        self.window = window
        self.per = window.per
        self.place = _PLACES[rule.unit]
        self.precise = precise
        self.header = b"%d" % amount


class StreamLimit:
    """The same for streams."""

    __slots__ = ("amount", "precise", "rule", "streams")

    def __init__(self, rule: Rule, amount: int, streams: Streams, precise: bool) -> None:
        self.rule = rule
        self.amount = amount
        self.streams = streams
        self.precise = precise


class Plan:
    """The limits of a request, by what they count; `windows`: those of requests and of tokens.

    `era`: in which it was made, see Limiter.
    """

    __slots__ = ("era", "is_empty", "reads_input", "reads_output", "requests", "streams", "tokens", "windows")

    def __init__(self, windows: Sequence[WindowLimit], streams: Sequence[StreamLimit], era: int) -> None:
        self.era = era
        self.requests = tuple(limit for limit in windows if limit.place == 0)
        self.tokens = tuple(limit for limit in windows if limit.place)
        self.windows = self.requests + self.tokens
        self.streams = tuple(streams)
        self.is_empty = not windows and not streams
        self.reads_input = any(limit.rule.unit != "output_tokens" for limit in self.tokens)
        self.reads_output = any(limit.rule.unit != "input_tokens" for limit in self.tokens)


# The name of a counter that limits share, the rule with the smallest of their amounts, and whether one is precise
Shared = tuple[str, Rule, bool]


def take(limits: tuple[WindowLimit, ...], wants: Wants, now: int) -> tuple[WindowLimit, int] | None:
    """Take from all of `limits`, or from none: then None.

    Returns the limit with the smallest remaining share, and what remains of it.
    """
    lowest, found, rest = 2.0, None, 0
    for limit in limits:
        window, per, amount, want = limit.window, limit.per, limit.amount, wants[limit.place]
        elapsed = now - window.start
        if not 0 <= elapsed < per:
            elapsed = window.roll(now)
        # So a large request passes an empty window.
        if want > amount:
            want = amount
        window.current = used = window.current + want
        if previous := window.previous:
            # `windows.faded`
            used -= previous * (elapsed - per) // per
        left = amount - used
        if left < 0:
            give_back(limits[: limits.index(limit) + 1], wants, now)
            return None
        share = left / amount
        if share < lowest:
            lowest, found, rest = share, limit, left
    return (found, rest) if found is not None else None


def give_back(limits: Iterable[WindowLimit], wants: Wants, taken_at: int) -> None:
    """Undo `take`."""
    for limit in limits:
        limit.window.give_back(min(wants[limit.place], limit.amount), taken_at)


def settle(limits: Iterable[WindowLimit], wants: Wants, used: Used, taken_at: int, now: int) -> None:
    """Put what was used in the place of what was taken; more than that counts in the window of `now`."""
    for limit in limits:
        amount = used[limit.place]
        if amount is None:
            continue
        more = amount - min(wants[limit.place], limit.amount)
        if more < 0:
            limit.window.give_back(-more, taken_at)
        elif more:
            limit.window.roll(now)
            limit.window.current += more


class Plans:
    """Makes Plans of rules, with the counters of `store`. `routers`: among which each limit is divided."""

    def __init__(self, store: Store, routers: int = 1) -> None:
        self._store = store
        self.routers = routers

    def make(self, rules: Iterable[Rule], model: str, address: str, era: int = 0) -> Plan:
        """The Plan of requests by one caller, from one address, for one model."""
        windows: list[WindowLimit] = []
        streams: list[StreamLimit] = []
        for name, rule, precise in named(rules, model, address):
            amount = max(rule.amount // self.routers, 1)
            if rule.unit == "streams":
                streams.append(StreamLimit(rule, amount, self._store.streams(name), precise))
            else:
                windows.append(WindowLimit(rule, amount, self._store.window(name, rule.per * 1000), precise))
        return Plan(windows, streams, era)


def named(rules: Iterable[Rule], model: str, address: str) -> Iterator[Shared]:
    """The rules that apply, one for each counter: limits with the same name share it, and the smallest holds."""
    found: dict[str, Shared] = {}
    for rule in rules:
        holder = _holder(rule, model, address)
        if holder is None or (rule.models is not None and not matcher(rule.models)(model)):
            continue
        name = _name(rule, holder)
        before = found.get(name)
        if rule.scope == "model":
            rule = rule._replace(shown=f"model {model!r}")
        precise = rule.precise or (before is not None and before[2])
        if before is not None and before[1].amount <= rule.amount:
            rule = before[1]
        found[name] = name, rule, precise
    yield from found.values()


@lru_cache(4096)
def address_of(host: str) -> str:
    """The address by which a client is counted: IPv4 as such, also if mapped into IPv6; of IPv6 the /64."""
    try:
        address = ip_address(host.partition("%")[0])
    except ValueError:
        # A Unix socket, or a test
        return host
    if isinstance(address, IPv6Address):
        if address.ipv4_mapped is not None:
            return str(address.ipv4_mapped)
        return f"{IPv6Address(int(address) >> 64 << 64)}/64"
    return str(address)


def _holder(rule: Rule, model: str, address: str) -> str | None:
    """Whose counter it is; None: the rule is not for this request."""
    if rule.scope in ("address", "anonymous"):
        return address
    if rule.scope == "model":
        return model if rule.holder in ("", model) else None
    return rule.holder


def _name(rule: Rule, holder: str) -> str:
    """The name of the counter, unique by scope, holder, unit, period and models."""
    models = "" if rule.models is None else f":{sha256(','.join(sorted(rule.models)).encode()).hexdigest()[:8]}"
    if rule.unit == "streams":
        return f"{rule.scope}:{holder}{models}"
    return f"{rule.scope}:{holder}:{rule.unit}:{rule.per}{models}"
