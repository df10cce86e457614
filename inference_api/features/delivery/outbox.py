"""Records that wait to be sent, and what follows the answer to a batch. Pure: no input or output, no clock."""

from collections import deque
from enum import Enum, auto
from itertools import islice

# Of the contract: records that may wait, and records and bytes of one request to the control plane.
CAPACITY = 10_000
BATCH = 500
# The control plane takes 1 MiB.
BATCH_BYTES = 1_000_000


class Verdict(Enum):
    """What becomes of a batch."""

    TAKEN = auto()
    # The batch itself is at fault: its halves may not be.
    SPLIT = auto()
    # The control plane is at fault, or away: the batch is kept.
    KEPT = auto()


_SPLIT = frozenset({400, 413, 415, 422})


def verdict(status: int) -> Verdict:
    """By the status of the answer; 0: there was none."""
    if status == 200:
        return Verdict.TAKEN
    return Verdict.SPLIT if status in _SPLIT else Verdict.KEPT


def fitting(lines: list[bytes], most: int = BATCH, size: int = BATCH_BYTES) -> int:
    """How many of the first lines fit into one batch; at least one."""
    total = 0
    for count, line in enumerate(lines[:most]):
        total += len(line) + 1
        if total > size and count:
            return count
    return min(len(lines), most)


class Outbox:
    """A queue with a bound. What was taken still counts until it is settled, so that there is room to give it back."""

    __slots__ = ("_lines", "_out", "capacity")

    def __init__(self, capacity: int = CAPACITY) -> None:
        self.capacity = capacity
        self._lines: deque[bytes] = deque()
        self._out = 0

    def __len__(self) -> int:
        return len(self._lines) + self._out

    @property
    def waiting(self) -> int:
        """Records that nobody has taken."""
        return len(self._lines)

    def put(self, line: bytes) -> bool:
        """Whether there was room."""
        if len(self._lines) + self._out >= self.capacity:
            return False
        self._lines.append(line)
        return True

    def take(self, most: int, size: int | None = None) -> list[bytes]:
        """The oldest records, at most so many and so many bytes, but at least one if there is one."""
        taken = list(islice(self._lines, most))
        if size is not None:
            del taken[fitting(taken, most, size) :]
        if len(taken) == len(self._lines):
            self._lines.clear()
        else:
            for _ in taken:
                self._lines.popleft()
        self._out += len(taken)
        return taken

    def settle(self, count: int) -> None:
        """So many of those taken have left: sent, spooled or dropped."""
        self._out -= count

    def give_back(self, lines: list[bytes]) -> None:
        self._lines.extendleft(reversed(lines))
        self._out -= len(lines)
