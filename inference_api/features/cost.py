"""What a request costs, by the catalogue key `price`: in the access line, a metric, the Record and the usage record.

Money is an integer, 10^-9 of CURRENCY. A price that is not known is never 0, and neither is a cost.
"""

from collections.abc import Awaitable, Iterator, Mapping
from decimal import Decimal
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, model_validator

from inference_api.core import Core
from inference_api.feature import Feature, Switch
from inference_api.models import Call, Reply, Send
from inference_api.observe.account import Record
from inference_api.observe.exposition import Family
from inference_api.observe.families import counter
from inference_api.observe.series import Count, Series
from inference_api.policy.document import nanos
from inference_api.routing.entries import CatalogueEntry, EntryKey
from inference_api.routing.fleet import Model
from inference_api.settings import Group, Settings

# Under which the state of a request has its Rates, and its Metered
RATES, METERED = "rates", "metered"
_MILLION = 10**6

# 10^-9 of CURRENCY per million input, cached input and output tokens, and per request
Rates = tuple[int, int, int, int]
_Money = Annotated[Decimal, Field(ge=0, le=_MILLION, allow_inf_nan=False)]


class Options(Group):
    currency: str = Field(
        default="USD",
        pattern=r"^[A-Z]{3}$",
        description="unit of prices and budgets: three capital letters; nothing is converted",
    )


class Price(BaseModel):
    """CURRENCY per million tokens, and per request; at most 9 decimals."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    input: _Money
    cached_input: _Money | None = None
    output: _Money
    request: _Money = Decimal(0)

    _rates: Rates = PrivateAttr(default=(0, 0, 0, 0))

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

    @model_validator(mode="after")
    def _in_nanos(self) -> Self:
        cached = self.input if self.cached_input is None else self.cached_input
        self._rates = nanos(self.input), nanos(cached), nanos(self.output), nanos(self.request)
        return self

    @property
    def rates(self) -> Rates:
        return self._rates

    @property
    def is_free(self) -> bool:
        return not any(self._rates)


PRICE: EntryKey[Price | None] = EntryKey("price", Price | None, None)


def build(core: Core, settings: Settings) -> Feature:
    """Always built, and only on the way of models with a price."""
    costs = Costs(core)
    return Feature("cost", ask=costs.ask, for_model=has_price, annotate=costs.annotate, collect=costs.collect)


def has_price(entry: CatalogueEntry) -> bool:
    return PRICE.of(entry) is not None


def cost_of(rates: Rates, input_tokens: int, cached: int, output_tokens: int) -> int:
    """10^-9 of CURRENCY, rounded down. `cached`: those of the input tokens that a cache had."""
    cached = min(cached, input_tokens)
    tokens = (input_tokens - cached) * rates[0] + cached * rates[1] + output_tokens * rates[2]
    return tokens // _MILLION + rates[3]


class Costs:
    """Notes the price at the beginning of a request, and computes its cost at the end."""

    def __init__(self, core: Core) -> None:
        self._totals: Series[str, Count] = Series(lambda model: Count(), lambda model: model in core.fleet.models)

    def ask(self, send: Send) -> Send:
        def priced(call: Call, model: Model) -> Awaitable[Reply]:
            # Of the model that answers: its price may change before the answer ends.
            price: Price = model.entry.price  # type: ignore[attr-defined]
            call.state[RATES] = price._rates  # type: ignore[index]
            return send(call, model)

        return priced

    def annotate(self, record: Record, extra: dict[str, Any]) -> None:
        metered = record.state.get(METERED)
        if metered is None:
            return
        prompt, cached, completion, _, source = metered
        if source == "cache" or (source == "none" and prompt is not None):
            extra["cost_nanos"] = 0
            return
        rates: Rates | None = record.state.get(RATES)
        if rates is None or prompt is None or completion is None:
            return
        extra["cost_nanos"] = cost = cost_of(rates, prompt, cached or 0, completion)
        if cost:
            self._totals[record.model_name].count += cost

    def collect(self) -> Iterator[Family]:
        if self._totals:
            yield from families({model: cell.count for model, cell in self._totals.snapshot().items()})


def families(totals: Mapping[str, int]) -> Iterator[Family]:
    """`totals`: cost by model."""
    text = "Cost of finished requests, in 10^-9 of CURRENCY."
    yield counter("cost_nanos", text, ("model_name",), [((model,), total) for model, total in totals.items()])


FEATURE = Switch(build, Options, keys=(PRICE,))
