"""Configuration: INFERENCE_API_* environment variables, read once at start into one frozen object."""

import difflib
import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar, get_args
from urllib.parse import urlsplit

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PrivateAttr,
    SecretStr,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, NoDecode, PydanticBaseSettingsSource, SettingsConfigDict

from inference_api.headers import NEVER_FORWARDED

PREFIX = "INFERENCE_API_"
# They enable traces; the first one wins.
OTLP_ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
DEFAULT_CATALOGUE = Path(__file__).with_name("catalogue.yaml")

# URLs may contain passwords, and invalid values are echoed in errors.
_PASSWORD = re.compile(r"(//|^)[^/]*@")

Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Port = Annotated[int, Field(ge=1, le=65535)]
Count = Annotated[int, Field(ge=1)]


class SettingsError(ValueError):
    """The environment cannot be used; one line per variable, each naming it."""


class InvalidSettings(ValueError):
    """The errors of pydantic, for the core's settings and each group."""

    def __init__(self, errors: list[ValidationError]) -> None:
        super().__init__("; ".join(str(error) for error in errors))
        self.errors = errors


class Group(BaseModel):
    """Base of the settings of one feature, named like their variables without the prefix. Each has a default: off."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)


G = TypeVar("G", bound=Group)


class Settings(BaseSettings):
    """Every setting of the core, named like its variable without the prefix; features have groups."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, frozen=True, extra="forbid", hide_input_in_errors=True)

    host: str = Field(default="127.0.0.1", min_length=1, description="listen address")
    port: Port = Field(default=8000, description="listen port")
    ops_port: Port | None = Field(
        default=None, description="port of probes, /metrics and /backends, on a thread of their own; unset: PORT"
    )
    catalogue: Path = Field(default=DEFAULT_CATALOGUE, description="YAML or JSON file of the static catalogue")
    registry_url: str | None = Field(default=None, description="base URL of the model registry")
    registry_token: SecretStr | None = Field(default=None, description="bearer token for the model registry")
    registry_refresh: Seconds = Field(default=15, description="seconds between two polls of the registry, +-20 %")
    registry_required: Literal["off", "on"] = Field(
        default="off",
        description="on: /readyz is 503 until the registry has answered once, even with a static catalogue",
    )
    discovery: Literal["dns", "endpointslices"] = Field(
        default="dns",
        description="how `discovery: dns` finds backends: by DNS, or by the EndpointSlices of the Kubernetes API",
    )
    discovery_interval: Seconds = Field(
        default=5, description="seconds between two look-ups of host names with `discovery: dns`, +-20 %"
    )
    connect_timeout: Seconds = Field(default=2, description="seconds to connect to a backend")
    first_byte_timeout: Seconds = Field(default=120, description="seconds until a backend's response head")
    idle_timeout: Seconds = Field(default=120, description="seconds without a byte in a backend's answer")
    total_timeout: Seconds = Field(default=590, description="seconds for a JSON answer, all attempts together")
    stream_timeout: Seconds = Field(default=3600, description="seconds for a streamed answer")
    header_timeout: Seconds = Field(default=10, description="seconds for a client to send its request head")
    body_timeout: Seconds = Field(default=60, description="seconds for a client to send its request body")
    write_stall_timeout: Seconds = Field(default=60, description="seconds until a client that does not read is reset")
    keepalive_timeout: Seconds = Field(default=75, description="seconds until an idle client connection is closed")
    max_connection_age: Annotated[float, Field(ge=0, allow_inf_nan=False)] = Field(
        default=0, description="seconds until a client connection is closed with its next answer, +-10 %; 0: never"
    )
    upstream_keepalive: Seconds = Field(
        default=3, description="seconds until an idle backend connection is closed; vLLM closes it at 5"
    )
    max_body_bytes: Count = Field(default=32 * 1024 * 1024, description="bytes of the largest request body")
    max_buffered_bytes: Count = Field(
        default=256 * 1024 * 1024,
        description="bytes of all request bodies in memory, except bodies that arrive with their head; more get 503",
    )
    max_in_flight: Count = Field(
        default=1000, description="concurrent requests, each counted once its body is complete; more get 503"
    )
    max_attempts: Annotated[int, Field(ge=1, le=3)] = Field(
        default=2, description="attempts per request, the first one included"
    )
    retry_budget: Annotated[float, Field(ge=0, le=1)] = Field(
        default=0.2, description="concurrent retries as a share of the model's requests in flight; 3 are always allowed"
    )
    retry_on_status: Annotated[frozenset[int], NoDecode] = Field(
        default=frozenset({503}), description="backend statuses to retry, from 429, 502, 503 and 504; comma-separated"
    )
    forward_headers: Annotated[frozenset[str], NoDecode] = Field(
        default=frozenset(),
        description="additional request headers to forward to backends, such as x-vllm-priority; comma-separated",
    )
    breaker_failures: Count = Field(default=5, description="consecutive failures that open a backend's circuit")
    breaker_cooldown: Seconds = Field(
        default=60, description="seconds until an open circuit admits one request, +-20 %"
    )
    health_interval: Seconds = Field(default=10, description="seconds between two health checks of a backend, +-20 %")
    health_timeout: Seconds = Field(default=5, description="seconds for one health check")
    drain_delay: Annotated[float, Field(ge=0, allow_inf_nan=False)] = Field(
        default=0, description="seconds to keep accepting connections after SIGTERM"
    )
    drain_timeout: Seconds = Field(default=570, description="seconds to wait for requests in flight after that")
    validation_status: Literal["422", "400"] = Field(
        default="422", description="status of `validation_error`; 400 for clients that expect vLLM's"
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(default="info", description="lowest level to log")
    log_format: Literal["json", "console"] | None = Field(
        default=None, description="json or console; unset: console on a terminal"
    )

    # Groups of the features, by their class
    _groups: Mapping[type[Group], Group] = PrivateAttr(default_factory=dict)

    @field_validator("retry_on_status", "forward_headers", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value

    @field_validator("retry_on_status")
    @classmethod
    def _statuses(cls, value: frozenset[int]) -> frozenset[int]:
        if unsafe := sorted(value - {429, 502, 503, 504}):
            raise ValueError(f"{unsafe[0]} cannot be retried safely; use some of 429, 502, 503, 504")
        return value

    @field_validator("forward_headers")
    @classmethod
    def _header_names(cls, value: frozenset[str]) -> frozenset[str]:
        names = frozenset(name.lower() for name in value)
        for name in sorted(names):
            if not name.isascii() or not name.replace("-", "").isalnum():
                raise ValueError(f"{name!r} is not a header name")
            if name.encode() in NEVER_FORWARDED or name.startswith("x-forwarded-"):
                raise ValueError(f"{name!r} is set by the router and is never forwarded; remove it")
        return names

    @field_validator("registry_url")
    @classmethod
    def _url(cls, value: str | None) -> str | None:
        if value is None:
            return None
        parts = urlsplit(value)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("must be an http:// or https:// URL")
        if parts.query or parts.fragment:
            raise ValueError("must be a base URL, without ? and #")
        try:
            _ = parts.port
        except ValueError:
            raise ValueError("its port must be a number from 0 to 65535") from None
        return value.rstrip("/")

    @field_validator("registry_token", mode="before")
    @classmethod
    def _token(cls, value: Any) -> Any:
        # A Secret made from a file often ends in a newline, which is not valid in a header.
        token = value.strip() if isinstance(value, str) else value
        if isinstance(token, str) and not (token.isascii() and token.isprintable() and token.split() == [token]):
            raise ValueError("must be one word of ASCII characters; unset it to send no token")
        return token

    @model_validator(mode="after")
    def _together(self) -> Self:
        if self.ops_port == self.port:
            raise ValueError(f"{PREFIX}OPS_PORT='{self.port}': is also {PREFIX}PORT; set it to another port")
        if self.max_buffered_bytes < self.max_body_bytes:
            raise ValueError(
                f"{PREFIX}MAX_BUFFERED_BYTES='{self.max_buffered_bytes}': one body of {PREFIX}MAX_BODY_BYTES="
                f"{self.max_body_bytes} would not fit; set it to a multiple of that"
            )
        return self

    def of(self, group: type[G]) -> G:
        """The settings of one feature, or its defaults if they were not loaded."""
        found = self._groups.get(group)
        return found if isinstance(found, group) else group()

    @classmethod
    def settings_customise_sources(
        cls, settings_cls: type[BaseSettings], init_settings: PydanticBaseSettingsSource, *args: Any, **kwargs: Any
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        # load_settings reads the environment. No .env files or secrets directories: only variables count.
        return (init_settings,)


def load_settings(environ: Mapping[str, str] | None = None, groups: Iterable[type[Group]] = ()) -> Settings:
    """Read and check the environment. Raises SettingsError naming every variable that is unknown or invalid."""
    environ = os.environ if environ is None else environ
    groups = tuple(groups)
    fields = fields_of(groups)
    known = {PREFIX + name.upper() for name in fields}
    given = {name: value for name, value in environ.items() if name.upper().startswith(PREFIX)}
    problems = [_unknown(name, known) for name in sorted(given) if name.upper() not in known]
    values = {
        name.upper().removeprefix(PREFIX).lower(): value for name, value in given.items() if name.upper() in known
    }
    settings = None
    try:
        settings = make_settings(values, groups)
    except InvalidSettings as exc:
        # Never shown in messages
        secrets = {name for name, field in fields.items() if _is_secret(field)}
        problems += [reason for error in exc.errors for reason in _reasons(error, values, secrets)]
    if problems or settings is None:
        raise SettingsError("\n".join(problems))
    return settings


def make_settings(values: Mapping[str, Any], groups: Iterable[type[Group]] = ()) -> Settings:
    """Settings from values by name. Raises InvalidSettings."""
    errors: list[ValidationError] = []
    made: dict[type[Group], Group] = {}
    rest = dict(values)
    for group in groups:
        mine = {name: rest.pop(name) for name in group.model_fields if name in rest}
        try:
            made[group] = group(**mine)
        except ValidationError as exc:
            errors.append(exc)
    try:
        settings = Settings(**rest)
    except ValidationError as exc:
        raise InvalidSettings([exc, *errors]) from None
    if errors:
        raise InvalidSettings(errors)
    settings._groups = made
    return settings


def fields_of(groups: Iterable[type[Group]]) -> dict[str, FieldInfo]:
    """Every setting by name, with default and description: the core's, then those of the groups."""
    models: tuple[type[BaseModel], ...] = (Settings, *groups)
    return {name: field for model in models for name, field in model.model_fields.items()}


def _is_secret(field: FieldInfo) -> bool:
    return SecretStr in (field.annotation, *get_args(field.annotation))


def _reasons(exc: ValidationError, values: Mapping[str, Any], secrets: Collection[str]) -> Iterator[str]:
    for error in exc.errors(include_url=False, include_context=False, include_input=False):
        reason = _reason(error["type"], error["msg"])
        if error["loc"]:
            name = str(error["loc"][0])
            value = values[name]
            if value.startswith("tcp://"):
                # Kubernetes sets NAME_PORT for each Service of the namespace.
                reason += "; Kubernetes sets it for a Service of that name: set `enableServiceLinks: false` in the pod"
            shown = "***" if name in secrets else without_password(value)[:80]
            reason = f"{PREFIX}{name.upper()}={shown!r}: {reason}"
        yield reason


def without_password(url: str) -> str:
    """A URL for display, without password; also of text that is not a valid URL."""
    return _PASSWORD.sub(r"\1***@", url)


def wants_traces(environ: Mapping[str, str]) -> bool:
    """Whether the variables of OpenTelemetry enable traces.

    Raises SettingsError for another protocol than OTLP over HTTP; the message hides endpoints, which may contain a
    password.
    """
    if environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true" or environ.get("OTEL_TRACES_EXPORTER") == "none":
        return False
    given = [name for name in OTLP_ENDPOINTS if environ.get(name)]
    if not given:
        return False
    endpoint = urlsplit(environ[given[0]])
    if endpoint.scheme not in ("http", "https") or not endpoint.hostname:
        raise SettingsError(f"{given[0]}: must be the http:// or https:// URL of OTLP over HTTP, usually port 4318")
    for name in ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL"):
        if environ.get(name, "http/protobuf") != "http/protobuf":
            raise SettingsError(f"{name}={environ[name][:80]!r}: spans go by http/protobuf only, usually to port 4318")
    return True


def _reason(kind: str, message: str) -> str:
    """Translate a message of pydantic for operators."""
    if kind == "int_parsing":
        return "must be a whole number"
    if kind == "float_parsing":
        return "must be a number"
    if kind == "literal_error":
        return message.replace("Input should be ", "must be one of ").replace(" or ", ", ").replace("'", "")
    return re.sub(r"^(Input|String) should ", "must ", message.removeprefix("Value error, "))


def _unknown(name: str, known: set[str]) -> str:
    names = {one.removeprefix(PREFIX): one for one in known}
    close = difflib.get_close_matches(name.upper().removeprefix(PREFIX), names, n=1)
    hint = f"did you mean {names[close[0]]}?" if close else "`inference-api serve --help` lists the variables"
    return f"{name}: there is no such setting; {hint}"
