"""Which limits apply to a request, and the one step that takes from all of them or from none.

A Plan is made once for a caller, an address and a model, and used for all their requests.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from hashlib import sha256
from ipaddress import IPv6Address, ip_address

from inference_api.features.limiting.windows import Store, Streams, Window
from inference_api.features.limiting.wording import FRACTIONS, SECONDS, go_duration, prepare
from inference_api.policy.rules import Rule, matcher

# Places of the units in what a request wants
_PLACES = {"requests": 0, "tokens": 1, "input_tokens": 2, "output_tokens": 3}
Wants = tuple[int, int, int, int]
# x-ratelimit-limit-requests: 600, and so on; rendered for each request, so in one step
_LINES = b"x-ratelimit-limit-UNIT: %d\r\nx-ratelimit-remaining-UNIT: %%d\r\nx-ratelimit-reset-UNIT: %%b%%bs\r\n"
# What a request has used, None: not known
Used = tuple[int, int | None, int | None, int | None]
# What a request without token limits wants
ONE: Wants = (1, 0, 0, 0)


class WindowLimit:
    """One limit of one holder, of requests or tokens, and its counter.

    `amount`: as it is enforced, perhaps a share of the rule's.
    """

    __slots__ = ("amount", "per", "place", "precise", "rule", "template", "window")

    def __init__(self, rule: Rule, amount: int, window: Window, precise: bool) -> None:
        self.rule = rule
        self.amount = amount
        self.window = window
        self.per = window.per
        self.place = _PLACES[rule.unit]
        self.precise = precise
        # The percent signs are for what is left, and for seconds and fraction of the time until all is.
        self.template = _LINES.replace(b"UNIT", b"tokens" if self.place else b"requests") % amount

    def imprecise(self) -> "WindowLimit":
        return WindowLimit(self.rule, self.amount, self.window, precise=False)

    def lines(self, left: int, now: int) -> bytes:
        """The headers that say what is left, as lines."""
        reset = go_duration(self.window.reset(now))
        return self.template % (left, reset[:-1], b"")

    def wanted(self, wants: Wants) -> int:
        """What a request takes of it: at most all, so that a large request passes an empty window."""
        return min(wants[self.place], self.amount)


class StreamLimit:
    """The same for streams."""

    __slots__ = ("amount", "precise", "rule", "streams")

    def __init__(self, rule: Rule, amount: int, streams: Streams, precise: bool) -> None:
        self.rule = rule
        self.amount = amount
        self.streams = streams
        self.precise = precise

    def imprecise(self) -> "StreamLimit":
        return StreamLimit(self.rule, self.amount, self.streams, precise=False)


class Plan:
    """The limits of a request.

    `requests`, `tokens`, `streams`: those that are taken here; `precise`: those that the store is asked for; `windows`,
    `metered`, `all_streams`: all of requests and tokens, of tokens, of streams. `era`: in which it was made, see
    Limiter. `is_closed`: it lets nothing through.
    """

    __slots__ = (
        "all_streams", "era", "is_closed", "is_empty", "is_special", "metered", "precise", "reads_input",
        "reads_output", "requests", "streams", "tokens", "windows",
    )  # fmt: skip

    def __init__(
        self, windows: Sequence[WindowLimit], streams: Sequence[StreamLimit], era: int = 0, is_closed: bool = False
    ) -> None:
        self.era = era
        self.windows, self.all_streams = tuple(windows), tuple(streams)
        self.metered = tuple(limit for limit in windows if limit.place)
        precise = [limit for limit in windows if limit.precise], [limit for limit in streams if limit.precise]
        self.precise: tuple[WindowLimit | StreamLimit, ...] = (*precise[0], *precise[1])
        self.requests = tuple(limit for limit in windows if limit.place == 0 and not limit.precise)
        self.tokens = tuple(limit for limit in self.metered if not limit.precise)
        self.streams = tuple(limit for limit in streams if not limit.precise)
        self.is_empty = not windows and not streams
        self.is_closed = is_closed and not self.is_empty
        self.is_special = self.is_closed or bool(self.precise)
        self.reads_input = any(limit.rule.unit != "output_tokens" for limit in self.metered)
        self.reads_output = any(limit.rule.unit != "input_tokens" for limit in self.metered)

    def beside(self, taken: "Plan | None") -> "Plan":
        """What a member has more than the request itself has `taken`. It is counted here, also what is precise."""
        counters = [] if taken is None else [one.window for one in taken.windows]
        windows = [one.imprecise() for one in self.windows if one.window not in counters]
        held = [] if taken is None else [one.streams for one in taken.all_streams]
        streams = [one.imprecise() for one in self.all_streams if one.streams not in held]
        return Plan(windows, streams, self.era, self.is_closed)

    def without_precise(self) -> "Plan":
        return Plan([*self.requests, *self.tokens], self.streams, self.era)


# The name of a counter that limits share, the rule with the smallest of their amounts, and whether one is precise
Shared = tuple[str, Rule, bool]


def take(limits: tuple[WindowLimit, ...], wants: Wants, now: int) -> bytes | None:
    """Take from all of `limits`, or from none: then None.

    Returns the headers of the one with the smallest share left, as lines.
    """
    lowest, tightest, rest = 2.0, None, 0
    for limit in limits:
        window, amount, want = limit.window, limit.amount, wants[limit.place]
        if now >= window.end:
            window.roll(now)
        # So a large request passes an empty window.
        if want > amount:
            want = amount
        window.current = used = window.current + want
        if window.previous:
            # `windows.faded`
            used -= window.previous * (now - window.end) // window.per
        left = amount - used
        if left < 0:
            give_back(limits[: limits.index(limit) + 1], wants, now)
            return None
        share = left / amount
        if share < lowest:
            lowest, tightest, rest = share, limit, left
    if tightest is None:
        return b""
    window = tightest.window
    if not window.current:
        return tightest.lines(rest, now)
    # `Window.reset`, where something is used: a second at least
    reset = window.end + window.per - now
    return tightest.template % (rest, SECONDS[reset // 1000], FRACTIONS[reset % 1000])


def give_back(limits: Iterable[WindowLimit], wants: Wants, taken_at: int) -> None:
    """Undo `take`."""
    for limit in limits:
        limit.window.give_back(limit.wanted(wants), taken_at)


def settle(limits: Iterable[WindowLimit], wants: Wants, used: Used, taken_at: int, clock: Callable[[], int]) -> None:
    """Put what was used in the place of what was taken; more than that counts in the window of now."""
    for limit in limits:
        place, window = limit.place, limit.window
        amount, taken = used[place], wants[place]
        if amount is None:
            continue
        if taken > limit.amount:
            taken = limit.amount
        if amount > taken:
            window.roll(clock())
            window.current += amount - taken
        elif taken_at >= window.start and window.current >= taken:
            # `Window.give_back`, for most requests
            window.current -= taken - amount
        else:
            window.give_back(taken - amount, taken_at)


class Plans:
    """Makes Plans of rules, with the counters of `store`. `routers`: among which each limit is divided.

    `asks`: the store can be asked for precise limits. `is_closed`: it lets nothing through that has a limit.
    """

    def __init__(self, store: Store, routers: int = 1, asks: bool = False, is_closed: bool = False) -> None:
        prepare()
        self._store = store
        self.routers = routers
        self._asks = asks
        self._is_closed = is_closed

    def make(self, rules: Iterable[Rule], models: Sequence[str], address: str, era: int) -> Plan:
        """The Plan of requests by one caller, from one address, for one model; or for a virtual one and its variant."""
        windows: list[WindowLimit] = []
        streams: list[StreamLimit] = []
        for name, rule, precise in named(rules, models, address):
            amount, precise = max(rule.amount // self.routers, 1), precise and self._asks
            if rule.unit == "streams":
                streams.append(StreamLimit(rule, amount, self._store.streams(name), precise))
            else:
                windows.append(WindowLimit(rule, amount, self._store.window(name, rule.per * 1000), precise))
        return Plan(windows, streams, era, self._is_closed)


def named(rules: Iterable[Rule], models: Sequence[str], address: str) -> Iterator[Shared]:
    """The rules that apply, one for each counter: limits with the same name share it, and the smallest holds."""
    found: dict[str, Shared] = {}
    for rule in rules:
        if rule.models is not None and not any(map(matcher(rule.models), models)):
            continue
        for holder in _holders(rule, models, address):
            name = _name(rule, holder)
            before = found.get(name)
            if rule.scope == "model":
                rule = rule._replace(holder=holder, shown=f"model {holder!r}")
            precise = rule.precise or (before is not None and before[2])
            smallest = before[1] if before is not None and before[1].amount <= rule.amount else rule
            found[name] = name, smallest, precise
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


def _holders(rule: Rule, models: Sequence[str], address: str) -> Sequence[str]:
    """Whose counters it is about; none: the rule is not for this request."""
    if rule.scope in ("address", "anonymous"):
        return (address,)
    if rule.scope == "model":
        return models if not rule.holder else [model for model in models if model == rule.holder]
    return (rule.holder,)


def _name(rule: Rule, holder: str) -> str:
    """The name of the counter, unique by scope, holder, unit, period and models."""
    models = "" if rule.models is None else f":{sha256(','.join(sorted(rule.models)).encode()).hexdigest()[:8]}"
    if rule.unit == "streams":
        return f"{rule.scope}:{holder}{models}"
    return f"{rule.scope}:{holder}:{rule.unit}:{rule.per}{models}"
