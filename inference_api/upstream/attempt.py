"""The attempt seam: one request to one backend, and its Reply.

A feature that acts on single attempts (a span for each, a header of its own) wraps one SendAttempt into another:

    def wrap(send: SendAttempt) -> SendAttempt:
        async def wrapped(attempt: Attempt) -> Reply:
            prepared = attempt.prepared._replace(lines=attempt.prepared.lines + b"x-trace: 1\r\n")
            return await send(attempt._replace(prepared=prepared))

        return wrapped

A wrapper may change the header lines, and gets the Reply or the exception, nothing else.
"""

import random
from collections.abc import Awaitable, Callable
from typing import NamedTuple, Protocol

import httpx

from inference_api.errors import UpstreamAuthFailed
from inference_api.models import AUTH_FAILED, Call, Outcome, Reply
from inference_api.routing.backend import Backend
from inference_api.routing.entries import CatalogueEntry
from inference_api.routing.fleet import Model
from inference_api.upstream.failures import outcome_of
from inference_api.upstream.prepare import Prepared
from inference_api.upstream.transport import Transport, one_line


class Attempt(NamedTuple):
    """One request to `backend`. `tried`: the backends of the attempts before it, in order; `fresh`: the connection
    must be a new one, because an old one broke.
    """

    call: Call
    model: Model
    backend: Backend
    tried: tuple[Backend, ...]
    prepared: Prepared
    fresh: bool

    @property
    def number(self) -> int:
        """From 1."""
        return len(self.tried) + 1


class SendAttempt(Protocol):
    """Takes an Attempt to its Reply. Raises httpx.TransportError, or RouterError if no other attempt may follow."""

    def __call__(self, attempt: Attempt) -> Awaitable[Reply]: ...


class SendToBackend:
    """Sends over the transport. The backend has the call in flight until the Reply ends.

    `on_answer` gets the status of each answer at its head, `on_attempt` how each attempt ended at the end of its body.
    `is_own`: whether a backend of this entry that refuses credentials, 401 or 403, does not mean those of the client.
    """

    def __init__(
        self,
        transport: httpx.AsyncBaseTransport,
        on_attempt: Callable[[Backend, Outcome], None] = lambda backend, outcome: None,
        on_answer: Callable[[Backend, int], None] = lambda backend, status: None,
        rand: random.Random | None = None,
        is_own: Callable[[CatalogueEntry], bool] = lambda entry: False,
    ) -> None:
        self._transport = transport
        self._own = transport if isinstance(transport, Transport) else None
        self._on_attempt = on_attempt
        self._on_answer = on_answer
        self._is_own = is_own
        self._random_bits = (rand or random.Random()).getrandbits

    async def __call__(self, attempt: Attempt) -> Reply:
        """Raises httpx.TransportError, or UpstreamAuthFailed."""
        call, model, backend, tried, prepared, fresh = attempt
        url, target = backend.address(call.route.path)
        if call.suffix:
            target = one_line(target + call.suffix)
        # Engines key generations by the request id, so every attempt has its own.
        request_id = f"{call.request_id}-{self._random_bits(32):08x}".encode()
        lines = b"host: %b\r\nx-request-id: %b\r\n%b" % (backend.host, request_id, prepared.lines)
        stream: httpx.AsyncByteStream
        call.tried.append(backend)
        backend.in_flight += 1
        backend.origin.in_flight += 1
        try:
            if self._own is not None:
                # No check for line breaks: without a suffix, the target comes from the catalogue and the routes.
                head = b"%b %b HTTP/1.1\r\n%b\r\n" % (call.route.method.encode(), target, lines)
                body, _, timeout, deadline, _ = prepared
                stream = await self._own.send(backend.url, url, head, body, timeout, deadline, fresh, backend)
                status, headers = stream.status, stream.headers
            else:
                response = await self._transport.handle_async_request(
                    _request(call.route.method, url, target, lines, prepared, fresh)
                )
                status, stream = response.status_code, _body_of(response)
                headers = [(name.lower(), value) for name, value in response.headers.raw]
        except BaseException as exc:
            backend.in_flight -= 1
            backend.origin.in_flight -= 1
            self._on_attempt(backend, outcome_of(exc))
            raise
        reply = Reply(status, headers, stream, backend, self._ended, len(tried) + 1)
        if 400 < status < 404 and status != 402 and self._is_own(model.entry):
            # Not for the client, who has no part in it, and no fault of the backend: its circuits do not know of it.
            await reply.aclose(AUTH_FAILED)
            raise UpstreamAuthFailed(model.name)
        self._on_answer(backend, status)
        return reply

    def _ended(self, reply: Reply, outcome: Outcome) -> None:
        backend = reply.backend
        assert backend is not None
        backend.in_flight -= 1
        backend.origin.in_flight -= 1
        self._on_attempt(backend, outcome)


def _request(
    method: str, url: httpx.URL, target: bytes, lines: bytes, prepared: Prepared, fresh: bool
) -> httpx.Request:
    """The same request for another transport than the router's."""
    headers = [tuple(line.split(b": ", 1)) for line in lines.split(b"\r\n")[:-1]]
    extensions = {
        "timeout": prepared.timeout._asdict(),
        "deadline": prepared.deadline,
        "target": target,
        "fresh": fresh,
    }
    body = b"".join(prepared.body) if isinstance(prepared.body, tuple) else prepared.body
    return httpx.Request(method, url, headers=headers, content=body, extensions=extensions)  # type: ignore[arg-type]


def _body_of(response: httpx.Response) -> httpx.AsyncByteStream:
    stream = response.stream
    assert isinstance(stream, httpx.AsyncByteStream)
    return stream
