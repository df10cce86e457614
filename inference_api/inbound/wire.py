"""The little of the OpenAI wire format that the router reads: a body becomes fields, models become a list."""

from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any, Required

import orjson
from pydantic import StringConstraints, TypeAdapter, ValidationError
from starlette.types import Receive
from typing_extensions import TypedDict

from inference_api.errors import (
    BadRequest,
    ClientGone,
    InvalidJSON,
    InvalidRequest,
    TooLarge,
    UnsupportedMediaType,
)
from inference_api.inbound.admission import Load
from inference_api.models import Call, Route
from inference_api.outbound.headers import Inbound
from inference_api.outbound.rewrite import form_field
from inference_api.routing.backend import Model

Fields = Mapping[str, Any]
_Name = Annotated[str, StringConstraints(min_length=1, max_length=256)]
_Text = str | list[Any]


class Named(TypedDict, total=False):
    """What every inference body has. All other fields pass unread; of a repeated one the last counts, as in vLLM."""

    model: Required[_Name]
    stream: bool | None


class Chat(Named):
    messages: Required[list[Any]]


class Completion(Named):
    prompt: Required[_Text]


class Responses(Named):
    input: Required[_Text]


class Embedding(Named, total=False):
    input: _Text
    messages: list[Any]


class Tokenize(Named, total=False):
    prompt: str
    messages: list[Any]


class Detokenize(Named):
    tokens: Required[list[Any]]


class Rerank(Named):
    query: Required[Any]
    documents: Required[Any]


def json_parser(shape: type, one_of: tuple[str, ...] = ()) -> Callable[[bytes], Fields]:
    """A function from a JSON body to the fields of `shape`; of `one_of` at least one must be there.

    It raises InvalidJSON for what is not JSON, and InvalidRequest, naming the field, for what is not the shape.
    """
    validate = TypeAdapter(shape).validator.validate_json

    def parse(body: bytes) -> Fields:
        try:
            fields: Fields = validate(body)
        except ValidationError as exc:
            raise _refusal(exc) from None
        if one_of and not any(name in fields for name in one_of):
            raise InvalidRequest(f"One of {' or '.join(map(repr, one_of))} is required.", param=one_of[0])
        return fields

    return parse


def parse_form(body: bytes, content_type: bytes) -> Fields:
    """The `model` and `stream` fields of a multipart body, which itself stays as it is."""
    try:
        span = form_field(body, content_type, "model")
        stream = form_field(body, content_type, "stream")
    except ValueError as exc:
        raise BadRequest(f"{str(exc)[0].upper()}{str(exc)[1:]}.") from None
    if span is None:
        raise InvalidRequest("The form has no field 'model'.", param="model")
    name = body[slice(*span)].decode("utf-8", "replace")
    if not 0 < len(name) <= 256:
        raise InvalidRequest("The form field 'model' must have 1 to 256 characters.", param="model")
    return {"model": name, "stream": stream is not None and body[slice(*stream)].lower() in (b"true", b"1")}


async def read_body(receive: Receive, inbound: Inbound, limit: int, load: Load) -> bytes:
    """The request body, whose bytes are the load's from now on.

    Raises TooLarge, before reading if its length says so, Overloaded, and ClientGone if it breaks off; of these bodies
    nothing is left with the load.
    """
    if inbound.content_length is not None and int(inbound.content_length) > limit:
        raise TooLarge(limit)
    load.check()
    parts: list[bytes] = []
    size, more = 0, True
    try:
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ClientGone
            part: bytes = message.get("body", b"")
            parts.append(part)
            size += len(part)
            load.buffer(len(part))
            if size > limit:
                raise TooLarge(limit)
            more = message.get("more_body", False)
    except BaseException:
        load.buffered -= size
        raise
    return b"".join(parts)


def read_call(route: Route, inbound: Inbound, body: bytes, query: bytes, request_id: str) -> Call:
    """Check a request and make the Call of it. Raises RouterError that names the field or header, and the fix."""
    if inbound.content_encoding not in (None, b"identity"):
        raise UnsupportedMediaType("The request body is compressed; send it without Content-Encoding.")
    kind = inbound.media_type
    if route.multipart:
        if kind != b"multipart/form-data":
            raise UnsupportedMediaType("The content type must be multipart/form-data.")
        fields = parse_form(body, inbound.content_type)
    else:
        if kind != b"application/json":
            raise UnsupportedMediaType("The content type must be application/json.")
        fields = route.parse(body)
    session_id = inbound.session_id
    return Call(
        route,
        fields["model"],
        fields.get("stream") or False,
        body,
        inbound.forwarded,
        request_id,
        query,
        fields,
        None if session_id is None else session_id.decode("latin-1"),
        inbound.authorization,
        inbound.lines,
    )


def model_card(model: Model) -> dict[str, Any]:
    """A model as /v1/models shows it: OpenAI's keys, vLLM's `max_model_len` when the engine told it, and our own."""
    entry = model.entry
    card = {
        "id": model.name,
        "object": "model",
        "created": entry.created,
        "owned_by": entry.owner,
        "version": entry.version,
        "aliases": entry.aliases,
        "hardware": None if entry.hardware is None else entry.hardware.model_dump(),
    }
    if model.max_model_len is not None:
        card["max_model_len"] = model.max_model_len
    return card


def json_bytes(value: Any) -> bytes:
    return orjson.dumps(value)


def model_list(models: Iterable[Model]) -> bytes:
    return json_bytes({"object": "list", "data": [model_card(model) for model in models]})


def _refusal(exc: ValidationError) -> InvalidJSON | InvalidRequest:
    error = exc.errors(include_url=False, include_context=False, include_input=False)[0]
    if error["type"] == "json_invalid":
        return InvalidJSON(f"The body is not valid JSON ({error['msg'].removeprefix('Invalid JSON: ')}).")
    param = str(error["loc"][0]) if error["loc"] else None
    if error["type"] == "missing":
        return InvalidRequest(f"The field {param!r} is required.", param=param)
    place = "The body" if param is None else f"The field {param!r}"
    return InvalidRequest(f"{place} is not valid: {error['msg']}.", param=param)
