"""Limits of one call: seconds and attempts."""

from typing import NamedTuple


class Limits(NamedTuple):
    """Seconds and counts per call; timeouts of the model's entry take precedence."""

    connect: float = 2.0
    first_byte: float = 120.0
    idle: float = 120.0
    total: float = 590.0
    stream_total: float = 3600.0
    attempts: int = 2
    retry_on_status: frozenset[int] = frozenset({503})
    retry_budget: float = 0.2
