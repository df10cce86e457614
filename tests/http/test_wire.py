"""What the router reads of a request, and what it says to a request that it cannot read."""

from collections.abc import Generator
from time import perf_counter
from typing import Any

import orjson
import pytest
from starlette.types import Message, Scope

from inference_api.errors import (
    BadRequest,
    ClientGone,
    InvalidJSON,
    InvalidRequest,
    Overloaded,
    RouterError,
    TooLarge,
    UnsupportedMediaType,
)
from inference_api.http import wire
from inference_api.http.admission import Admission
from inference_api.http.bodies import Chat, JSONReader
from inference_api.http.head import RequestHead, RequestHeaders
from inference_api.http.routes import INFERENCE_ROUTES
from inference_api.http.wire import model_card, model_list, read_body
from inference_api.models import Asked, Call, RawHeaders, Route
from inference_api.observe.account import Account
from inference_api.routing.balance import make_balancer
from inference_api.routing.entries import CatalogueEntry
from inference_api.routing.fleet import Model
from tests.conftest import Served
from tests.fakes import FakeEngine, form

ROUTES = {route.path: route for route in INFERENCE_ROUTES}
CHAT = "/v1/chat/completions"
AUDIO = "/v1/audio/transcriptions"
JSON = {"content-type": "application/json"}
# The least that each route takes beside the model.
MINIMAL: dict[str, dict[str, Any]] = {
    CHAT: {"messages": []},
    "/v1/completions": {"prompt": ""},
    "/v1/embeddings": {"input": "a"},
    "/v1/responses": {"input": "a"},
    "/v1/messages": {"messages": []},
    "/v1/messages/count_tokens": {"messages": []},
    "/v1/rerank": {"query": "a", "documents": []},
    "/rerank": {"query": "a", "documents": []},
    "/v1/score": {},
    "/score": {},
    "/tokenize": {"prompt": "a"},
    "/detokenize": {"tokens": [1]},
    "/v1/chat/completions/batch": {"messages": []},
    "/v1/moderations": {"input": "a"},
    "/classify": {"input": "a"},
    "/pooling": {"data": 1},
    "/invocations": {},
    "/v1/audio/speech": {"input": "a"},
    "/v1/images/generations": {"prompt": "a"},
}
UPLOADS = (AUDIO, "/v1/audio/translations", "/v1/images/edits")
NOT_JSON = {
    "empty": b"",
    "text": b"nope",
    "cut": b'{"model":"m","messages":[',
    "trailing comma": b'{"model":"m","messages":[],}',
    "more after the end": b'{"model":"m","messages":[]} {}',
    "utf-16": '{"model":"m","messages":[]}'.encode("utf-16"),
    "not utf-8": b'{"model":"m","messages":["\xff"]}',
    "not utf-8 in the name": b'{"model":"\xff","messages":[]}',
    "a control character": b'{"model":"m","messages":["\x00"]}',
    "a lone surrogate in the name": b'{"model":"\\ud800","messages":[]}',
    "half an escape": b'{"model":"m","messages":[],"x":"\\ud8',
    "two documents": b"{}{}",
    "a wrong bracket": b'{"model":"m","messages":[[1}],"x":[{]}]}',
    "a number with a zero before it": b'{"model":"m","messages":[01]}',
    "100,000 open arrays": b'{"model":"m","messages":' + b"[" * 100_000,
    "100,000 arrays": b'{"model":"m","messages":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "100,000 arrays in an unknown field": b'{"model":"m","messages":[],"x":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "100,000 objects": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
}


# What is JSON to Python, and so to vLLM.
DIALECT = {
    "a byte order mark": b'\xef\xbb\xbf{"model":"m","messages":[]}',
    "a lone surrogate": b'{"model":"m","messages":["\\ud800"]}',
    "a lone surrogate as bytes": b'{"model":"m","messages":["\xed\xa0\x80"]}',
    "a lone surrogate as a key": b'{"model":"m","messages":[],"\\udfff":1}',
    "a number of 10,000 digits": b'{"model":"m","messages":[' + b"9" * 10_000 + b"]}",
    "a number without an end": b'{"model":"m","messages":[1e999],"x":-1E+99999}',
    "nan": b'{"model":"m","messages":[NaN,-Infinity]}',
    "500 arrays": b'{"model":"m","messages":' + b"[" * 500 + b"]" * 500 + b"}",
    "950 arrays": b'{"model":"m","messages":' + b"[" * 950 + b"]" * 950 + b"}",
    "9,000 arrays in an unknown field": b'{"model":"m","messages":[],"x":' + b"[" * 9000 + b"]" * 9000 + b"}",
    "9,000 objects": b'{"model":"m","messages":[],"x":' + b'{"a":' * 9000 + b"1" + b"}" * 9001,
}


def inbound(headers: RawHeaders) -> RequestHead:
    return RequestHeaders()(headers)


def read(
    body: bytes | dict[str, Any],
    path: str = CHAT,
    content_type: str = "application/json",
    entry: dict[str, Any] | None = None,
    **more: str,
) -> Call:
    """Read a body as the route at `path` does; `entry` is the model's, `more` are headers."""
    headers = [(b"content-type", content_type.encode())]
    headers += [(name.replace("_", "-").encode(), value.encode()) for name, value in more.items()]
    data = body if isinstance(body, bytes) else orjson.dumps(body)
    return call_of(ROUTES[path], inbound(headers), data, entry or {})


def call_of(route: Route, head: RequestHead, body: bytes, entry: dict[str, Any]) -> Call:
    asked = wire.read(route, head, body)
    if not isinstance(asked, tuple):
        asked = end_of(asked)
    scope: Scope = {"path": route.path, "query_string": b"", "client": None, "state": {}}
    account = Account("abc", perf_counter, scope, head)
    return wire.make_call(route, account, body, scope, asked, model(**entry))


def end_of(work: Generator[None, None, Asked]) -> Asked:
    while True:
        try:
            next(work)
        except StopIteration as stop:
            asked: Asked = stop.value
            return asked


def read_form(*parts: bytes, content_type: str = "multipart/form-data; boundary=B") -> Call:
    return read(form(*parts), AUDIO, content_type)


def model(**entry: Any) -> Model:
    checked = CatalogueEntry.model_validate({"name": "m", **entry})
    return Model(checked, (), make_balancer("two_choices"))


# Shapes


@pytest.mark.parametrize("path", MINIMAL)
def test_the_least_body_of_a_route_is_enough(path: str) -> None:
    call = read({"model": "m", **MINIMAL[path]}, path)

    assert (call.model, call.stream, call.route.path) == ("m", False, path)


@pytest.mark.parametrize("path", MINIMAL)
@pytest.mark.parametrize("name", [None, "", 3, True, [], {}, "n" * 257, ...])
def test_a_name_that_is_none_is_refused_on_every_route(path: str, name: Any) -> None:
    body = MINIMAL[path] if name is ... else {"model": name, **MINIMAL[path]}

    with pytest.raises(InvalidRequest, match="'model'") as caught:
        read(body, path)

    assert caught.value.param == "model"


def test_a_name_may_have_256_characters() -> None:
    assert read({"model": "ü" * 256, "messages": []}).model == "ü" * 256


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        (CHAT, {}, "messages"),
        (CHAT, {"messages": None}, "messages"),
        (CHAT, {"messages": "hello"}, "messages"),
        (CHAT, {"messages": {}}, "messages"),
        ("/v1/messages", {"prompt": "a"}, "messages"),
        ("/v1/messages/count_tokens", {}, "messages"),
        ("/v1/completions", {}, "prompt"),
        ("/v1/completions", {"prompt": None}, "prompt"),
        ("/v1/completions", {"prompt": 3}, "prompt"),
        ("/v1/responses", {}, "input"),
        ("/v1/responses", {"input": {}}, "input"),
        ("/v1/embeddings", {}, "input"),
        ("/v1/embeddings", {"input": 3}, "input"),
        ("/v1/embeddings", {"messages": "a"}, "messages"),
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": ["a"]}, "prompt"),
        ("/tokenize", {"messages": 1}, "messages"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": "a"}, "tokens"),
        ("/v1/rerank", {"documents": []}, "query"),
        ("/rerank", {"query": "a"}, "documents"),
    ],
)
def test_a_field_that_is_missing_or_of_the_wrong_type_is_named(path: str, body: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest, match=f"'{param}'") as caught:
        read({"model": "m", **body}, path)

    assert (caught.value.status, caught.value.param) == (422, param)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": [1, 2]}),
        ("/v1/completions", {"prompt": [[1], [2]]}),
        ("/v1/completions", {"prompt": ["a", "b"]}),
        ("/v1/responses", {"input": [{"role": "user", "content": "a"}]}),
        ("/v1/embeddings", {"input": [[1, 2]]}),
        ("/v1/embeddings", {"messages": []}),
        ("/tokenize", {"messages": [{"role": "user"}]}),
        ("/v1/rerank", {"query": {"text": "a"}, "documents": {"content": []}}),
        ("/v1/score", {"text_1": "a", "text_2": ["b"]}),
    ],
)
def test_every_form_that_an_engine_takes_is_taken(path: str, body: dict[str, Any]) -> None:
    assert read({"model": "m", **body}, path).model == "m"


@pytest.mark.parametrize(
    ("value", "stream"),
    [*((value, True) for value in (True, 1, "true", "True")), *((value, False) for value in (False, 0, "false", None))],
)
def test_a_stream_is_asked_for_in_every_spelling_that_vllm_takes(value: Any, stream: bool) -> None:
    assert read({"model": "m", "messages": [], "stream": value}).stream is stream


@pytest.mark.parametrize("value", ["maybe", 2, [], {}, "", 0.5])
def test_a_stream_that_is_no_boolean_is_refused(value: Any) -> None:
    with pytest.raises(InvalidRequest) as caught:
        read({"model": "m", "messages": [], "stream": value})

    assert caught.value.param == "stream"


@pytest.mark.parametrize(
    ("body", "name", "stream"),
    [
        (b'{"model":"a","model":"b","messages":[]}', "b", False),
        (b'{"m\\u006fdel":"a","messages":[]}', "a", False),
        (b'{"model":"a","messages":[],"m\\u006f\\u0064el":"b"}', "b", False),
        (b'{"model":"a","messages":[],"stream":true,"stream":false}', "a", False),
        (b'{"model":"a","messages":[],"stream":false,"\\u0073tream":true}', "a", True),
        (b'{"model":3,"model":"a","messages":1,"messages":[]}', "a", False),
        (b' \r\n\t{"x":{"model":"inner","stream":true},"messages":[],"model":"a"} \n', "a", False),
    ],
)
def test_of_a_repeated_key_the_last_counts_as_in_vllm(body: bytes, name: str, stream: bool) -> None:
    call = read(body)

    assert (call.model, call.stream, call.body) == (name, stream, body)


@pytest.mark.parametrize("body", NOT_JSON.values(), ids=NOT_JSON.keys())
def test_what_is_not_json_is_refused_in_a_sentence(body: bytes) -> None:
    with pytest.raises(InvalidJSON, match=r"^The body is not valid JSON \(.+\)\.$") as caught:
        read(body)

    assert (caught.value.status, caught.value.code) == (400, "invalid_json")
    assert len(caught.value.message) < 200


@pytest.mark.parametrize("body", DIALECT.values(), ids=DIALECT.keys())
def test_json_that_only_python_reads_is_left_to_the_engine(body: bytes) -> None:
    call = read(body)

    assert (call.model, call.body) == ("m", body)


def large(body: bytes) -> bytes:
    """The same, with a field that nobody reads and that is too large to be read at once."""
    start = body.index(b"{") + 1
    return body[:start] + b'"padding":[' + b'"",' * 500_000 + b"0]," + body[start:]


@pytest.mark.parametrize("body", [*DIALECT.values(), *(orjson.dumps({"model": "m", **MINIMAL[CHAT], "stream": True}),)])
def test_a_large_body_is_read_as_a_small_one(body: bytes) -> None:
    call, small = read(large(body)), read(body)

    assert (call.model, call.stream, call.fields) == (small.model, small.stream, small.fields)
    assert call.model_at is not None
    assert call.body[slice(*call.model_at)] == b'"m"'


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"model": "m"},
        {"model": None, "messages": []},
        {"model": "", "messages": []},
        {"model": "n" * 257, "messages": []},
        {"model": "n" * 1_000_000, "messages": []},
        {"model": ["m"] * 100_000, "messages": []},
        {"model": "m", "messages": "text"},
        {"model": "m", "messages": {"a": 1}},
        {"model": "m", "messages": [], "stream": "maybe"},
        {"model": "m", "messages": [], "stream": [True] * 100_000},
    ],
)
def test_a_large_body_is_refused_as_a_small_one(body: dict[str, Any]) -> None:
    data = orjson.dumps(body)
    shortened = (
        data.replace(b"n" * 1_000_000, b"n" * 300).replace(b'"m",' * 99_999, b"").replace(b"true," * 99_999, b"")
    )
    with pytest.raises(InvalidRequest) as expected:
        read(shortened)

    with pytest.raises(InvalidRequest) as caught:
        read(large(data if body else b'{"x":1}'))

    assert (caught.value.message, caught.value.param) == (expected.value.message, expected.value.param)


@pytest.mark.parametrize("body", [body for body in NOT_JSON.values() if body.startswith(b"{") and len(body) < 1000])
def test_a_large_body_that_is_not_json_is_refused(body: bytes) -> None:
    with pytest.raises(InvalidJSON, match=r"^The body is not valid JSON \(.+\)\.$"):
        read(large(body))


def test_nothing_is_kept_of_a_prompt() -> None:
    for body in ({"prompt": "SECRET"}, {"prompt": ["SECRET"], "prompt_embeds": "SECRET"}):
        assert read({"model": "m", "stream": True, **body}, "/v1/completions").fields == {"model": "m", "stream": True}


class Priced(Chat, total=False):
    max_tokens: int | None
    stream_options: dict[str, Any] | None


@pytest.mark.parametrize("before", [0, 32_700, 32_740, 32_768, 400_000])
def test_whoever_needs_another_field_finds_it_whole_in_a_body_of_any_size(before: int) -> None:
    route = ROUTES[CHAT]._replace(reader=JSONReader(Priced, kept=("max_tokens", "stream_options")))
    few = {"max_tokens": 7, "stream_options": {"include_usage": True, "a": [{"b": [1, 2, 3]}] * 20}}
    for after in (0, 1_000_000):
        body = orjson.dumps({"x": "x" * before, "y": [0] * (before // 2), **few, "model": "m", "messages": [0] * after})

        call = call_of(route, inbound([(b"content-type", b"application/json")]), body, {})

        assert call.fields == {"model": "m", **few}


def test_a_conversation_has_one_prefix_however_large_it_grows() -> None:
    opening = [
        {"role": "system", "content": "é" * 60_000},
        {"role": "user", "content": [{"type": "text", "text": "a"}]},
    ]
    more = [{"role": "assistant", "content": "b, " * 1000}, {"role": "user", "content": "c"}]
    affine = {"balancing": "prefix_affinity"}

    prefixes = [
        read({"messages": opening + more * turns, "model": "m"}, entry=affine).prefix for turns in (0, 10, 100, 1000)
    ]

    assert len(set(prefixes)) == 1
    assert prefixes[0]
    assert read({"messages": opening, "model": "m"}).prefix == ""
    other = read({"messages": [opening[0], *more], "model": "m", "x": [0] * 100_000}, entry=affine).prefix
    assert other not in ("", prefixes[0])


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt_embeds": "AAAA"}),
        ("/v1/completions", {"prompt": None, "prompt_embeds": ["AAAA"]}),
        ("/v1/completions", {"prompt": "a", "prompt_embeds": None}),
        ("/v1/embeddings", {"input": None, "messages": []}),
        ("/v1/embeddings", {"input": "a", "messages": None}),
        ("/tokenize", {"prompt": None, "messages": []}),
        ("/tokenize", {"prompt": "a", "messages": None}),
    ],
)
def test_of_two_fields_one_may_be_null(path: str, body: dict[str, Any]) -> None:
    assert read({"model": "m", **body}, path).model == "m"


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/completions", {"prompt": None, "prompt_embeds": None}, "prompt"),
        ("/v1/embeddings", {"input": None}, "input"),
        ("/tokenize", {"prompt": None, "messages": None}, "prompt"),
    ],
)
def test_not_all_of_them_may_be_null(path: str, body: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest, match=f"'{param}'") as caught:
        read({"model": "m", **body}, path)

    assert caught.value.param == param


# Fields reserved for operators

TRANSFERS = ["kv_transfer_params", "ec_transfer_params"]
PAYLOADS: list[Any] = [{"do_remote_prefill": True}, {}, [], "x", 1, False]


@pytest.mark.parametrize("size", [0, 500_000])
@pytest.mark.parametrize("name", TRANSFERS)
@pytest.mark.parametrize("path", MINIMAL)
def test_a_client_moves_no_engines_state(path: str, name: str, size: int) -> None:
    for payload in PAYLOADS:
        for body in ({name: payload}, {"vllm_xargs": {"a": 1, name: payload}}):
            request = {"x": [0] * size, "model": "m", **MINIMAL[path], **body}

            with pytest.raises(InvalidRequest, match="reserved for operators") as caught:
                read(request, path)
            assert (caught.value.status, caught.value.param) == (422, next(iter(body)))
            if not size:
                assert read(request, path, entry={"engine_fields": "allow"}).fields == {"model": "m"}


@pytest.mark.parametrize(
    "body",
    [
        b'{"model":"m","messages":[],"kv_transfer_params":{},"kv_transfer_params":{}}',
        b'{"model":"m","messages":[],"kv_\\u0074ransfer_params":{}}',
        b'\xef\xbb\xbf{"model":"m","messages":[],"kv_transfer_params":{}}',
        b'{"model":"m","messages":[],"vllm_xargs":{},"vllm_xargs":{"ec_transfer\\u005fparams":1}}',
        b'{"model":"m","messages":[],"vllm_xargs":{"a":[' + b"1," * 500_000 + b'1],"kv_transfer_params":1}}',
    ],
)
def test_no_spelling_gets_it_past(body: bytes) -> None:
    with pytest.raises(InvalidRequest, match="reserved for operators"):
        read(body)


@pytest.mark.parametrize(
    "body",
    [
        {"kv_transfer_params": None, "ec_transfer_params": None, "vllm_xargs": None},
        {"vllm_xargs": {"seed": 1, "kv": "kv_transfer_params"}},
        {"vllm_xargs": ["kv_transfer_params"]},
        {"x": {"kv_transfer_params": {}}},
    ],
)
@pytest.mark.parametrize("size", [0, 500_000])
def test_what_moves_nothing_is_taken(body: dict[str, Any], size: int) -> None:
    assert read({"x": [0] * size, "model": "m", "messages": [], **body}).fields == {"model": "m"}


@pytest.mark.parametrize(
    ("field", "param"),
    [
        (b'name="kv_transfer_params"\r\n\r\n{}', "kv_transfer_params"),
        (b'name="vllm_xargs"\r\n\r\n{"kv_transfer_params":{}}', "vllm_xargs"),
        (b'name="vllm_xargs"\r\n\r\n{"a":"' + b"b" * 100_000 + b'","kv_transfer_params":{}}', "vllm_xargs"),
        (b'name="vllm_xargs"\r\n\r\n{"a":1}', None),
        (b'name="vllm_xargs"\r\n\r\nnot JSON', None),
    ],
)
def test_a_form_moves_no_engines_state_either(field: bytes, param: str | None) -> None:
    part = b"content-disposition: form-data; " + field
    if param is None:
        assert read_form(MODEL, part).model == "m"
        return

    with pytest.raises(InvalidRequest, match="reserved for operators") as caught:
        read_form(MODEL, part)
    assert caught.value.param == param


@pytest.mark.parametrize("body", [b"[]", b"null", b'"m"', b"3", b"NaN", b"[{}]"])
def test_json_that_is_no_object_is_refused_without_a_param(body: bytes) -> None:
    with pytest.raises(InvalidRequest, match=r"^The body is not valid: .*object") as caught:
        read(body)

    assert (caught.value.status, caught.value.param) == (422, None)


@pytest.mark.parametrize(
    "body",
    [
        b'{"model":"m","messages":"SECRET"}',
        b'{"model":["SECRET"],"messages":[]}',
        b'{"model":"m","messages":[],"stream":"SECRET"}',
        b'{"model":"m","messages":["SECRET" SECRET]}',
        b"SECRET",
    ],
)
def test_a_refusal_does_not_repeat_what_the_client_sent(body: bytes) -> None:
    with pytest.raises(RouterError) as caught:
        read(body)

    assert "SECRET" not in caught.value.message


# Content type and encoding


@pytest.mark.parametrize(
    "content_type",
    ["application/json", "application/json; charset=utf-8", "APPLICATION/JSON ;charset=UTF-8", "Application/Json;x"],
)
def test_json_may_be_spelt_as_rfc_9110_allows(content_type: str) -> None:
    assert read({"model": "m", "messages": []}, content_type=content_type).model == "m"


@pytest.mark.parametrize("content_type", ["", "text/plain", "application/jsonl", "application/x-www-form-urlencoded"])
def test_another_content_type_is_refused_with_the_right_one(content_type: str) -> None:
    with pytest.raises(UnsupportedMediaType, match="application/json") as caught:
        read({"model": "m", "messages": []}, content_type=content_type)

    assert caught.value.status == 415


def test_a_missing_content_type_is_refused() -> None:
    with pytest.raises(UnsupportedMediaType):
        wire.read(ROUTES[CHAT], inbound([]), b"{}")


@pytest.mark.parametrize("encoding", ["gzip", "GZIP", "br", "gzip, identity"])
def test_a_compressed_body_is_refused(encoding: str) -> None:
    with pytest.raises(UnsupportedMediaType, match="Content-Encoding"):
        read({"model": "m", "messages": []}, content_encoding=encoding)


def test_an_identity_encoding_is_none() -> None:
    assert read({"model": "m", "messages": []}, content_encoding="identity").model == "m"


def test_what_the_headers_say_goes_into_the_call() -> None:
    call = read({"model": "m", "messages": []}, x_request_id="abc", x_session_id="s\xff1", authorization="Bearer k")

    assert (call.request_id, call.authorization) == ("abc", b"Bearer k")
    assert (b"authorization", b"Bearer k") not in call.headers


# Multipart

MODEL = b'content-disposition: form-data; name="model"\r\n\r\nm'
FILE = (
    b'content-disposition: form-data; name="file"; filename="a.wav"\r\ncontent-type: audio/wav\r\n\r\n\x00\r\n--b\xff'
)


@pytest.mark.parametrize("parts", [(MODEL, FILE), (FILE, MODEL), (FILE, MODEL, FILE)])
def test_the_model_of_a_form_is_found_wherever_it_stands(parts: tuple[bytes, ...]) -> None:
    call = read_form(*parts)

    assert (call.model, call.stream, call.body) == ("m", False, form(*parts))


@pytest.mark.parametrize(("value", "stream"), [(b"true", True), (b"True", True), (b"1", True), (b"false", False)])
def test_a_form_may_ask_for_a_stream(value: bytes, stream: bool) -> None:
    assert read_form(MODEL, b'content-disposition: form-data; name="stream"\r\n\r\n' + value).stream is stream


@pytest.mark.parametrize(
    "parts",
    [
        (FILE,),
        (MODEL.removesuffix(b"m"),),
        (MODEL + b"x" * 256,),
        # A file that is called `model` is no model.
        (b'content-disposition: form-data; name="model"; filename="m"\r\n\r\nm',),
    ],
)
def test_a_form_without_a_model_is_refused(parts: tuple[bytes, ...]) -> None:
    with pytest.raises(InvalidRequest, match="'model'") as caught:
        read_form(*parts)

    assert (caught.value.status, caught.value.param) == (422, "model")


@pytest.mark.parametrize(
    ("body", "content_type"),
    [
        (form(MODEL), "multipart/form-data"),
        (form(MODEL), "multipart/form-data; boundary=OTHER"),
        (form(MODEL)[:-8], "multipart/form-data; boundary=B"),
        (b"", "multipart/form-data; boundary=B"),
        (b"SECRET", "multipart/form-data; boundary=B"),
    ],
)
def test_a_body_that_is_not_the_form_it_claims_to_be_is_refused(body: bytes, content_type: str) -> None:
    with pytest.raises(BadRequest, match=r"^The .+\.$") as caught:
        read(body, AUDIO, content_type)

    assert caught.value.status == 400
    assert "SECRET" not in caught.value.message


@pytest.mark.parametrize("content_type", ["", "application/json", "multipart/mixed; boundary=B"])
def test_an_upload_must_be_a_form(content_type: str) -> None:
    with pytest.raises(UnsupportedMediaType, match="multipart/form-data"):
        read(form(MODEL), AUDIO, content_type)


# Bodies


async def body_of(
    *messages: Message, limit: int = 10, length: int | None = None, load: Admission | None = None
) -> bytes:
    told = iter(messages)
    load = load or Admission()
    before = load.buffered

    async def receive() -> Message:
        return next(told)

    headers = [] if length is None else [(b"content-length", b"%d" % length)]
    try:
        body = await read_body(receive, inbound(headers), limit, load)
    except BaseException:
        assert load.buffered == before
        raise
    assert load.buffered == before + len(body)
    return body


def part(body: bytes, more: bool = True) -> Message:
    return {"type": "http.request", "body": body, "more_body": more}


@pytest.mark.anyio
async def test_a_body_of_exactly_the_limit_is_read() -> None:
    assert await body_of(part(b"x" * 10, more=False), length=10) == b"x" * 10
    assert await body_of(part(b"12345"), part(b""), part(b"67890"), part(b"", more=False)) == b"1234567890"


@pytest.mark.anyio
async def test_a_body_that_says_it_is_too_large_is_not_read_at_all() -> None:
    with pytest.raises(TooLarge, match="10 bytes"):
        await body_of(length=11)


@pytest.mark.anyio
@pytest.mark.parametrize(
    "messages",
    [
        (part(b"x" * 11, more=False),),
        (part(b"x" * 6), part(b"x" * 5)),
        (part(b"x" * 6), part(b"x" * 5, more=False)),
        (part(b"x" * 10), part(b""), part(b"x")),
    ],
)
async def test_a_body_without_a_length_is_counted(messages: tuple[Message, ...]) -> None:
    with pytest.raises(TooLarge):
        await body_of(*messages)


@pytest.mark.anyio
@pytest.mark.parametrize("before", [(), (part(b"x"),)])
async def test_a_client_that_leaves_while_it_sends_is_gone(before: tuple[Message, ...]) -> None:
    with pytest.raises(ClientGone):
        await body_of(*before, {"type": "http.disconnect"})


@pytest.mark.anyio
async def test_bodies_beyond_what_is_to_be_in_memory_are_refused() -> None:
    load = Admission(max_buffered=15)
    assert await body_of(part(b"x" * 10, more=False), load=load) == b"x" * 10
    with pytest.raises(Overloaded, match="Buffered request bodies exceed"):
        await body_of(part(b"xxx"), part(b"xxx", more=False), load=load)
    assert await body_of(part(b"x" * 5, more=False), load=load) == b"x" * 5


# Models


def test_a_card_has_openais_keys_and_our_own() -> None:
    card = model_card(model(owner="me", version=2, aliases=["a"], created=7, hardware={"gpu": "l4", "gpu_count": 2}))

    assert card == {
        "id": "m",
        "object": "model",
        "created": 7,
        "owned_by": "me",
        "version": "2",
        "aliases": ("a",),
        "hardware": {"gpu": "l4", "gpu_count": 2, "gpu_memory_gib": None},
    }


def test_a_card_has_the_context_length_once_it_is_known() -> None:
    served = model()
    served.max_model_len = 4096

    assert orjson.loads(model_list([served]))["data"][0]["max_model_len"] == 4096


# On the wire


@pytest.mark.anyio
async def test_each_route_leads_to_the_same_path_of_the_engine(served: Served, engine: FakeEngine) -> None:
    bodies = {path: orjson.dumps({"model": "m", **body}) for path, body in MINIMAL.items()}

    answers = [await served.client.post(path, content=body, headers=JSON) for path, body in bodies.items()]

    assert {answer.status_code for answer in answers} == {200}
    assert {request.target: request.body for request in engine.requests} == bodies
    assert set(ROUTES) - set(bodies) == set(UPLOADS)


@pytest.mark.anyio
@pytest.mark.parametrize("path", UPLOADS)
async def test_an_upload_reaches_the_engine_as_it_was_sent(path: str, served: Served, engine: FakeEngine) -> None:
    content_type = "multipart/form-data; boundary=B"

    answer = await served.client.post(path, content=form(FILE, MODEL), headers={"content-type": content_type})

    assert answer.status_code == 200
    assert (engine.requests[0].target, engine.requests[0].body) == (path, form(FILE, MODEL))
    assert engine.requests[0].header("content-type") == content_type


@pytest.mark.anyio
async def test_fields_that_the_router_does_not_know_are_not_touched(served: Served, engine: FakeEngine) -> None:
    body = b'{"priority":-1,"seed":123456789012345678901234567890,"kv":{"a":[1e-7,1.0,"\\u00e9\\/"]},'
    body += b'"model":"m", "messages":[{"role":"user","content":"\\ud83d\\ude00","x":null}],"a":1,"a":2}'

    await served.client.post(CHAT, content=body, headers=JSON)

    assert engine.requests[0].body == body


@pytest.mark.anyio
async def test_what_is_not_json_never_reaches_an_engine(served: Served, engine: FakeEngine) -> None:
    for what, body in NOT_JSON.items():
        answer = await served.client.post(CHAT, content=body, headers=JSON)
        assert (what, answer.status_code, answer.json()["error"]["code"]) == (what, 400, "invalid_json")

    assert engine.requests == []
    # What grows with the square of the depth takes minutes.
    assert max(line["latency_ms"] for line in served.lines) < 10_000
