"""The system's reason for a failed connection."""

import os
import ssl

import httpx


def cause_of(exc: BaseException) -> str:
    """The system error that caused a failure to connect, such as `connection refused`."""
    seen: BaseException | None = exc
    while seen is not None:
        if isinstance(seen, BaseExceptionGroup):
            seen = seen.exceptions[0]
        if isinstance(seen, ssl.SSLError):
            return _cause_of_tls(seen)
        if isinstance(seen, OSError) and seen.errno:
            # Negative numbers are errors of name look-ups.
            text = os.strerror(seen.errno) if seen.errno > 0 else seen.strerror
            return (text or str(seen)).lower()
        seen = seen.__cause__ or seen.__context__
    if isinstance(exc, TimeoutError | httpx.TimeoutException):
        return "no answer in time"
    return str(exc) or type(exc).__name__


def _cause_of_tls(exc: ssl.SSLError) -> str:
    """Its number is OpenSSL's, and no error of the system."""
    if isinstance(exc, ssl.SSLCertVerificationError):
        return f"its certificate is refused: {exc.verify_message}"
    hint = "; does it speak plain HTTP?" if exc.reason == "WRONG_VERSION_NUMBER" else ""
    return f"no TLS: {(exc.reason or type(exc).__name__).lower().replace('_', ' ')}{hint}"
