"""The HTTP surface: an allow-list of routes, and what happens on each. Nothing that is not here reaches a backend."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import NamedTuple

from starlette.types import ASGIApp, Receive, Scope
from starlette.types import Send as ASGISend

from inference_api.errors import ClientGone, InternalError, RouterError, ShuttingDown, TooLarge, render
from inference_api.http import bodies, wire
from inference_api.http.admission import Admission, overloaded
from inference_api.http.disconnect import DisconnectWatcher
from inference_api.http.head import RequestHead, RequestHeaders
from inference_api.models import Asked, Call, Outcome, RawHeaders, Route, Send, Tap
from inference_api.observe.accounts import Account, Accounts
from inference_api.relay.relay import Relay
from inference_api.routing.backend import Model
from inference_api.server.cycle import CYCLE, Cycle
from inference_api.server.repeated_head import HeadCache

logger = logging.getLogger(__name__)

_CHAT = bodies.JSONReader(bodies.Chat)
_COMPLETION = bodies.JSONReader(bodies.Completion, one_of=("prompt", "prompt_embeds"))
_EMBEDDING = bodies.JSONReader(bodies.Embedding, one_of=("input", "messages"))
_RESPONSES = bodies.JSONReader(bodies.Responses)
_RERANK = bodies.JSONReader(bodies.Rerank)
_SCORE = bodies.JSONReader(bodies.Named)
_TOKENIZE = bodies.JSONReader(bodies.Tokenize, one_of=("prompt", "messages"))
_UPLOAD = bodies.FormReader()
_RESPONSE_ENDS = (b"response.completed", b"response.incomplete", b"response.failed")

INFERENCE_ROUTES = (
    Route("/v1/chat/completions", "chat_completions", _CHAT, end_marks=(b"[DONE]",)),
    Route("/v1/completions", "completions", _COMPLETION, end_marks=(b"[DONE]",)),
    Route("/v1/embeddings", "embeddings", _EMBEDDING),
    # May store what it made: never sent twice.
    Route("/v1/responses", "responses", _RESPONSES, False, False, _RESPONSE_ENDS, token_type=b'.delta"'),
    Route("/v1/messages", "messages", _CHAT, end_marks=(b"message_stop",), token_type=b'"content_block_delta"'),
    Route("/v1/messages/count_tokens", "count_tokens", _CHAT),
    Route("/v1/rerank", "rerank", _RERANK),
    Route("/rerank", "rerank", _RERANK),
    Route("/v1/score", "score", _SCORE),
    Route("/score", "score", _SCORE),
    Route("/tokenize", "tokenize", _TOKENIZE),
    Route("/detokenize", "detokenize", bodies.JSONReader(bodies.Detokenize)),
    Route("/v1/audio/transcriptions", "transcriptions", _UPLOAD, multipart=True),
    Route("/v1/audio/translations", "translations", _UPLOAD, multipart=True),
)


class Gate(NamedTuple):
    """What a request needs from the rest of the router, and the limits that hold before it has a model."""

    accounts: Accounts
    resolve: Callable[[str], Model]
    send: Send
    read_headers: RequestHeaders
    mint_id: Callable[[], str]
    # The optional features' taps of one request, made anew for each
    taps: Callable[[], Sequence[Tap]] = tuple
    max_body: int = 32 * 1024 * 1024
    write_stall: float = 60.0


class Inference:
    """POST on an inference route, from the request head to the end of the answer."""

    def __init__(self, route: Route, gate: Gate, admission: Admission) -> None:
        self.route = route
        self._gate = gate
        self._load = admission

    async def __call__(self, scope: Scope, receive: Receive, send: ASGISend) -> None:
        gate, admission = self._gate, self._load
        seen = gate.accounts.begin(self.route.label, scope.get("client"))
        cycle: Cycle | None = scope["extensions"].get(CYCLE) if "extensions" in scope else None
        watcher: DisconnectWatcher | Cycle = DisconnectWatcher(receive) if cycle is None else cycle
        relay: Relay | None = None
        taps: Sequence[Tap] = ()
        outcome = Outcome.INTERNAL_ERROR
        taken = held = 0
        try:
            head = self._read_headers(scope["headers"], None if cycle is None else cycle.head_cache)
            seen.request_id = head.request_id or gate.mint_id()
            body = None if cycle is None else cycle.whole_body(gate.max_body)
            if body is None:
                body = await wire.read_body(receive, head, gate.max_body, admission)
                held = len(body)
                seen.received()
            taken = 1
            admission.in_flight += 1
            read = wire.read(self.route, head, body)
            call, model = self._accept(
                read if isinstance(read, tuple) else await admission.turns.run(read), head, body, scope, seen
            )
            with watcher:
                reply = await gate.send(call, model)
                seen.answered(reply)
                taps = gate.taps()
                relay = Relay(reply, call, taps, gate.write_stall, watcher.close, cycle, gate.accounts.clock)
                outcome = await relay(send)
        except RouterError as error:
            outcome = await reject(error, seen, send)
        except ClientGone:
            outcome = _left(cycle, seen)
        except asyncio.CancelledError:
            outcome = seen.interrupted(relay)
            if not watcher.gone:
                outcome = await _shut_down(relay, seen, send)
                raise
            asyncio.current_task().uncancel()  # type: ignore[union-attr]
        except Exception:
            logger.exception("a request failed", extra={"fields": {"request_id": seen.request_id}})
            if relay is None or not relay.started:
                outcome = await reject(InternalError(), seen, send)
        finally:
            admission.in_flight -= taken
            admission.buffered -= held
            seen.finished(relay)
            seen.end(outcome)
            for tap in taps:
                tap.end(outcome)

    def _read_headers(self, headers: RawHeaders, head_cache: HeadCache | None) -> RequestHead:
        if head_cache is None:
            return self._gate.read_headers(headers)
        if head_cache.head is None:
            head_cache.head = self._gate.read_headers(headers)
        head: RequestHead = head_cache.head
        return head

    def _accept(self, asked: Asked, head: RequestHead, body: bytes, scope: Scope, seen: Account) -> tuple[Call, Model]:
        """The request is sound, and there is room for it. `asked` may hold as much as a large body, and ends here."""
        fields = asked[0]
        seen.stream = fields.get("stream") or False
        model = self._gate.resolve(fields["model"])
        seen.model_name = model.name
        if fields["model"] != model.name:
            seen.more = {"asked_model": fields["model"]}
        call = wire.make_call(self.route, head, body, scope["query_string"], seen.request_id, asked, model)
        limit, admission = model.entry.max_in_flight, self._load
        if admission.in_flight > admission.max_in_flight:
            raise overloaded("The router")
        if limit is not None and model.in_flight >= limit:
            raise overloaded(f"The model {model.name!r}")
        seen.resolved(model, call.tried)
        return call, model


class Dispatch:
    """The ASGI app. An inference route is one dictionary look-up away; everything else goes through `others`."""

    def __init__(self, inference: Mapping[str, ASGIApp], others: ASGIApp) -> None:
        self._inference = inference
        self._others = others

    def __call__(self, scope: Scope, receive: Receive, send: ASGISend) -> Awaitable[None]:
        if scope["type"] == "http":
            endpoint = self._inference.get(scope["path"])
            if endpoint is None:
                scope["path"] = normal_path(scope["path"])
                endpoint = self._inference.get(scope["path"])
            if endpoint is not None and scope["method"] == "POST":
                return endpoint(scope, receive, send)
        return self._others(scope, receive, send)


def normal_path(path: str) -> str:
    """Without doubled or trailing slashes: base_urls often end in one, and a redirect would lose the body."""
    return "/" + "/".join(part for part in path.split("/") if part)


def _left(cycle: Cycle | None, seen: Account) -> Outcome:
    """The outcome of a request that did not come to its end: the client left, or the server had to refuse the rest."""
    if cycle is None or cycle.rejection is None:
        return Outcome.CLIENT_GONE
    return cycle.rejection.tell(seen)


async def _shut_down(relay: Relay | None, seen: Account, send: ASGISend) -> Outcome:
    """The router stops, and this request has had all the time there is."""
    if relay is None or not relay.started:
        return await reject(ShuttingDown(), seen, send)
    return await relay.interrupt(send)


async def reject(error: RouterError, seen: Account, send: ASGISend) -> Outcome:
    """Answer with an error of the router's own."""
    status, headers, body = render(error, seen.request_id)
    if isinstance(error, TooLarge):
        headers.append((b"connection", b"close"))
    seen.refused(error, status, len(body))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body, "more_body": False})
    return error.outcome
