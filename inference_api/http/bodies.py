"""Reads a few fields of request bodies, checked by pydantic, and skips the rest.

A small body is checked in one call. A large one is scanned in slices (upstream.scanner, http.forms), and the
fields that the scan has found are checked by the same call.
"""

import json
from collections.abc import Collection, Generator, Mapping
from typing import Annotated, Any, Required, get_args

from pydantic import StringConstraints, TypeAdapter, ValidationError
from typing_extensions import TypedDict

from inference_api.errors import BadRequest, InvalidJSON, InvalidRequest
from inference_api.http.forms import FormField, form_fields
from inference_api.models import Asked
from inference_api.upstream.json_text import NotJSON, judge
from inference_api.upstream.scanner import Member, Scan

# Bytes up to which pydantic checks a body in one call: the worst takes ten milliseconds and eight megabytes.
SMALL = 128 * 1024
# The same for the usual large body, a text or an image: so many bytes with at most so many values
_LIGHT, _VALUES = 1024 * 1024, 40_000
# Counting costs more than a search for the next comma, if that is far.
_COMMAS_LOOKED_FOR = 500
# Characters of a long text that the checks below need
_LONG = 1024
# Reserved for operators: they make an engine import or export the state of another request, or crash.
TRANSFERS = ("kv_transfer_params", "ec_transfer_params")
# Where vLLM also reads them from
_EXTRA = "vllm_xargs"
ENGINE_FIELDS = frozenset({*TRANSFERS, _EXTRA})

# A field with the object that names a stored prompt, for a feature that reads it; and its name in `Call.fields`, where
# the field itself holds a prompt otherwise.
_PROMPT, STORED_PROMPT = "prompt", "stored prompt"

_Name = Annotated[str, StringConstraints(min_length=1, max_length=256)]
_Text = str | list[Any]


class Named(TypedDict, total=False):
    """The fields of every inference body. All others pass unread; the last of a repeated one counts, as in vLLM."""

    model: Required[_Name]
    stream: bool | None
    kv_transfer_params: Any
    ec_transfer_params: Any
    vllm_xargs: Any


class Chat(Named):
    messages: Required[list[Any]]


class Completion(Named, total=False):
    prompt: _Text | None
    prompt_embeds: _Text | None


class Responses(Named, total=False):
    input: Required[_Text]
    store: Any


class Embedding(Named, total=False):
    input: _Text | None
    messages: list[Any] | None


class Pooling(Embedding, total=False):
    # The model's plugin defines its shape
    data: Any


class Moderation(Named):
    input: Required[_Text]


class Speech(Named):
    input: Required[str]


class Image(Named):
    prompt: Required[str]


class Tokenize(Named, total=False):
    prompt: str | None
    messages: list[Any] | None


class Detokenize(Named):
    tokens: Required[list[Any]]


class Rerank(Named):
    query: Required[Any]
    documents: Required[Any]


class JSONReader:
    """Reads the fields of `shape`; of `one_of` at least one must be there, and not null.

    `Call.fields` gets the fields of every body, and those in `kept`: small top-level fields for features. Of other
    fields only the type is checked, and the beginning read for prefix affinity. `stored`: the fields that a stored
    prompt stands for; `instead`: reads the bodies that have one.

    Raises InvalidJSON, or InvalidRequest naming the field.
    """

    def __init__(
        self,
        shape: type,
        one_of: tuple[str, ...] = (),
        kept: tuple[str, ...] = (),
        stored: tuple[str, ...] = (),
        instead: "JSONReader | None" = None,
    ) -> None:
        self.bulky = frozenset(shape.__annotations__.keys() - Named.__annotations__.keys() - set(kept))
        self._names = frozenset(shape.__annotations__)
        self._one_of = one_of
        self._kept = kept
        self._stored = stored
        self._instead = instead
        self._shape = shape
        self._validate = TypeAdapter(shape).validator.validate_json

    def at_once(self, body: bytes) -> Asked | None:
        if len(body) > SMALL and not _is_light(body):
            return None
        try:
            fields: dict[str, Any] = self._validate(body)
        except ValidationError as exc:
            if exc.errors(include_url=False, include_context=False, include_input=False)[0]["type"] == "json_invalid":
                # Engines accept JSON that pydantic rejects: a byte order mark, deep nesting, a lone surrogate.
                return None
            stored = self._instead and self._instead.with_stored(body)
            if not stored:
                raise _refusal(exc) from None
            return stored, stored, None
        if self._one_of:
            self._check_one_of(fields)
        return fields, fields, None

    def slices(self, body: bytes, content_type: bytes = b"") -> Generator[None, None, Asked]:
        scan = Scan(body, self._names)
        try:
            yield from scan.slices()
        except NotJSON as exc:
            raise InvalidJSON(f"The body is not valid JSON ({exc}).") from None
        outline = self._outline(scan)
        try:
            fields: dict[str, Any] = self._validate(outline)
        except ValidationError as exc:
            stored = self._instead and self._instead.with_stored(outline)
            if not stored:
                raise _refusal(exc) from None
            return stored, _Members(scan.members), scan.members["model"].string_span()
        if self._one_of:
            self._check_one_of(fields)
        return fields, _Members(scan.members), scan.members["model"].string_span()

    def schema(self) -> dict[str, Any]:
        schema = TypeAdapter(self._shape).json_schema()
        schema = {name: schema[name] for name in ("type", "properties", "required")}
        if self._one_of:
            schema["anyOf"] = [{"required": [name]} for name in self._one_of]
        # Not for clients: reserved for operators.
        schema["properties"] = {name: it for name, it in schema["properties"].items() if name not in ENGINE_FIELDS}
        return schema

    def keeping(self, names: Collection[str]) -> "JSONReader":
        """A reader that also keeps these fields, of any type. In a large body a large value may be cut."""
        reads_stored = self._stored and _PROMPT in names
        names = [name for name in names if name not in self._names]
        shape = self._shape_with(dict.fromkeys(names, Any))
        instead = None
        if reads_stored:
            optional = {name: Any if name == _PROMPT else self._optional(name) for name in self._stored}
            given = {**dict.fromkeys(names, Any), **optional, _PROMPT: Required[dict[str, Any]]}
            instead = JSONReader(self._shape_with(given, replace=True))
        return JSONReader(shape, self._one_of, (*self._kept, *names), self._stored, instead)

    def with_stored(self, body: bytes) -> dict[str, Any] | None:
        """The fields of a body with a stored prompt, in place of those that it stands for. None: it is not one."""
        try:
            fields: dict[str, Any] = self._validate(body)
        except ValidationError:
            return None
        fields[STORED_PROMPT] = True
        return fields

    def _shape_with(self, fields: Mapping[str, Any], replace: bool = False) -> Any:
        own = self._shape.__annotations__
        every = {**own, **fields} if replace else {**fields, **own}
        return TypedDict(self._shape.__name__, every, total=False)  # type: ignore[operator]

    def _optional(self, name: str) -> Any:
        """The type of a required field, or None."""
        return get_args(self._shape.__annotations__[name])[0] | None

    def _outline(self, scan: Scan) -> bytes:
        """A small document for which pydantic reports the same errors as for the whole."""
        if not scan.is_object:
            return b"[]"
        return json.dumps({name: self._outlined(name, member) for name, member in scan.members.items()}).encode()

    def _outlined(self, name: str, member: Member) -> Any:
        value = member.value
        if isinstance(value, str):
            return "" if name in self.bulky else value[:_LONG]
        if name in TRANSFERS:
            return None if value is None else True
        if name == _EXTRA:
            return _transfers(value, member.whole)
        if isinstance(value, list | dict) and (name in self.bulky or not member.whole):
            return type(value)()
        return value

    def _check_one_of(self, fields: Mapping[str, Any]) -> None:
        if all(fields.get(name) is None for name in self._one_of):
            raise InvalidRequest(f"One of {' or '.join(map(repr, self._one_of))} is required.", param=self._one_of[0])


class FormReader:
    """Reads the `model` and `stream` fields of a multipart body, without changing it."""

    bulky: frozenset[str] = frozenset()

    def at_once(self, body: bytes) -> Asked | None:
        return None

    def keeping(self, names: Collection[str]) -> "FormReader":
        # Fields of forms are not JSON.
        return self

    def schema(self) -> dict[str, Any]:
        return _FORM

    def slices(self, body: bytes, content_type: bytes) -> Generator[None, None, Asked]:
        try:
            form = yield from form_fields(body, content_type, ("model", "stream", *ENGINE_FIELDS))
        except ValueError as exc:
            raise BadRequest(f"{str(exc)[0].upper()}{str(exc)[1:]}.") from None
        model = form.get("model")
        if model is None:
            raise InvalidRequest("The form has no field 'model'.", param="model")
        name = model.value.decode("utf-8", "replace")
        if not 0 < len(name) <= 256:
            raise InvalidRequest("The form field 'model' must have 1 to 256 characters.", param="model")
        stream = form.get("stream")
        fields = {"model": name, "stream": stream is not None and stream.value.lower() in (b"true", b"1")}
        fields |= {name: True for name in TRANSFERS if name in form}
        if _EXTRA in form:
            fields[_EXTRA] = _form_extra(form[_EXTRA])
        return fields, fields, model.span


_FORM: dict[str, Any] = {
    "type": "object",
    "properties": {
        "model": {"type": "string", "minLength": 1, "maxLength": 256},
        "stream": {"type": "boolean"},
    },
    "required": ["model"],
}


def take_engine_fields(fields: dict[str, Any]) -> str | None:
    """Remove them from `fields`. Returns the name of one that is reserved for operators, if there is one."""
    found = [name for name in TRANSFERS if fields.pop(name, None) is not None]
    extra = fields.pop(_EXTRA, None)
    if isinstance(extra, dict) and any(name in extra for name in TRANSFERS):
        found.append(_EXTRA)
    return found[0] if found else None


def _is_light(body: bytes) -> bool:
    if len(body) > _LIGHT:
        return False
    at = -1
    for _ in range(_COMMAS_LOOKED_FOR):
        at = body.find(b",", at + 1)
        if at < 0:
            return True
    return body.count(b",") <= _VALUES


class _Members:
    """The fields of a large body, for `affinity_key`."""

    def __init__(self, members: Mapping[str, Member]) -> None:
        self._members = members

    def get(self, name: str) -> Any:
        member = self._members.get(name)
        return None if member is None else member.value


def _transfers(value: Any, whole: bool) -> Any:
    """The relevant part of `vllm_xargs`; one that is too large to search may hold anything."""
    if not isinstance(value, dict):
        return None
    return {name: True for name in TRANSFERS if name in value or not whole}


def _form_extra(field: FormField) -> Any:
    if field.span is not None and field.span[1] - field.span[0] > len(field.value):
        return _transfers({}, whole=False)
    try:
        return _transfers(judge(field.value), whole=True)
    except (NotJSON, RecursionError):
        return None


def _refusal(exc: ValidationError) -> InvalidJSON | InvalidRequest:
    error = exc.errors(include_url=False, include_context=False, include_input=False)[0]
    if error["type"] == "json_invalid":
        # Every slice was JSON, so the reason is a lone surrogate, which Rust strings cannot hold.
        return InvalidJSON("The body is not valid JSON (a lone surrogate in a field that the router reads).")
    param = str(error["loc"][0]) if error["loc"] else None
    if error["type"] == "missing":
        return InvalidRequest(f"The field {param!r} is required.", param=param)
    place = "The body" if param is None else f"The field {param!r}"
    return InvalidRequest(f"{place} is not valid: {error['msg']}.", param=param)
