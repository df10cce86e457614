"""How long one call may take, and how often it may be tried."""

from typing import NamedTuple


class Limits(NamedTuple):
    """Seconds and counts that hold for one call; a model's own timeouts come first."""

    connect: float = 2.0
    first_byte: float = 120.0
    idle: float = 120.0
    total: float = 590.0
    stream_total: float = 3600.0
    attempts: int = 2
    retry_on_status: frozenset[int] = frozenset({503})
    retry_budget: float = 0.2
