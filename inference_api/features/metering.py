"""The tokens of each request, for its usage record, its cost and its limits."""

from typing import Any, cast

from inference_api.core import Core
from inference_api.feature import Feature, Switch
from inference_api.features import policy, usage
from inference_api.features.delivery.metered import Calibration, metered
from inference_api.features.delivery.records import METERED, Metered
from inference_api.models import OK
from inference_api.observe.account import Record
from inference_api.routing.entries import CatalogueEntry
from inference_api.settings import Settings


def build(core: Core, settings: Settings) -> Feature:
    """Always built: a price in the catalogue turns it on for its model."""
    metering = Metering(core)
    is_wanted = settings.of(usage.Options).usage != "off" or settings.of(policy.Options).policy is not None
    return Feature("metering", annotate=metering.annotate, for_model=None if is_wanted else has_price)


def has_price(entry: CatalogueEntry) -> bool:
    return getattr(entry, "price", None) is not None


class Metering:
    """Puts the tokens of each request into its state, under METERED."""

    def __init__(self, core: Core) -> None:
        self._models = core.fleet
        self.calibration = Calibration()

    def annotate(self, record: Record, extra: dict[str, Any]) -> None:
        state = cast(dict[str, Any], record[21])
        answered, (prompt, _, completion, _), events = record[24], record[13], record[14]
        if not events and prompt is not None and completion is not None and 200 <= answered < 300:
            # Nearly every JSON answer
            state[METERED] = (*record[13], "reported")
            return
        model = record[2]
        tokens: Metered = metered(record, self.calibration.of(model))
        state[METERED] = tokens
        if events and record[6] is OK and tokens[4] == "reported" and tokens[2]:
            self.calibration.learn(model, tokens[2], events, len(self._models.models))


FEATURE = Switch(build)
