"""When to do something again: spread by chance, so that many routers, or many backends, do not meet in one moment."""


def spread(seconds: float, random: float) -> float:
    """The interval, +-20 %; `random` is in [0, 1)."""
    return seconds * (0.8 + 0.4 * random)


def back_off(failures: int, first: float, longest: float, random: float) -> float:
    """Seconds to wait after so many failures in a row, from 1: any time up to `first`, twice that ... `longest`.

    Full jitter: all who lost a server lost it in the same moment. `random` is in [0, 1).
    """
    return random * min(longest, first * 2.0 ** min(failures - 1, 10))
