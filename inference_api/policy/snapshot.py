"""The compiled policy: immutable, replaced as a whole.

A key is a tuple of plain values, 0.4 KB, that the garbage collector need not follow: 100,000 keys take about 40 MB and
do not lengthen its pauses. A KeyCaller is made of it at its first request.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from inference_api.policy.document import Anonymous, Budget, Organisation, ScopedBudget, ScopedLimit, StoredPrompt
from inference_api.policy.rules import Patterns, Rule, Spending, least, matcher, rule, smallest, spending

# Callers kept; with more active keys, they are made again.
_CALLERS = 10_000


class KeyRow(NamedTuple):
    """One key as the policy keeps it: times in Unix seconds, its digests elsewhere. A plain tuple at run time."""

    id: str
    name: str
    organisation: str | None
    user: str | None
    models: Patterns
    # Places of the limits and of the budget in `Policy.parts`; 0: none
    limits: int
    budget: int
    priority: int
    weight: float
    expires: float | None
    disabled: bool
    # End of the previous secret
    until: float | None


class KeyCaller:
    """Who asks: a key, with its user and organisation, and all that holds for it. Shared by its requests."""

    __slots__ = (
        "_known", "allows_all", "budgets", "expires", "id", "is_disabled", "limits", "models", "name", "organisation",
        "priority", "until", "user", "weight",
    )  # fmt: skip

    def __init__(
        self,
        row: KeyRow,
        organisation: Organisation | None,
        limits: tuple[Rule, ...] = (),
        budgets: tuple[Spending, ...] = (),
    ) -> None:
        self.id, self.name, self.organisation, self.user = row.id, row.name, row.organisation, row.user
        self.priority, self.weight = row.priority, row.weight
        self.limits, self.budgets = limits, budgets
        # Compared with the clock at every request
        self.expires, self.until = row.expires, row.until
        self.is_disabled = row.disabled or (organisation is not None and organisation.disabled)
        self.models = tuple(one for one in (row.models, organisation and organisation.models) if one is not None)
        self.allows_all = not self.models
        # Name -> whether it is allowed
        self._known: dict[str, bool] = {}

    def may_use(self, model: str) -> bool:
        """Whether key and organisation allow this name of the catalogue."""
        if self.allows_all:
            return True
        known = self._known.get(model)
        if known is None:
            known = self._known[model] = all(matcher(patterns)(model) for patterns in self.models)
        return known

    def __repr__(self) -> str:
        return f"<Caller {self.id}>"


class Policy:
    """Keys, limits, budgets and prompts of one moment.

    `digests`, `previous`: raw digests of secrets, and of replaced ones, to the KeyRow. `parts`: limits and budgets of
    keys, equal ones once. `number` differs from that of any
    other policy of the process.

    Limits and budgets of callers are in their KeyCaller; here are those of no key: `everyone` (scope `all`),
    `anonymous` (everyone's included), `by_address` and `by_model`, whose holder is "" or one name.
    """

    def __init__(
        self,
        number: int,
        digests: dict[bytes, KeyRow],
        previous: dict[bytes, KeyRow],
        kinds: frozenset[str],
        parts: Sequence[Any],
        organisations: Mapping[str, Organisation],
        limits: Sequence[ScopedLimit],
        budgets: Sequence[ScopedBudget],
        anonymous: Anonymous,
        prompts: Sequence[StoredPrompt],
    ) -> None:
        self.number = number
        self.digests, self.previous, self.kinds = digests, previous, kinds
        self.parts = parts
        self.organisations = organisations
        self.limits, self.budgets = limits, budgets
        self.prompts = prompts
        self.keys = len(digests)
        self.everyone = smallest([rule(one, "all", "", "all callers") for one in limits if one.scope == "all"])
        own = [rule(one, "anonymous", "", "your address") for one in anonymous.limits]
        self.anonymous = smallest([*self.everyone, *own])
        by_address = [rule(one, "address", "", "your address") for one in limits if one.scope == "address"]
        self.by_address = smallest(by_address)
        self.by_model = smallest([rule(one, "model", one.name or "", "") for one in limits if one.scope == "model"])
        self.of_everyone = least([spending(one, "all", "", "all callers") for one in budgets if one.scope == "all"])
        self._callers: dict[str, KeyCaller] = {}

    def find(self, digest: bytes) -> tuple[KeyCaller, bool] | None:
        """The caller of a secret, and whether the secret has been replaced. None: unknown."""
        row, replaced = self.digests.get(digest), False
        if row is None:
            row, replaced = self.previous.get(digest), True
            if row is None:
                return None
        caller = self._callers.get(row[0])
        return (self._caller(row) if caller is None else caller), replaced

    def rows(self) -> Iterator[KeyRow]:
        return iter(self.digests.values())

    def has_budgets(self) -> bool:
        """Whether any budget is in it."""
        organisations = any(one.budget for one in self.organisations.values())
        return bool(self.budgets) or organisations or any(isinstance(part, Budget) for part in self.parts)

    def dismantle(self) -> Iterator[None]:
        """Free its keys in slices: freed at once, 100,000 would stop the event loop for 20 ms."""
        for keys in (self.digests, self.previous):
            while keys:
                for _ in range(min(500, len(keys))):
                    keys.popitem()
                yield

    def _caller(self, row: KeyRow) -> KeyCaller:
        row = KeyRow(*row)
        organisation = self.organisations.get(row.organisation) if row.organisation else None
        caller = KeyCaller(row, organisation, self._limits_of(row, organisation), self._budgets_of(row, organisation))
        if len(self._callers) >= _CALLERS:
            self._callers.clear()
        self._callers[row.id] = caller
        return caller

    def _limits_of(self, row: KeyRow, organisation: Organisation | None) -> tuple[Rule, ...]:
        found = [*self.everyone]
        for scope, holder, shown in _holders(row):
            own: Iterable[Any] = (self.parts[row.limits] or ()) if scope == "key" else ()
            if scope == "organisation" and organisation is not None:
                own = organisation.limits
            scoped = (one for one in self.limits if one.scope == scope and one.name in (None, holder))
            found += (rule(one, scope, holder, shown) for one in (*own, *scoped))
        return smallest(found)

    def _budgets_of(self, row: KeyRow, organisation: Organisation | None) -> tuple[Spending, ...]:
        found = [*self.of_everyone]
        for scope, holder, shown in _holders(row):
            own = self.parts[row.budget] if scope == "key" else None
            if scope == "organisation" and organisation is not None:
                own = organisation.budget
            scoped = (one for one in self.budgets if one.scope == scope and one.name in (None, holder))
            found += (spending(one, scope, holder, shown) for one in (*([own] if own else ()), *scoped))
        return least(found)

    def __repr__(self) -> str:
        return f"<Policy {self.number}: {self.keys} keys>"


def _holders(row: KeyRow) -> Iterator[tuple[str, str, str]]:
    """Scope, holder, and the holder in messages."""
    if row.organisation:
        yield "organisation", row.organisation, f"organisation {row.organisation!r}"
    if row.user:
        yield "user", row.user, f"user {row.user!r}"
    yield "key", row.id, f"key {row.name!r}"
