"""The outermost ASGI layer: a request id and an Account for every request, and an answer to every error.

Every exception of a layer or page inside is counted, logged and answered here, and nowhere else.
"""

import asyncio
import logging
from collections.abc import Callable, Sequence
from time import perf_counter
from typing import Any

from starlette.types import ASGIApp, Receive, Scope, Send

from inference_api.errors import ClientGone, InternalError, InvalidRequest, RouterError, ShuttingDown, TooLarge, render
from inference_api.headers import extra_pairs
from inference_api.http.head import RequestHead, RequestHeaders
from inference_api.models import ENDED, NOTES, RAN, Outcome, RawHeaders
from inference_api.observe.account import Account, Annotate, Record, Sink
from inference_api.routing.fleet import Model
from inference_api.server.cycle import Cycle, cycle_of

logger = logging.getLogger(__name__)

# Key of the Account in the ASGI scope.
ACCOUNT = "inference_api.account"
# Stands for input that never became a request
_NO_SCOPE: Scope = {"path": "", "state": {}}
_NO_NOTES: dict[str, Any] = {}


class Accounts:
    """Wraps the whole HTTP side. `sinks` get the Record of each request; they are fast.

    `clock` gives seconds. `validation_status`: the status of InvalidRequest. `annotators` add to the Records
    of requests without a model, before the sinks; those of a model are in its parts.
    """

    def __init__(
        self,
        app: ASGIApp,
        sinks: Sequence[Sink],
        read_headers: RequestHeaders,
        mint_id: Callable[[], str],
        clock: Callable[[], float] = perf_counter,
        validation_status: int = InvalidRequest.status,
        annotators: Sequence[Annotate] = (),
    ) -> None:
        self.app = app
        self._sinks = tuple(sinks)
        self._read_headers = read_headers
        self._mint_id = mint_id
        self._clock = clock
        self._validation_status = validation_status
        self._annotators = annotators

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        # Not every server sets it.
        scope.setdefault("state", {})
        cycle = cycle_of(send)
        # A head that repeats an earlier one byte for byte is not read again; the caller is identified again.
        cache = None if cycle is None else cycle.head_cache
        head: RequestHead | None = None if cache is None else cache.head
        if head is None:
            head = self._read_headers(scope["headers"])
            if cache is not None:
                cache.head = head
        account = scope[ACCOUNT] = Account(head.request_id or self._mint_id(), self._clock, scope, head, cycle)
        try:
            await self.app(scope, receive, send)
        except ClientGone:
            account.outcome = Outcome.CLIENT_GONE if account.relay is None else account.relay.outcome
        except asyncio.CancelledError:
            await _shut_down(account, send)
            raise
        except Exception as exc:
            await self._failed(exc, account, send)
        finally:
            if cycle is not None and cycle.rejection is not None:
                _rejected_by_server(cycle, account)
            if not account.silent:
                self._deliver(account)

    def rejected(self, error: RouterError, request_id: str, size: int, client: tuple[str, int] | None) -> None:
        """Count and log input that the server rejected before it was a request."""
        account = Account(request_id, self._clock, {**_NO_SCOPE, "client": client}, self._read_headers([]))
        account.rejected(error, error.status, size)
        self._deliver(account)

    async def _failed(self, exc: Exception, account: Account, send: Send) -> None:
        """Answer with the error; if an answer has begun, leave it incomplete: the server then cuts the connection."""
        error = exc if isinstance(exc, RouterError) else InternalError()
        if error is not exc or account.started:
            logger.error("a request failed", exc_info=exc, extra={"fields": {"request_id": account.request_id}})
        if account.started:
            account.outcome = Outcome.INTERNAL_ERROR
            return
        if isinstance(error, InvalidRequest):
            error.status = self._validation_status
        await reject(error, account, send)

    def _deliver(self, account: Account) -> None:
        state = account.state
        model: Model | None = state.get(RAN, account.model)
        # Those of the model were composed when the request was sent.
        parts = None if model is None else model.parts
        annotators = self._annotators if parts is None else parts[2]
        record = self._annotated(account, annotators) if annotators or NOTES in state else account.end()
        for sink in (*state[ENDED], *self._sinks) if ENDED in state else self._sinks:
            try:
                sink(record)
            except Exception:
                # Contained: the answer has gone out, and the other sinks get the Record all the same.
                logger.exception("a sink failed", extra={"fields": {"request_id": record.request_id}})

    def _annotated(self, account: Account, annotators: Sequence[Annotate]) -> Record:
        account.extra = extra = {**account.extra, **account.state.get(NOTES, _NO_NOTES)}
        record = account.end()
        for annotate in annotators:
            try:
                annotate(record, extra)
            except Exception:
                logger.exception("an annotator failed", extra={"fields": {"request_id": record.request_id}})
        return record


async def respond(scope: Scope, send: Send, status: int, headers: RawHeaders, body: bytes = b"") -> None:
    """Send a whole answer of a layer's own, with the request id, and note it in the Account."""
    account: Account = scope[ACCOUNT]
    account.responded(status, len(body))
    headers = [*headers, (b"x-request-id", account.request_id.encode()), *extra_pairs(account.answer_headers)]
    if status != 204:
        headers.append((b"content-length", b"%d" % len(body)))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body, "more_body": False})


async def reject(error: RouterError, account: Account, send: Send) -> None:
    """Answer with an error of the router."""
    status, headers, body = render(error, account.request_id)
    if isinstance(error, TooLarge):
        headers.append((b"connection", b"close"))
    headers += extra_pairs(account.answer_headers)
    account.rejected(error, status, len(body))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body, "more_body": False})


async def _shut_down(account: Account, send: Send) -> None:
    """End a request at the end of the drain timeout."""
    if not account.started:
        await reject(ShuttingDown(), account, send)
    elif account.relay is None:
        account.outcome = Outcome.DRAIN_TIMEOUT
    else:
        account.outcome = await account.relay.interrupt(send)


def _rejected_by_server(cycle: Cycle, account: Account) -> None:
    """Note the answer that the client got: the server's, not the application's."""
    rejection = cycle.rejection
    assert rejection is not None
    account.request_id = rejection.request_id
    account.rejected(rejection.error, rejection.error.status, rejection.size)
