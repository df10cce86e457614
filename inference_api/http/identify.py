"""The ASGI layer in which features identify the caller, before the body is read. Built only if one does."""

from collections.abc import Awaitable, Callable, Sequence

from starlette.types import ASGIApp, Receive, Scope, Send

from inference_api.http.accounts import ACCOUNT
from inference_api.http.head import RequestHead
from inference_api.http.pages import OPEN_PATHS
from inference_api.http.routes import normal_path
from inference_api.models import Caller
from inference_api.observe.account import Account


class Identify:
    """Notes the Caller in the Account. The first of `identify` that returns one decides; any may raise RouterError."""

    def __init__(self, app: ASGIApp, identify: Sequence[Callable[[RequestHead], Caller | None]]) -> None:
        self._app = app
        self._identify = identify

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        if scope["type"] == "http" and scope["method"] != "OPTIONS" and normal_path(scope["path"]) not in OPEN_PATHS:
            account: Account = scope[ACCOUNT]
            account.caller = next(
                (caller for identify in self._identify if (caller := identify(account.head)) is not None), None
            )
        return self._app(scope, receive, send)
