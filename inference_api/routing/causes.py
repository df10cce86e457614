"""Why a connection could not be made, in the system's words."""

import os

import httpx


def cause_of(exc: BaseException) -> str:
    """The error of the system at the root of a failure to connect, such as `connection refused`."""
    seen: BaseException | None = exc
    while seen is not None:
        if isinstance(seen, BaseExceptionGroup):
            seen = seen.exceptions[0]
        if isinstance(seen, OSError) and seen.errno:
            # Negative ones are of name look-ups.
            text = os.strerror(seen.errno) if seen.errno > 0 else seen.strerror
            return (text or str(seen)).lower()
        seen = seen.__cause__ or seen.__context__
    if isinstance(exc, TimeoutError | httpx.TimeoutException):
        return "no answer in time"
    return str(exc) or type(exc).__name__
