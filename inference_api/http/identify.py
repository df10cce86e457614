"""The ASGI layer in which features identify the caller, before the body is read. Built only if one does."""

from collections.abc import Awaitable, Callable, Collection, Sequence

from starlette.types import ASGIApp, Receive, Scope, Send

from inference_api.http.accounts import ACCOUNT
from inference_api.http.head import RequestHead
from inference_api.http.pages import OPEN_PATHS
from inference_api.http.routes import normal_path
from inference_api.models import Caller
from inference_api.observe.account import Account


class Identify:
    """Notes the Caller in the Account. The first of `identify` that returns one decides; any may raise RouterError.

    `closed`: the paths of most requests, none of which is open.
    """

    def __init__(
        self,
        app: ASGIApp,
        identify: Sequence[Callable[[RequestHead], Caller | None]],
        closed: Collection[str] = (),
    ) -> None:
        self._app = app
        self._identify = identify[0] if len(identify) == 1 else _first_of(identify)
        self._closed = frozenset(closed)

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        if scope["type"] == "http" and (
            (scope["path"] in self._closed and scope["method"] == "POST") or not _is_open(scope)
        ):
            account: Account = scope[ACCOUNT]
            account.caller = self._identify(account.head)
        return self._app(scope, receive, send)


def _is_open(scope: Scope) -> bool:
    return scope["method"] == "OPTIONS" or normal_path(scope["path"]) in OPEN_PATHS


def _first_of(
    identify: Sequence[Callable[[RequestHead], Caller | None]],
) -> Callable[[RequestHead], Caller | None]:
    def first(head: RequestHead) -> Caller | None:
        return next((caller for one in identify if (caller := one(head)) is not None), None)

    return first
