"""Feature: one value with all parts of an optional feature; every part defaults to nothing.

A module of `features/` exports a Switch, `FEATURE`, and has one line in `app.py`. A feature that is off is not built:
it has no object, and no request checks for it.
"""

from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from starlette.routing import Route as PageRoute
from starlette.types import ASGIApp

from inference_api.http.head import RequestHead
from inference_api.http.pipeline import Resolve
from inference_api.models import INTERNAL_ERROR, Call, Caller, Reply, Send, Tap
from inference_api.observe.account import Annotate, Sink
from inference_api.observe.exposition import Family
from inference_api.routing.balancer import MakeBalancer
from inference_api.routing.entries import CatalogueEntry, EntryKey
from inference_api.routing.fleet import Model
from inference_api.settings import Group, Settings
from inference_api.upstream.attempt import SendAttempt
from inference_api.upstream.forward import OnFailure

if TYPE_CHECKING:
    from inference_api.core import Core

Run = Callable[[], Coroutine[Any, Any, None]]


class Feature(NamedTuple):
    """The parts of one optional feature, in the order in which a request passes them.

    All but `collect` run on the event loop of the requests and must not block it. A wrapper closes every Reply that it
    does not return, and re-raises exceptions that it does not handle.
    """

    name: str
    # ASGI layer inside of Accounts: `scope[ACCOUNT]` is set; a RouterError is answered, counted and logged;
    # `http.accounts.respond` sends an answer of the layer's own; `scope[ACCOUNT].answer_headers` adds headers to every
    # answer. If it wraps `send` or `receive`, it gets every byte, as plain ASGI messages, but no answer to an error;
    # both are stepped outside of a task (relay.pump, http.disconnect), so that neither anyio nor `asyncio.timeout`
    # works inside of them.
    layer: Callable[[ASGIApp], ASGIApp] | None = None
    # RequestHead -> Caller, before the body is read, for all paths but the probes. Raises RouterError (401).
    identify: Callable[[RequestHead], Caller | None] | None = None
    # Names of small top-level fields of JSON bodies that its parts find in `Call.fields`.
    fields: tuple[str, ...] = ()
    # Wraps the look-up of a name: access per caller. Raises RouterError (403, 404).
    resolve: Callable[[Resolve], Resolve] | None = None
    # Wraps (Call, Model) -> Reply: reject, rewrite, answer without a backend, try another model. `reply.extra` adds
    # headers, `reply.on_end` reports the end, `reply.filter` drops single events.
    send: Callable[[Send], Send] | None = None
    # The same, directly around the attempts: inside of admission, so that it runs for the model that answers.
    ask: Callable[[Send], Send] | None = None
    # Whether `send`, `ask` and `annotate` apply to the models of this entry; None: to all. Asked once per entry.
    for_model: Callable[[CatalogueEntry], bool] | None = None
    # Wraps one attempt on one backend.
    attempt: Callable[[SendAttempt], SendAttempt] | None = None
    # Gets each attempt that failed, and what follows it: a repeat, or not. One that does not fail costs nothing.
    failed: OnFailure | None = None
    # A Tap for the bytes of this answer, or None; without taps the fast path stays open.
    tap: Callable[[Call, Reply], Tap | None] | None = None
    # Adds fields to the Record of a finished request (`Record.extra`), before the sinks.
    annotate: Annotate | None = None
    # Gets the Record of every finished request, rejected ones included; must not raise.
    record: Sink | None = None
    # Metric families, made anew for each scrape; with OPS_PORT on another thread.
    collect: Callable[[], Iterator[Family]] | None = None
    # Routes for clients, and for operators (on OPS_PORT if set).
    pages: tuple[PageRoute, ...] = ()
    ops_pages: tuple[PageRoute, ...] = ()
    # Background tasks; each runs until it is cancelled.
    tasks: tuple[Run, ...] = ()
    # The reason for which the router is not ready, or None.
    ready: Callable[[], str | None] | None = None
    # Warnings of `inference-api check`: of what is valid, and probably wrong.
    check: Callable[[], Iterator[str]] | None = None
    # Called at the end of the process, after the last request.
    close: Callable[[], None] | None = None


class Switch(NamedTuple):
    """How one feature is turned on. A module of `features/` exports it as FEATURE; `app` lists it."""

    # Returns the feature, or None if the settings leave it off. Raises SettingsError.
    build: "Callable[[Core, Settings], Feature | None]"
    # Its settings
    options: type[Group] | None = None
    # Its keys of a catalogue entry
    keys: tuple[EntryKey[Any], ...] = ()
    # Balancing algorithms by name; they replace the core's if the feature is on.
    balancers: Callable[[Settings], Mapping[str, MakeBalancer]] | None = None
    # With these settings, the reason to refuse an entry of a catalogue, or None
    refuse: Callable[[Settings], Callable[[CatalogueEntry], str | None] | None] | None = None


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


class Layer(NamedTuple):
    """One `send` layer, and the entries that it applies to; None: all."""

    wrap: Callable[[Send], Send]
    for_model: Callable[[CatalogueEntry], bool] | None = None


class _Parts(NamedTuple):
    entry: CatalogueEntry
    send: Send
    annotators: Sequence[Annotate]


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
        parts = model.parts
        if parts is None or parts.entry is not model.entry:
            parts = self._compose(model)
        sent: Awaitable[Reply] = parts.send(call, model)
        return sent

    def _compose(self, model: Model) -> _Parts:
        entry = model.entry
        on = tuple(layer.for_model is None or layer.for_model(entry) for layer in self._layers)
        send = self._chains.get(on)
        if send is None:
            layers = [layer.wrap for layer, applies in zip(self._layers, on, strict=True) if applies]
            send = self._chains[on] = chain(self._send, layers)
        annotators = tuple(
            annotate for annotate, for_model in self._annotators if for_model is None or for_model(entry)
        )
        model.parts = parts = _Parts(entry, send, annotators)
        return parts


def chain(send: Send, layers: Sequence[Callable[[Send], Send]]) -> Send:
    """Wrap `send` in `layers`, the first one outermost."""
    for layer in reversed(layers):
        send = layer(send)
    return send
