"""Reads a few fields of a multipart form, in slices, without decoding or copying the others. Sans-IO."""

from collections.abc import Collection, Generator
from typing import NamedTuple

from python_multipart.exceptions import MultipartParseError
from python_multipart.multipart import MultipartParser, parse_options_header

# A part costs 50 us; a slice may hold 280.
SLICE = 16 * 1024
# Fields and files together; the limit of the engines' own parser
MAX_PARTS = 2000
# Bytes kept of a field
KEPT = 64 * 1024


class FormField(NamedTuple):
    """A field. `span`: of the value in the body; None if all of it looked like the beginning of a boundary."""

    value: bytes
    span: tuple[int, int] | None


def form_fields(
    body: bytes, content_type: bytes, names: Collection[str], size: int = SLICE
) -> Generator[None, None, dict[str, FormField]]:
    """The last field of each name, files aside; yields after each slice of `size` bytes.

    Raises ValueError, with a sentence, if the body is not valid multipart/form-data.
    """
    kind, options = parse_options_header(content_type)
    boundary = options.get(b"boundary")
    if kind != b"multipart/form-data" or not boundary:
        raise ValueError("the content type must be multipart/form-data with a boundary")
    form = _Form({name.encode(): name for name in names})
    parser = MultipartParser(boundary, form.callbacks())  # type: ignore[arg-type]
    try:
        for start in range(0, len(body), size):
            form.slice, form.slice_at = body[start : start + size], start
            parser.write(form.slice)
            yield
        parser.finalize()
    except MultipartParseError as exc:
        raise ValueError(f"the body is not valid multipart/form-data: {exc}") from None
    if not form.ended:
        raise ValueError("the multipart body ends before its closing boundary")
    return form.fields


class _Form:
    """Notes the values of some fields, and their offsets."""

    def __init__(self, names: dict[bytes, str]) -> None:
        self.fields: dict[str, FormField] = {}
        self.ended = False
        # The slice that is parsed, and its offset
        self.slice, self.slice_at = b"", 0
        self._names = names
        self._parts = 0
        # The current header
        self._header = b""
        self._content = b""
        # The current field: its name, kept bytes, size so far, and offset
        self._field: str | None = None
        self._value = b""
        self._size = 0
        self._start: int | None = None

    def callbacks(self) -> dict[str, object]:
        return {
            "on_part_begin": self._begin,
            "on_header_field": self._header_field,
            "on_header_value": self._header_value,
            "on_header_end": self._header_end,
            "on_part_data": self._data,
            "on_part_end": self._part_end,
            "on_end": self._end,
        }

    def _begin(self) -> None:
        self._parts += 1
        if self._parts > MAX_PARTS:
            raise ValueError(f"the form has more than {MAX_PARTS} parts")
        self._header = self._content = self._value = b""
        self._field = self._start = None
        self._size = 0

    def _header_field(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        self._content += data[start:end]

    def _header_end(self) -> None:
        if self._header.lower() == b"content-disposition":
            _, options = parse_options_header(self._content)
            self._field = None if b"filename" in options else self._names.get(options.get(b"name", b""))
        self._header = self._content = b""

    def _data(self, data: bytes, start: int, end: int) -> None:
        if self._field is None:
            return
        if self._start is None and data is self.slice:
            # The bytes before were held back as a possible boundary: they are not part of this slice.
            self._start = self.slice_at + start - self._size
        self._value += data[start : min(end, start + KEPT - len(self._value))]
        self._size += end - start

    def _part_end(self) -> None:
        if self._field is not None:
            at = self._start
            self.fields[self._field] = FormField(self._value, None if at is None else (at, at + self._size))

    def _end(self) -> None:
        self.ended = True
