"""Forms that make a secret: sent again, by a reload of the page that shows it, they make no second one."""

import asyncio
import re
import secrets
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import NamedTuple

from starlette.responses import Response

from control_plane.errors import StorageUnavailable
from control_plane.http.console.forms import Form, unreadable
from control_plane.http.console.shell import Visit
from control_plane.http.idempotency import begin
from control_plane.services import idempotency
from control_plane.services.idempotency import Claim

# Of the page that a form leads to which has been sent before
NOTICE = "This form was sent before, and nothing was made a second time. Its secret was shown then, that once."
# Seconds for which the secret before another one is valid
OVERLAPS = (("0", "at once: it is refused from now on"), ("3600", "1 hour"), ("86400", "1 day"), ("604800", "7 days"))
_TOKEN = re.compile(r"[A-Za-z0-9_-]{16,64}")


class Shown(NamedTuple):
    """The page with the secret, and the address of what was made."""

    page: Response
    where: str


def token() -> str:
    """For the hidden field `once` of a form."""
    return secrets.token_urlsafe(16)


async def once(visit: Visit, form: Form, make: Callable[[], Awaitable[Shown]]) -> Response:
    """The page of `make` for who sends the form first; later ones are led to what it made. Raises Refused."""
    given, store = form.text("once"), visit.plane.database.main
    if not _TOKEN.fullmatch(given):
        raise unreadable()
    claim = Claim(f"console:{visit.act.principal.user}", f"form:{given}", "form")
    kept = await begin(visit.plane, claim)
    if kept is not None:
        return visit.back("once", to=kept.body)
    try:
        shown = await make()
    except BaseException:
        await asyncio.shield(idempotency.forget(store, claim))
        raise
    # It is made, and its secret must be shown, whatever becomes of the database now.
    with suppress(StorageUnavailable):
        await idempotency.keep(store, claim, 200, {}, shown.where)
    return shown.page
