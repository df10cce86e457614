"""`check --connect`: requests /v1/models of each backend, and looks for the model's name."""

import asyncio
import ssl
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import httpx

from inference_api.commands.configuration import table
from inference_api.discovery.naming import IGNORES_NAMES, misnamed, names_in
from inference_api.models import Outcome
from inference_api.routing.addresses import place_of
from inference_api.routing.catalogue import Catalogue
from inference_api.routing.causes import cause_of
from inference_api.routing.entries import BackendEntry, CatalogueEntry, Credentials
from inference_api.settings import Settings
from inference_api.upstream.credentials import read_token

_AT_ONCE = 16
_TIMEOUT = 10.0
_SHOWN = 3


class Result(NamedTuple):
    """`result`: ok, name (the backend serves other models), or failed."""

    model: str
    backend: str
    result: str
    detail: str = ""


def connect(settings: Settings, catalogue: Catalogue, environ: Mapping[str, str]) -> int:
    """Print a line per backend. Returns 1 if one cannot serve its model."""
    results = asyncio.run(_ask_all(settings, catalogue, environ))
    print(table([("MODEL", "BACKEND", "RESULT", "DETAIL"), *results]))
    return 0 if all(result.result == "ok" for result in results) else 1


async def _ask_all(settings: Settings, catalogue: Catalogue, environ: Mapping[str, str]) -> Sequence[Result]:
    slots = asyncio.Semaphore(_AT_ONCE)
    # Certificates are trusted as the router trusts them.
    tls = ssl.create_default_context()
    async with httpx.AsyncClient(verify=tls, trust_env=False, timeout=_TIMEOUT) as client:

        async def ask(entry: CatalogueEntry, backend: BackendEntry) -> Result:
            async with slots:
                return await _ask(client, settings, entry, backend, environ)

        pairs = [(entry, backend) for entry in catalogue.values() for backend in entry.backends]
        return await asyncio.gather(*(ask(entry, backend) for entry, backend in pairs))


async def _ask(
    client: httpx.AsyncClient,
    settings: Settings,
    entry: CatalogueEntry,
    backend: BackendEntry,
    environ: Mapping[str, str],
) -> Result:
    timeout = httpx.Timeout(_TIMEOUT, connect=entry.timeouts.connect or settings.connect_timeout)
    place = place_of(backend.url)
    try:
        async with asyncio.timeout(2 * _TIMEOUT):
            headers = _headers(entry, environ)
            url = f"{backend.url}{entry.base_path or '/v1'}/models"
            response = await client.get(url, headers=headers, timeout=timeout)
    except (httpx.ConnectError, httpx.ConnectTimeout) as exc:
        return _failed(entry, place, Outcome.CONNECT_FAILED, cause_of(exc))
    except (httpx.TimeoutException, TimeoutError):
        return _failed(entry, place, Outcome.FIRST_BYTE_TIMEOUT, f"no answer within {_TIMEOUT:.0f} s")
    except httpx.ProtocolError as exc:
        if "disconnected" in str(exc):
            return _failed(entry, place, Outcome.RESET, "the backend closed the connection without an answer")
        return _failed(entry, place, Outcome.PROTOCOL_ERROR, str(exc))
    except (httpx.HTTPError, httpx.InvalidURL) as exc:
        return _failed(entry, place, Outcome.RESET, str(exc) or type(exc).__name__)
    if response.status_code != 200:
        return _failed(entry, place, Outcome.of_status(max(response.status_code, 400)), _status(entry, response))
    return _compare(entry, place, response)


def _compare(entry: CatalogueEntry, place: str, response: httpx.Response) -> Result:
    try:
        names = names_in(response.json())
    except ValueError:
        names = None
    if names is None:
        return _failed(entry, place, Outcome.PROTOCOL_ERROR, "the answer to /v1/models is not a list of models")
    wrong = misnamed(entry, names)
    if wrong is not None and entry.engine not in IGNORES_NAMES:
        return Result(entry.name, place, "name", wrong)
    lacking = [] if entry.discover else [name for name in entry.adapters or () if name not in names]
    if lacking:
        shown = ", ".join(f'"{name}"' for name in lacking[:_SHOWN]) + (", ..." if len(lacking) > _SHOWN else "")
        return Result(entry.name, place, "name", f"lacks the adapters {shown}; load them, or set discover: true")
    return Result(entry.name, place, "ok")


def _status(entry: CatalogueEntry, response: httpx.Response) -> str:
    hint = ""
    if response.status_code in (401, 403):
        hint = "; set its credentials" if entry.credentials is None else "; it refuses the entry's credentials"
    return f"{response.status_code} {response.reason_phrase} for /v1/models{hint}"


def _failed(entry: CatalogueEntry, place: str, outcome: Outcome, cause: str) -> Result:
    return Result(entry.name, place, "failed", f"{outcome.value}: {cause}")


def _headers(entry: CatalogueEntry, environ: Mapping[str, str]) -> dict[str, str]:
    credentials, token = entry.credentials, None
    if not isinstance(credentials, Credentials):
        return entry.headers
    if credentials.env is not None:
        token = environ.get(credentials.env)
    elif credentials.file is not None:
        try:
            token = read_token(credentials.file)
        except (OSError, ValueError):
            token = None
    return entry.headers | ({credentials.header: credentials.prefix + token} if token else {})
