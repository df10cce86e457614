"""An answer of a router as it comes, byte for byte; a browser that leaves ends it, there too."""

from typing import Final

import orjson
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from control_plane.clients.router import LONGEST, Answer, Router, RouterAway
from control_plane.errors import Refused, envelope
from control_plane.http.leaving import while_there
from control_plane.plane import Act, Plane
from control_plane.services import playground

# The answer has the id that the router got.
_OWN: Final = frozenset({"x-request-id"})


class Relay(Response):
    """Asks when it is sent. The body of the request must have been read. Raises Refused before its first byte."""

    def __init__(self, plane: Plane, act: Act, router: Router | None, organisation: str | None, body: bytes) -> None:
        super().__init__()
        self._plane = plane
        self._act = act
        self._router = router
        self._organisation = organisation
        self._asked = body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await while_there(receive, self._relay(send))

    async def _relay(self, send: Send) -> None:
        began = False
        asking = playground.asked(self._plane, self._act, self._router, self._organisation, self._asked, LONGEST)
        try:
            async with asking as answer:
                await send({"type": "http.response.start", "status": answer.status, "headers": _headers(answer)})
                began = True
                async for data in answer.body:
                    await send({"type": "http.response.body", "body": data, "more_body": True})
        except RouterAway as exc:
            error = Refused(502, "router_away", f"The answer broke off: {exc}.")
            if not began:
                raise error from None
            # An event of its own, wherever the last one has ended.
            data = b"\n\ndata: " + orjson.dumps(envelope(error, self._act.request_id or "")) + b"\n\n"
            await send({"type": "http.response.body", "body": data, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def _headers(answer: Answer) -> list[tuple[bytes, bytes]]:
    kept = [
        (name.encode(), value.encode("latin-1", "replace"))
        for name, value in answer.headers.items()
        if name not in _OWN
    ]
    # A proxy in front passes on what it has.
    return [*kept, (b"x-accel-buffering", b"no")]
