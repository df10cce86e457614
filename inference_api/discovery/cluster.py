"""The address of the Kubernetes API server, credentials for it, and limits on its answers."""

import ssl
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from inference_api.discovery.slices import is_label

_MAX_TOKEN = 64 * 1024
ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")


class ClusterError(ValueError):
    """This process cannot use an API server: it runs outside of a pod, or without a service account."""


class ApiLimits(NamedTuple):
    """Seconds to connect, for the head of a watch, and for a whole list; bytes of an event and of a page; slices.

    etcd accepts objects of up to 1.5 MB, which grow in JSON; a page has 50 slices of at most 1,000 endpoints. `names`:
    with more names proxies may refuse the selector; then all slices are listed, and the caller selects.
    """

    connect: float = 5.0
    head: float = 10.0
    list: float = 30.0
    line: int = 8 * 1024 * 1024
    page: int = 32 * 1024 * 1024
    slices: int = 20_000
    names: int = 200


class Cluster(NamedTuple):
    """Address of the API server, and files of token and CA, which the kubelet keeps current."""

    url: str
    namespace: str
    token: Path
    ca: Path
    limits: ApiLimits = ApiLimits()


def in_cluster(environ: Mapping[str, str], account: Path = ACCOUNT) -> Cluster:
    """The cluster of this pod, from the variables and files that the kubelet provides. Raises ClusterError."""
    host, port = environ.get("KUBERNETES_SERVICE_HOST"), environ.get("KUBERNETES_SERVICE_PORT", "443")
    if not host:
        raise ClusterError("KUBERNETES_SERVICE_HOST is not set, so this is not a pod of a cluster")
    try:
        namespace = (account / "namespace").read_text("utf-8").strip()
        (account / "token").read_bytes()
    except OSError as exc:
        raise ClusterError(
            f"the pod has no service account token ({exc.strerror}: {exc.filename}); set automountServiceAccountToken"
        ) from None
    if not is_label(namespace):
        raise ClusterError(f"{account / 'namespace'} does not hold the name of a namespace")
    url = f"https://[{host}]:{port}" if ":" in host else f"https://{host}:{port}"
    return Cluster(url, namespace, account / "token", account / "ca.crt")


def read_bearer(token: Path) -> str:
    """The header `authorization`, read for every request: the kubelet replaces the token. Raises ClusterError."""
    try:
        with token.open("rb") as file:
            text = file.read(_MAX_TOKEN).decode("ascii").strip()
    except (OSError, UnicodeDecodeError) as exc:
        raise ClusterError(f"the service account token cannot be read ({type(exc).__name__})") from None
    # Checked here: an error message of the HTTP library would contain it.
    if not text or not text.isprintable() or " " in text:
        raise ClusterError("the service account token is empty, or not a token")
    return f"Bearer {text}"


def read_tls(url: str, ca: Path | None) -> ssl.SSLContext | bool:
    """What verifies the API server: its CA, or for None those of this machine. Raises ClusterError."""
    try:
        return ssl.create_default_context(cafile=ca) if url.startswith("https") else False
    except (OSError, ssl.SSLError) as exc:
        raise ClusterError(f"the certificate of its CA cannot be read ({type(exc).__name__})") from exc
