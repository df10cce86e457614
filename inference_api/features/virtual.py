"""What a vote or a race cannot answer is refused as other invalid requests are: before prompts, budgets and limits.

They check it again where they run as a member of another model.
"""

from collections.abc import Awaitable

from inference_api.core import Core
from inference_api.feature import Feature, Switch
from inference_api.features import consensus, race
from inference_api.models import Call, Reply, Send
from inference_api.routing.entries import CatalogueEntry
from inference_api.routing.fleet import Model
from inference_api.settings import Settings


def build(core: Core, settings: Settings) -> Feature:
    """Always built, and only on the way of votes and races."""
    return Feature("virtual", send=_of_what_runs, for_model=has_check)


def has_check(entry: CatalogueEntry) -> bool:
    return consensus.votes_on(entry) or race.is_race(entry)


def _of_what_runs(send: Send) -> Send:
    def checked(call: Call, model: Model) -> Awaitable[Reply]:
        (consensus.check if consensus.votes_on(model.entry) else race.check)(call, model)
        return send(call, model)

    return checked


FEATURE = Switch(build)
