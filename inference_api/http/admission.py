"""The limits of the process: concurrent requests, and bytes of request bodies."""

from inference_api.errors import Overloaded
from inference_api.http.turns import Turns


class Admission:
    """Counts inference requests in flight, and the bytes of bodies that did not arrive together with their head.

    A request is in flight once its body is complete, so that slow senders do not exclude others. Their bytes have a
    limit of their own.
    """

    __slots__ = ("buffered", "in_flight", "max_buffered", "max_in_flight", "turns")

    def __init__(self, max_in_flight: int = 1000, max_buffered: int = 256 * 1024 * 1024) -> None:
        self.max_in_flight = max_in_flight
        self.max_buffered = max_buffered
        self.in_flight = 0
        self.buffered = 0
        # For large bodies
        self.turns = Turns()

    def check(self) -> None:
        """Check before waiting for a body. Raises Overloaded if the process is at its limit."""
        if self.in_flight >= self.max_in_flight:
            raise overloaded("The router")

    def buffer(self, size: int) -> None:
        """Add `size` bytes. Raises Overloaded beyond the limit; the bytes count until they are subtracted."""
        self.buffered += size
        if self.buffered > self.max_buffered:
            raise Overloaded("The router has as many bytes of request bodies in memory as it takes.", retry_after=1)


def overloaded(who: str) -> Overloaded:
    return Overloaded(f"{who} has as many requests in flight as it takes.", retry_after=1)
