"""Times: Unix milliseconds in the database, RFC 3339 in UTC under /api/v1."""

from datetime import UTC, datetime
from typing import Annotated

from pydantic import BeforeValidator, PlainSerializer

from inference_api.policy.document import unix_time

# 9999-12-31T23:59:59Z
_LAST = 253_402_300_799_000


def shown(at: int | None) -> str | None:
    """`2026-11-28T12:00:00Z`, with milliseconds only if it has some."""
    if at is None:
        return None
    text = datetime.fromtimestamp(at // 1000, UTC).isoformat().removesuffix("+00:00")
    return f"{text}.{at % 1000:03d}Z" if at % 1000 else f"{text}Z"


def read(value: object) -> int:
    """Unix milliseconds of an RFC 3339 time in UTC. Raises ValueError."""
    at = round(float(unix_time(value)) * 1000)
    if at > _LAST:
        raise ValueError("must be before the year 10000")
    return at


# A time in a body: text there, Unix milliseconds here
Moment = Annotated[int, BeforeValidator(read), PlainSerializer(shown, return_type=str | None)]
