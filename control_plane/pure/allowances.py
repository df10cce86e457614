"""Limits and budgets in words: `60 requests a minute`, `50.00 USD a month`."""

from collections.abc import Mapping
from typing import Any

from control_plane.pure import figures
from inference_api.policy.document import BUDGET_UNITS, UNITS, nanos

_EACH = {1: "a second", 60: "a minute", 3600: "an hour"}


def limit(one: Mapping[str, Any]) -> str:
    """An item of `limits`, as it is stored."""
    unit = next(unit for unit in UNITS if one.get(unit) is not None)
    text = f"{figures.count(one[unit])} {unit.replace('_', ' ')}"
    per = one.get("per")
    text += " at once" if per is None else f" {_EACH.get(per) or f'in {figures.ms(per * 1000)}'}"
    if one.get("models") is not None:
        text += f" for {', '.join(one['models']) or 'no model'}"
    return text


def budget(one: Mapping[str, Any], currency: str) -> str:
    """A budget, as it is stored."""
    unit = next(unit for unit in BUDGET_UNITS if one.get(unit) is not None)
    return f"{amount(unit, nanos(one[unit]) if unit == 'cost' else one[unit], currency)} a {one['per']}"


def amount(unit: str, size: int, currency: str) -> str:
    """What is spent, or may be. `size`: nanos of a cost, else a count."""
    return figures.money(size, currency) if unit == "cost" else f"{figures.count(size)} {unit}"
