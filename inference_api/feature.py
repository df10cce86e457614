"""Feature: one value with all parts of an optional feature; every part defaults to nothing.

A module of `features/` exports a Switch, `FEATURE`, and has one line in `app.py`. A feature that is off is not built:
it has no object, and no request checks for it.
"""

from collections.abc import Callable, Coroutine, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from starlette.routing import Route as PageRoute
from starlette.types import ASGIApp

from inference_api.http.head import RequestHead
from inference_api.http.pipeline import Resolve
from inference_api.models import Call, Caller, Reply, Send, Tap
from inference_api.observe.account import Annotate, Sink
from inference_api.observe.exposition import Family
from inference_api.routing.balancer import MakeBalancer
from inference_api.routing.entries import CatalogueEntry, EntryKey
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
    # The same, where the model runs for another one: as its fallback, or as a member of a race or a vote. A variant has
    # `send`.
    member: Callable[[Send], Send] | None = None
    # The same, directly around the attempts: inside of admission, so that it runs for the model that answers.
    ask: Callable[[Send], Send] | None = None
    # Whether `send`, `member`, `ask` and `annotate` apply to the models of this entry; None: to all. Asked once per
    # entry.
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
    # Gets the Record of a run beside the request's own, which no client got: the loser of a race, of a vote or of a
    # hedge, a shadow. It adds to the second argument, `Record.extra`.
    leg: Annotate | None = None
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
