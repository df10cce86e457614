"""What holds for one caller: limits and budgets of a holder, and patterns of model names. Pure."""

import re
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

from inference_api.policy.document import Budget, Limit

Patterns = tuple[str, ...] | None


class Rule(NamedTuple):
    """A limit of one holder. `per`: seconds, 0 for streams. `models`: it holds for these patterns only; None: all.

    `holder` is "" for the scope `all`, and for the scopes `address`, `anonymous` and `model` until the request is
    known. `shown`: the holder in messages.
    """

    scope: str
    holder: str
    unit: str
    amount: int
    per: int
    precise: bool
    models: Patterns
    shown: str


class Spending(NamedTuple):
    """A budget of one holder. `id`: `<scope>:<name>:<unit>:<per>`. `amount`: nanos of a cost, else a count.

    `soft`: the share of it from which it is announced. `shown`: the holder in messages.
    """

    id: str
    shown: str
    unit: str
    amount: int
    per: str
    soft: float


def rule(limit: Limit, scope: str, holder: str, shown: str) -> Rule:
    return Rule(scope, holder, limit.unit, limit.amount, limit.per or 0, limit.precise, limit.models, shown)


def spending(budget: Budget, scope: str, holder: str, shown: str) -> Spending:
    unit = budget.unit
    return Spending(f"{scope}:{holder}:{unit}:{budget.per}", shown, unit, budget.amount, budget.per, budget.soft)


def smallest(rules: list[Rule]) -> tuple[Rule, ...]:
    """Limits of one scope, holder, unit, period and models share a counter: the smallest holds, precise if one is."""
    kept: dict[tuple[object, ...], Rule] = {}
    for one in rules:
        key = one.scope, one.holder, one.unit, one.per, one.models
        known = kept.get(key)
        if known is not None:
            one = min(one, known, key=lambda each: each.amount)._replace(precise=one.precise or known.precise)
        kept[key] = one
    return tuple(kept.values())


def least(budgets: list[Spending]) -> tuple[Spending, ...]:
    """Of budgets with one id the smallest holds."""
    kept: dict[str, Spending] = {}
    for one in budgets:
        known = kept.get(one.id)
        kept[one.id] = one if known is None or one.amount < known.amount else known
    return tuple(kept.values())


@lru_cache(maxsize=4096)
def matcher(patterns: Patterns) -> Callable[[str], bool]:
    """Whether a catalogue name matches: `*` is any run of characters. None: every name; (): none."""
    if patterns is None:
        return lambda name: True
    exact = frozenset(pattern for pattern in patterns if "*" not in pattern)
    text = "|".join(".*".join(map(re.escape, pattern.split("*"))) for pattern in patterns if "*" in pattern)
    if not text:
        return exact.__contains__
    match = re.compile(text).fullmatch
    return lambda name: name in exact or match(name) is not None
