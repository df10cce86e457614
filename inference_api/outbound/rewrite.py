"""The one rewrite there is: the body's `model` becomes the backend's `served_model_name`; every other byte stays."""

import re

import orjson
from python_multipart.exceptions import MultipartParseError
from python_multipart.multipart import MultipartParser, parse_options_header

# Possessive: a long string (an image in base64) must not leave a backtracking mark per character.
_TOKEN = re.compile(rb'"(?:[^"\\]++|\\.)*+"|[{}\[\],]', re.DOTALL)
_VALUE = re.compile(rb'\s*+:\s*+("(?:[^"\\]++|\\.)*+")', re.DOTALL)


def rewrite_json(body: bytes, name: str) -> bytes:
    """`body`, a JSON object with a string under `model`, with `name` there instead."""
    span = _model_value(body)
    if span is None:
        return body
    start, end = span
    return body[:start] + orjson.dumps(name) + body[end:]


def _model_value(body: bytes) -> tuple[int, int] | None:
    """Where the value of the top-level `model` is. As in the engines' parsers, the last of several counts."""
    span = None
    depth, at_key, position = 0, False, 0
    while match := _TOKEN.search(body, position):
        token, position = match.group(), match.end()
        if token in (b"{", b"["):
            depth += 1
            at_key = depth == 1
        elif token in (b"}", b"]"):
            depth -= 1
        elif token == b",":
            at_key = depth == 1
        elif at_key:
            at_key = False
            value = _VALUE.match(body, position)
            if value and orjson.loads(token) == "model":
                span = value.span(1)
    return span


def form_field(body: bytes, content_type: bytes, field: str) -> tuple[int, int] | None:
    """Where the value of a form field stands in a multipart body, without decoding or copying the others.

    Raises ValueError, with a sentence, when the body is not the multipart message that its content type says.
    """
    kind, options = parse_options_header(content_type)
    boundary = options.get(b"boundary")
    if kind != b"multipart/form-data" or not boundary:
        raise ValueError("the content type must be multipart/form-data with a boundary")
    form = _Form(field.encode())
    parser = MultipartParser(boundary, form.callbacks())  # type: ignore[arg-type]
    try:
        parser.write(body)
        parser.finalize()
    except MultipartParseError as exc:
        raise ValueError(f"the body is not valid multipart/form-data: {exc}") from None
    if not form.ended:
        raise ValueError("the multipart body ends before its closing boundary")
    return form.span


class _Form:
    """Notes the offsets of one field; the parser is given the whole body at once, so they are the body's own."""

    def __init__(self, field: bytes) -> None:
        self._field = field
        self._header = b""
        self._value = b""
        self._wanted = False
        self.span: tuple[int, int] | None = None
        self.ended = False

    def callbacks(self) -> dict[str, object]:
        return {
            "on_part_begin": self._begin,
            "on_header_field": self._name,
            "on_header_value": self._content,
            "on_header_end": self._header_end,
            "on_part_data": self._data,
            "on_end": self._end,
        }

    def _begin(self) -> None:
        self._header = self._value = b""
        self._wanted = False

    def _name(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]

    def _content(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _header_end(self) -> None:
        if self._header.lower() == b"content-disposition":
            _, options = parse_options_header(self._value)
            self._wanted = options.get(b"name") == self._field and b"filename" not in options
            if self._wanted:
                self.span = (0, 0)
        self._header = self._value = b""

    def _data(self, data: bytes, start: int, end: int) -> None:
        if self._wanted:
            before = self.span or (0, 0)
            self.span = (before[0] if before[1] else start, end)

    def _end(self) -> None:
        self.ended = True
