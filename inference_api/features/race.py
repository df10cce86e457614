"""Virtual models by the catalogue key `race`: several members get the request, and the fastest one's answer is taken.

The first byte of a 2xx body wins. The others are cancelled at once, and their engines stop.
"""

from collections import deque
from collections.abc import Awaitable, Iterator, Mapping
from time import monotonic
from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from inference_api.core import Core
from inference_api.errors import InvalidRequest
from inference_api.feature import Feature, Switch
from inference_api.features.parallel.members import MemberRuns, present
from inference_api.features.parallel.runs import Run, until_first_byte
from inference_api.models import Call, Outcome, Reply, Send
from inference_api.observe.exposition import Family
from inference_api.observe.families import counter
from inference_api.observe.series import Count, Series
from inference_api.routing.entries import CatalogueEntry, EntryKey, ModelName
from inference_api.routing.fleet import Model
from inference_api.routing.references import Refers
from inference_api.settings import Settings


class Race(BaseModel):
    """Starts the members in order, `stagger` seconds apart."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    members: tuple[ModelName, ...] = Field(min_length=2, max_length=8)
    stagger: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0

    @model_validator(mode="after")
    def _distinct(self) -> Self:
        if len(set(self.members)) != len(self.members):
            raise ValueError("the same member is listed twice")
        return self


_REFERS = Refers(lambda race: race.members, "race.members", True, True, frozenset({"cache"}))
RACE: EntryKey[Race | None] = EntryKey("race", Race | None, None, _REFERS)


def build(core: Core, settings: Settings) -> Feature:
    """Always built: the key turns it on for its model."""
    races = Races(core)
    return Feature("race", send=races.layer, member=races.layer, for_model=is_race, collect=races.collect)


def is_race(entry: CatalogueEntry) -> bool:
    return RACE.of(entry) is not None


class Races:
    """Runs races, and counts who wins."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self._wins: Series[tuple[str, str], Count] = Series(
            lambda key: Count(), lambda key: key[0] in core.fleet.models
        )

    def layer(self, send: Send) -> Send:
        """In place of `send`: a race has no backends of its own. Raises InvalidRequest."""

        def racing(call: Call, model: Model) -> Awaitable[Reply]:
            check(call, model)
            return self._race(call, model)

        return racing

    async def _race(self, call: Call, model: Model) -> Reply:
        race = RACE.of(model.entry)
        assert race is not None
        waiting, due = deque(present(self._core, race.members, model)), 0.0
        async with MemberRuns(self._core, "race", Outcome.RACE_LOST, call, model, until_first_byte) as runs:
            failed: list[Run] = []
            while True:
                # One that failed starts the next one at once.
                while waiting and (failed or monotonic() >= due):
                    runs.start_member(waiting.popleft())
                    failed, due = failed[1:], monotonic() + race.stagger
                if not runs.are_open:
                    return await runs.keep(runs.all[0])
                failed = await runs.next(max(due - monotonic(), 0.0) if waiting else None)
                winner = next((run for run in failed if run.answered), None)
                if winner is not None:
                    self._wins[model.name, winner.model.name].count += 1
                    return await runs.keep(winner)

    def collect(self) -> Iterator[Family]:
        if self._wins:
            yield from families({labels: cell.count for labels, cell in self._wins.snapshot().items()})


def families(wins: Mapping[tuple[str, str], int]) -> Iterator[Family]:
    """`wins`: by virtual model and member."""
    text = "Races by the member whose answer came first."
    series = [(labels, float(count)) for labels, count in wins.items()]
    yield counter("race_wins", text, ("model_name", "member"), series)


def check(call: Call, model: Model) -> None:
    """Raises InvalidRequest for what members must not do more than once."""
    if call.route.repeatable or call.fields.get("store") is False:
        return
    text = (
        f"The model {model.name!r} is a race: its members would each store a response. "
        "Send `store: false`, or name one model."
    )
    raise InvalidRequest(text, param="model")


FEATURE = Switch(build, keys=(RACE,))
