"""What a request costs, by the catalogue key `price`: in the access line, a metric, the Record and the usage record.

Money is an integer, 10^-9 of CURRENCY. A price that is not known is never 0, and neither is a cost.
"""

from collections.abc import Awaitable, Iterator, Mapping
from decimal import Decimal
from typing import Annotated, Any, NamedTuple

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PlainSerializer,
    field_validator,
    model_validator,
)

from inference_api.core import Core
from inference_api.feature import Feature, Switch
from inference_api.features.delivery.records import METERED
from inference_api.models import Call, Reply, Send
from inference_api.observe.account import Record
from inference_api.observe.exposition import Family
from inference_api.observe.families import counter
from inference_api.observe.legs import BILLED, KIND
from inference_api.observe.series import Count, Series
from inference_api.policy.document import nanos
from inference_api.routing.entries import CatalogueEntry, EntryKey
from inference_api.routing.fleet import Model
from inference_api.settings import Group, Settings

# Under which the state of a request has its price
_NAME = "price"
_MILLION = 10**6

_Money = Annotated[Decimal, Field(ge=0, le=_MILLION, allow_inf_nan=False)]


class Options(Group):
    currency: str = Field(
        default="USD",
        pattern=r"^[A-Z]{3}$",
        description="unit of prices and budgets: three capital letters; nothing is converted",
    )


class Price(NamedTuple):
    """In 10^-9 of CURRENCY: per million input, cached input and output tokens, and per request."""

    input: int
    cached_input: int
    output: int
    request: int


class EntryPrice(Price):
    """The price of an entry, which a registry can write again: `written` has what people wrote."""

    written: Mapping[str, int | float]


class PriceEntry(BaseModel):
    """A price as people write it: CURRENCY per million tokens, and per request; at most 9 decimals."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    input: _Money
    cached_input: _Money | None = None
    output: _Money
    request: _Money = Decimal(0)

    @model_validator(mode="before")
    @classmethod
    def _as_written(cls, value: Any) -> Any:
        """Numbers of JSON and YAML by their digits: 0.1 is not the nearest binary fraction."""
        if not isinstance(value, dict):
            return value
        for name, one in value.items():
            if name in cls.model_fields and (isinstance(one, bool) or not isinstance(one, int | float | Decimal)):
                raise ValueError(f"{name} must be a number")
        return {name: Decimal(str(one)) if isinstance(one, float) else one for name, one in value.items()}

    @field_validator("input", "cached_input", "output", "request")
    @classmethod
    def _exact(cls, amount: Decimal | None) -> Decimal | None:
        if amount is not None:
            nanos(amount)
        return amount

    def price(self) -> EntryPrice:
        cached = self.input if self.cached_input is None else self.cached_input
        price = EntryPrice(nanos(self.input), nanos(cached), nanos(self.output), nanos(self.request))
        price.written = {name: _number(one) for name, one in self if one is not None and name in self.model_fields_set}
        return price


def _number(amount: Decimal) -> int | float:
    return int(amount) if amount == amount.to_integral_value() else float(amount)


# Entries have the plain integers, which requests read.
_InNanos = Annotated[
    PriceEntry, AfterValidator(PriceEntry.price), PlainSerializer(lambda price: dict(price.written), return_type=dict)
]
PRICE: EntryKey[Price | None] = EntryKey("price", _InNanos | None, None)


def build(core: Core, settings: Settings) -> Feature:
    """Always built, and only on the way of models with a price."""
    costs = Costs(core)
    return Feature(
        "cost", ask=costs.ask, for_model=has_price, annotate=costs.annotate, leg=costs.leg, collect=costs.collect
    )


def has_price(entry: CatalogueEntry) -> bool:
    return PRICE.of(entry) is not None


def cost_of(price: Price, input_tokens: int, cached: int, output_tokens: int) -> int:
    """10^-9 of CURRENCY, rounded down. `cached`: those of the input tokens that a cache had."""
    read, reused, made, request = price
    if cached > input_tokens:
        cached = input_tokens
    return ((input_tokens - cached) * read + cached * reused + output_tokens * made) // _MILLION + request


class Costs:
    """Notes the price at the beginning of a request, and computes its cost at the end."""

    def __init__(self, core: Core) -> None:
        self._totals: Series[str, Count] = Series(lambda model: Count(), lambda model: model in core.fleet.served)

    def ask(self, send: Send) -> Send:
        def priced(call: Call, model: Model) -> Awaitable[Reply]:
            # Of the model that answers: its price may change before the answer ends.
            call.state[_NAME] = model.entry.price  # type: ignore[attr-defined, index]
            return send(call, model)

        return priced

    def annotate(self, record: Record, extra: dict[str, Any]) -> None:
        # By its place: reading a field by name costs ten times as much.
        state = record[21]
        metered = state.get(METERED)
        if metered is None:
            return
        prompt, cached, completion, _, source = metered
        if source == "cache" or (source == "none" and prompt is not None):
            extra["cost_nanos"] = 0
            return
        price: Price | None = state.get(_NAME)
        if price is None or prompt is None or completion is None:
            return
        extra["cost_nanos"] = cost = cost_of(price, prompt, cached or 0, completion)
        if cost:
            self._totals[record[2]].count += cost

    def leg(self, record: Record, extra: dict[str, Any]) -> None:
        if extra[KIND] in BILLED:
            self.annotate(record, extra)
        else:
            extra["cost_nanos"] = 0

    def collect(self) -> Iterator[Family]:
        if self._totals:
            yield from families({model: cell.count for model, cell in self._totals.snapshot().items()})


def families(totals: Mapping[str, int]) -> Iterator[Family]:
    """`totals`: cost by model."""
    text = "Cost of finished requests, in 10^-9 of CURRENCY."
    yield counter("cost_nanos", text, ("model_name",), [((model,), total) for model, total in totals.items()])


FEATURE = Switch(build, Options, keys=(PRICE,))
