"""What the process has taken on, and when that is all it takes."""

from inference_api.errors import Overloaded
from inference_api.http.turns import Turns


class Admission:
    """Inference requests in flight, and the bytes of those bodies that did not come together with their head.

    A request is in flight once its body is whole: clients that are slow to send keep nobody out. But what they have
    sent is in memory, and that has an end too.
    """

    __slots__ = ("buffered", "in_flight", "max_buffered", "max_in_flight", "turns")

    def __init__(self, max_in_flight: int = 1000, max_buffered: int = 256 * 1024 * 1024) -> None:
        self.max_in_flight = max_in_flight
        self.max_buffered = max_buffered
        self.in_flight = 0
        self.buffered = 0
        # For what takes long of a request
        self.turns = Turns()

    def check(self) -> None:
        """Before a body is waited for. Raises Overloaded if there is no use in sending it."""
        if self.in_flight >= self.max_in_flight:
            raise overloaded("The router")

    def buffer(self, size: int) -> None:
        """So many bytes more. Raises Overloaded if that is too much; they count until they are taken off again."""
        self.buffered += size
        if self.buffered > self.max_buffered:
            raise Overloaded("The router has as many bytes of request bodies in memory as it takes.", retry_after=1)


def overloaded(who: str) -> Overloaded:
    return Overloaded(f"{who} has as many requests in flight as it takes.", retry_after=1)
