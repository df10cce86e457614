"""The playground: what a router answers, asked with a key in the organisation of whoever uses it."""

import time
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Final, NamedTuple

from control_plane.clients.router import Answer, Router, RouterAway
from control_plane.errors import Forbidden, NotFound, Refused
from control_plane.plane import Act, Plane
from control_plane.pure.chat import Problem, Transcript
from control_plane.services import lending, models, prices, requests
from control_plane.services.lending import Borrower
from control_plane.services.visibility import visible_models
from inference_api.routing.references import virtual_key

NAME: Final = "playground"
# Seconds for which a form waits for its answer, and bytes of one that is no stream
PATIENCE, _MOST_BYTES = 120.0, 8 * 1024 * 1024


def borrower(act: Act, organisation: str | None) -> Borrower:
    """Of a key in an organisation, or (None) on the platform, for those who may use prompts there. Raises Refused."""
    if act.principal.user is None or not act.principal.may("prompts.use", organisation):
        if organisation is not None and organisation not in act.principal.roles:
            raise NotFound("organisation", organisation)
        raise Forbidden("The playground needs a role that may use prompts here.")
    return Borrower(NAME, organisation)


def asked(
    plane: Plane, act: Act, router: Router | None, organisation: str | None, body: bytes, longest: float
) -> AbstractAsyncContextManager[Answer]:
    """As `lending.asked`. Raises Refused."""
    return lending.asked(plane, act, router, borrower(act, organisation), body, longest)


@dataclass(frozen=True)
class Whole:
    """An answer from its begin to its end. `first`, `took`: milliseconds to its first text, and of all of it."""

    model: str
    status: int
    transcript: Transcript
    first: float | None
    took: float
    cost: "Cost | None" = None

    @property
    def tokens_per_second(self) -> float | None:
        """Of output, from the first one on."""
        made, rest = self.transcript.output_tokens, self.took - (self.first or 0)
        return None if self.first is None or not made or rest <= 0 else made * 1000 / rest


async def whole(
    plane: Plane, act: Act, router: Router | None, organisation: str | None, model: str, body: bytes
) -> Whole:
    """The answer, once it has ended; a refusal is its problem."""
    start, first, status, transcript, size = time.monotonic(), None, 0, Transcript(), 0
    try:
        async with asked(plane, act, router, organisation, body, PATIENCE) as answer:
            status, parts = answer.status, []
            streams = answer.headers.get("content-type", "").startswith("text/event-stream")
            async for data in answer.body:
                size += len(data)
                if not streams:
                    parts.append(data)
                elif transcript.feed(data) and first is None:
                    first = (time.monotonic() - start) * 1000
                if transcript.full or (not streams and size > _MOST_BYTES):
                    break
            if not streams:
                transcript.take(b"".join(parts))
    except Refused as exc:
        status, transcript.problem = exc.status, Problem(exc.message, exc.code)
    except RouterAway as exc:
        transcript.problem = Problem(f"The answer broke off: {exc}.", "router_away")
    if status >= 400 and transcript.problem is None:
        transcript.problem = Problem(f"The router answers {status}.")
    took = (time.monotonic() - start) * 1000
    found = None
    if status < 400 and transcript.input_tokens is not None:
        tokens = transcript.input_tokens, transcript.cached_tokens, transcript.output_tokens
        found = await cost(plane, act, act.request_id or "", model, transcript.model, *tokens)
    return Whole(model, status, transcript, first, took, found)


class Cost(NamedTuple):
    """`nanos`: None: not known. `recorded`: of the usage record; otherwise by the price that holds now."""

    nanos: int | None
    recorded: bool
    input_tokens: int | None
    output_tokens: int | None


async def cost(
    plane: Plane,
    act: Act,
    request_id: str,
    model: str,
    answered: str | None,
    input_tokens: int | None,
    cached: int | None,
    output_tokens: int | None,
) -> Cost:
    """Of an answer. `model`: which was asked; of a virtual one counts the one that `answered`, as far as is known."""
    try:
        record = await requests.one(plane, act, request_id)
        return Cost(record["cost_nanos"], True, record["input_tokens"], record["output_tokens"])
    except NotFound:
        catalogue = models.catalogue(plane)
        name = catalogue.owners.get(model, model)
        if name in catalogue.stored and virtual_key(catalogue.stored[name].entry) is not None:
            name = answered or name
        found = None
        # Of others it is not said whether there is such a model.
        if (await visible_models(plane, act))(name):
            found = prices.current(plane).cost(name, act.at, input_tokens, cached, output_tokens)
        return Cost(found, False, input_tokens, output_tokens)
