"""Idempotency-Key on every POST under /api/v1: the same request gets the first answer, and is not done again."""

import asyncio
import hashlib
import logging
import re
from typing import Any

import orjson
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from control_plane.errors import Invalid, Problem, Refused, StorageUnavailable
from control_plane.http.identity import plane_of, principal_of
from control_plane.plane import Plane
from control_plane.pure.roles import Principal
from control_plane.services import idempotency
from control_plane.services.idempotency import Claim, Kept

log = logging.getLogger(__name__)

# Members of answers that are shown once
SECRETS = ("key", "token", "setup_url", "examples", "summary")
# A login is no change that must not happen twice, and its answer is a secret.
_EXCEPT = frozenset({"/api/v1/session"})
_KEY = re.compile(r"[\x21-\x7e]{1,255}")
_KEPT_HEADERS = frozenset({"content-type", "etag", "location"})
# Statuses after which nothing was done, and the same request may be answered differently
_PASSING = frozenset({401, 403, 429})
# Seconds between two looks at a request that runs elsewhere, and until a caller is sent away
_POLL, _PATIENCE = 0.05, 30.0


class Idempotent:
    """ASGI layer of /api/v1."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive) if scope["type"] == "http" and scope["method"] == "POST" else None
        keys = [] if request is None or scope["path"] in _EXCEPT else request.headers.getlist("idempotency-key")
        principal = await principal_of(request) if request is not None and keys else None
        if request is None or principal is None:
            # Nobody, who is answered 401.
            await self._app(scope, receive, send)
            return
        if len(keys) > 1 or not _KEY.fullmatch(keys[0]):
            raise Invalid(Problem("Idempotency-Key", "must be one text of 1 to 255 visible ASCII characters"))
        body = await request.body()
        claim = Claim(_actor(principal), keys[0], _digest(scope, body))
        kept = await begin(plane_of(request), claim)
        if kept is not None and kept.request != claim.request:
            message = "The Idempotency-Key was used for another request; use a new one for each."
            raise Refused(422, "idempotency_key_reused", message, param="Idempotency-Key")
        if kept is None:
            await self._first(plane_of(request), claim, body, scope, receive, send)
        else:
            await _replay(kept, send)

    async def _first(self, plane: Plane, claim: Claim, body: bytes, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the request, keep its answer, and then send it."""
        given, answer = [body], _Answer()

        async def replayed() -> Message:
            return {"type": "http.request", "body": given.pop(), "more_body": False} if given else await receive()

        try:
            await self._app(scope, replayed, answer.send)
            if answer.status < 500 and answer.status not in _PASSING:
                await idempotency.keep(plane.database.main, claim, *answer.kept())
            else:
                await idempotency.forget(plane.database.main, claim)
        except StorageUnavailable:
            log.warning("an answer is not kept: the request must not be sent again")
        except BaseException:
            await asyncio.shield(idempotency.forget(plane.database.main, claim))
            raise
        for message in answer.messages:
            await send(message)


class _Answer:
    """An answer that is collected: those to POSTs are small."""

    def __init__(self) -> None:
        self.messages: list[Message] = []

    async def send(self, message: Message) -> None:
        self.messages.append(message)

    @property
    def status(self) -> int:
        status: int = self.messages[0]["status"]
        return status

    def kept(self) -> tuple[int, dict[str, str], str]:
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in self._head()}
        body = b"".join(message.get("body", b"") for message in self.messages[1:])
        return (
            self.status,
            {name: value for name, value in headers.items() if name in _KEPT_HEADERS},
            without_secrets(body).decode(),
        )

    def _head(self) -> list[tuple[bytes, bytes]]:
        found: list[tuple[bytes, bytes]] = list(self.messages[0].get("headers", ()))
        return found


def without_secrets(body: bytes) -> bytes:
    """The answer with null for what is shown once."""
    try:
        found: Any = orjson.loads(body)
    except orjson.JSONDecodeError:
        return body
    if not isinstance(found, dict) or not found.keys() & set(SECRETS):
        return body
    return orjson.dumps({name: None if name in SECRETS else value for name, value in found.items()})


async def begin(plane: Plane, claim: Claim) -> Kept | None:
    """What is kept, once it is, or that of another request; None: this one is the first. Raises Refused."""
    try:
        async with asyncio.timeout(_PATIENCE):
            while True:
                kept = await idempotency.begin(plane.database.main, claim, plane.clock())
                if kept is None or not kept.runs or kept.request != claim.request:
                    return kept
                await asyncio.sleep(_POLL)
    except TimeoutError:
        raise StorageUnavailable from None


async def _replay(kept: Kept, send: Send) -> None:
    body = kept.body.encode()
    headers = {**kept.headers, "idempotency-replayed": "true"}
    if body:
        headers["content-length"] = str(len(body))
    pairs = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": kept.status, "headers": pairs})
    await send({"type": "http.response.body", "body": body})


def _actor(principal: Principal) -> str:
    return f"token:{principal.token}" if principal.token else f"{principal.kind}:{principal.user}"


def _digest(scope: Scope, body: bytes) -> str:
    what = b"\0".join((scope["path"].encode(), scope["query_string"], body))
    return hashlib.sha256(what).hexdigest()
