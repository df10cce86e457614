"""How many second attempts a model may have: a share of its requests. Pure."""

# For sums of shares such as 0.1
_ROUNDING = 1e-9


class Allowance:
    """Of n requests at most `share` x n, or one. What is not used is kept, up to `most`: a burst stays small."""

    __slots__ = ("_credit", "_most", "_used")

    def __init__(self, most: float = 10.0) -> None:
        self._most = most
        self._credit = 0.0
        self._used = False

    def earn(self, share: float) -> None:
        """One more request."""
        credit = self._credit + share
        self._credit = credit if credit < self._most else self._most

    def spend(self) -> bool:
        """Take one, if there is one."""
        if self._used and self._credit < 1 - _ROUNDING:
            return False
        # The first one may be in advance.
        self._used = True
        self._credit -= 1
        return True
