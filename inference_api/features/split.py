"""`split`: a virtual model that shares its requests out among variants, by weight; the same id keeps its variant."""

from collections.abc import Callable
from time import monotonic
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from inference_api.core import Core
from inference_api.errors import NoBackend
from inference_api.feature import Feature, Switch
from inference_api.features.splitting.metrics import VariantMetrics
from inference_api.features.splitting.slots import SLOTS, slot_of, variant_of
from inference_api.members import Members, is_noted
from inference_api.models import ASKED, RAN, Call, Reply, Send, at_end, header_of, note
from inference_api.routing.backend import Backend
from inference_api.routing.entries import CatalogueEntry, EntryKey, ModelName
from inference_api.routing.fleet import Fleet, Model
from inference_api.routing.references import Refers, members_of
from inference_api.settings import Settings

_HEADER = b"x-inference-variant"
# Fields of the body that name the client's own user; the first of them counts.
_USER = ("user", "safety_identifier")
# The field of the access line with the choice of the outermost split
_VARIANT = "variant"
_Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]


def _some(variants: dict[str, float]) -> dict[str, float]:
    if not any(variants.values()):
        raise ValueError("the weights are all 0; one of them must be greater")
    return variants


class SplitEntry(BaseModel):
    """Variants with their weights, relative to each other. `sticky`: what keeps its variant."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    variants: Annotated[dict[ModelName, _Weight], Field(min_length=2, max_length=16), AfterValidator(_some)]
    sticky: Literal["user", "key", "session", "none"] = "user"


_NAMES = Refers(lambda split: split.variants, "split.variants", is_virtual=True, follows=True)
KEY: EntryKey[SplitEntry | None] = EntryKey("split", SplitEntry | None, None, _NAMES)


def build(core: Core, settings: Settings) -> Feature:
    """Always built, and only on the way of virtual models with a split."""
    splits = Splits(core.fleet, core.members, core.rand.random)
    return Feature(
        "split",
        fields=_USER,
        send=splits.send,
        member=splits.member,
        for_model=has_split,
        collect=splits.metrics.collect,
    )


def has_split(entry: CatalogueEntry) -> bool:
    return KEY.of(entry) is not None


class Splits:
    """Chooses the variant of each request, which then runs in place of the virtual model. `rand` gives [0, 1)."""

    def __init__(self, fleet: Fleet, members: Members, rand: Callable[[], float]) -> None:
        self._fleet = fleet
        self._members = members
        self._rand = rand
        self.metrics = VariantMetrics(fleet)

    def send(self, send: Send) -> Send:
        """The layer, for a virtual model that a client asked for; `send` is not used: a variant has its own layers."""
        return lambda call, model: self._send(call, model, self._members.variant)

    def member(self, send: Send) -> Send:
        """The same, for a virtual model that is a member of another."""
        return lambda call, model: self._send(call, model, self._members.send)

    async def _send(self, call: Call, model: Model, run: Send) -> Reply:
        name, state = self._choose(call, model), call.state
        variant = self._fleet.by_name.get(name)
        if variant is None:
            # An adapter that no engine has listed yet
            raise NoBackend(name, none=True)
        at_end(state, lambda record: self.metrics.count(model.name, name, record))
        state.setdefault(ASKED, model)  # type: ignore[attr-defined]
        state[RAN] = variant  # type: ignore[index]
        if not is_noted(state, _VARIANT):
            note(state, _VARIANT, name)
            call.answer_headers.append((_HEADER, name.encode()))
        return await run(call, variant)

    def _choose(self, call: Call, model: Model) -> str:
        split = KEY.of(model.entry)
        assert split is not None
        id = _id(call, split.sticky)
        slot = int(self._rand() * SLOTS) if id is None else slot_of(model.name, id)
        now = monotonic()
        return variant_of(slot, split.variants, lambda name: _is_out(self._fleet, name, now))


def _id(call: Call, sticky: str) -> str | None:
    """What keeps its variant; None: nothing does."""
    if sticky == "none":
        return None
    if sticky == "session" and (session := header_of(call, b"x-session-id")):
        return session.decode("latin-1")
    if sticky != "key":
        users = (call.fields.get(name) for name in _USER)
        user = next((user for user in users if isinstance(user, str) and user), None)
        user = user or getattr(call.caller, "user", None)
        if user is not None:
            return user
    if call.caller is not None:
        return call.caller.id
    return "" if call.client is None else call.client[0]


def _is_out(fleet: Fleet, name: str, now: float) -> bool:
    """Whether a variant has no backend to try: none is found, or all are out or open.

    A virtual one is out if all of its members are.
    """
    model = fleet.by_name.get(name)
    if model is None:
        return True
    if model.members:
        return all(_is_out(fleet, member, now) for member in members_of(model.entry))
    return not any(backend.usable or _may_be_tried(backend, now) for backend in model.awake)


def _may_be_tried(backend: Backend, now: float) -> bool:
    """Whether its circuit is half-open."""
    return not backend.closed and backend.origin.healthy and backend.due <= now


FEATURE = Switch(build, keys=(KEY,))
