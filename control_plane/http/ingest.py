"""POST /usage: batches of records from routers."""

import zlib
from typing import Any

import orjson
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from control_plane.errors import Invalid, Problem, Refused
from control_plane.http.identity import plane_of, service_act
from control_plane.http.requests import TooLarge
from control_plane.services import ingest

MAX_RECORDS = 1000
# Once it is decompressed
MAX_BYTES = 1024 * 1024


async def take(request: Request) -> Response:
    service_act(request, "ingest")
    records = _records(await _body(request))
    stored = await ingest.store(plane_of(request), records)
    refused = [{"index": one.place, "id": one.id, "code": one.code, "message": one.message} for one in stored.refused]
    answer = {"accepted": stored.accepted, "duplicates": stored.duplicates, "refused": refused}
    return Response(orjson.dumps(answer), media_type="application/json")


async def _body(request: Request) -> bytes:
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type not in ("", "application/json"):
        message = f"The content type {media_type[:128]!r} is not supported; send records as application/json."
        raise Refused(415, "unsupported_media_type", message)
    coding = ",".join(request.headers.getlist("content-encoding")).strip().lower()
    if coding not in ("", "identity", "gzip"):
        message = f"The content encoding {coding[:128]!r} is not supported; send gzip, or none."
        raise Refused(415, "unsupported_media_type", message, headers={"Accept-Encoding": "gzip"})
    body = await request.body()
    return decompress(body) if coding == "gzip" else body


def decompress(data: bytes, most: int = MAX_BYTES) -> bytes:
    """The content of gzip data. Raises Refused if it has more than `most` bytes, which are not made then."""
    found = bytearray()
    try:
        while data:
            member = zlib.decompressobj(wbits=31)
            found += member.decompress(data, most + 1 - len(found))
            if len(found) > most:
                raise TooLarge(most)
            if not member.eof:
                raise Refused(400, "invalid_json", "The body is not gzip data: it ends too early.")
            data = member.unused_data
    except zlib.error as exc:
        raise Refused(400, "invalid_json", f"The body is not gzip data: {exc}.") from None
    return bytes(found)


def _records(body: bytes) -> list[Any]:
    try:
        given = orjson.loads(body)
    except orjson.JSONDecodeError as exc:
        raise Refused(400, "invalid_json", f"The body is not JSON: {exc}.") from None
    records = given.get("records") if isinstance(given, dict) else None
    if not isinstance(records, list):
        raise Invalid(Problem("records", "must be a list of usage records"))
    if not 1 <= len(records) <= MAX_RECORDS:
        raise Invalid(Problem("records", f"must have 1 to {MAX_RECORDS} records, not {len(records)}"))
    return records


ROUTES = (Route("/usage", take, methods=["POST"]),)
