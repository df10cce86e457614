"""GET, DELETE and cancel of a stored response: sent to the backend that made it, found by the id.

The process keeps model and backend of the last responses that it relayed; any other id gets 404, as from an engine
without it.
"""

import re
from collections import OrderedDict
from time import monotonic
from typing import NamedTuple

import httpx
from starlette.routing import Route as PageRoute
from starlette.types import Receive, Scope
from starlette.types import Send as ASGISend

from inference_api.errors import MethodNotAllowed, ResponseNotFound
from inference_api.http import wire
from inference_api.http.accounts import ACCOUNT
from inference_api.http.disconnect import DisconnectWatcher
from inference_api.http.pipeline import Pipeline, Stages
from inference_api.http.routes import RESPONSES, STORED
from inference_api.models import RAN, Call, Caller, Outcome, RawHeaders, Reply, Route, Send
from inference_api.observe.account import Account
from inference_api.relay.relay import Relay
from inference_api.routing.backend import Backend
from inference_api.routing.fleet import Model
from inference_api.routing.standing import no_backend
from inference_api.server.cycle import cycle_of
from inference_api.upstream.attempt import Attempt, SendAttempt
from inference_api.upstream.failures import classify
from inference_api.upstream.prepare import Prepare
from inference_api.upstream.retry import GiveUp, Why, error_of

# About 3 MB.
_REMEMBERED = 10_000
# The id stands at the beginning of an answer, and of the first event of a stream.
_LOOKED_AT = 4096
_ID = re.compile(rb'"id"\s*:\s*"(resp_[A-Za-z0-9_-]{1,128})"')


class Place(NamedTuple):
    """The place of a response: the model's name, the backend's URL, and the caller."""

    model: str
    url: str
    caller: str | None


class Memory(OrderedDict[str, Place]):
    """Id of a response -> its Place, for the last responses."""

    def put(self, response: str, place: Place) -> None:
        self[response] = place
        self.move_to_end(response)
        if len(self) > _REMEMBERED:
            self.popitem(last=False)


class _IdTap:
    """Finds the id in an answer."""

    __slots__ = ("_memory", "_place", "_seen")

    def __init__(self, memory: Memory, place: Place) -> None:
        self._memory = memory
        self._place = place
        self._seen: bytes | None = b""

    def start(self, status: int, headers: RawHeaders) -> None: ...

    def chunk(self, data: bytes) -> None:
        if self._seen is None:
            return
        self._seen += data[:_LOOKED_AT]
        if found := _ID.search(self._seen):
            self._memory.put(found[1].decode(), self._place)
        if found or len(self._seen) >= _LOOKED_AT:
            self._seen = None

    def end(self, outcome: Outcome) -> None: ...


class StoredResponses:
    """`send` makes one attempt, since only one backend has the response."""

    def __init__(self, send: SendAttempt, prepare: Prepare, stages: Stages) -> None:
        self._memory = Memory()
        self._send = send
        self._prepare = prepare
        self._stages = stages

    def pipeline(self, route: Route) -> Pipeline:
        """The pipeline of the route; on the route that creates responses, it keeps their places."""
        stages = self._stages
        if route.path == RESPONSES.path:
            return Pipeline(route, stages._replace(send=self._remembering(stages.send)), is_wrapped=True)
        return Pipeline(route, stages)

    def routes(self) -> list[PageRoute]:
        return [
            PageRoute("/v1/responses/{id}", _Operation(self, ("GET", "DELETE"), b""), methods=["GET", "DELETE"]),
            PageRoute("/v1/responses/{id}/cancel", _Operation(self, ("POST",), b"/cancel"), methods=["POST"]),
        ]

    def _remembering(self, send: Send) -> Send:
        async def remembering(call: Call, model: Model) -> Reply:
            reply = await send(call, model)
            if reply.status < 300 and reply.backend is not None and call.fields.get("store") is not False:
                place = Place(call.state.get(RAN, model).name, reply.backend.url, _id_of(call.caller))
                reply.taps += (_IdTap(self._memory, place),)
            return reply

        return remembering

    def find(self, response: str, caller: Caller | None) -> tuple[Model, Backend]:
        """The place of a response. Raises ResponseNotFound, also for the response of another caller, or NoBackend.

        A backend that an operator drains still has it; one that is out is asked for nothing.
        """
        place = self._memory.get(response)
        if place is None or place.caller != _id_of(caller):
            raise ResponseNotFound(response)
        model = self._stages.resolve(place.model, caller)
        # An adapter may have left the backend that still has the response.
        owner = model.parent or model
        for backend in (*owner.backends, *owner.leaving):
            if backend.url == place.url:
                if backend.is_out:
                    raise no_backend(owner, monotonic())
                return model, backend
        raise ResponseNotFound(response)

    async def serve(self, call: Call, model: Model, backend: Backend) -> Reply:
        """Raises RouterError."""
        try:
            return await self._send(Attempt(call, model, backend, (), self._prepare(call, model), False))
        except httpx.TransportError as exc:
            failure = classify(exc, backend, call.route, False)
            raise error_of(model, [failure], GiveUp(Why.NEVER, False)) from None

    @property
    def stages(self) -> Stages:
        return self._stages


class _Operation:
    """ASGI app of one operation on a stored response. `rest`: the path after the id."""

    def __init__(self, stored: StoredResponses, methods: tuple[str, ...], rest: bytes) -> None:
        self._stored = stored
        self._methods = methods
        self._rest = rest

    async def __call__(self, scope: Scope, receive: Receive, send: ASGISend) -> None:
        account: Account = scope[ACCOUNT]
        account.route = "response"
        if scope["method"] not in self._methods:
            # HEAD, which comes with GET
            raise MethodNotAllowed(scope["method"], scope["path"], ", ".join(sorted(self._methods)))
        stages, response = self._stored.stages, scope["path_params"]["id"]
        reader = cycle_of(receive)
        if reader is None or reader.whole_body(stages.max_body) is None:
            body = await wire.read_body(receive, account.head, stages.max_body, stages.admission)
            stages.admission.buffered -= len(body)
        model, backend = self._stored.find(response, account.caller)
        account.model_name = account.asked = model.name
        call = self._call(scope, account, model, response)
        account.accepted(call, model)
        account.stream = call.stream
        with reader or DisconnectWatcher(receive) as watcher:
            account.reply = reply = await self._stored.serve(call, model, backend)
            account.relay = relay = Relay(reply, call, stages.write_stall, watcher.close, clock=account.clock)
            account.outcome = await relay(send)

    def _call(self, scope: Scope, account: Account, model: Model, response: str) -> Call:
        query: bytes = scope["query_string"]
        return Call(
            STORED._replace(method=scope["method"]),
            model.entry.served_model_name or model.name,
            b"stream=true" in query,
            b"",
            [pair for pair in account.head.forwarded if pair[0] != b"content-type"],
            account.request_id,
            [],
            b"/%b%b%b" % (response.encode(), self._rest, b"?" + query if query else b""),
            authorization=account.head.authorization,
            caller=account.caller,
            state=scope["state"],
            answer_headers=account.answer_headers,
            client=account.client,
            head=account.head,
        )


def _id_of(caller: Caller | None) -> str | None:
    return None if caller is None else caller.id
