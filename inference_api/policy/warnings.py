"""What is valid in a policy and probably wrong, for `inference-api check`. Pure."""

from collections.abc import Collection, Iterable, Iterator, Sequence

from inference_api.policy.document import Limit, ScopedBudget, ScopedLimit, shown_time
from inference_api.policy.rules import Patterns, matcher
from inference_api.policy.snapshot import Policy

# Warnings of one kind that are shown
_SHOWN = 20


def warnings(policy: Policy, models: Collection[str] | None, now: float) -> Iterator[str]:
    """`models`: the names of the catalogue, None if they are not known. `now`: Unix seconds."""
    yield from _shown(_expired(policy, now), "keys that have expired")
    if models is not None:
        yield from _shown(_of_no_model(policy, models), "patterns that no model matches")
    yield from _shown(_of_nobody(policy, models), "limits and budgets of nobody")


def has_precise_limits(policy: Policy) -> bool:
    rules = (*policy.anonymous, *policy.by_address, *policy.by_model)
    limits = (limit for _, limits in _limits(policy) for limit in limits)
    return any(one.precise for one in rules) or any(one.precise for one in (*policy.limits, *limits))


def _expired(policy: Policy, now: float) -> Iterator[str]:
    for row in policy.rows():
        if row.expires is not None and row.expires <= now:
            yield f"the key {row.name!r} ({row.id}) expired at {shown_time(row.expires)}"


def _of_no_model(policy: Policy, models: Collection[str]) -> Iterator[str]:
    """Each pattern once, with its first place."""
    seen: set[str] = set()
    for place, patterns in _patterns(policy):
        for pattern in patterns or ():
            if pattern not in seen and not any(map(matcher((pattern,)), models)):
                seen.add(pattern)
                yield f"{place}: no model matches {pattern!r}"


def _patterns(policy: Policy) -> Iterator[tuple[str, Patterns]]:
    for name, organisation in policy.organisations.items():
        yield f"organisation {name!r}", organisation.models
    for index, limit in enumerate(policy.limits):
        yield f"limits.{index}", limit.models
    for place, limits in _limits(policy):
        yield from ((place, limit.models) for limit in limits)
    seen: set[int] = set()
    for row in policy.rows():
        if row.models not in seen:
            seen.add(row.models)
            yield f"key {row.name!r}", policy.parts[row.models]


def _limits(policy: Policy) -> Iterator[tuple[str, Iterable[Limit]]]:
    """The limits of organisations and keys; equal ones of keys once."""
    for name, organisation in policy.organisations.items():
        yield f"organisation {name!r}", organisation.limits
    seen = {0}
    for row in policy.rows():
        if row.limits not in seen:
            seen.add(row.limits)
            yield f"key {row.name!r}", policy.parts[row.limits]


def _of_nobody(policy: Policy, models: Collection[str] | None) -> Iterator[str]:
    holders: dict[str, set[str]] = {"user": set(), "organisation": set()}
    for row in policy.rows():
        holders["user"].add(row.user or "")
        holders["organisation"].add(row.organisation or "")
    if models is not None:
        holders["model"] = set(models)
    sections: dict[str, Sequence[ScopedLimit | ScopedBudget]] = {"limits": policy.limits, "budgets": policy.budgets}
    for section, items in sections.items():
        for index, one in enumerate(items):
            if one.name is not None and one.name not in holders.get(one.scope, {one.name}):
                what = "there is no model" if one.scope == "model" else f"no key has the {one.scope}"
                yield f"{section}.{index}: {what} {one.name!r}"


def _shown(found: Iterator[str], rest: str) -> Iterator[str]:
    more = 0
    for number, one in enumerate(found):
        if number < _SHOWN:
            yield one
        else:
            more += 1
    if more:
        yield f"and {more} more {rest}"
