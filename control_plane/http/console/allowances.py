"""Fields of forms for limits, a budget, models and an end: from what is stored, and back to what the API takes."""

from collections.abc import Iterable, Mapping
from itertools import zip_longest
from typing import Any

from control_plane.errors import Invalid, Problem
from control_plane.http.console.forms import Form
from control_plane.pure.figures import ms
from inference_api.policy.document import BUDGET_UNITS, UNITS

# Empty rows of limits in a form
_MORE = 3
_COLUMNS = ("unit", "amount", "per", "models", "precise")
EMPTY = {"unit": "requests", "amount": "", "per": "60", "models": "", "precise": ""}
_PERIODS = {"1": "a second", "60": "a minute", "3600": "an hour"}
UNIT_CHOICES = tuple((unit, unit.replace("_", " ")) for unit in UNITS)
BUDGET_CHOICES = (("", "none"), *((unit, unit) for unit in BUDGET_UNITS))
PERIOD_CHOICES = (("day", "a day"), ("week", "a week"), ("month", "a month"))


def periods(rows: Iterable[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """The choices of a limit's period, with those that rows have already."""
    others = {row["per"] for row in rows} - {*_PERIODS, ""}
    more = sorted((int(one), f"in {ms(int(one) * 1000)}") for one in others if _is_count(one))
    return [*_PERIODS.items(), *((str(seconds), text) for seconds, text in more)]


# What templates need for these fields
FIELDS: Mapping[str, Any] = {
    "unit_choices": UNIT_CHOICES,
    "budget_choices": BUDGET_CHOICES,
    "period_choices": PERIOD_CHOICES,
    "periods": periods,
}


def typed(form: Form) -> dict[str, Any]:
    """All that was typed, to be shown again."""
    rows = [{**EMPTY, **row} for row in _rows(form) if row.get("amount")]
    return {**shown({}), **form.values, "limits": _with_empty(rows)}


def shown(one: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a form, of an object that has limits, a budget, models and an end as they are stored."""
    return {
        "limits": _with_empty(map(_row, one.get("limits") or ())),
        **_budget(one.get("budget")),
        "models": " ".join(one.get("models") or ()),
        "no_models": "1" if one.get("models") == [] else "",
        "expires": (one.get("expires") or "")[:10],
    }


def limits(form: Form) -> list[dict[str, Any]]:
    """Raises Invalid."""
    rows = _rows(form)
    if any(len(row) < len(_COLUMNS) for row in rows):
        raise Invalid(Problem("limits", "cannot be read: open the form again"))
    return [_limit(row, place) for place, row in enumerate(row for row in rows if row["amount"])]


def budget(form: Form) -> dict[str, Any] | None:
    """Raises Invalid."""
    unit = form.optional("budget_unit")
    if unit is None:
        return None
    if unit not in BUDGET_UNITS:
        raise Invalid(Problem("budget", f"must be one of {', '.join(BUDGET_UNITS)}"))
    size: float | None = form.decimal("budget_amount") if unit == "cost" else form.number("budget_amount")
    if size is None:
        raise Invalid(Problem("budget", "needs an amount"))
    soft = form.decimal("budget_soft")
    return {unit: size, "per": form.text("budget_per")} | ({} if soft is None else {"soft": soft / 100})


def as_patch(given: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """A budget in place of another one, as a merge patch."""
    return None if given is None else {**dict.fromkeys((*BUDGET_UNITS, "per", "soft")), **given}


def models(form: Form) -> list[str] | None:
    """None: all."""
    return form.words("models") or ([] if form.text("no_models") else None)


def expires(form: Form, before: str | None = None) -> str | None:
    """The start of a day in UTC; `before` stays as it is if its day does."""
    day = form.optional("expires")
    if day is None:
        return None
    return before if before is not None and before[:10] == day else f"{day}T00:00:00Z"


def _with_empty(rows: Iterable[dict[str, str]]) -> list[dict[str, str]]:
    return [*rows, *(dict(EMPTY) for _ in range(_MORE))]


def _row(one: Mapping[str, Any]) -> dict[str, str]:
    unit = next(unit for unit in UNITS if one.get(unit) is not None)
    return {
        "unit": unit,
        "amount": str(one[unit]),
        "per": str(one.get("per") or 60),
        # An empty list is no model at all.
        "models": "-" if one.get("models") == [] else " ".join(one.get("models") or ()),
        "precise": "1" if one.get("precise") else "",
    }


def _rows(form: Form) -> list[dict[str, str]]:
    """Browsers send all columns of each."""
    columns = [form.several(f"limit_{name}") for name in _COLUMNS]
    return [
        {name: text.strip() for name, text in zip(_COLUMNS, row, strict=True) if text is not None}
        for row in zip_longest(*columns)
    ]


def _is_count(text: str) -> bool:
    """Also one that is too large for the API to take; no more digits than anything can be made of."""
    return text.isdecimal() and len(text) <= 18


def _limit(row: Mapping[str, str], place: int) -> dict[str, Any]:
    unit, amount = row["unit"], row["amount"].replace(",", "")
    if unit not in UNITS:
        raise Invalid(Problem(f"limits.{place}", f"must be of one of {', '.join(UNITS)}"))
    if not _is_count(amount) or not _is_count(row["per"]):
        raise Invalid(Problem(f"limits.{place}", f"must be a whole number, not {row['amount'][:40]!r}"))
    found: dict[str, Any] = {unit: int(amount)}
    if unit != "streams":
        found["per"] = int(row["per"])
    if row["precise"]:
        found["precise"] = True
    if row["models"]:
        found["models"] = [] if row["models"] == "-" else row["models"].replace(",", " ").split()
    return found


def stored_budget(one: Mapping[str, Any]) -> dict[str, Any]:
    """A budget of the platform as one of a holder."""
    return {name: one[name] for name in (*BUDGET_UNITS, "per", "soft") if one.get(name) is not None}


def _budget(one: Mapping[str, Any] | None) -> dict[str, str]:
    if one is None:
        return {"budget_unit": "", "budget_amount": "", "budget_per": "month", "budget_soft": ""}
    unit = next(unit for unit in BUDGET_UNITS if one.get(unit) is not None)
    soft = one.get("soft")
    return {
        "budget_unit": unit,
        "budget_amount": f"{one[unit]:.9f}".rstrip("0").rstrip(".") if unit == "cost" else str(one[unit]),
        "budget_per": one["per"],
        "budget_soft": "" if soft is None else f"{soft * 100:.6f}".rstrip("0").rstrip("."),
    }
