"""The list of names in /v1/models of a backend, which may be slow, broken or wrong; all but `fetch` is pure."""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import httpx

from inference_api.routing.backend import Backend

# Limit of a list, which is a few KiB; and names of it that are looked at.
_MAX_BYTES = 1 << 20
_MAX_NAMES = 4096
# As in the entries of a catalogue
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/@-]{0,127}\Z")


class Listing(NamedTuple):
    """The names that one backend lists. Equal lists are equal.

    `models`: each name without a parent, and its `root`; `adapters`: each name with one, and the parent. `names`: all,
    also those that no model can have. `refused`: how many of them that are.
    """

    names: tuple[str, ...]
    models: tuple[tuple[str, str | None], ...]
    adapters: tuple[tuple[str, str], ...]
    refused: int = 0

    def adapters_of(self, served: str, others: frozenset[str]) -> frozenset[str]:
        """The adapters of the model with this name here. `others`: models that have adapters of their own.

        Engines with several names for one model give the first one of them as the parent of all its adapters.
        """
        alike = self._alike(served)
        # A parent is no adapter itself: rings of parents have none.
        parents = alike - others | {served} if alike else alike
        return frozenset(name for name, parent in self.adapters if parent in parents)

    def names_of(self, served: str, others: frozenset[str]) -> frozenset[str]:
        """Further names of the model with this name here."""
        return self._alike(served) - others - {served}

    def _alike(self, served: str) -> frozenset[str]:
        roots = dict(self.models)
        if served not in roots:
            return frozenset()
        own = roots[served]
        return frozenset(name for name, root in self.models if own is None or root is None or root == own)


def listing_of(document: Any) -> Listing | None:
    """The names in an answer to GET /v1/models; None if it is not a list."""
    cards = document.get("data") if isinstance(document, dict) else None
    if not isinstance(cards, list):
        return None
    names: dict[str, None] = {}
    models: dict[str, str | None] = {}
    adapters: dict[str, str] = {}
    refused = 0
    for card in cards[:_MAX_NAMES]:
        name = card.get("id") if isinstance(card, dict) else None
        if not isinstance(name, str) or name in names:
            continue
        names[name] = None
        parent, root = card.get("parent"), card.get("root")
        if parent is None:
            # Its own name may be one that only `served_model_name` can have.
            models[name] = root if isinstance(root, str) else None
        elif isinstance(parent, str) and parent != name and is_name(name):
            adapters[name] = parent
        else:
            refused += 1
    return Listing(tuple(names), tuple(models.items()), tuple(adapters.items()), refused)


def is_name(name: str) -> bool:
    """Whether a model of the catalogue could have it."""
    return _NAME.match(name) is not None


async def fetch(
    transport: httpx.AsyncBaseTransport, backend: Backend, headers: Mapping[str, str], seconds: float
) -> tuple[int, bytes]:
    """Status and body of GET /v1/models. `seconds`: to connect; the caller limits the whole.

    Raises httpx.HTTPError, httpx.InvalidURL, or ValueError for an answer that is too long.
    """
    url, target = backend.address("/v1/models")
    extensions = {"timeout": {"connect": seconds}, "origin": backend.url, "target": target}
    request = httpx.Request("GET", url, headers=headers, extensions=extensions)
    response = await transport.handle_async_request(request)
    body = bytearray()
    stream = response.stream
    assert isinstance(stream, httpx.AsyncByteStream)
    try:
        async for chunk in stream:
            body += chunk
            if len(body) > _MAX_BYTES:
                raise ValueError("a list of models that is too long")
    finally:
        await stream.aclose()
    return response.status_code, bytes(body)
