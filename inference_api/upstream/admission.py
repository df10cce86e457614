"""Admission per model: the innermost `send` layer, directly around the attempts."""

from inference_api.errors import Overloaded
from inference_api.models import Call, Reply, Send
from inference_api.routing.fleet import Model


def model_admission(send: Send) -> Send:
    """Counts a model's requests from the first attempt to the end of the answer, and enforces `max_in_flight`.

    The count falls when the Reply ends, or when an exception takes its place. Raises Overloaded.
    """

    async def admitted(call: Call, model: Model) -> Reply:
        limit = model.entry.max_in_flight
        if limit is not None and model.in_flight >= limit:
            raise Overloaded(f"The model {model.name!r} is at its limit of {limit} concurrent requests.", retry_after=1)
        model.in_flight += 1
        try:
            reply = await send(call, model)
        except BaseException:
            model.in_flight -= 1
            raise
        reply.model = model
        return reply

    return admitted
