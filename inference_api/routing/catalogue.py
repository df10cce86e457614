"""The Catalogue: the set of models, as read from a file or from the registry, checked entry by entry."""

import ipaddress
import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Self
from urllib.parse import urlsplit

import httpx
import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    FailFast,
    Field,
    StringConstraints,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from inference_api.routing import wording

ModelName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._:/@-]{0,127}$")]
BalancingName = Literal["round_robin", "least_in_flight", "two_choices", "prefix_affinity"]
Engine = Literal["vllm", "tgi", "sglang", "llamacpp", "openai"]
DiscoveryName = Literal["static", "dns"]
Int64 = Annotated[int, Field(strict=True, ge=-(2**63), lt=2**63)]
Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]

# Cloud metadata services that are not link-local by number, and the names they answer to.
_METADATA_HOSTS = frozenset(
    {
        "metadata",
        "metadata.google.internal",
        "metadata.goog",
        "instance-data",
        "instance-data.ec2.internal",
        "fd00:ec2::254",
        "fd20:ce::254",
        "100.100.100.200",
        "168.63.129.16",
        "192.0.0.192",
    }
)
_HOST_NAME = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9._-]*[A-Za-z0-9_.])?")
# Headers that tell where a message ends, or where it goes: whoever may name these could smuggle requests.
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
# IPv6 ranges whose low 32 bits are an IPv4 address: compatible, and NAT64.
_EMBEDDING = (ipaddress.IPv6Network("::/96"), ipaddress.IPv6Network("64:ff9b::/96"))
# A model that has more is refused; a name that has more addresses is used in part.
MAX_BACKENDS = 4096
# Beyond these a document is not a catalogue but an attack or an accident; up to them it is below 100 MB of memory.
_MAX_MODELS = 20_000
_MAX_BACKENDS_OF_ALL = 50_000
# So many refused entries are told one by one.
_TOLD_PROBLEMS = 100


class CatalogueError(ValueError):
    """The catalogue as a whole cannot be read: no such file, not YAML or JSON, or no `models` list."""


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, coerce_numbers_to_str=True, hide_input_in_errors=True)


def check_backend_url(url: str) -> str:
    """Return the base of `url`, which routes are added to, or raise ValueError with a sentence that says why not.

    A registry is not trusted to aim the router at anything: only http(s), no credentials in the URL, and no
    link-local, metadata, multicast or unspecified address, in any spelling the resolver would accept.
    """
    # First, so that no sentence below can show a password or a token.
    if "@" in url:
        raise ValueError("a backend url carries user information; put the token in `credentials: {env: NAME}` instead")
    if "?" in url or "#" in url:
        raise ValueError("a backend url must not have a query or a fragment")
    shown = url[:200]
    if not url.isascii() or not url.isprintable() or " " in url or "\\" in url:
        raise ValueError(f"backend url {shown!r} has spaces, control characters or backslashes")
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port
        same = httpx.URL(url).host.lower() == host
    except (ValueError, httpx.InvalidURL):
        raise ValueError(f"backend url {shown!r} is not a URL with a host and a port of at most 65535") from None
    if parts.scheme not in ("http", "https"):
        raise ValueError(f"backend url {shown!r} must start with http:// or https://")
    if not host or port == 0 or not same or not _is_host(host, parts.netloc):
        raise ValueError(f"backend url {shown!r} names no usable host, or port 0")
    if "%" in parts.path or not {".", ".."}.isdisjoint(parts.path.split("/")):
        raise ValueError(f"backend url {shown!r} must not have '.', '..' or '%' in its path")
    if host.rstrip(".") in _METADATA_HOSTS or _is_forbidden_address(host):
        raise ValueError(f"backend url {shown!r} points at a link-local, metadata or unusable address")
    return _base(url)


def _base(url: str) -> str:
    """Without the slashes, and the /v1 of the clients' base URLs, at its end: every route is added with its own /v1.

    All there are: what a registry has read once is read again by a router.
    """
    scheme, _, rest = url.partition("://")
    host, *path = rest.split("/")
    while path and path[-1] in ("", "v1"):
        path.pop()
    return f"{scheme}://{'/'.join((host, *path))}"


# A thousand addresses are asked about every few seconds, and are nearly all the same ones.
@lru_cache(maxsize=16384)
def is_usable_address(address: str) -> bool:
    """Whether an address that a name was resolved to may be connected to: by the same rule as one in a URL."""
    return is_address(address) and not _is_forbidden_address(address)


def is_address(host: str) -> bool:
    """Whether it is an IP address, and no name."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _is_host(host: str, netloc: str) -> bool:
    if ":" in host:
        return netloc.lower().startswith(f"[{host}]")
    return _HOST_NAME.fullmatch(host) is not None


def _is_forbidden_address(host: str) -> bool:
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        # "0x7f.1", "2130706433": numbers that a resolver would take for an IPv4 address.
        last = host.rstrip(".").rsplit(".", 1)[-1]
        return last.isdigit() or last.startswith("0x")
    if isinstance(address, ipaddress.IPv6Address):
        address = _embedded(address) or address
    return (
        address.is_link_local
        or address.is_multicast
        or address.is_unspecified
        or address == ipaddress.IPv4Address("255.255.255.255")
        or str(address) in _METADATA_HOSTS
    )


def _embedded(address: ipaddress.IPv6Address) -> ipaddress.IPv4Address | None:
    """The IPv4 address that an IPv6 one stands for, if it does."""
    if address == ipaddress.IPv6Address("::1"):
        return None
    if address.ipv4_mapped or address.sixtofour:
        return address.ipv4_mapped or address.sixtofour
    if any(address in network for network in _EMBEDDING):
        return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    return None


class BackendEntry(_Entry):
    """One backend: its base URL and its share of the traffic, relative to its siblings. A URL alone is one, too.

    With `discovery: dns` it is as many backends as its host name has addresses, each with this weight.
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


class Address(NamedTuple):
    """One backend that a BackendEntry stands for.

    `url` is the entry's; where its host name was looked up, with the address after a `#`. No other URL has a fragment.
    """

    url: str
    weight: float


def addresses_of(entries: Iterable[BackendEntry], addresses: Mapping[str, Sequence[str]]) -> list[Address]:
    """The backends of these entries; `addresses` has what is known of those that are to be found.

    By host name what it was looked up to, or by URL the URLs of its backends, where an entry's Service is watched.
    What two names lead to is one backend, so that none gets two shares, or has two series of one label.
    """
    entries = tuple(entries)
    found = [Address(entry.url, entry.weight) for entry in entries if entry.discovery == "static"]
    taken = {backend.url.partition("://")[2] for backend in found}
    for entry in entries:
        for url in _found(entry, addresses) if entry.discovery == "dns" else ():
            place = place_of(url)
            if place not in taken:
                taken.add(place)
                found.append(Address(url, entry.weight))
    return found[:MAX_BACKENDS]


def _found(entry: BackendEntry, addresses: Mapping[str, Sequence[str]]) -> Sequence[str]:
    watched = addresses.get(entry.url)
    return [f"{entry.url}#{address}" for address in addresses.get(entry.host, ())] if watched is None else watched


def place_of(url: str) -> str:
    """host:port/path of a Address, the host being the address if it was looked up."""
    rest, _, address = url.partition("://")[2].partition("#")
    if not address:
        return rest
    netloc, slash, path = rest.partition("/")
    # A name has no colon of its own.
    _, colon, port = netloc.partition(":")
    return f"[{address}]{colon}{port}{slash}{path}" if ":" in address else f"{address}{colon}{port}{slash}{path}"


class Hardware(_Entry):
    """What a model runs on; carried through to /v1/models, not acted on."""

    gpu: str | None = None
    gpu_count: int | None = Field(default=None, ge=0)
    gpu_memory_gib: float | None = Field(default=None, ge=0)


class Timeouts(_Entry):
    """Seconds, per model; None takes the router's setting."""

    connect: Seconds | None = None
    first_byte: Seconds | None = None
    idle: Seconds | None = None
    total: Seconds | None = None


class Credentials(_Entry):
    """The token for the backends, by the environment variable or the file that holds it; a file is read again.

    Only names that begin with BACKEND_: a catalogue must not be able to send the router's other secrets anywhere.
    It goes out as `header: scheme token`; the scheme is Bearer where the header is `authorization`, else none.
    """

    env: Annotated[str, StringConstraints(pattern=r"^BACKEND_[A-Z0-9_]{1,100}$")] | None = None
    file: Annotated[str, StringConstraints(pattern=r"^/(.*/)?BACKEND_[A-Z0-9_]{1,100}$", max_length=1024)] | None = (
        Field(default=None, validate_default=True)
    )
    header: Annotated[str, StringConstraints(pattern=r"^[a-z0-9-]{1,64}$")] = "authorization"
    scheme: Annotated[str, StringConstraints(pattern=r"^[A-Za-z]{0,32}$")] | None = None

    @field_validator("file")
    @classmethod
    def _file(cls, path: str | None, info: ValidationInfo) -> str | None:
        # One that is refused is not here.
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
        """What its token is known by."""
        return self.env or self.file or ""

    @property
    def prefix(self) -> str:
        """What stands before the token."""
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
    # Whether clients may send what only those should who run the engines
    engine_fields: Literal["refuse", "allow"] = "refuse"
    # Who says how urgent a request is: an int64 that vLLM takes, lower is earlier
    priority: Literal["client", "ignore", "caller"] | Annotated[int, Field(strict=True, ge=-(2**63), lt=2**63)] = (
        "client"
    )
    created: int = Field(default=0, ge=0, description="Unix seconds; /v1/models shows it, 0 is unknown")

    @field_validator("backends")
    @classmethod
    def _distinct(cls, backends: tuple[BackendEntry, ...]) -> tuple[BackendEntry, ...]:
        urls = [b.url for b in backends]
        if len(set(urls)) != len(urls):
            raise ValueError("the same backend url is listed twice")
        return backends


class Catalogue(dict[str, CatalogueEntry]):
    """name -> entry, in the order given; `problems` holds one sentence for each entry that was refused."""

    def __init__(self, entries: Iterable[CatalogueEntry] = (), problems: Iterable[str] = ()) -> None:
        super().__init__((e.name, e) for e in entries)
        self.problems = list(problems)


def parse_catalogue(document: Any) -> Catalogue:
    """Check a decoded catalogue, `{"models": [...]}`; a bad entry is refused alone.

    Raises CatalogueError when there is no list of models to look at, or one that is too long.
    """
    if not isinstance(document, dict) or not isinstance(document.get("models"), list):
        raise CatalogueError("a catalogue is a mapping with a list under `models`")
    if unknown := set(document) - {"models"}:
        raise CatalogueError(f"unknown key {sorted(map(str, unknown))[0]!r} beside `models`")
    _check_size(document["models"])
    entries: list[CatalogueEntry] = []
    problems: list[str] = []
    taken: set[str] = set()
    refused = 0
    for position, raw in enumerate(document["models"]):
        entry = _entry(raw, taken)
        if isinstance(entry, CatalogueEntry):
            taken |= {entry.name, *entry.aliases}
            entries.append(entry)
            continue
        refused += 1
        if refused <= _TOLD_PROBLEMS:
            reason = describe(entry) if isinstance(entry, ValidationError) else entry
            problems.append(f"{_title(raw, position)}: {reason}")
    if refused > _TOLD_PROBLEMS:
        problems.append(f"and {refused - _TOLD_PROBLEMS} more")
    return Catalogue(entries, problems)


def _check_size(models: list[Any]) -> None:
    """Before anything is made of it: a hostile registry must not fill the memory with entries that are sound."""
    if len(models) > _MAX_MODELS:
        raise CatalogueError(f"it lists {len(models)} models, and {_MAX_MODELS} is the limit")
    lists = (raw.get("backends") for raw in models if isinstance(raw, dict))
    # One that is too long is refused alone.
    count = sum(len(one) for one in lists if isinstance(one, list) and len(one) <= MAX_BACKENDS)
    if count > _MAX_BACKENDS_OF_ALL:
        raise CatalogueError(f"it lists {count} backends, and {_MAX_BACKENDS_OF_ALL} is the limit")


def _entry(raw: Any, taken: set[str]) -> CatalogueEntry | ValidationError | str:
    """The entry, or why it is refused."""
    try:
        entry = CatalogueEntry.model_validate(raw)
    except ValidationError as exc:
        return exc
    if clash := sorted({entry.name, *entry.aliases} & taken):
        return f"the name {clash[0]!r} is taken by an earlier entry"
    return entry


def load_catalogue(path: Path, named_by: str = "INFERENCE_API_CATALOGUE or --catalogue") -> Catalogue:
    """Read a YAML or JSON catalogue file. Raises CatalogueError with the path and the fix: what it was `named_by`."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as exc:
        reason = exc.strerror if isinstance(exc, OSError) and exc.strerror else str(exc)
        fix = f"{named_by} must name a file that can"
        raise CatalogueError(f"catalogue {str(path)!r} cannot be read: {reason}; {fix}") from None
    try:
        return parse_catalogue(_document(path, text))
    except CatalogueError as exc:
        raise CatalogueError(f"catalogue {str(path)!r}: {exc}") from None


def _document(path: Path, text: str) -> Any:
    try:
        if path.suffix == ".json":
            return json.loads(text, object_pairs_hook=_once)
        return yaml.load(text, Loader=_Loader)
    except CatalogueError:
        raise
    except (ValueError, RecursionError, yaml.YAMLError) as exc:
        raise CatalogueError(f"it is not {_format(path)}: {' '.join(str(exc).split())}") from None


def describe(exc: ValidationError) -> str:
    """What is wrong with an entry, as one sentence."""
    return wording.describe(exc, _KEYS)


# The known keys of an entry, and of its parts
_KEYS: Mapping[str, Collection[str]] = {
    "": CatalogueEntry.model_fields,
    "backends": BackendEntry.model_fields,
    "hardware": Hardware.model_fields,
    "timeouts": Timeouts.model_fields,
    "credentials": Credentials.model_fields,
}


# The C loader is about 8 x faster; 10,000 models are read in seconds instead of a minute.
_SafeLoader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class _Loader(_SafeLoader):  # type: ignore[misc]
    """Refuses a key that a mapping has twice, of which YAML's own loader drops the first in silence."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        lines: dict[str, int] = {}
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
                continue
            line = key.start_mark.line + 1
            if key.value in lines:
                twice = f"the key {key.value[:64]!r} is given twice"
                raise CatalogueError(f"{twice}, in lines {lines[key.value]} and {line}")
            lines[key.value] = line
        made: dict[Any, Any] = super().construct_mapping(node, deep)
        return made


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON, which has no lines any more."""
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise CatalogueError(f"the key {twice[:64]!r} is given twice")
    return made


def _format(path: Path) -> str:
    return "JSON" if path.suffix == ".json" else "YAML"


def _title(raw: Any, position: int) -> str:
    name = raw.get("name") if isinstance(raw, dict) else None
    return f"model {name[:128]!r}" if isinstance(name, str) else f"model number {position + 1}"
