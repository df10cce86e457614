"""The price that held at a time: rows are added, and each holds until the next one of its model."""

from bisect import bisect_right
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from inference_api.features.cost import EntryPrice, Price, cost_of
from inference_api.policy.document import NANOS


class PriceRow(NamedTuple):
    """`valid_from`: Unix milliseconds. `cached_as_input`: cached tokens have no price of their own."""

    valid_from: int
    price: Price
    cached_as_input: bool = False

    def entry_price(self) -> EntryPrice:
        """As an entry has it."""
        found = EntryPrice(*self.price)
        found.written = {
            name: amount(value)
            for name, value in self.price._asdict().items()
            if not (name == "cached_input" and self.cached_as_input) and not (name == "request" and value == 0)
        }
        return found


def amount(value: int) -> int | float:
    """Nanos as people write them."""
    return value // NANOS if value % NANOS == 0 else value / NANOS


class PriceList:
    """All rows, by model. Never changes."""

    def __init__(self, rows: Iterable[tuple[str, PriceRow]]) -> None:
        """`rows`: of the same moment, the one added last holds."""
        found: dict[str, list[PriceRow]] = {}
        for model, row in rows:
            found.setdefault(model, []).append(row)
        self._rows: Mapping[str, list[PriceRow]] = {
            model: sorted(of, key=lambda row: row.valid_from) for model, of in found.items()
        }

    def at(self, model: str, at: int) -> PriceRow | None:
        """What held then; None: not known."""
        rows = self._rows.get(model, [])
        place = bisect_right(rows, at, key=lambda row: row.valid_from)
        return rows[place - 1] if place else None

    def next_after(self, at: int) -> int | None:
        """When the next row begins to hold."""
        return min(
            (row.valid_from for rows in self._rows.values() for row in rows if row.valid_from > at), default=None
        )

    def cost(self, model: str, at: int, input_tokens: int | None, cached: int | None, output: int | None) -> int | None:
        """In 10^-9 of CURRENCY; None if the price or the tokens are not known."""
        row = self.at(model, at)
        if row is None or input_tokens is None or output is None:
            return None
        return cost_of(row.price, input_tokens, cached or 0, output)
