"""The attempt loop: choose a backend, send, and follow the RetryPolicy after a failure."""

import asyncio
from collections.abc import Callable
from time import monotonic

import httpx

from inference_api.errors import NOT_AGAIN
from inference_api.models import Call, Reply
from inference_api.routing.backend import Backend
from inference_api.routing.fleet import Model
from inference_api.routing.standing import no_backend
from inference_api.upstream.attempt import Attempt, SendAttempt
from inference_api.upstream.failures import Failure, classify
from inference_api.upstream.prepare import Prepare
from inference_api.upstream.retry import GiveUp, Retry, RetryPolicy, Why, error_of
from inference_api.upstream.retry_guards import FREE

OnFailure = Callable[[Call, Failure, Retry | GiveUp], None]


class Forward:
    """Takes a Call to a Reply.

    `on_retry` gets the model's name, and the Reason of each retry, or the Why if budget or poison guard forbid one.
    `on_failure` gets each Failure, and what follows it.
    """

    def __init__(
        self,
        send: SendAttempt,
        prepare: Prepare,
        policy: RetryPolicy,
        on_retry: Callable[[str, str], None] = lambda model, reason: None,
        on_failure: OnFailure = lambda call, failure, decision: None,
    ) -> None:
        self._send = send
        self._prepare = prepare
        self._policy = policy
        self._on_retry = on_retry
        self._on_failure = on_failure

    async def __call__(self, call: Call, model: Model) -> Reply:
        """Raises RouterError if no attempt gave an answer. The caller closes the Reply.

        `call.tried` lists the backends of all attempts, the current one included.
        """
        policy = self._policy
        prepared = self._prepare(call, model)
        key = prepared.key
        backend = policy.rested(model, key) if policy.resting else model.choose(key)
        if backend is None:
            raise no_backend(model, monotonic())
        past: list[Failure] = []
        tried: tuple[Backend, ...] = ()
        permit, fresh = FREE, False
        while True:
            failures = backend.origin.failures
            try:
                reply = await self._send(tuple.__new__(Attempt, (call, model, backend, tried, prepared, fresh)))
            except BaseException as exc:
                permit.release()
                if not isinstance(exc, httpx.TransportError):
                    raise
                past.append(classify(exc, backend, call.route, not failures))
            else:
                if permit is not FREE:
                    reply.on_end(permit.ended)
                if reply.status not in policy.retry_on_status:
                    if reply.status == 429:
                        policy.rest(backend, reply)
                    return reply
                past.append(policy.busy(backend, reply))
            decision = policy.decide(call, model, past, prepared.deadline - monotonic())
            self._on_failure(call, past[-1], decision)
            if isinstance(decision, GiveUp):
                return self._answer(model, past, decision, prepared.deadline)
            again = await self._next(model, key, past, decision)
            if again is None:
                return self._answer(model, past, policy.give_up(model, past, Why.NEVER), prepared.deadline)
            tried = (*tried, backend)
            backend, permit, fresh = again, decision.permit, decision.fresh

    async def _next(self, model: Model, key: str, past: list[Failure], retry: Retry) -> Backend | None:
        """Wait, choose the next backend, and close the previous answer.

        None if there is no backend; the permit is then released.
        """
        failure = past[-1]
        reply = failure.reply
        try:
            if retry.delay:
                await asyncio.sleep(retry.delay)
            backend = self._policy.choose(model, key, past)
            if backend is not None and reply is not None:
                await reply.aclose(failure.outcome)
        except BaseException:
            retry.permit.release()
            if reply is not None:
                await reply.aclose(failure.outcome)
            raise
        if backend is None:
            retry.permit.release()
        else:
            self._on_retry(model.name, str(failure.reason))
        return backend

    def _answer(self, model: Model, past: list[Failure], give_up: GiveUp, deadline: float) -> Reply:
        """The last answer. Raises RouterError if there is none."""
        if give_up.why.is_limit:
            self._on_retry(model.name, str(give_up.why))
        reply = past[-1].reply
        if reply is None:
            raise error_of(model, past, give_up, deadline)
        if give_up.final:
            headers = reply.headers
            headers[:] = [pair for pair in headers if pair[0] != NOT_AGAIN[0]] + [NOT_AGAIN]
        return reply
