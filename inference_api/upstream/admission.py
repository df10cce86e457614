"""Admission of the process and of each model: the `send` layer around the attempts."""

from collections.abc import Callable
from typing import Protocol

from inference_api.errors import Overloaded
from inference_api.models import Call, Reply, Send
from inference_api.routing.fleet import Model


class Process(Protocol):
    """The limit of the process; this request is counted already."""

    in_flight: int
    max_in_flight: int

    def full(self) -> Overloaded: ...


def admission(process: Process) -> Callable[[Send], Send]:
    """Enforces the limit of the process, counts a model's requests, and enforces the model's `max_in_flight`.

    A model counts from the first attempt to the end of the answer: the count falls when the Reply ends, or when an
    exception takes its place. Raises Overloaded. Other refusals come first: the layers above have raised them.
    """

    def wrap(send: Send) -> Send:
        async def admitted(call: Call, model: Model) -> Reply:
            if process.in_flight > process.max_in_flight:
                raise process.full()
            limit = model.entry.max_in_flight
            if limit is not None and model.in_flight >= limit:
                text = f"The model {model.name!r} is at its limit of {limit} concurrent requests."
                raise Overloaded(text, retry_after=1)
            model.in_flight += 1
            try:
                reply = await send(call, model)
            except BaseException:
                model.in_flight -= 1
                if model.waiting:
                    model.wake()
                raise
            reply.model = model
            return reply

        return admitted

    return wrap
