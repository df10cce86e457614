"""The limits of the process: concurrent requests, and bytes of request bodies."""

from inference_api.errors import Overloaded
from inference_api.http.turns import Turns


class Admission:
    """Counts inference requests in flight, and the bytes of bodies that did not arrive together with their head.

    A request counts as in flight once its body is complete, so that slow senders do not exclude others. Incomplete
    bodies have a limit of bytes.
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
            raise self.full()

    def buffer(self, size: int) -> None:
        """Add `size` bytes. Raises Overloaded beyond the limit; the bytes count until they are subtracted."""
        self.buffered += size
        if self.buffered > self.max_buffered:
            message = f"Buffered request bodies exceed the router's limit of {self.max_buffered} bytes; retry shortly."
            raise Overloaded(message, retry_after=1)

    def full(self) -> Overloaded:
        """The error of a request beyond `max_in_flight`."""
        message = f"The router is at its limit of {self.max_in_flight} concurrent requests; retry shortly."
        return Overloaded(message, retry_after=1)
