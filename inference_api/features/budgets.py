"""Budgets of the policy: cost, tokens or requests per day, week or month, of keys, users and organisations.

The usage records are the counter: the registry sums them (GET /spend), and this router adds what that sum may not have
yet, and what its requests in flight have reserved. A request in flight completes, so a budget may be exceeded by those.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from typing import Any

import httpx
import orjson

from inference_api.core import Core
from inference_api.errors import ModelNotPriced, QuotaExceeded
from inference_api.feature import Feature, Switch
from inference_api.features import usage
from inference_api.features.cost import PRICE, Options, Price, cost_of
from inference_api.features.delivery.records import METERED
from inference_api.features.limiting.amounts import FIELDS, Estimates
from inference_api.features.spending.deliveries import Deliveries
from inference_api.features.spending.ledger import Amounts, Entry, Ledger, Spent
from inference_api.members import request_state
from inference_api.models import Call, Caller, Reply, Send
from inference_api.observe.account import Record
from inference_api.observe.exposition import Family
from inference_api.observe.families import gauge
from inference_api.observe.legs import BILLED, KIND
from inference_api.policy.document import NANOS, shown_time, unix_time
from inference_api.policy.snapshot import KeyCaller
from inference_api.policy.source import Policies
from inference_api.routing.fleet import Model
from inference_api.routing.registry import RegistryError
from inference_api.routing.snapshots import Snapshot
from inference_api.settings import Settings

logger = logging.getLogger(__name__)

# Under which the state of a request has its entries and what it reserved
_NAME = "budgets"
_HEADER = b"x-inference-budget-remaining"
# Under which the state of a request, or of a leg, has what its members have reserved
_MORE = "budgets_of_members"
# ... and those that it was let past because its model is free
Held = tuple[Sequence[Entry], Amounts, Sequence[Entry]]
# Seconds between two reads of /spend, +-20 %
_EVERY = 5.0
# Callers whose budgets are kept
_CALLERS = 10_000
_MAX_BYTES = 64 * 1024 * 1024


def build(core: Core, settings: Settings) -> Feature | None:
    """Off without a policy. The sums of the registry are read only if the records go there."""
    policies = core.provided(Policies)
    if policies is None:
        return None
    estimates = Estimates.shared(core)
    budgets = Budgets(policies, settings.of(Options).currency, estimates, core.boot)
    counts_alone = settings.of(usage.Options).usage != "registry"
    tasks = []
    if not counts_alone and core.registry_client is not None:
        deliveries = core.provided(Deliveries) or Deliveries()
        deliveries.listeners.append(budgets.delivered)
        core.provide(deliveries)
        spends = Spends(core.registry_client, budgets, core.rand.random)
        core.snapshots["spend"] = spends.snapshot
        policies.on_change(lambda policy: spends.look())
        tasks.append(spends.run)

    def check() -> Iterator[str]:
        policy = policies.current
        if counts_alone and policy is not None and policy.has_budgets():
            yield (
                "the policy has budgets, and USAGE is not `registry`: each router counts its own requests since its "
                "start"
            )

    return Feature(
        "budgets",
        fields=FIELDS,
        send=budgets.send,
        member=budgets.member,
        record=budgets.record,
        leg=budgets.leg,
        collect=budgets.collect,
        tasks=tuple(tasks),
        check=check,
    )


class Budgets:
    """Lets requests through while their budgets last. `boot`: of this process. `now`: Unix seconds."""

    def __init__(
        self,
        policies: Policies,
        currency: str,
        estimates: Estimates,
        boot: str,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._policies = policies
        self.currency = currency
        self._estimates = estimates
        self._boot = boot
        self._now = now
        self._ledger = Ledger()
        # Made anew with each policy; what is spent stays in the ledger.
        self._entries: dict[Caller | None, tuple[Entry, ...]] = {}
        policies.on_change(lambda policy: self._entries.clear())
        # Unix seconds of the last sums of the registry, 0: none
        self.at = 0.0

    @property
    def needed(self) -> bool:
        policy = self._policies.current
        return policy is not None and policy.has_budgets()

    def send(self, send: Send) -> Send:
        """The layer. Raises ModelNotPriced, QuotaExceeded."""

        known = self._entries

        def budgeted(call: Call, model: Model) -> Awaitable[Reply]:
            entries = known.get(call.caller)
            if entries is None:
                entries = self._entries_of(call.caller)
            if entries:
                self._take(call, model, entries)
            return send(call, model)

        return budgeted

    def member(self, send: Send) -> Send:
        """The layer of a model that runs for another one; the request itself was let through.

        Raises ModelNotPriced, QuotaExceeded.
        """

        def budgeted(call: Call, model: Model) -> Awaitable[Reply]:
            held: Held | None = request_state(call.state).get(_NAME)
            if held is None:
                return send(call, model)
            price = PRICE.of(model.entry)
            if price is None and (cost := next((one for one in held[0] if not one.place), None)) and not model.members:
                raise ModelNotPriced(model.name, _quoted(cost.spending.shown))
            if price is not None and any(price):
                for entry in held[2]:
                    if entry.used(self._now()) >= entry.amount:
                        raise self._refusal(entry)
            reserved = self._reserved(call, model, price, requests=0)
            for entry in held[0]:
                entry.reserved += reserved[entry.place]
            call.state.setdefault(_MORE, []).append((held[0], reserved))  # type: ignore[attr-defined]
            return send(call, model)

        return budgeted

    def record(self, record: Record) -> None:
        """Release what the request has reserved, and count what it took."""
        # By their places: reading a field by name costs ten times as much.
        code, attempts, state = record[9], record[7], record[21]
        held: Held | None = state.get(_NAME)
        if held is None:
            return
        entries, reserved, _ = held
        metered = state.get(METERED)
        tokens = 0 if metered is None else (metered[0] or 0) + (metered[2] or 0)
        taken = record[20].get("cost_nanos") or 0, tokens, _requests(code, attempts)
        at = self._now() - record[10]
        for entry in entries:
            place = entry.place
            entry.reserved -= reserved[place]
            entry.take(taken[place], at)
        if _MORE in state:
            _release(state)

    def leg(self, record: Record, extra: dict[str, Any]) -> None:
        """Count what a member of a race or of a vote took: the caller pays for it, and the request is one."""
        state = record.state
        _release(state)
        held: Held | None = request_state(state).get(_NAME)
        if held is None or extra[KIND] not in BILLED:
            return
        metered = state.get(METERED)
        tokens = 0 if metered is None else (metered[0] or 0) + (metered[2] or 0)
        taken, at = (extra.get("cost_nanos") or 0, tokens, 0), self._now() - record.took
        for entry in held[0]:
            entry.take(taken[entry.place], at)

    def delivered(self, records: list[bytes]) -> None:
        """The registry has these records; those of other processes were never pending here."""
        now = self._now()
        for record in records:
            one = orjson.loads(record)
            kind = one["kind"]
            if not one["id"].startswith(self._boot) or (kind != "request" and kind not in BILLED):
                continue
            names = ("organisation", one["organisation"]), ("user", one["user"]), ("key", one["key_id"])
            holders = ["all:", *(f"{scope}:{name}" for scope, name in names if name is not None)]
            tokens = (one["input_tokens"] or 0) + (one["output_tokens"] or 0)
            requests = _requests(one["code"], one["attempts"]) if kind == "request" else 0
            amounts = one["cost_nanos"] or 0, tokens, requests
            self._ledger.deliver(holders, amounts, one["at"] / 1000, now)

    def learn(self, spends: list[Spent], at: float) -> None:
        """Take the sums of the registry as of `at`."""
        self.at = at
        self._ledger.learn(spends, at, self._now())

    def collect(self) -> Iterator[Family]:
        now = self._now()
        return families(self._ledger.states(now), now - self.at if self.at else None)

    def _entries_of(self, caller: Caller | None) -> tuple[Entry, ...]:
        if isinstance(caller, KeyCaller):
            budgets = caller.budgets
        else:
            policy = self._policies.current
            budgets = () if policy is None else policy.of_everyone
        if len(self._entries) >= _CALLERS:
            self._entries.clear()
        now = self._now()
        entries = self._entries[caller] = tuple(self._ledger.of(budget, now) for budget in budgets)
        return entries

    def _take(self, call: Call, model: Model, entries: Sequence[Entry]) -> None:
        now, price, least = self._now(), PRICE.of(model.entry), 1.0
        passed: tuple[Entry, ...] = ()
        for entry in entries:
            # A virtual model has no price: its members have.
            if not entry.place and not model.members:
                if price is None:
                    raise ModelNotPriced(model.name, _quoted(entry.spending.shown))
                if not any(price):
                    passed = (*passed, entry)
                    continue
            # `Entry.used`, without a call
            used = entry.spent + entry.pending + entry.late + entry.reserved if now < entry.end else entry.used(now)
            if used >= entry.amount:
                raise self._refusal(entry)
            if used >= entry.soft_at:
                least = min(least, 1 - used / entry.amount)
        reserved = self._reserved(call, model, price, requests=1)
        for entry in entries:
            entry.reserved += reserved[entry.place]
        # The state is the request's own dictionary; Record.state is the same.
        call.state[_NAME] = entries, reserved, passed  # type: ignore[index]
        if least < 1.0:
            call.answer_headers.append((_HEADER, b"%.2f" % least))

    def _reserved(self, call: Call, model: Model, price: Price | None, requests: int) -> Amounts:
        read, made = self._estimates.of(call, model)
        return 0 if price is None else cost_of(price, read, 0, made), read + made, requests

    def _refusal(self, entry: Entry) -> QuotaExceeded:
        budget = entry.spending
        amount = f"{entry.amount} {budget.unit}"
        if budget.unit == "cost":
            whole, rest = divmod(entry.amount, NANOS)
            digits = f"{rest:09d}".rstrip("0")
            amount = f"{whole}{'.' if digits else ''}{digits} {self.currency}"
        resets = shown_time(entry.end)
        return QuotaExceeded(f"Budget used up for {budget.shown}: {amount} per {budget.per}. It resets at {resets}.")


def families(states: Mapping[str, int], age: float | None) -> Iterator[Family]:
    """`age`: of the sums of the registry, in seconds; None: there are none."""
    series = [((state,), float(count)) for state, count in states.items()]
    yield gauge("budgets", "Budgets by state: ok, soft, hard (used up).", ("state",), series)
    yield gauge("spend_age_seconds", "Age of the sums of the registry, in seconds.", (), [((), age)])


class Spends:
    """Takes the documents of GET /spend, polled while the policy has budgets; what is known stays when that fails."""

    def __init__(
        self, client: httpx.AsyncClient, budgets: Budgets, rand: Callable[[], float], every: float = _EVERY
    ) -> None:
        self._budgets = budgets
        self._needed = asyncio.Event()
        self.snapshot = Snapshot(client, "/spend", self, every, _MAX_BYTES, waits=False, rand=rand)
        self._complaint = ""

    async def run(self) -> None:
        """Poll until cancelled, from the first policy with budgets on."""
        self.look()
        await self._needed.wait()
        await self.snapshot.run()

    def look(self) -> None:
        """Look whether the policy has budgets."""
        if self._budgets.needed:
            self._needed.set()

    async def take(self, content: Sequence[bytes]) -> bool:
        document = orjson.loads(b"".join(content))
        try:
            currency, at = document["currency"], unix_time(document["at"])
            spends = [
                Spent(str(one["id"]), unix_time(one["period_start"]), unix_time(one["resets_at"]), int(one["spent"]))
                for one in document["budgets"]
            ]
        except (KeyError, TypeError) as exc:
            raise ValueError(f"it is not a document of spend: {exc!r}") from None
        if currency != self._budgets.currency:
            raise ValueError(f"its currency is {currency!r}, and CURRENCY is {self._budgets.currency!r}")
        self._budgets.learn(spends, at)
        return True

    def confirm(self) -> None:
        self._complaint = ""

    def failed(self, error: RegistryError) -> None:
        if error.reason != self._complaint:
            self._complaint = error.reason
            logger.warning("the registry's /spend cannot be used, the last sums stay: %s", error)


def _release(state: Mapping[str, Any]) -> None:
    """Release what members have reserved."""
    for entries, reserved in state.get(_MORE, ()):
        for entry in entries:
            entry.reserved -= reserved[entry.place]


def _requests(code: str | None, attempts: int) -> int:
    """1 for a request that was not refused before a backend was asked."""
    return 1 if code is None or attempts else 0


def _quoted(shown: str) -> str:
    """The name of a holder in quotes, without its scope."""
    return shown[shown.index("'") :] if "'" in shown else shown


FEATURE = Switch(build)
