"""The steps of one inference request, from its head to the end of the answer."""

from collections.abc import Callable
from typing import NamedTuple

from starlette.types import Receive, Scope
from starlette.types import Send as ASGISend

from inference_api.http import wire
from inference_api.http.accounts import ACCOUNT
from inference_api.http.admission import Admission
from inference_api.http.disconnect import DisconnectWatcher
from inference_api.models import RAN, Asked, Call, Caller, Route, Send, answered_by
from inference_api.observe.account import Account
from inference_api.relay.relay import Relay
from inference_api.routing.fleet import Model

Resolve = Callable[[str, Caller | None], Model]


class Stages(NamedTuple):
    """Shared by the pipelines of all routes."""

    resolve: Resolve
    send: Send
    admission: Admission
    max_body: int = 32 * 1024 * 1024
    # Seconds without progress until a client that does not read is reset
    write_stall: float = 60.0


class Pipeline:
    """POST on one inference route. Errors are raised; `http.accounts` answers them.

    `is_wrapped`: `stages.send` is more than the layers of the model, and is always called.
    """

    def __init__(self, route: Route, stages: Stages, is_wrapped: bool = False) -> None:
        self.route = route
        self.stages = stages
        self.is_wrapped = is_wrapped

    async def __call__(self, scope: Scope, receive: Receive, send: ASGISend) -> None:
        account: Account = scope[ACCOUNT]
        account.route = self.route.label
        stages, admission = self.stages, self.stages.admission
        # The server's own callables allow short cuts; those of a layer get plain ASGI.
        cycle = account.cycle
        reader = cycle if getattr(receive, "__self__", None) is cycle else None
        direct = cycle if getattr(send, "__self__", None) is cycle else None
        body = None if reader is None else reader.whole_body(stages.max_body)
        held = 0
        if body is None:
            body = await wire.read_body(receive, account.head, stages.max_body, admission)
            held = len(body)
            account.received()
        admission.in_flight += 1
        try:
            asked = wire.read(self.route, account.head, body)
            if not isinstance(asked, tuple):
                asked = await admission.turns.run(asked)
            call, model = self._accept(asked, body, scope, account)
            with reader or DisconnectWatcher(receive) as watcher:
                parts = model.parts
                composed = parts is not None and parts[0] is model.entry and not self.is_wrapped
                account.reply = reply = await (parts[1] if composed else stages.send)(call, model)
                if RAN in account.state:
                    reply.extra += answered_by(account.state[RAN], model)
                if account.answer_headers:
                    reply.extra += tuple(account.answer_headers)
                account.relay = relay = Relay(reply, call, stages.write_stall, watcher.close, direct, account.clock)
                account.outcome = await relay(send)
        finally:
            admission.in_flight -= 1
            admission.buffered -= held

    def _accept(self, asked: Asked, body: bytes, scope: Scope, account: Account) -> tuple[Call, Model]:
        """Resolve the model and make the Call. Raises RouterError. `asked` may be as large as a body: freed here."""
        fields = asked[0]
        account.stream = fields.get("stream") or False
        account.asked = fields["model"]
        model = self.stages.resolve(account.asked, account.caller)
        account.model_name = model.name
        call = wire.make_call(self.route, account, body, scope, asked, model)
        account.accepted(call, model)
        return call, model
