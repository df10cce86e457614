"""How an optional part attaches to the router: one value, whose parts all default to nothing.

A module of `features/` has a function `build(core, settings)` that returns a Feature, or None where it is off, and one
line in `app.py`. What is off is not built: no object of it exists, and no request asks for it.
"""

from collections.abc import Callable, Coroutine, Iterator
from typing import Any, NamedTuple

from starlette.routing import Route as PageRoute
from starlette.types import ASGIApp

from inference_api.http.head import RequestHead
from inference_api.http.pipeline import Resolve
from inference_api.models import Call, Caller, Reply, Send, Tap
from inference_api.observe.account import Sink
from inference_api.observe.exposition import Family
from inference_api.routing.fleet import Model
from inference_api.upstream.attempt import SendAttempt

Run = Callable[[], Coroutine[Any, Any, None]]


class Feature(NamedTuple):
    """The parts of one optional feature, in the order in which a request meets them.

    Everything but `collect` runs on the event loop of the requests and must not block it. A part that wraps another
    calls it at most as often as it needs answers, closes every Reply that it does not return, and lets every exception
    it does not know pass.
    """

    name: str
    # An ASGI layer inside of the accounts: `scope[ACCOUNT]` is there; a RouterError that it raises is answered, counted
    # and logged; `http.accounts.respond` gives an answer of its own. One that wraps `send` or `receive` gets plain ASGI
    # messages, every byte of them.
    layer: Callable[[ASGIApp], ASGIApp] | None = None
    # From a request head to who asks, before the body is read, for every path but the probes. Raises RouterError (401).
    identify: Callable[[RequestHead], Caller | None] | None = None
    # Around the look-up of a name: what a caller may see. Raises RouterError (403, 404).
    resolve: Callable[[Resolve], Resolve] | None = None
    # Around the way from a Call to a Reply: refuse, rewrite, answer without a backend, try another model. To add
    # headers: `reply.extra`; to learn of the end: `reply.on_end`; to drop single events: `reply.filter`.
    send: Callable[[Send], Send] | None = None
    # Around one try on one backend.
    attempt: Callable[[SendAttempt], SendAttempt] | None = None
    # Who sees the bytes of this answer; None: nobody, and the fast path stays open.
    tap: Callable[[Call, Reply], Tap | None] | None = None
    # Gets the frozen Record of every finished request, refused ones included; must not raise.
    record: Sink | None = None
    # Families of metrics, made anew for each scrape; may be called from another thread (OPS_PORT).
    collect: Callable[[], Iterator[Family]] | None = None
    # Routes of its own: for clients, and for the operator (OPS_PORT, else the same port).
    pages: tuple[PageRoute, ...] = ()
    ops_pages: tuple[PageRoute, ...] = ()
    # Run beside the requests until they are cancelled.
    tasks: tuple[Run, ...] = ()
    # At the end of the process, after the last request.
    close: Callable[[], None] | None = None


def with_taps(taps: list[Callable[[Call, Reply], Tap | None]]) -> Callable[[Send], Send]:
    """A `send` layer that gives each answer the taps that want to see it."""

    def wrap(send: Send) -> Send:
        async def tapped(call: Call, model: Model) -> Reply:
            reply = await send(call, model)
            reply.taps += tuple(tap for make in taps if (tap := make(call, reply)) is not None)
            return reply

        return tapped

    return wrap


def chain(send: Send, layers: list[Callable[[Send], Send]]) -> Send:
    """`layers` around `send`, the first one outermost."""
    for layer in reversed(layers):
        send = layer(send)
    return send
