"""The compiled policy: immutable, replaced as a whole.

A key is kept as a few bytes, which the garbage collector never looks at: with 100,000 tuples in its way it would stop
the event loop for 35 ms. A KeyCaller is made of them at its first request.
"""

from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import orjson

from inference_api.policy.document import Anonymous, Organisation, ScopedBudget, ScopedLimit, StoredPrompt
from inference_api.policy.rules import Patterns, Rule, Spending, least, matcher, rule, smallest, spending

# Callers kept; with more active keys, they are made again. Names that a caller knows
_CALLERS = 10_000
_NAMES = 256


class KeyRow(NamedTuple):
    """One key as the policy keeps it: times in Unix seconds, its digests elsewhere."""

    id: str
    name: str
    organisation: str | None
    user: str | None
    # Places of the patterns of models, the limits and the budget in `Policy.parts`; 0: none
    models: int
    limits: int
    budget: int
    priority: int
    weight: float
    expires: float | None
    disabled: bool
    # End of the previous secret
    until: float | None


class Rows:
    """Digest -> KeyRow, packed, in shards: one dictionary of 100,000 would stop the interpreter while it grows."""

    __slots__ = ("_shards",)

    def __init__(self) -> None:
        self._shards: list[dict[bytes, bytes]] = [{} for _ in range(256)]

    def get(self, digest: bytes) -> KeyRow | None:
        packed = self._shards[digest[0]].get(digest)
        return None if packed is None else KeyRow(*orjson.loads(packed))

    def put(self, digest: bytes, row: bytes) -> None:
        """Add what `packed` has made."""
        self._shards[digest[0]][digest] = row

    def values(self) -> Iterator[KeyRow]:
        for shard in self._shards:
            for packed in shard.values():
                yield KeyRow(*orjson.loads(packed))

    def clear(self) -> Iterator[None]:
        """Remove them in slices."""
        for shard in self._shards:
            while shard:
                for _ in range(min(500, len(shard))):
                    shard.popitem()
                yield

    def __contains__(self, digest: bytes) -> bool:
        return digest in self._shards[digest[0]]

    def __len__(self) -> int:
        return sum(map(len, self._shards))


def packed(row: KeyRow) -> bytes:
    # A copy: the buffer of orjson was larger, and is not given back.
    return memoryview(orjson.dumps(tuple(row))).tobytes()


class End(NamedTuple):
    """Why a known key is not valid, and since when, in Unix seconds."""

    kind: Literal["expired", "replaced", "disabled"]
    at: float


class KeyCaller:
    """Who asks: a key, with its user and organisation, and all that holds for it. Shared by its requests."""

    __slots__ = (
        "_known", "allows_all", "budgets", "expires", "fields", "id", "is_disabled", "limits", "models", "name",
        "organisation", "priority", "until", "user", "weight",
    )  # fmt: skip

    def __init__(
        self,
        row: KeyRow,
        models: Patterns,
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
        self.models = tuple(one for one in (models, organisation and organisation.models) if one is not None)
        self.allows_all = not self.models
        # Name -> whether it is allowed
        self._known: dict[str, bool] = {}
        # Fields of the access line
        self.fields = {"key_id": self.id}
        if self.organisation is not None:
            self.fields["organisation"] = self.organisation
        if self.user is not None:
            self.fields["user"] = self.user

    def may_use(self, model: str) -> bool:
        """Whether key and organisation allow this name of the catalogue."""
        if self.allows_all:
            return True
        known = self._known.get(model)
        if known is None:
            if len(self._known) >= _NAMES:
                self._known.clear()
            known = self._known[model] = all(matcher(patterns)(model) for patterns in self.models)
        return known

    def end(self, now: float, is_replaced: bool) -> "End | None":
        """Why this secret is not valid at this time, in Unix seconds; None: it is. `is_replaced`: see `Policy.find`."""
        if self.expires is not None and now >= self.expires:
            return End("expired", self.expires)
        if is_replaced and self.until is not None and now >= self.until:
            return End("replaced", self.until)
        return End("disabled", now) if self.is_disabled else None

    def __repr__(self) -> str:
        return f"<Caller {self.id}>"


class Policy:
    """Keys, limits, budgets and prompts of one moment.

    `digests`, `previous`: raw digests of secrets, and of replaced ones, to the KeyRow. `parts`: patterns, limits and
    budgets of keys, equal ones once. `number` differs from that of any other policy of the process.

    Limits and budgets of callers are in their KeyCaller; here are those of no key: `everyone` (scope `all`),
    `anonymous` (everyone's included), `by_address` and `by_model`, whose holder is "" or one name.
    """

    def __init__(
        self,
        number: int,
        digests: Rows,
        previous: Rows,
        kinds: frozenset[str],
        parts: Sequence[Any],
        organisations: Mapping[str, Organisation],
        limits: Sequence[ScopedLimit],
        budgets: Sequence[ScopedBudget],
        anonymous: Anonymous,
        prompts: Sequence[StoredPrompt],
        keys_have_budgets: bool = False,
    ) -> None:
        self.number = number
        self.digests, self.previous, self.kinds = digests, previous, kinds
        self.parts = parts
        self.organisations = organisations
        self.limits, self.budgets = limits, budgets
        self.prompts = prompts
        self.keys = len(digests)
        organisations_do = any(one.budget for one in organisations.values())
        self._has_budgets = bool(budgets) or organisations_do or keys_have_budgets
        self.everyone = smallest([rule(one, "all", "", "all callers") for one in limits if one.scope == "all"])
        own = [rule(one, "anonymous", "", "your address") for one in anonymous.limits]
        self.anonymous = smallest([*self.everyone, *own])
        by_address = [rule(one, "address", "", "your address") for one in limits if one.scope == "address"]
        self.by_address = smallest(by_address)
        self.by_model = smallest([rule(one, "model", one.name or "", "") for one in limits if one.scope == "model"])
        self.of_everyone = least([spending(one, "all", "", "all callers") for one in budgets if one.scope == "all"])
        # By id; and by digest, with whether it has been replaced
        self._callers: dict[str, KeyCaller] = {}
        self._found: dict[bytes, tuple[KeyCaller, bool]] = {}

    def find(self, digest: bytes) -> tuple[KeyCaller, bool] | None:
        """The caller of a secret, and whether the secret has been replaced. None: unknown."""
        found = self._found.get(digest)
        if found is not None:
            return found
        row, replaced = self.digests.get(digest), False
        if row is None:
            row, replaced = self.previous.get(digest), True
            if row is None:
                return None
        if len(self._found) >= _CALLERS:
            self._found.clear()
            self._callers.clear()
        found = self._found[digest] = self._caller(row), replaced
        return found

    def rows(self) -> Iterator[KeyRow]:
        return self.digests.values()

    def has_budgets(self) -> bool:
        """Whether any budget is in it."""
        return self._has_budgets

    def dismantle(self) -> Generator[None, None, None]:
        """Free its keys in slices: freed at once, 100,000 would stop the event loop for 20 ms."""
        yield from self.digests.clear()
        yield from self.previous.clear()

    def _caller(self, row: KeyRow) -> KeyCaller:
        caller = self._callers.get(row.id)
        if caller is None:
            organisation = self.organisations.get(row.organisation) if row.organisation else None
            limits, budgets = self._limits_of(row, organisation), self._budgets_of(row, organisation)
            caller = self._callers[row.id] = KeyCaller(row, self.parts[row.models], organisation, limits, budgets)
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
