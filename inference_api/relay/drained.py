"""An answer that nobody gets: read to its end, counted and dropped."""

from typing import NamedTuple

from inference_api.models import Outcome, Reply, Route, of_status
from inference_api.relay.answers import hold, read_answer
from inference_api.relay.head import ReturnedHead
from inference_api.relay.typed_events import follow
from inference_api.relay.usage import Counts, counts

# Bytes of an answer other than a stream of which the tokens are read
_READ = 64 * 1024
_NO_COUNTS: Counts = (None, None, None, None)


class Drained(NamedTuple):
    """How the answer ended, its tokens as its engine reports them, and its events with a token."""

    outcome: Outcome
    tokens: Counts
    events: int


async def drain(reply: Reply, route: Route) -> Drained:
    """Read the answer; the caller closes it. Raises httpx.TransportError, and RouterError if it is not valid."""
    head = ReturnedHead(reply.status, reply.headers)
    if head.is_stream:
        events = follow(route, True)
        async for data in reply.stream:
            (events.feed if events.tokens else events.begin)(data)
        events.finish()
        usage = events.usage()
        return Drained(events.verdict(), counts(usage or {}), events.tokens)
    body, rest = await hold(reply.stream, _READ)
    if rest is not None:
        async for _ in rest:
            pass
    elif head.is_json and reply.status == 200:
        usage, is_aborted = read_answer(body)
        return Drained(Outcome.ABORTED if is_aborted else Outcome.OK, counts(usage or {}), 0)
    return Drained(of_status(reply.status), _NO_COUNTS, 0)
