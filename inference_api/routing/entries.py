"""The entries of a catalogue: one model each, in the same shape in the file, in the registry and in its API."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Generic, Literal, NamedTuple, Self, TypeVar, cast
from urllib.parse import urlsplit

from pydantic import (
    BaseModel,
    ConfigDict,
    FailFast,
    Field,
    StringConstraints,
    ValidationInfo,
    create_model,
    field_validator,
    model_validator,
)

from inference_api.routing.balance import BALANCERS
from inference_api.routing.references import Refers, excess_key
from inference_api.routing.urls import check_backend_url, is_address

ModelName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._:/@-]{0,127}$")]
if TYPE_CHECKING:
    BalancingName = str
else:
    BalancingName = Literal[tuple(BALANCERS)]
Engine = Literal["vllm", "tgi", "sglang", "llamacpp", "openai"]
DiscoveryName = Literal["static", "dns"]
Int64 = Annotated[int, Field(strict=True, ge=-(2**63), lt=2**63)]
Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
HeaderName = Annotated[str, StringConstraints(pattern=r"^[a-z0-9-]{1,64}$")]
_HeaderValue = Annotated[str, StringConstraints(pattern=r"^[\x21-\x7e]([\x20-\x7e]*[\x21-\x7e])?$", max_length=1024)]
_RouteName = Annotated[str, StringConstraints(pattern=r"^[a-z_]+$", max_length=64)]

# Headers that frame or route a message: a token in one of them could smuggle requests.
_NO_CREDENTIALS = frozenset(
    {
        "accept-encoding",
        "connection",
        "content-encoding",
        "content-length",
        "content-type",
        "cookie",
        "expect",
        "host",
        "http2-settings",
        "keep-alive",
        "proxy-connection",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
        "x-request-id",
    }
)
# Headers that no entry may fix: those, and the usual places of tokens, which are no text of a catalogue.
_NOT_FIXED = _NO_CREDENTIALS | {"authorization", "x-api-key", "api-key"}
# Keys of an entry by their names in earlier releases
RENAMED = {"policy": "balancing"}
# A model with more is refused; of a name with more addresses, only these are used.
MAX_BACKENDS = 4096
# Of a model that lists more, only these are served.
MAX_ADAPTERS = 1000


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, coerce_numbers_to_str=True, hide_input_in_errors=True)


class BackendEntry(_Entry):
    """One backend: its base URL and its weight, relative to the model's other backends. A plain URL is valid, too.

    With `discovery: dns` each address of the host name is one backend, with this weight.
    """

    url: str = Field(max_length=2048)
    weight: float = Field(default=1.0, gt=0, le=1000)
    discovery: DiscoveryName = "static"

    @model_validator(mode="before")
    @classmethod
    def _alone(cls, value: Any) -> Any:
        return {"url": value} if isinstance(value, str) else value

    @field_validator("url")
    @classmethod
    def _url(cls, url: str) -> str:
        return check_backend_url(url)

    @model_validator(mode="after")
    def _has_a_name(self) -> Self:
        if self.discovery == "dns" and is_address(self.host):
            raise ValueError("`discovery: dns` needs a host name in the url, and this is an address")
        return self

    @property
    def host(self) -> str:
        return urlsplit(self.url).hostname or ""


class Hardware(_Entry):
    """The hardware of a model; only shown in /v1/models."""

    gpu: str | None = None
    gpu_count: int | None = Field(default=None, ge=0)
    gpu_memory_gib: float | None = Field(default=None, ge=0)


class Timeouts(_Entry):
    """Seconds, per model; None: the router's setting."""

    connect: Seconds | None = None
    first_byte: Seconds | None = None
    idle: Seconds | None = None
    total: Seconds | None = None


class Credentials(_Entry):
    """The token for the backends: the environment variable or the file that holds it. Files are reloaded.

    Names must begin with BACKEND_, so that a catalogue cannot send other secrets of the router to a backend.
    It is sent as `header: scheme token`; the default scheme is Bearer for `authorization`, else none.
    """

    env: Annotated[str, StringConstraints(pattern=r"^BACKEND_[A-Z0-9_]{1,100}$")] | None = None
    file: Annotated[str, StringConstraints(pattern=r"^/(.*/)?BACKEND_[A-Z0-9_]{1,100}$", max_length=1024)] | None = (
        Field(default=None, validate_default=True)
    )
    header: HeaderName = "authorization"
    scheme: Annotated[str, StringConstraints(pattern=r"^[A-Za-z]{0,32}$")] | None = None

    @field_validator("file")
    @classmethod
    def _file(cls, path: str | None, info: ValidationInfo) -> str | None:
        # A refused value is missing here.
        if "env" in info.data and (info.data["env"] is None) == (path is None):
            raise ValueError("give either `env` or `file`")
        if path is not None and not {".", ".."}.isdisjoint(path.split("/")):
            raise ValueError("the path must not have '.' or '..' in it")
        return path

    @field_validator("header")
    @classmethod
    def _header(cls, name: str) -> str:
        if name in _NO_CREDENTIALS:
            raise ValueError(f"the header {name!r} frames or routes a request and cannot carry a token")
        return name

    @property
    def source(self) -> str:
        """The key of its token: the name of the variable, or the path of the file."""
        return self.env or self.file or ""

    @property
    def prefix(self) -> str:
        """The text before the token."""
        scheme = self.scheme if self.scheme is not None else "Bearer" * (self.header == "authorization")
        return f"{scheme} " if scheme else ""


class CatalogueEntry(_Entry):
    """One model of the catalogue; the same shape in the file, in the registry and in its API."""

    name: ModelName
    version: str = Field(default="1", max_length=128)
    owner: str = Field(default="unknown", max_length=128)
    engine: Engine = "vllm"
    # Fail fast: a hostile list of a million bad items must not take a minute to refuse.
    backends: Annotated[tuple[BackendEntry, ...], FailFast()] = Field(default=(), max_length=MAX_BACKENDS)
    aliases: Annotated[tuple[ModelName, ...], FailFast()] = Field(default=(), max_length=256)
    hardware: Hardware | None = None
    served_model_name: Annotated[str, StringConstraints(min_length=1, max_length=256)] | None = None
    balancing: BalancingName = "two_choices"
    timeouts: Timeouts = Timeouts()
    max_in_flight: int | None = Field(default=None, ge=1)
    credentials: Credentials | Literal["passthrough"] | None = None
    # Whether clients may send fields that are reserved for operators
    engine_fields: Literal["refuse", "allow"] = "refuse"
    # Source of a request's priority: an int64 for vLLM, lower is earlier
    priority: Literal["client", "ignore", "caller"] | Int64 = "client"
    # Whether its backends are asked for names and adapters; the adapters that are served, None: all that are listed
    discover: bool = False
    adapters: tuple[ModelName, ...] | None = Field(default=None, max_length=MAX_ADAPTERS)
    created: int = Field(default=0, ge=0, description="Unix seconds; /v1/models shows it, 0 is unknown")
    # Tokens of input and output together, until an engine reports its own length
    max_model_len: int | None = Field(default=None, ge=1, lt=2**31)
    # Stands for the leading /v1 of the client's path
    base_path: Annotated[str, StringConstraints(pattern=r"^(/[A-Za-z0-9._~-]+)+$", max_length=256)] | None = None
    # Replace the client's headers of these names
    headers: dict[HeaderName, _HeaderValue] = Field(default={}, max_length=32)
    # Labels of the inference routes that it is served on; None: all
    routes: tuple[_RouteName, ...] | None = Field(default=None, min_length=1, max_length=64)

    # The keys of features that name other models, by their names
    referring: ClassVar[Mapping[str, "EntryKey[Any]"]] = {}

    @model_validator(mode="before")
    @classmethod
    def _renamed(cls, value: Any) -> Any:
        """Accept a key by its name in earlier releases, for one release more; `check` warns of it."""
        if isinstance(value, dict) and (old := [key for key in RENAMED if key in value and RENAMED[key] not in value]):
            return {RENAMED[key] if key in old else key: given for key, given in value.items()}
        return value

    @field_validator("backends")
    @classmethod
    def _distinct(cls, backends: tuple[BackendEntry, ...]) -> tuple[BackendEntry, ...]:
        urls = [b.url for b in backends]
        if len(set(urls)) != len(urls):
            raise ValueError("the same backend url is listed twice")
        return backends

    @field_validator("adapters", mode="before")
    @classmethod
    def _few_adapters(cls, names: Any) -> Any:
        # Before its items are looked at, which could take a minute.
        if isinstance(names, list | tuple) and len(names) > MAX_ADAPTERS:
            raise ValueError(f"at most {MAX_ADAPTERS} adapters")
        return names

    @field_validator("adapters")
    @classmethod
    def _adapters_once(cls, names: tuple[str, ...] | None) -> tuple[str, ...] | None:
        if names is not None and len(set(names)) != len(names):
            raise ValueError("the same adapter is listed twice")
        return names

    @field_validator("base_path")
    @classmethod
    def _base_path(cls, path: str | None) -> str | None:
        if path is not None and not {".", ".."}.isdisjoint(path.split("/")):
            raise ValueError("must not have '.' or '..' in it")
        return path

    @field_validator("headers")
    @classmethod
    def _headers(cls, headers: dict[str, str]) -> dict[str, str]:
        if wrong := sorted(_NOT_FIXED & headers.keys()):
            fix = "frames or routes a request" if wrong[0] in _NO_CREDENTIALS else "holds a token: use `credentials`"
            raise ValueError(f"the header {wrong[0]!r} {fix}")
        return headers

    @field_validator("routes")
    @classmethod
    def _routes(cls, routes: tuple[str, ...] | None) -> tuple[str, ...] | None:
        if routes is not None and len(set(routes)) != len(routes):
            raise ValueError("the same route is listed twice")
        return routes

    @model_validator(mode="after")
    def _no_header_twice(self) -> Self:
        if isinstance(self.credentials, Credentials) and self.credentials.header in self.headers:
            raise ValueError(f"headers: {self.credentials.header!r} is the header of its credentials")
        return self

    @property
    def is_provider(self) -> bool:
        """Whether its backends are someone else's, asked for a token: only traffic shows their health."""
        return self.engine == "openai" and isinstance(self.credentials, Credentials)


T = TypeVar("T")


class EntryKey(NamedTuple, Generic[T]):
    """A key that a feature adds to the entries of a catalogue: its name, its type for pydantic, and its default.

    `refers`: how its value names other models, if it does.
    """

    name: str
    type: Any
    default: T
    refers: Refers | None = None

    def of(self, entry: CatalogueEntry) -> T:
        """The entry's value of this key."""
        return cast(T, getattr(entry, self.name, self.default))


def entry_type(keys: Iterable[EntryKey[Any]]) -> type[CatalogueEntry]:
    """The class of entries with these additional keys."""
    keys = tuple(keys)
    fields: dict[str, Any] = {key.name: (key.type, key.default) for key in keys}
    made = create_model("CatalogueEntry", __base__=CatalogueEntry, **fields) if fields else CatalogueEntry
    referring = {key.name: key for key in keys if key.refers}
    if not referring:
        return made
    made.referring = referring
    return refusing(made, [excess_key])


def refusing(
    entry: type[CatalogueEntry], reasons: Sequence[Callable[[CatalogueEntry], str | None]]
) -> type[CatalogueEntry]:
    """The class of entries that refuses those for which one of `reasons` gives a reason."""

    def judged(self: CatalogueEntry) -> CatalogueEntry:
        for reason in reasons:
            if (why := reason(self)) is not None:
                raise ValueError(why)
        return self

    judge: Any = model_validator(mode="after")(judged)
    # A name of its own: the same one would replace that of the base.
    return create_model("CatalogueEntry", __base__=entry, __validators__={f"judged_{len(entry.__mro__)}": judge})
