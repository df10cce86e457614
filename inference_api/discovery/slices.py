"""From the EndpointSlices of a Service to the addresses of its pods for a backend's URL. Sans-IO.

https://kubernetes.io/docs/reference/kubernetes-api/service-resources/endpoint-slice-v1/
"""

import re
from collections.abc import Iterable
from typing import Annotated, Any, Literal, NamedTuple
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field

from inference_api.routing.entries import MAX_BACKENDS
from inference_api.routing.urls import is_usable_address

SERVICE_LABEL = "kubernetes.io/service-name"
# RFC 1123, as in Kubernetes: names go into URLs and selectors unescaped.
_LABEL = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
_DEFAULT_PORTS = {"http": 80, "https": 443}


def is_label(text: str) -> bool:
    """Whether it is a valid name of a Service or namespace."""
    return _LABEL.fullmatch(text) is not None


class Service(NamedTuple):
    """A Service by name and namespace."""

    namespace: str
    name: str

    def __str__(self) -> str:
        return f"{self.name}.{self.namespace}"


def service_of(host: str, namespace: str) -> Service | None:
    """The Service that a host name means in a pod of `namespace`; None: not a Service.

    `service`, `service.namespace`, `service.namespace.svc`, or that with the cluster's domain appended. A name with a
    dot at its end is never abbreviated, as in DNS.
    """
    absolute = host.endswith(".")
    labels = host.removesuffix(".").split(".")
    if host == "localhost" or not all(map(is_label, labels)):
        return None
    if len(labels) > 2:
        return Service(labels[1], labels[0]) if labels[2] == "svc" else None
    return None if absolute else Service((*labels, namespace)[1], labels[0])


class Endpoint(NamedTuple):
    """An address that takes requests; `pod`: its owner, or None."""

    address: str
    pod: str


class Slice(NamedTuple):
    """One EndpointSlice: its endpoints that take requests, and their common ports, by name.

    No ports: any. `others` counts endpoints that are not ready, or terminating.
    """

    service: str
    family: str
    ports: tuple[tuple[str, int], ...]
    endpoints: tuple[Endpoint, ...]
    others: int


class _Part(BaseModel):
    model_config = ConfigDict(hide_input_in_errors=True)


class _Conditions(_Part):
    ready: bool | None = None
    serving: bool | None = None
    terminating: bool | None = None


class _Reference(_Part):
    uid: str = ""
    name: str = ""


class _Endpoint(_Part):
    addresses: list[str] = Field(min_length=1)
    conditions: _Conditions | None = None
    targetRef: _Reference | None = None

    @property
    def takes_requests(self) -> bool:
        """Whether an endpoint is ready; absent means yes. `serving` is `ready` regardless of `terminating`."""
        said = self.conditions or _Conditions()
        serving = said.ready if said.serving is None else said.serving
        return serving is not False and not said.terminating


class _Port(_Part):
    name: str | None = None
    port: Annotated[int, Field(ge=1, le=65535)] | None = None
    protocol: str | None = None


class _Metadata(_Part):
    name: str = Field(min_length=1)
    labels: dict[str, str] = {}


class _Document(_Part):
    metadata: _Metadata
    addressType: Literal["IPv4", "IPv6", "FQDN"]
    endpoints: list[_Endpoint] | None = None
    ports: list[_Port] | None = None


def read_slice(document: Any) -> tuple[str, Slice]:
    """An EndpointSlice as the API server sends it, by its name. Raises ValueError."""
    read = _Document.model_validate(document)
    listed = read.endpoints or []
    usable = [endpoint for endpoint in listed if endpoint.takes_requests]
    # Several addresses of an endpoint lead to the same listener.
    endpoints = tuple(Endpoint(one.addresses[0], _pod(one.targetRef)) for one in usable)
    service = read.metadata.labels.get(SERVICE_LABEL, "")
    found = Slice(service, read.addressType, _ports(read.ports or []), endpoints, len(listed) - len(usable))
    return read.metadata.name, found


def _pod(reference: _Reference | None) -> str:
    return "" if reference is None else reference.uid or reference.name


def _ports(listed: list[_Port]) -> tuple[tuple[str, int], ...]:
    known = [(port.name or "", port.port) for port in listed if port.protocol in (None, "TCP")]
    # A port without a number stands for all.
    return tuple((name, number) for name, number in known if number is not None) if all(n for _, n in known) else ()


def port_of(url: str, ports: tuple[tuple[str, int], ...]) -> int | None:
    """The pods' port for a URL whose host is their Service; None: ambiguous.

    The URL's port if the pods have it, as with a headless Service in DNS. Otherwise the URL has the Service's port,
    which slices do not contain: then the only port, or the one named like the scheme.
    """
    parts = urlsplit(url)
    own = parts.port or _DEFAULT_PORTS[parts.scheme]
    if not ports or own in (number for _, number in ports):
        return own
    if len(ports) == 1:
        return ports[0][1]
    return next((number for name, number in ports if name == parts.scheme), None)


class Located(NamedTuple):
    """The backends of a URL, as `catalogue.Address` writes them, and the endpoints that were left out.

    `refused`: forbidden addresses. `portless`: the port of some endpoints is ambiguous.
    """

    urls: tuple[str, ...]
    refused: tuple[str, ...]
    portless: bool


def locate(url: str, slices: Iterable[Slice]) -> Located:
    """The addresses of a Service's pods for `url`, from all slices of the Service.

    A pod in two slices, because it moves between them or has addresses of both families, is one backend.
    """
    urls: set[str] = set()
    refused: set[str] = set()
    portless = False
    pods: set[str] = set()
    # IPv4 first: in a cluster with both families, not every pod may have IPv6.
    for one in sorted(slices):
        port = port_of(url, one.ports)
        if port is None:
            portless = portless or bool(one.endpoints)
            continue
        base = _with_port(url, port)
        for endpoint in one.endpoints:
            if not is_usable_address(endpoint.address):
                refused.add(endpoint.address)
            elif not endpoint.pod or endpoint.pod not in pods:
                pods.add(endpoint.pod)
                urls.add(f"{base}#{endpoint.address}")
    return Located(tuple(sorted(urls)[:MAX_BACKENDS]), tuple(sorted(refused)), portless)


def _with_port(url: str, port: int) -> str:
    parts = urlsplit(url)
    if port == (parts.port or _DEFAULT_PORTS[parts.scheme]):
        return url
    return parts._replace(netloc=f"{parts.hostname}:{port}").geturl()
