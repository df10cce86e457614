"""What a process remembers of usage, beside the database: nothing that could not be read again."""

import asyncio
from dataclasses import dataclass, field
from typing import Any

from control_plane.kept import Pieces


@dataclass
class UsageState:
    """`working`: batches that are being stored. `days`: those whose partitions exist. `pieces`: parts of answers, of
    sums of hours and days. `spend`: the last GET /spend; `spending`: who makes it anew.
    """

    working: int = 0
    days: set[int] = field(default_factory=set)
    pieces: Pieces = field(default_factory=Pieces)
    spend: Any = None
    spending: asyncio.Lock = field(default_factory=asyncio.Lock)
