"""From a request to a Call, and from models to the list that clients see."""

from collections.abc import Generator, Iterable
from io import BytesIO
from typing import Any

import orjson
from starlette.types import Receive, Scope

from inference_api.errors import ClientGone, InvalidRequest, TooLarge, UnsupportedMediaType, printable
from inference_api.http.admission import Admission
from inference_api.http.bodies import ENGINE_FIELDS, TRANSFERS, take_engine_fields
from inference_api.http.head import RequestHead
from inference_api.models import RESERVED, Asked, Call, Route
from inference_api.observe.account import Account
from inference_api.routing.affinity import affinity_key
from inference_api.routing.fleet import Model


async def read_body(receive: Receive, head: RequestHead, limit: int, admission: Admission) -> bytes:
    """Read the request body; its bytes are counted in `admission`, and the caller subtracts them.

    Raises TooLarge (before reading if Content-Length says so), Overloaded, and ClientGone if the body breaks off; then
    its bytes are subtracted already.
    """
    if head.content_length is not None and int(head.content_length) > limit:
        raise TooLarge(limit)
    admission.check()
    # Its buffer becomes the body; joining the parts would copy a large body at once.
    whole = BytesIO()
    size, more = 0, True
    try:
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ClientGone
            part: bytes = message.get("body", b"")
            size += len(part)
            admission.buffer(len(part))
            if size > limit:
                raise TooLarge(limit)
            more = message.get("more_body", False)
            if size == len(part) and not more:
                return part
            whole.write(part)
    except BaseException:
        admission.buffered -= size
        raise
    return whole.getvalue()


def read(route: Route, head: RequestHead, body: bytes) -> Asked | Generator[None, None, Asked]:
    """The fields of a request, or a generator that reads them slice by slice, if the body is large.

    Either raises RouterError that names the field or header, and the fix.
    """
    if head.content_encoding not in (None, b"identity"):
        raise UnsupportedMediaType("The request body is compressed; send it without Content-Encoding.")
    kind = b"multipart/form-data" if route.multipart else b"application/json"
    if head.media_type != kind:
        raise _not_this_type(kind.decode(), head.media_type)
    reader = route.reader
    return reader.at_once(body) or reader.slices(body, head.content_type)


def _not_this_type(kind: str, given: bytes) -> UnsupportedMediaType:
    instead = f", not {printable(given.decode('latin-1'))!r}" if given else ""
    # curl -d sets another default.
    hint = f"; with curl: -H 'content-type: {kind}'" if kind == "application/json" else ""
    return UnsupportedMediaType(f"The content type must be {kind}{instead}{hint}.")


def make_call(route: Route, account: Account, body: bytes, scope: Scope, asked: Asked, model: Model) -> Call:
    """The Call of a request to `model`. It keeps the few small fields. Raises InvalidRequest."""
    head, entry, (fields, prompt, model_at) = account.head, model.entry, asked
    if not ENGINE_FIELDS.isdisjoint(fields):
        name = take_engine_fields(fields)
        if name is not None:
            if entry.engine_fields == "refuse":
                raise _not_the_clients(name)
            scope["state"][RESERVED] = name
    prefix = ""
    if entry.balancing == "prefix_affinity" or model.members:
        session_id = head.session_id
        prefix = affinity_key(model.name, prompt, None if session_id is None else session_id.decode("latin-1"))
    for name in route.reader.bulky:
        fields.pop(name, None)
    query = scope["query_string"]
    parts: tuple[object, ...] = (
        route, fields["model"], fields.get("stream") or False, body, head.forwarded, account.request_id, [],
        b"?" + query if query else b"", fields, prefix, head.authorization, head.lines, model_at, account.caller,
        scope["state"], account.answer_headers, account.client, head, 0.0, (),
    )  # fmt: skip
    # Avoids the NamedTuple's constructor, which is a call in Python.
    return tuple.__new__(Call, parts)


def _not_the_clients(name: str) -> InvalidRequest:
    held = "" if name in TRANSFERS else f" with {' or '.join(map(repr, TRANSFERS))} in it"
    return InvalidRequest(
        f"The field {name!r}{held} is reserved for operators: leave it out, or set `engine_fields: allow` in "
        "the model's entry.",
        param=name,
    )


def model_card(model: Model) -> dict[str, Any]:
    """A model as /v1/models shows it: OpenAI's keys, vLLM's `max_model_len` if the engine reports it, and our own."""
    entry = model.entry
    card = {
        "id": model.name,
        "object": "model",
        "created": entry.created,
        "owned_by": entry.owner,
        "version": entry.version,
        "aliases": (*entry.aliases, *model.further),
        "hardware": None if entry.hardware is None else entry.hardware.model_dump(),
    }
    if model.parent is not None:
        card["parent"] = model.parent.name
    if model.max_model_len is not None:
        card["max_model_len"] = model.max_model_len
    return card


def json_bytes(value: Any) -> bytes:
    return orjson.dumps(value)


def model_list(models: Iterable[Model]) -> bytes:
    return json_bytes({"object": "list", "data": [model_card(model) for model in models]})
