"""Who wants to know of usage records that the registry has."""

from collections.abc import Callable


class Deliveries:
    """`listeners` get each delivered batch: records as they were sent, encoded."""

    def __init__(self) -> None:
        self.listeners: list[Callable[[list[bytes]], None]] = []

    def tell(self, records: list[bytes]) -> None:
        for listen in self.listeners:
            listen(records)
