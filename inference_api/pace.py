"""Jitter and back-off: spread in time what many routers, or a router with many backends, repeat."""


def spread(seconds: float, random: float) -> float:
    """The interval, +-20 %; `random` is in [0, 1)."""
    return seconds * (0.8 + 0.4 * random)


def back_off(failures: int, first: float, longest: float, random: float) -> float:
    """Seconds to wait after `failures` (from 1) in a row: up to `first`, twice that ... `longest`.

    Full jitter: the clients of a server all lose it at the same moment. `random` is in [0, 1).
    """
    return random * min(longest, first * 2.0 ** min(failures - 1, 10))
