"""A Feature with every part that there is, none of which changes what a client gets but for one header."""

import asyncio
from collections.abc import Iterator
from typing import Any

from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route as PageRoute
from starlette.types import ASGIApp, Message, Receive, Scope
from starlette.types import Send as ASGISend

from inference_api.errors import RouterError
from inference_api.feature import Feature
from inference_api.http.head import RequestHead
from inference_api.http.pipeline import Resolve
from inference_api.models import Call, Caller, Outcome, RawHeaders, Reply, Send
from inference_api.observe.account import Record
from inference_api.observe.exposition import Family
from inference_api.observe.families import gauge
from inference_api.routing.fleet import Model
from inference_api.upstream.attempt import Attempt, SendAttempt


class Unauthorized(RouterError):
    status, type, code = 401, "invalid_request_error", "invalid_api_key"

    def __init__(self) -> None:
        super().__init__("The API key is not known.")


class Forbidden(RouterError):
    status, type, code = 403, "invalid_request_error", "model_not_allowed"

    def __init__(self, name: str) -> None:
        super().__init__(f"The model {name!r} is not for this key.", param="model")


class Asker:
    """A Caller who may use the models of these names."""

    def __init__(self, id: str, *models: str) -> None:
        self.id = id
        self._models = models

    def may_use(self, model: str) -> bool:
        return model in self._models


def knows(request_head: RequestHead) -> Caller | None:
    """`Bearer <id>:<model>,<model>` is a Caller; `Bearer wrong` is nobody that may be here."""
    token = (request_head.authorization or b"").decode().removeprefix("Bearer ")
    if token == "wrong":
        raise Unauthorized
    name, colon, models = token.partition(":")
    return Asker(name, *models.split(",")) if colon else None


class Everything:
    """`seen` are the names of the parts that a request has met; `open` counts what has begun and not ended."""

    def __init__(self) -> None:
        self.seen: set[str] = set()
        self.open = 0
        self.feature = Feature(
            "everything",
            layer=self._layer,
            identify=self._identify,
            fields=("user",),
            resolve=self._resolve,
            send=self._send,
            member=lambda send: send,
            attempt=self._attempt,
            leg=lambda record, extra: None,
            ask=self._ask,
            for_model=lambda entry: True,
            failed=lambda call, failure, decision: None,
            tap=self._tap,
            annotate=self._annotate,
            record=self._record,
            collect=self._collect,
            pages=(PageRoute("/page", self._page),),
            ops_pages=(PageRoute("/ops-page", self._page),),
            tasks=(self._task,),
            ready=lambda: None,
            check=lambda: iter(()),
            close=lambda: self.seen.add("close"),
        )

    def _layer(self, app: ASGIApp) -> ASGIApp:
        async def layer(scope: Scope, receive: Receive, send: ASGISend) -> None:
            async def receive_on() -> Message:
                return await receive()

            async def send_on(message: Message) -> None:
                await send(message)

            self.seen.add("layer")
            await app(scope, receive_on, send_on)

        return layer

    def _identify(self, head: RequestHead) -> Caller | None:
        self.seen.add("identify")
        return None

    def _resolve(self, resolve: Resolve) -> Resolve:
        def resolved(name: str, caller: Caller | None) -> Model:
            self.seen.add("resolve")
            return resolve(name, caller)

        return resolved

    def _send(self, send: Send) -> Send:
        async def sending(call: Call, model: Model) -> Reply:
            self.seen.add("send")
            reply = await send(call, model)
            self.open += 1
            reply.extra += ((b"x-everything", b"1"),)
            reply.on_end(self._ended)
            return reply

        return sending

    def _ended(self, reply: Reply, outcome: Outcome) -> None:
        self.open -= 1

    def _attempt(self, send: SendAttempt) -> SendAttempt:
        async def attempting(attempt: Attempt) -> Reply:
            self.seen.add("attempt")
            return await send(attempt)

        return attempting

    def _tap(self, call: Call, reply: Reply) -> "_Tap":
        self.seen.add("tap")
        return _Tap(self)

    def _ask(self, send: Send) -> Send:
        async def asking(call: Call, model: Model) -> Reply:
            self.seen.add("ask")
            return await send(call, model)

        return asking

    def _annotate(self, record: Record, extra: dict[str, Any]) -> None:
        self.seen.add("annotate")

    def _record(self, record: Record) -> None:
        self.seen.add("record")

    def _collect(self) -> Iterator[Family]:
        yield gauge("everything_open", "What has not ended.", (), [((), float(self.open))])

    async def _page(self, request: Request) -> Response:
        return PlainTextResponse("a page")

    async def _task(self) -> None:
        self.seen.add("task")
        await asyncio.get_running_loop().create_future()


class _Tap:
    def __init__(self, everything: Everything) -> None:
        self._everything = everything
        everything.open += 1

    def start(self, status: int, headers: RawHeaders) -> None: ...
    def chunk(self, data: bytes) -> None: ...

    def end(self, outcome: Outcome) -> None:
        self._everything.open -= 1


def parts_of(feature: Feature) -> dict[str, Any]:
    """Its parts by their name."""
    return {name: part for name, part in feature._asdict().items() if name != "name"}
