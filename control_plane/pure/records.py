"""Usage records as routers send them: checked one by one, for one bad record must not stop the others."""

from collections.abc import Iterable
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

MINUTE = 60_000
HOUR = 60 * MINUTE
DAY = 24 * HOUR
# Milliseconds around the present within which the time of a record may be
PAST, FUTURE = 7 * DAY, 5 * MINUTE
# Kinds that are billed: others cost nothing, whatever they took.
BILLED = ("request", "race", "vote")
KINDS = (*BILLED, "hedge", "shadow")
# Outcomes that are no errors
FINE = ("ok", "client_gone", "upstream_4xx", "refused")


def _printable(value: str) -> str:
    """PostgreSQL stores no NUL, and nobody needs other control characters in a name."""
    if not value.isprintable():
        raise ValueError("must have printable characters only")
    return value


def _word(pattern: str) -> Any:
    return Annotated[str, Field(pattern=pattern)]


Count = Annotated[int, Field(ge=0, le=2**53 - 1)]
Milliseconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Status = Annotated[int, Field(ge=0, le=599)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._@-]{0,127}$")]
ModelName = Annotated[str, Field(max_length=128), AfterValidator(_printable)]
Backend = Annotated[str, Field(max_length=2048), AfterValidator(_printable)]
Outcome = Annotated[str, Field(pattern=r"^[a-z0-9_]+$", max_length=128)]


class Tried(BaseModel):
    """One attempt on a backend."""

    model_config = ConfigDict(strict=True)

    backend: Annotated[str, Field(min_length=1, max_length=2048), AfterValidator(_printable)]
    outcome: Outcome
    status: Status
    start_ms: Milliseconds
    duration_ms: Milliseconds


class UsageRecord(BaseModel):
    """A record, by usage-record.json. A key that it does not know is ignored."""

    model_config = ConfigDict(strict=True)

    id: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{8,64}$")]
    kind: Literal["request", "race", "vote", "hedge", "shadow"]
    at: Annotated[int, Field(ge=1, le=2**53 - 1)]
    router: Name
    request_id: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,128}$")]
    key_id: Annotated[str, Field(pattern=r"^[0-9A-Za-z]{12}$")] | None
    organisation: Name | None
    user: Name | None
    end_user: Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")] | None
    asked_model: ModelName
    model: ModelName
    backend: Backend | None
    route: Annotated[str, Field(pattern=r"^[a-z_]+$", max_length=128)]
    stream: bool
    status: Status
    outcome: Outcome
    code: Outcome | None
    attempts: Count
    attempt_details: Annotated[list[Tried], Field(max_length=16)] | None = None
    fallback: bool
    variant: ModelName | None
    cache: Literal["hit", "miss", "bypass"] | None
    prompt: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._@-]{0,127}@[0-9]+$", max_length=256)] | None
    votes: Annotated[str, Field(pattern=r"^[0-9]+/[0-9]+$", max_length=64)] | None
    input_tokens: Count | None
    cached_input_tokens: Count | None
    output_tokens: Count | None
    reasoning_tokens: Count | None
    usage_source: Literal["reported", "counted", "cache", "none"]
    latency_ms: Milliseconds
    ttft_ms: Milliseconds | None
    queued_ms: Milliseconds
    bytes: Count
    cost_nanos: Count | None


# As they are shown and stored
FIELDS = tuple(UsageRecord.model_fields)


class Refusal(NamedTuple):
    """Why one record is not taken. `place`: in the batch; `id`: as it was given, if that is a text."""

    place: int
    id: str | None
    code: Literal["validation_error", "clock_skew"]
    message: str


class Checked(NamedTuple):
    """`taken`: (place in the batch, record)."""

    taken: list[tuple[int, UsageRecord]]
    refused: list[Refusal]


def check(records: Iterable[Any], now: int) -> Checked:
    """Sort records out. `now`: Unix milliseconds."""
    taken, refused = [], []
    for index, given in enumerate(records):
        try:
            record = UsageRecord.model_validate(given)
        except ValidationError as exc:
            refused.append(Refusal(index, _id(given), "validation_error", _reason(exc)))
            continue
        if now - PAST <= record.at <= now + FUTURE:
            taken.append((index, record))
        else:
            refused.append(Refusal(index, record.id, "clock_skew", skew(record.at, now)))
    return Checked(taken, refused)


def skew(at: int, now: int, past: int = PAST) -> str:
    """`at is 9 days in the past; records of -7 days to +5 minutes are taken`."""
    side = "past" if at < now else "future"
    return f"at is {_amount(abs(now - at))} in the {side}; records of -{_amount(past)} to +5 minutes are taken"


def _amount(milliseconds: int) -> str:
    for size, unit in ((DAY, "day"), (HOUR, "hour"), (MINUTE, "minute")):
        if milliseconds >= size:
            count = milliseconds // size
            return f"{count} {unit}{'s' if count > 1 else ''}"
    return f"{milliseconds // 1000} seconds"


def _id(given: Any) -> str | None:
    found = given.get("id") if isinstance(given, dict) else None
    return found[:64] if isinstance(found, str) else None


def _reason(exc: ValidationError) -> str:
    error = exc.errors(include_url=False, include_input=False, include_context=False)[0]
    place = ".".join(map(str, error["loc"]))
    text = error["msg"].removeprefix("Value error, ")
    if error["type"] == "model_type":
        return "a record must be an object"
    return f"{place}: {text[:1].lower()}{text[1:]}"
