"""Configuration: CONTROL_PLANE_* environment variables, or options of `serve`, read once into one frozen object."""

import os
import re
from collections.abc import Mapping
from importlib.util import find_spec
from ipaddress import ip_network
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError, field_validator, model_validator
from sqlalchemy import URL

from control_plane.data.database import DatabaseError, parse_url
from control_plane.pure import elsewhere
from inference_api.features.trusted_proxies import Network
from inference_api.routing.wording import suggestion
from inference_api.settings import without_password

PREFIX = "CONTROL_PLANE_"
_SHORTEST = 32
Port = Annotated[int, Field(ge=0, le=65535)]
Days = Annotated[int, Field(ge=1, le=3660)]
Switch = Literal["on", "off"]
_LABEL = r"^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$"


class SettingsError(ValueError):
    """The environment cannot be used; one line per variable, each naming it."""


class Settings(BaseModel):
    """Every setting, named like its variable without the prefix."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    host: str = Field(default="127.0.0.1", min_length=1, description="listen address")
    port: Port = Field(default=8081, description="port for routers, probes and /metrics; 0 picks a free one")
    api_port: Port | None = Field(default=None, description="port of /api/v1 and /console; unset: PORT")
    database_url: str = Field(
        default="sqlite:///control-plane.sqlite3", description="sqlite:///FILE or postgresql://USER:PASSWORD@HOST/NAME"
    )
    migrate: Literal["auto", "check"] | None = Field(
        default=None, description="auto: upgrade the schema at the start; check: refuse another; unset: auto on SQLite"
    )
    public_url: str | None = Field(default=None, description="URL of the console; unset: http://HOST:PORT")
    key_pepper: SecretStr | None = Field(default=None, description="as the routers' KEY_PEPPER; `new,old`")
    currency: str = Field(default="USD", pattern="^[A-Z]{3}$", description="as the routers' CURRENCY")
    trusted_proxies: tuple[Network, ...] = Field(
        default=(), description="networks of proxies whose `x-forwarded-for` names the client; comma-separated"
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(default="info", description="lowest level to log")
    log_format: Literal["json", "console"] | None = Field(
        default=None, description="json or console; unset: console on a terminal"
    )
    service_token: SecretStr | None = Field(
        default=None, description="a service token with every scope, at least 32 characters, for REGISTRY_TOKEN"
    )
    router_url: str | None = Field(default=None, description="URL of the router that the console uses")
    router_public_url: str | None = Field(
        default=None, description="URL under which applications reach the routers, for the code that the console shows"
    )
    log_url: str | None = Field(
        default=None,
        description="URL of an engine's log, for links of the console: https://logs.example.com/?q={backend}&from={start}",
    )
    trace_url: str | None = Field(default=None, description="URL of a request's trace, likewise, with {request_id}")
    kubernetes_namespace: str | None = Field(
        default=None, pattern=_LABEL, description="namespace of the engines' Deployments; unset: no Kubernetes"
    )
    kubernetes_url: str | None = Field(
        default=None,
        description="URL of the API server, such as that of `kubectl proxy`; unset: this cluster's",
    )
    kubernetes_scale: Switch = Field(default="off", description="on: engines may be started, stopped and scaled there")
    kubernetes_logs: Switch = Field(default="off", description="on: logs of engines may be read there")
    processes: Path | None = Field(
        default=None, description="YAML file with the commands of engines on this machine; unset: no processes"
    )
    model_test_every: Annotated[int, Field(ge=60, le=30 * 86_400)] | None = Field(
        default=None, description="seconds between two tests of each model; unset: by hand only"
    )
    hub_endpoint: str | None = Field(
        default=None, description="hub whose models may be inspected, such as https://huggingface.co; unset: none"
    )
    hub_token: SecretStr | None = Field(default=None, description="token for that hub, and for no other host")
    model_roots: tuple[Path, ...] = Field(
        default=(), description="folders below which models may be inspected; comma-separated"
    )
    prometheus_url: str | None = Field(
        default=None, description="Prometheus with series of engines, hosts and GPUs, for the console; unset: none"
    )
    prometheus_token: SecretStr | None = Field(default=None, description="bearer token for it")
    triage_model: str | None = Field(
        default=None, description="model that summarises groups of log lines, through ROUTER_URL; unset: none"
    )
    triage_engine_logs: Switch = Field(
        default="off", description="on: that model gets lines of engines, too; it must be in your cluster"
    )
    admin_email: str | None = Field(default=None, min_length=3, description="first platform admin, while there is none")
    admin_password_file: Path | None = Field(default=None, description="file with the first admin's password")
    password_login: Switch = Field(default="on", description="off: OpenID only")
    oidc_issuer: str | None = Field(default=None, description="URL of the OpenID provider; needs the extra `oidc`")
    oidc_client_id: str | None = Field(default=None, description="client id at the OpenID provider")
    oidc_client_secret: SecretStr | None = Field(default=None, description="client secret at the OpenID provider")
    oidc_groups_claim: str = Field(default="groups", description="claim with the groups of a user")
    oidc_roles: Mapping[str, str] = Field(
        default={}, description="roles on the platform by group: GROUP=admin,GROUP=operator"
    )
    usage_days: Days | None = Field(
        default=None, description="days that usage records stay; unset: 7 with SQLite, 14 with PostgreSQL"
    )
    hourly_days: Days = Field(default=400, description="days that hourly sums stay")

    @property
    def url(self) -> URL:
        return parse_url(self.database_url)

    @property
    def upgrades(self) -> bool:
        """Whether `serve` migrates."""
        chosen = self.migrate or ("auto" if self.url.get_backend_name() == "sqlite" else "check")
        return chosen == "auto"

    @property
    def record_days(self) -> int:
        return self.usage_days or (7 if self.url.get_backend_name() == "sqlite" else 14)

    @property
    def peppers(self) -> tuple[str, ...]:
        """The first one is for new keys."""
        return () if self.key_pepper is None else tuple(self.key_pepper.get_secret_value().split(","))

    @property
    def origin(self) -> str:
        """Of the console: for cookies and CSRF, never taken from `Host`."""
        if self.public_url is not None:
            parts = urlsplit(self.public_url)
            return f"{parts.scheme}://{parts.netloc}"
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.port if self.api_port is None else self.api_port}"

    @property
    def public(self) -> str:
        """URL under which people reach the console, without `/console`."""
        return self.public_url or self.origin

    @field_validator("database_url")
    @classmethod
    def _database(cls, value: str) -> str:
        try:
            parse_url(value)
        except DatabaseError as exc:
            raise ValueError(str(exc)) from None
        return value

    @field_validator(
        *("public_url", "router_url", "router_public_url", "oidc_issuer"),
        *("kubernetes_url", "hub_endpoint", "prometheus_url"),
    )
    @classmethod
    def _http(cls, value: str | None) -> str | None:
        if value is None:
            return None
        parts = urlsplit(value)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
            raise ValueError("must be an http:// or https:// URL, without ? and #")
        return value.rstrip("/")

    @field_validator("log_url", "trace_url")
    @classmethod
    def _elsewhere(cls, value: str | None) -> str | None:
        return None if value is None else elsewhere.checked(value)

    @field_validator("key_pepper")
    @classmethod
    def _peppers(cls, value: SecretStr | None) -> SecretStr | None:
        parts = [] if value is None else value.get_secret_value().split(",")
        if len(parts) > 2 or any(len(part) < _SHORTEST for part in parts):
            raise ValueError(f"must be at least {_SHORTEST} characters without commas, or two such: new,old")
        return value

    @field_validator("service_token", mode="before")
    @classmethod
    def _token(cls, value: Any) -> Any:
        token = value.strip() if isinstance(value, str) else value
        if isinstance(token, str) and (len(token) < _SHORTEST or not re.fullmatch(r"[\x21-\x7e]+", token)):
            raise ValueError(f"must be one word of at least {_SHORTEST} ASCII characters")
        return token

    @field_validator("trusted_proxies", mode="before")
    @classmethod
    def _networks(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        try:
            return tuple(ip_network(part.strip(), strict=False) for part in value.split(",") if part.strip())
        except ValueError as exc:
            raise ValueError(f"must be addresses or networks such as 10.0.0.0/8, comma-separated: {exc}") from None

    @field_validator("model_roots", mode="before")
    @classmethod
    def _folders(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        found = tuple(Path(part.strip()) for part in value.split(",") if part.strip())
        if wrong := next((one for one in found if not one.is_absolute()), None):
            raise ValueError(f"must be absolute paths, comma-separated, not '{wrong}'")
        return found

    @field_validator("oidc_roles", mode="before")
    @classmethod
    def _roles(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        found = {}
        for part in filter(None, map(str.strip, value.split(","))):
            group, _, role = part.rpartition("=")
            if not group or role not in ("admin", "operator", "viewer"):
                raise ValueError("must be GROUP=ROLE, comma-separated, with the roles admin, operator, viewer")
            found[group] = role
        return found

    @model_validator(mode="after")
    def _together(self) -> Self:
        if self.api_port == self.port and self.port:
            raise ValueError(
                f"{PREFIX}API_PORT='{self.port}': is also {PREFIX}PORT; set it to another port, or unset it"
            )
        if self.admin_password_file is not None and self.admin_email is None:
            raise ValueError(
                f"{PREFIX}ADMIN_PASSWORD_FILE={str(self.admin_password_file)!r}: needs {PREFIX}ADMIN_EMAIL"
            )
        needs = {
            "kubernetes_url": "kubernetes_namespace",
            "hub_token": "hub_endpoint",
            "prometheus_token": "prometheus_url",
            "triage_model": "router_url",
            "model_test_every": "router_url",
        }
        for name, other in needs.items():
            if getattr(self, name) is not None and getattr(self, other) is None:
                raise ValueError(f"{PREFIX}{name.upper()}: needs {PREFIX}{other.upper()}")
        for name in ("kubernetes_scale", "kubernetes_logs"):
            if getattr(self, name) == "on" and self.kubernetes_namespace is None:
                raise ValueError(f"{PREFIX}{name.upper()}='on': needs {PREFIX}KUBERNETES_NAMESPACE")
        if self.oidc_issuer is not None and self.oidc_client_id is None:
            raise ValueError(f"{PREFIX}OIDC_ISSUER={self.oidc_issuer!r}: needs {PREFIX}OIDC_CLIENT_ID")
        if self.oidc_issuer is not None and find_spec("joserfc") is None:
            fix = "the extra is not installed; pip install 'inference-api[oidc]'"
            raise ValueError(f"{PREFIX}OIDC_ISSUER={self.oidc_issuer!r}: {fix}")
        if self.password_login == "off" and self.oidc_issuer is None:
            raise ValueError(f"{PREFIX}PASSWORD_LOGIN='off': needs {PREFIX}OIDC_ISSUER, or nobody could log in")
        return self


def load_settings(environ: Mapping[str, str] | None = None, options: Mapping[str, str] | None = None) -> Settings:
    """Read and check the environment; an option stands for the variable of the same name. Raises SettingsError."""
    environ = os.environ if environ is None else environ
    given = {name: value for name, value in environ.items() if name.startswith(PREFIX)}
    known = {PREFIX + name.upper() for name in Settings.model_fields}
    problems = [_unknown(name, known) for name in sorted(given.keys() - known)]
    values = {name.removeprefix(PREFIX).lower(): value for name, value in given.items() if name in known}
    values |= options or {}
    try:
        settings = Settings(**values)  # type: ignore[arg-type]  # text, which pydantic reads
    except ValidationError as exc:
        raise SettingsError("\n".join([*problems, *_reasons(exc, values)])) from None
    if problems:
        raise SettingsError("\n".join(problems))
    return settings


def _reasons(exc: ValidationError, values: Mapping[str, str]) -> list[str]:
    reasons = []
    for error in exc.errors(include_url=False, include_context=False, include_input=False):
        reason = error["msg"].removeprefix("Value error, ")
        reason = re.sub(r"^(Input|String) should (be )?('.*)$", r"must be one of \3", reason)
        reason = re.sub(r"^(Input|String) should ", "must ", reason).replace(" or '", ", '").replace("'", "")
        if error["loc"]:
            name = str(error["loc"][0])
            annotation = Settings.model_fields[name].annotation
            hidden = SecretStr in (annotation, *get_args(annotation))
            shown = "***" if hidden else without_password(values[name])[:80]
            if values[name].startswith("tcp://"):
                # Kubernetes sets NAME_PORT for each Service of the namespace.
                reason += "; Kubernetes sets it for a Service of that name: set `enableServiceLinks: false` in the pod"
            reason = f"{PREFIX}{name.upper()}={shown!r}: {reason}"
        else:
            reason = error["msg"].removeprefix("Value error, ")
        reasons.append(reason)
    return reasons


def _unknown(name: str, known: set[str]) -> str:
    near = suggestion(name, sorted(known))
    return f"{name}: there is no such setting; {f'did you mean {near}?' if near else 'see control-plane serve --help'}"
