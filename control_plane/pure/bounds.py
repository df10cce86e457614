"""Whether limits and a budget of an organisation are below the platform's: what is above would never hold."""

from collections.abc import Iterable, Mapping
from typing import Any

from inference_api.policy.document import Budget, Limit, ScopedBudget, ScopedLimit

_OF_EACH = ("all", "organisation")


def beyond(
    organisation: str,
    limits: Iterable[Mapping[str, Any]],
    budget: Mapping[str, Any] | None,
    platform_limits: Iterable[Mapping[str, Any]],
    platform_budgets: Iterable[Mapping[str, Any]],
) -> list[tuple[str, str]]:
    """(parameter, reason) of each that is above one of the platform with the same unit and time."""
    found = []
    theirs = [ScopedLimit.model_validate(one) for one in platform_limits]
    for place, given in enumerate(limits):
        own = Limit.model_validate(given)
        for limit in theirs:
            same = (limit.unit, limit.per, limit.models) == (own.unit, own.per, own.models)
            if same and _holds_for(limit, organisation) and own.amount > limit.amount:
                found.append((f"limits.{place}.{own.unit}", f"must be at most {limit.amount}, as of the platform"))
    if budget is not None:
        mine = Budget.model_validate(budget)
        for one in map(ScopedBudget.model_validate, platform_budgets):
            same = (one.unit, one.per) == (mine.unit, mine.per)
            if same and _holds_for(one, organisation) and mine.amount > one.amount:
                found.append((f"budget.{mine.unit}", f"must be at most {getattr(one, one.unit)}, as of the platform"))
    return found


def _holds_for(one: ScopedLimit | ScopedBudget, organisation: str) -> bool:
    return one.scope in _OF_EACH and one.name in (None, organisation)
