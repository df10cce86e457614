"""From the layers of features to one chain for each model: what a request for it passes."""

from collections.abc import Awaitable, Callable, Sequence
from enum import IntEnum
from typing import NamedTuple, TypeVar

from inference_api.feature import Feature
from inference_api.models import INTERNAL_ERROR, Call, Reply, Send, Tap
from inference_api.observe.account import Annotate
from inference_api.routing.entries import CatalogueEntry
from inference_api.routing.fleet import Model
from inference_api.upstream.admission import Process, admission

T = TypeVar("T")


def compose(send: Send, process: Process, enabled: Sequence[Feature]) -> "ByModel":
    """The chains around the attempts, `send`; `enabled` are the features, in order."""
    taps = [feature.tap for feature in enabled if feature.tap]
    asked, runs, member = (Role.ASKED,), (Role.ASKED, Role.VARIANT), (Role.MEMBER,)
    layers = [
        # Outermost: taps see the answer that the client gets, also one that a feature made.
        *([Layer(with_taps(taps), None, asked)] if taps else ()),
        *(
            Layer(wrap, feature.for_model, roles)
            for feature in enabled
            for wrap, roles in ((feature.send, runs), (feature.member, member))
            if wrap
        ),
        # Counts in the model that runs; the layers above can handle Overloaded.
        Layer(admission(process)),
        # Innermost: depends on the model that really answers.
        *(Layer(feature.ask, feature.for_model) for feature in enabled if feature.ask),
    ]
    return ByModel(send, layers, [(feature.annotate, feature.for_model) for feature in enabled if feature.annotate])


def with_taps(taps: list[Callable[[Call, Reply], Tap | None]]) -> Callable[[Send], Send]:
    """A `send` layer that adds taps to the Reply."""

    def wrap(send: Send) -> Send:
        async def tapped(call: Call, model: Model) -> Reply:
            reply = await send(call, model)
            try:
                reply.taps += tuple(tap for make in taps if (tap := make(call, reply)) is not None)
            except BaseException:
                await reply.aclose(INTERNAL_ERROR)
                raise
            return reply

        return tapped

    return wrap


class Role(IntEnum):
    """Why a model runs: a client asked for it; as the variant of a split; or as a fallback or member of another."""

    ASKED = 0
    VARIANT = 1
    MEMBER = 2


class Layer(NamedTuple):
    """One `send` layer, the entries that it applies to (None: all), and the roles of a model in which it does."""

    wrap: Callable[[Send], Send]
    for_model: Callable[[CatalogueEntry], bool] | None = None
    roles: tuple[Role, ...] = tuple(Role)


class _Parts(NamedTuple):
    entry: CatalogueEntry
    send: Send
    annotators: Sequence[Annotate]
    variant: Send
    member: Send


class ByModel:
    """The layers and annotators that apply to each model, composed at its first request with this entry.

    A feature that a key of the catalogue turns on so costs nothing for models without the key.
    """

    def __init__(
        self,
        send: Send,
        layers: Sequence[Layer],
        annotators: Sequence[tuple[Annotate, Callable[[CatalogueEntry], bool] | None]],
    ) -> None:
        self._send = send
        self._layers = layers
        self._annotators = annotators
        # Of requests without a model
        self.annotators = tuple(annotate for annotate, for_model in annotators if for_model is None)
        # Shared: models with the same layers have one chain.
        self._chains: dict[tuple[bool, ...], Send] = {}

    def send(self, call: Call, model: Model) -> Awaitable[Reply]:
        sent: Awaitable[Reply] = self._parts(model).send(call, model)
        return sent

    def variant(self, call: Call, model: Model) -> Awaitable[Reply]:
        return self._parts(model).variant(call, model)

    def member(self, call: Call, model: Model) -> Awaitable[Reply]:
        return self._parts(model).member(call, model)

    def _parts(self, model: Model) -> _Parts:
        parts: _Parts | None = model.parts
        if parts is None or parts.entry is not model.entry:
            entry = model.entry
            annotators = tuple(
                annotate for annotate, for_model in self._annotators if for_model is None or for_model(entry)
            )
            asked, variant, member = (self._chain(entry, role) for role in Role)
            model.parts = parts = _Parts(entry, asked, annotators, variant, member)
        return parts

    def _chain(self, entry: CatalogueEntry, role: Role) -> Send:
        on = tuple(
            role in layer.roles and (layer.for_model is None or layer.for_model(entry)) for layer in self._layers
        )
        send = self._chains.get(on)
        if send is None:
            layers = [layer.wrap for layer, applies in zip(self._layers, on, strict=True) if applies]
            send = self._chains[on] = chain(self._send, layers)
        return send


def chain(inner: T, layers: Sequence[Callable[[T], T]]) -> T:
    """Wrap `inner` in `layers`, the first one outermost."""
    for layer in reversed(layers):
        inner = layer(inner)
    return inner
