"""How many requests of one model may be in flight: the innermost `send` layer, right around the attempts."""

from inference_api.errors import Overloaded
from inference_api.models import Call, Reply, Send
from inference_api.routing.fleet import Model


class ModelAdmission:
    """Counts a model's requests from their first attempt to the end of the answer, and keeps its `max_in_flight`.

    The count falls in the end of the Reply, or with the exception that takes its place. Raises Overloaded.
    """

    def __init__(self, send: Send) -> None:
        self._send = send

    async def __call__(self, call: Call, model: Model) -> Reply:
        limit = model.entry.max_in_flight
        if limit is not None and model.in_flight >= limit:
            raise Overloaded(f"The model {model.name!r} is at its limit of {limit} concurrent requests.", retry_after=1)
        model.in_flight += 1
        try:
            reply = await self._send(call, model)
        except BaseException:
            model.in_flight -= 1
            raise
        reply.on_end(model.request_ended)
        return reply
