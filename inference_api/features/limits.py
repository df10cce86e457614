"""LIMITS: how many requests, tokens and streams the policy lets keys, users, organisations, models and addresses have.

All limits of a request are looked at, then all are taken, or none. Tokens are reserved before they are known, and
settled with the Record of the request. `limiting` has the rules, `stores` the counters.
"""

from collections import OrderedDict
from collections.abc import Awaitable, Iterator, Sequence
from functools import partial
from typing import Any, Final, Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator

from inference_api.core import Core
from inference_api.errors import LimitsUnavailable, RateLimited
from inference_api.feature import Feature, Switch
from inference_api.features.delivery.records import METERED, NOTHING, UNKNOWN, Metered
from inference_api.features.limiting.amounts import FIELDS, Estimates
from inference_api.features.limiting.members import MEMBERS, MemberLimits
from inference_api.features.limiting.plans import (
    ONE,
    Plan,
    Plans,
    StreamLimit,
    Wants,
    WindowLimit,
    address_of,
    give_back,
    settle,
    take,
)
from inference_api.features.limiting.refusals import Refusal, refusal, standing
from inference_api.features.limiting.windows import Store
from inference_api.features.stores.memory import MemoryStore
from inference_api.features.stores.shared import Asked, take_share
from inference_api.members import is_shadow, request_state
from inference_api.models import ASKED, FELL, Call, Caller, Reply, Send
from inference_api.observe.account import Record
from inference_api.observe.exposition import Family
from inference_api.observe.families import counter, gauge
from inference_api.observe.legs import BILLED, KIND
from inference_api.policy.rules import Rule
from inference_api.policy.snapshot import Policy
from inference_api.policy.source import Policies
from inference_api.policy.warnings import has_precise_limits
from inference_api.routing.fleet import Model
from inference_api.settings import PREFIX, Count, Group, Settings, SettingsError, without_password

# Under which the state of a request has its Ticket
_NAME = "limits"
# The Plan of a request, what it wanted, when, and its limits of streams
Ticket = tuple[Plan, Wants, int, tuple[StreamLimit, ...]]
# In the key of the Plan of a member
_MEMBER = object()
# Plans at most; one is made again in microseconds.
_PLANS = 20_000
Precise = list[WindowLimit | StreamLimit]
# Places of fields of Call and Record, for the hot path: reading one by name costs ten times as much.
_ASKED: Final = 1
_STREAM: Final = 2
_CALLER: Final = 13
_STATE: Final = 14
_HEADERS: Final = 15
_RECORD_MODEL: Final = 2
_RECORD_CODE: Final = 9
_RECORD_STATE: Final = 21
_RECORD_FIELDS: Final = 23
OnFailure = Literal["share", "open", "closed"]


class Options(Group):
    limits: Literal["local", "redis"] = Field(
        default="local", description="where the limits of the policy are counted: in each router, or together in Redis"
    )
    limits_on_failure: OnFailure = Field(
        default="share",
        description="while Redis is away: a share of each limit for each router, none (`open`), or 503 (`closed`)",
    )
    limits_share: Count = Field(
        default=1, description="number of routers among which `local` divides each limit, rounded down, at least 1"
    )
    redis_url: str | None = Field(
        default=None, description="URL of Redis or Valkey: redis://, rediss:// or unix://; needs `inference-api[redis]`"
    )

    @field_validator("redis_url")
    @classmethod
    def _url(cls, value: str | None) -> str | None:
        if value is not None:
            parts = urlsplit(value)
            if parts.scheme not in ("redis", "rediss", "unix") or not (parts.hostname or parts.scheme == "unix"):
                raise ValueError("must be a redis://, rediss:// or unix:// URL")
        return value


def build(core: Core, settings: Settings) -> Feature | None:
    """Off without a policy. Raises SettingsError without REDIS_URL, or if the extra `redis` is not installed."""
    options, policies = settings.of(Options), core.provided(Policies)
    if options.limits == "redis" and options.redis_url is None:
        raise SettingsError(f"{PREFIX}LIMITS='redis': needs {PREFIX}REDIS_URL; set it to redis://HOST:6379")
    if policies is None:
        return None
    if options.limits == "local":
        store = MemoryStore()
        limiter = Limiter(policies, store, Estimates.shared(core), options.limits_share)
        store.on_evict(limiter.forget)
        return limiter.feature()._replace(check=partial(_warnings, policies))
    try:
        from inference_api.features.stores.redis import RedisStore
    except ModuleNotFoundError as exc:
        raise SettingsError(
            f"{PREFIX}LIMITS='redis': the extra is not installed ({exc}); pip install 'inference-api[redis]'"
        ) from None
    assert options.redis_url is not None
    try:
        shared = RedisStore(options.redis_url, core.instance)
    except ValueError as exc:
        shown = without_password(options.redis_url)
        raise SettingsError(f"{PREFIX}REDIS_URL={shown!r}: {exc}") from None
    estimates = Estimates.shared(core)
    limiter = Limiter(policies, shared, estimates, options.limits_share, shared, options.limits_on_failure)
    shared.on_evict(limiter.forget)
    shared.on_change(limiter.forget)
    return limiter.feature()._replace(tasks=(shared.run,))


def _warnings(policies: Policies) -> Iterator[str]:
    if policies.current is not None and has_precise_limits(policies.current):
        yield "the policy has limits that are `precise`, and LIMITS is `local`: each router counts them on its own"


class Limiter:
    """Lets requests through, or refuses them. `routers`: among which each limit is divided without Redis.

    `asked`: `store`, if other routers count there, too; `on_failure`: what holds while it is away.
    """

    def __init__(
        self,
        policies: Policies,
        store: Store,
        estimates: Estimates,
        routers: int = 1,
        asked: Asked | None = None,
        on_failure: OnFailure = "share",
    ) -> None:
        self._policies = policies
        self._store = store
        self._now = store.now
        self._estimates = estimates
        self._asked = asked
        self._touch = None if asked is None else asked.touch
        self._members = MemberLimits(estimates, store.now, self._touch)
        self._routers = routers
        self._on_failure = on_failure
        self._plans: OrderedDict[tuple[object, ...], Plan] = OrderedDict()
        # Plans of an earlier one are made anew.
        self._era = 0
        # Refused requests by scope and unit
        self._refused: dict[tuple[str, str], int] = {}
        # Whether limits of addresses are for callers with a key, too
        self._by_address = False
        self._maker = Plans(store, routers)
        policies.on_change(self._applied)
        self.forget()

    def feature(self) -> Feature:
        return Feature(
            "limits",
            fields=FIELDS,
            send=self.send,
            member=self.member,
            record=self.record,
            leg=self.leg,
            collect=self.collect,
        )

    def forget(self) -> None:
        """Begin an era: the policy has changed, counters have gone, or Redis has. The counts stay."""
        policy, asked = self._policies.current, self._asked
        self._by_address = policy is not None and bool(policy.by_address)
        self._era += 1
        if asked is None:
            self._maker = Plans(self._store, self._routers)
        elif not asked.is_away:
            self._maker = Plans(self._store, asks=True)
        else:
            routers = (asked.routers or self._routers) if self._on_failure == "share" else 1
            self._maker = Plans(self._store, routers, is_closed=self._on_failure == "closed")

    def send(self, send: Send) -> Send:
        """The layer. Raises RateLimited, LimitsUnavailable."""
        plans, clock, touch, estimate = self._plans, self._now, self._touch, self._estimates.of

        # No coroutine: most requests do not wait here.
        def limited(call: Call, model: Model) -> Awaitable[Reply]:
            caller = call[_CALLER]
            if caller is None or self._by_address:
                client = call.client
                key: tuple[object, ...] = caller, None if client is None else client[0], call[_ASKED], model.name
            else:
                key = caller, call[_ASKED], model.name
            plan = plans.get(key)
            if plan is None or plan.era != self._era:
                asked: Model = call.state.get(ASKED, model)
                plan = self._make(key, call, tuple(dict.fromkeys((asked.name, model.name))), self._rules(call.caller))
            if plan.is_empty:
                return send(call, model)
            wants = ONE
            if plan.metered:
                read, made = estimate(call, model)
                wants = (1, read + made, read, made)
            if plan.is_special or (plan.streams and call[_STREAM]):
                return self._special(send, call, model, plan, wants)
            now = clock()
            lines = take(plan.requests, wants, now)
            if lines is None:
                raise self._refusal(call, plan, wants, now)
            if plan.tokens:
                more = take(plan.tokens, wants, now)
                if more is None:
                    give_back(plan.requests, wants, now)
                    raise self._refusal(call, plan, wants, now)
                lines += more
            # The Record has the same dictionary.
            call[_STATE][_NAME] = (plan, wants, now, ())  # type: ignore[index]
            call[_HEADERS].append(lines)
            if touch is not None:
                touch(plan)
            return send(call, model)

        return limited

    def member(self, send: Send) -> Send:
        """The layer of a model that runs for another one. Raises as `send`."""
        plans, members = self._plans, self._members

        def limited(call: Call, model: Model) -> Awaitable[Reply]:
            if is_shadow(call.state):
                return send(call, model)
            client = call.client
            key = call.caller, None if client is None else client[0], _MEMBER, model.name
            plan = plans.get(key)
            if plan is None or plan.era != self._era:
                rules = (rule for rule in self._rules(call.caller) if rule.scope == "model" or rule.models is not None)
                plan = self._make(key, call, (model.name,), rules)
            if plan.is_empty:
                return send(call, model)
            ticket: Ticket | None = request_state(call.state).get(_NAME)
            plan = plan.beside(None if ticket is None else ticket[0])
            return send(call, model) if plan.is_empty else members.send(send, call, model, plan)

        return limited

    def record(self, record: Record) -> None:
        """Release and settle what the request has taken."""
        state = record[_RECORD_STATE]
        if self._estimates.known:
            # Without an answer of a backend, whatever it has done, the tokens are given back.
            metered: Metered = NOTHING if record[_RECORD_CODE] is not None else state.get(METERED, UNKNOWN)
            if metered[4] == "reported":
                self._estimates.learn(record[_RECORD_MODEL], metered[0], metered[2], record[_RECORD_FIELDS])
        else:
            metered = UNKNOWN
        if MEMBERS in state:
            self._members.settle(state, record.model_name, metered)
        ticket: Ticket | None = state.get(_NAME)
        if ticket is None:
            return
        plan, wants, taken_at, streams = ticket
        for limit in streams:
            limit.streams.own -= 1
        if record[_RECORD_CODE] is not None and (record.status == 503 or not record.attempts):
            # The router itself has refused it.
            give_back(plan.windows, wants, taken_at)
        elif plan.metered:
            read, made = metered[0], metered[2]
            total = None if read is None or made is None else read + made
            limits, used = plan.metered, (1, total, read, made)
            if FELL in state:
                limits = self._give_back_of(state[FELL], plan, wants, taken_at)
            settle(limits, wants, used, taken_at, self._now)
        if self._touch is not None:
            self._touch(plan)

    def leg(self, record: Record, extra: dict[str, Any]) -> None:
        """Settle what a member of a race or of a vote has taken: its tokens are the caller's."""
        if extra[KIND] not in BILLED:
            return
        state = record.state
        metered: Metered = state.get(METERED, UNKNOWN)
        self._members.settle(state, record.model_name, metered)
        of_request = request_state(state)
        ticket: Ticket | None = of_request.get(_NAME)
        if ticket is not None:
            self._members.add(ticket[0], metered, ticket[2], of_request.get(FELL))

    def _give_back_of(self, model: str, plan: Plan, wants: Wants, taken_at: int) -> tuple[WindowLimit, ...]:
        """Give back the tokens of a model for which another one answered. Returns the other limits of tokens."""
        its = [one for one in plan.metered if one.rule.scope == "model" and one.rule.holder == model]
        settle(its, wants, (1, 0, 0, 0), taken_at, self._now)
        return tuple(one for one in plan.metered if one not in its)

    def collect(self) -> Iterator[Family]:
        asked = self._asked
        text = "Requests that a limit has refused, by the scope and unit of the limit."
        series = [(labels, float(count)) for labels, count in dict(self._refused).items()]
        yield counter("limits_refused", text, ("scope", "unit"), series)
        text = "1: Redis is away, and LIMITS_ON_FAILURE holds."
        yield gauge("limits_degraded", text, (), [((), float(asked is not None and asked.is_away))])
        text = "Routers that count limits together, or among which each limit is divided."
        yield gauge("limits_routers", text, (), [((), float(self._routers if asked is None else asked.routers))])
        text = "Calls of Redis that failed."
        failures = {} if asked is None else dict(asked.failures)
        yield counter("limits_sync_failures", text, ("reason",), [((why,), n) for why, n in failures.items()])

    def _applied(self, policy: Policy) -> None:
        self.forget()

    def _make(self, key: tuple[object, ...], call: Call, models: Sequence[str], rules: Iterator[Rule]) -> Plan:
        host = "" if call.client is None else call.client[0]
        plan = self._maker.make(rules, models, address_of(host), self._era)
        self._plans[key] = plan
        if len(self._plans) > _PLANS:
            self._plans.popitem(last=False)
        return plan

    def _rules(self, caller: Caller | None) -> Iterator[Rule]:
        policy = self._policies.current
        if policy is None or (self._asked is not None and self._asked.is_away and self._on_failure == "open"):
            return
        yield from policy.anonymous if caller is None else getattr(caller, "limits", policy.everyone)
        yield from policy.by_address
        yield from policy.by_model

    def _take(self, call: Call, plan: Plan, wants: Wants, now: int) -> tuple[bytes, tuple[StreamLimit, ...]]:
        """Take from all limits that are not precise. Returns the headers as lines, and the limits of streams.

        Raises RateLimited.
        """
        streams = plan.streams if call.stream else ()
        if self._touch is not None:
            self._touch(plan)
        for stream in streams:
            if stream.streams.used(now) >= stream.amount:
                raise self._refusal(call, plan, wants, now)
        lines = take(plan.requests, wants, now)
        if lines is None:
            raise self._refusal(call, plan, wants, now)
        more = take(plan.tokens, wants, now)
        if more is None:
            give_back(plan.requests, wants, now)
            raise self._refusal(call, plan, wants, now)
        for stream in streams:
            stream.streams.own += 1
        return lines + more, streams

    def _refusal(self, call: Call, plan: Plan, wants: Wants, now: int, found: Refusal | None = None) -> RateLimited:
        """The error of a request that is refused; `found`: by this limit."""
        if found is None:
            found = refusal(plan.windows, plan.all_streams if call.stream else (), wants, now)
        if found is None:
            # Redis has refused, and there is room again.
            rule, amount = plan.precise[0].rule, plan.precise[0].amount
            found = Refusal(rule, amount, min(wants[1], amount), 1)
        labels = found.rule.scope, found.rule.unit
        self._refused[labels] = self._refused.get(labels, 0) + 1
        call.answer_headers.append(standing(plan, now))
        return found.error()

    def _special(self, send: Send, call: Call, model: Model, plan: Plan, wants: Wants) -> Awaitable[Reply]:
        """A request that has a limit of streams, or a precise one, or that nothing is let through for."""
        if plan.is_closed:
            raise LimitsUnavailable
        if plan.precise:
            return self._ask(send, call, model, plan, wants)
        now = self._now()
        lines, streams = self._take(call, plan, wants, now)
        call.state[_NAME] = (plan, wants, now, streams)  # type: ignore[index]
        call.answer_headers.append(lines)
        return send(call, model)

    async def _ask(self, send: Send, call: Call, model: Model, plan: Plan, wants: Wants) -> Reply:
        """Take the limits that are not precise, then the precise ones; if those refuse, give the others back."""
        asked = self._asked
        assert asked is not None
        now = self._now()
        _, streams = self._take(call, plan, wants, now)
        precise: Precise = [limit for limit in plan.precise if call.stream or isinstance(limit, WindowLimit)]
        try:
            granted = await asked.ask(precise, wants) if precise else True
            if granted is None:
                plan = self._without_answer(call, plan, precise, wants)
            elif not granted:
                raise self._refusal(call, plan, wants, self._now())
        except BaseException:
            give_back([*plan.requests, *plan.tokens], wants, now)
            for stream in streams:
                stream.streams.own -= 1
            raise
        held = tuple(limit for limit in plan.precise if call.stream and isinstance(limit, StreamLimit))
        call.state[_NAME] = (plan, wants, now, streams + held)  # type: ignore[index]
        call.answer_headers.append(standing(plan, self._now()))
        return await send(call, model)

    def _without_answer(self, call: Call, plan: Plan, precise: Precise, wants: Wants) -> Plan:
        """Redis has not answered in time: decide by LIMITS_ON_FAILURE. Returns the Plan of what is taken."""
        asked = self._asked
        assert asked is not None
        if self._on_failure == "closed":
            raise LimitsUnavailable
        if self._on_failure == "open":
            return plan.without_precise()
        now = self._now()
        refused = take_share(precise, wants, asked.routers or self._routers, now)
        if refused is not None:
            raise self._refusal(call, plan, wants, now, refused)
        asked.touch(plan)
        return plan


FEATURE = Switch(build, Options)
