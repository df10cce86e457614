"""The policy as people and the registry write it: one pydantic model per item, as in policy.json."""

import re
from datetime import UTC, datetime
from decimal import Decimal
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints, model_validator

Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._@-]{0,127}$")]
KeyId = Annotated[str, StringConstraints(pattern=r"^[0-9A-Za-z]{12}$")]
Digest = Annotated[str, StringConstraints(pattern=r"^(sha256|hmac-sha256):[0-9a-f]{64}$")]
Pattern = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9._:/@*-]{1,128}$")]
Patterns = tuple[Pattern, ...] | None
Amount = Annotated[int, Field(strict=True, ge=1, le=2**53 - 1)]
Unit = Literal["requests", "tokens", "input_tokens", "output_tokens", "streams"]
Period = Literal["day", "week", "month"]

UNITS: tuple[Unit, ...] = ("requests", "tokens", "input_tokens", "output_tokens", "streams")
BUDGET_UNITS = ("cost", "tokens", "requests")
# 10^-9 of CURRENCY
NANOS = 10**9
_TIME = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}(\.[0-9]{1,6})?Z")


def unix_time(value: Any) -> Any:
    """Unix seconds of an RFC 3339 time in UTC; YAML reads an unquoted one itself."""
    if isinstance(value, datetime):
        return (value if value.tzinfo else value.replace(tzinfo=UTC)).timestamp()
    if not isinstance(value, str) or not _TIME.fullmatch(value):
        raise ValueError("must be a time in UTC, such as 2027-01-31T00:00:00Z")
    return datetime.fromisoformat(value).timestamp()


def shown_time(seconds: float) -> str:
    """Unix seconds as RFC 3339 in UTC."""
    text = datetime.fromtimestamp(seconds, UTC).isoformat().removesuffix("+00:00")
    return f"{text.rstrip('0') if '.' in text else text}Z"


def nanos(amount: Any) -> int:
    """Money as people write it, in 10^-9. Raises ValueError for more than 9 digits after the point."""
    exact = Decimal(str(amount)) * NANOS
    if exact != exact.to_integral_value():
        raise ValueError("must have at most 9 digits after the point")
    return int(exact)


Time = Annotated[float, BeforeValidator(unix_time)]


class _Item(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)


class Limit(_Item):
    """At most so many of one unit per `per` seconds, or so many streams at once. `models`: for these names together."""

    requests: Amount | None = None
    tokens: Amount | None = None
    input_tokens: Amount | None = None
    output_tokens: Amount | None = None
    streams: Amount | None = None
    per: Annotated[int, Field(strict=True, ge=1, le=3600)] | None = None
    precise: bool = False
    models: Patterns = None

    @model_validator(mode="after")
    def _one_unit(self) -> Self:
        given = [unit for unit in UNITS if getattr(self, unit) is not None]
        if len(given) != 1:
            raise ValueError(f"give one of {', '.join(UNITS)}, not {' and '.join(given) or 'none'}")
        if (self.streams is None) == (self.per is None):
            raise ValueError("a limit of streams has no `per`" if self.per else "give `per`, in seconds")
        return self

    @property
    def unit(self) -> Unit:
        return next(unit for unit in UNITS if getattr(self, unit) is not None)

    @property
    def amount(self) -> int:
        found: int = getattr(self, self.unit)
        return found


class ScopedLimit(Limit):
    """A limit of the platform. Without `name` each holder of the scope has a counter of its own."""

    scope: Literal["all", "organisation", "user", "key", "address", "model"]
    name: Annotated[str, StringConstraints(min_length=1, max_length=128)] | None = None

    @model_validator(mode="after")
    def _no_name(self) -> Self:
        if self.name is not None and self.scope in ("all", "address"):
            raise ValueError(f"a limit of the scope {self.scope!r} has no `name`")
        return self


class Budget(_Item):
    """An amount of money, tokens or requests per UTC day, ISO week or calendar month. `soft`: a share of it."""

    cost: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    tokens: Amount | None = None
    requests: Amount | None = None
    per: Period
    soft: Annotated[float, Field(gt=0, lt=1)] = 0.8

    @model_validator(mode="after")
    def _one_unit(self) -> Self:
        given = [unit for unit in BUDGET_UNITS if getattr(self, unit) is not None]
        if len(given) != 1:
            raise ValueError(f"give one of {', '.join(BUDGET_UNITS)}, not {' and '.join(given) or 'none'}")
        if self.cost is not None:
            nanos(self.cost)
        return self

    @property
    def unit(self) -> str:
        return next(unit for unit in BUDGET_UNITS if getattr(self, unit) is not None)

    @property
    def amount(self) -> int:
        """Nanos of a cost, else a count."""
        found: Any = getattr(self, self.unit)
        return nanos(found) if self.cost is not None else int(found)


class ScopedBudget(Budget):
    """A budget of the platform. Without `name` each holder of the scope has one of its own."""

    scope: Literal["all", "organisation", "user", "key"]
    name: Annotated[str, StringConstraints(min_length=1, max_length=128)] | None = None

    @model_validator(mode="after")
    def _no_name(self) -> Self:
        if self.name is not None and self.scope == "all":
            raise ValueError("a budget of the scope 'all' has no `name`")
        return self


class Organisation(_Item):
    """A team. `models`: patterns of the names that its keys may use; None: all."""

    name: Name
    disabled: bool = False
    models: Patterns = None
    limits: tuple[Limit, ...] = ()
    budget: Budget | None = None


class Previous(_Item):
    """The digest of a replaced secret, valid until this time."""

    digest: Digest
    until: Time


class Key(_Item):
    """One API key; of its secret only the digest."""

    id: KeyId
    name: Annotated[str, StringConstraints(min_length=1, max_length=128)]
    digest: Digest
    organisation: Name | None = None
    user: Name | None = None
    models: Patterns = None
    limits: tuple[Limit, ...] = ()
    budget: Budget | None = None
    priority: Annotated[int, Field(strict=True, ge=-100, le=100)] = 0
    weight: Annotated[float, Field(ge=0.01, le=100)] = 1.0
    expires: Time | None = None
    disabled: bool = False
    previous: Previous | None = None


class Anonymous(_Item):
    """Callers without a key (AUTH=off), by client address."""

    limits: tuple[Limit, ...] = ()


class Variable(_Item):
    """A variable of a prompt. `trusted`: may stand in a system or developer message."""

    type: Literal["string", "number", "enum"] = "string"
    required: bool = False
    default: str | int | float | None = None
    max_length: Annotated[int, Field(ge=1, le=1048576)] = 65536
    values: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    trusted: bool = False

    @model_validator(mode="after")
    def _values_of_an_enum(self) -> Self:
        if (self.type == "enum") == (self.values is None):
            raise ValueError("give `values` for the type 'enum', and for no other")
        return self


class Message(BaseModel):
    """A message of a prompt; other keys pass unread."""

    model_config = ConfigDict(extra="allow", frozen=True, hide_input_in_errors=True)

    role: str
    content: Any


VariableName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z_][A-Za-z0-9_]{0,63}$")]
Label = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9_-]{0,63}$")]
_Number = Annotated[int, Field(strict=True, ge=1)]
# The only syntax of a template.
USED = re.compile(r"\{\{\s*([A-Za-z_][A-Za-z0-9_]{0,63})\s*\}\}")


class Version(_Item):
    """An immutable version of a prompt: messages, or the text of a completion."""

    version: _Number
    messages: Annotated[tuple[Message, ...], Field(min_length=1)] | None = None
    text: str | None = None
    variables: dict[VariableName, Variable] = {}

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        if (self.messages is None) == (self.text is None):
            raise ValueError("give either `messages` or `text`")
        return self


class StoredPrompt(_Item):
    """A stored prompt. `organisation`: only its callers may use it."""

    name: Name
    organisation: Name | None = None
    labels: dict[Label, _Number] = {}
    versions: Annotated[tuple[Version, ...], Field(min_length=1)]


# Sections of the document that are lists, with the class of their items
SECTIONS: dict[str, type[BaseModel]] = {
    "organisations": Organisation,
    "keys": Key,
    "limits": ScopedLimit,
    "budgets": ScopedBudget,
    "prompts": StoredPrompt,
}
