"""The fields that are read of a multipart form, wherever they are and wherever it is cut."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from inference_api.http.forms import KEPT, MAX_PARTS, SLICE, FormField, form_fields


def part(name: str, value: bytes, more: str = "") -> bytes:
    return f'Content-Disposition: form-data; name="{name}"{more}\r\n\r\n'.encode() + value


def form(*parts: bytes, boundary: bytes = b"xYz", end: bytes = b"--\r\n") -> bytes:
    return b"".join(b"--" + boundary + b"\r\n" + data + b"\r\n" for data in parts) + b"--" + boundary + end


KIND = b"multipart/form-data; boundary=xYz"
MODEL = part("model", b"whisper-1")
FILE = part("file", bytes(range(256)) * 9, '; filename="a.wav"\r\nContent-Type: audio/wav')


def read(body: bytes, kind: bytes = KIND, size: int = SLICE) -> FormField | None:
    work = form_fields(body, kind, ("model", "language"), size)
    while True:
        try:
            next(work)
        except StopIteration as stop:
            fields: dict[str, FormField] = stop.value
            return fields.get("model")


def value(body: bytes, kind: bytes = KIND, size: int = SLICE) -> bytes | None:
    field = read(body, kind, size)
    if field is None:
        return None
    assert field.span is None or body[slice(*field.span)] == field.value
    return field.value


@pytest.mark.parametrize("parts", [(MODEL, FILE), (FILE, MODEL), (part("language", b"en"), MODEL, FILE)])
def test_a_form_field_is_found_wherever_it_is(parts: tuple[bytes, ...]) -> None:
    assert value(form(*parts)) == b"whisper-1"


@pytest.mark.parametrize(
    "disposition",
    [
        b'Content-Disposition: form-data; name="model"',
        b"content-disposition: form-data; name=model",
        b'CONTENT-DISPOSITION:form-data;  name="model"',
        b'Content-Type: text/plain\r\nContent-Disposition: form-data; name="model"',
        b'Content-Disposition: form-data; name="model"\r\nContent-Type: text/plain; charset=utf-8',
    ],
)
def test_a_form_field_may_be_named_in_many_ways(disposition: bytes) -> None:
    assert value(form(disposition + b"\r\n\r\nm", FILE)) == b"m"


def test_of_a_repeated_form_field_the_last_counts() -> None:
    assert value(form(part("model", b"a"), FILE, part("model", b"b"))) == b"b"


def test_a_file_is_no_field_even_if_it_is_called_model() -> None:
    assert value(form(part("model", b"weights", '; filename="model"'))) is None
    assert value(form(part("model", b"weights", '; filename="x"'), MODEL)) == b"whisper-1"
    assert value(form(MODEL, part("model", b"weights", '; filename="x"'))) == b"whisper-1"


def test_a_form_without_the_field_has_none() -> None:
    assert value(form(FILE)) is None
    assert value(form(part("models", b"a"), part("Model", b"b"))) is None


def test_an_empty_form_field_is_there() -> None:
    assert value(form(part("model", b""), FILE)) == b""


@pytest.mark.parametrize("kind", [KIND + b"; charset=utf-8", b'multipart/form-data; boundary="xYz"'])
def test_the_boundary_may_be_quoted(kind: bytes) -> None:
    assert value(form(FILE, MODEL), kind) == b"whisper-1"


@settings(deadline=None)
@given(
    st.lists(st.sampled_from([b"\r", b"\n", b"--", b"xYz", b"\r\n--", b"\r\n--xY", b"a", b"\0\xff"]), max_size=8),
    st.integers(1, 40),
)
def test_a_form_fields_bytes_are_its_own(pieces: list[bytes], size: int) -> None:
    content = b"".join(pieces)
    if b"\r\n--xYz" in b"\r\n" + content:
        return
    assert value(form(FILE, part("model", content), FILE), size=size) == content


@pytest.mark.parametrize("size", range(1, 40))
def test_a_form_field_is_found_wherever_it_is_cut(size: int) -> None:
    body = form(part("model", b"a"), FILE, part("model", b"\r\n--b"), part("language", b"en"))

    field = read(body, size=size)

    assert field == (b"\r\n--b", (body.index(b"\r\n--b\r"), body.index(b"\r\n--b\r") + 5))


def test_a_form_of_many_parts_is_refused() -> None:
    assert value(form(*[part("x", b"")] * (MAX_PARTS - 1), MODEL)) == b"whisper-1"

    with pytest.raises(ValueError, match=f"more than {MAX_PARTS} parts"):
        read(form(*[part("x", b"")] * MAX_PARTS, MODEL))


def test_of_a_long_form_field_the_beginning_is_kept() -> None:
    body = form(part("model", b"ab" * KEPT))

    field = read(body)

    assert field is not None
    assert field.value == b"ab" * (KEPT // 2)
    assert field.span is not None
    assert body[slice(*field.span)] == b"ab" * KEPT


@pytest.mark.parametrize(
    "kind",
    [
        b"",
        b"multipart/form-data",
        b"multipart/mixed; boundary=xYz",
        b"application/json",
        b'multipart/form-data; boundary=""',
    ],
)
def test_a_content_type_without_a_boundary_is_refused(kind: bytes) -> None:
    with pytest.raises(ValueError, match="must be multipart/form-data with a boundary"):
        read(form(MODEL), kind)


@pytest.mark.parametrize(
    "body",
    [
        form(MODEL, FILE)[:-4],
        form(MODEL)[:-7],
        b"",
        b"--xYz",
        b"--xYz\r\nContent-Disp",
        form(MODEL, boundary=b"other"),
        b"{}",
    ],
)
def test_a_broken_form_is_refused_with_a_sentence(body: bytes) -> None:
    with pytest.raises(ValueError, match=r"the (multipart )?body (is not valid|ends before)"):
        read(body)
