"""Tokens of programs: service tokens for routers, in memory, and management tokens, which act for their maker."""

import hmac
from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

from sqlalchemy import Row, select
from sqlalchemy.ext.asyncio import AsyncConnection

from control_plane.data.tables import tokens
from control_plane.documents import Built, Document
from control_plane.plane import Plane
from control_plane.pure.roles import Principal
from inference_api.policy.keys import MANAGEMENT, SERVICE, id_of, is_well_formed, sha256

DOCUMENT = "tokens"
SCOPES = frozenset({"snapshots", "ingest", "report", "activate"})


class ServiceToken(NamedTuple):
    """`digests`: hex SHA-256 -> Unix milliseconds until which it is valid, None: for ever."""

    id: str
    name: str
    digests: Mapping[str, int | None]
    scopes: frozenset[str]
    expires_at: int | None


async def build(connection: AsyncConnection, known: Document | None, now: int) -> Built:
    """The service tokens that hold, kept in memory so that routers are served without the database."""
    query = select(tokens).where(tokens.c.kind == "service", tokens.c.ended_at.is_(None), tokens.c.disabled.is_(False))
    rows = (await connection.execute(query.order_by(tokens.c.id))).all()
    found = {row.id: _service_token(row) for row in rows}
    # The document is served to nobody; its bytes say whether it has changed.
    return Built(repr(sorted(found.items())).encode(), MappingProxyType(found))


def service(plane: Plane, given: str) -> Principal | None:
    """Whose service token it is; None: of nobody."""
    expected = plane.settings.service_token
    raw = given.encode("latin-1", "replace")
    if expected is not None and hmac.compare_digest(raw, expected.get_secret_value().encode()):
        return Principal("router", scopes=SCOPES)
    if not is_well_formed(raw, SERVICE.encode()):
        return None
    found: ServiceToken | None = plane.documents.get(DOCUMENT).parts.get(id_of(raw))
    if found is None:
        return None
    digest, now = f"sha256:{sha256(raw).hex()}", plane.clock()
    if digest not in found.digests or not _holds(found.digests[digest], now) or not _holds(found.expires_at, now):
        return None
    return Principal("router", user=found.name, token=found.id, scopes=found.scopes)


def is_management(given: str) -> bool:
    return is_well_formed(given.encode("latin-1", "replace"), MANAGEMENT.encode())


def _holds(until: int | None, now: int) -> bool:
    return until is None or now < until


def _service_token(row: Row[tuple[object, ...]]) -> ServiceToken:
    digests = {row.digest: None}
    if row.previous_digest is not None:
        digests[row.previous_digest] = row.previous_until
    scopes = frozenset(row.scopes or ())
    return ServiceToken(row.id, row.name, MappingProxyType(digests), scopes, row.expires_at)
