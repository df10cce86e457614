"""Every error the router answers with, as a client sees it: curl, the OpenAI SDK, and the event inside a stream."""

import re
from collections.abc import Callable
from typing import Any

import openai
import orjson
import pytest

from inference_api import errors
from inference_api.errors import (
    AuthUnavailable,
    InternalError,
    InvalidRequest,
    LimitsUnavailable,
    MethodNotAllowed,
    ModelLoading,
    ModelNotFound,
    ModelNotPriced,
    NoBackend,
    NoConsensus,
    Overloaded,
    PromptVariableInvalid,
    PromptVariableMissing,
    PromptVariableUnknown,
    QuotaExceeded,
    RateLimited,
    RouteNotServed,
    RouterError,
    ShuttingDown,
    TooLarge,
    UnknownURL,
    UpstreamAuthFailed,
    UpstreamError,
    UpstreamTimeout,
    URITooLong,
    error_event,
    printable,
    render,
)
from inference_api.models import Outcome
from tests.fakes import LAST_CHUNK, FakeEngine, event, sse

Start = Callable[..., Any]
TABLE = {
    "BadRequest": (400, "bad_request"),
    "InvalidJSON": (400, "invalid_json"),
    "Unauthorized": (401, "invalid_api_key"),
    "ModelForbidden": (403, "model_not_found"),
    "ModelNotPriced": (403, "model_not_priced"),
    "RateLimited": (429, "rate_limit_exceeded"),
    "QuotaExceeded": (429, "insufficient_quota"),
    "AuthUnavailable": (503, "auth_unavailable"),
    "LimitsUnavailable": (503, "limits_unavailable"),
    "NoConsensus": (502, "no_consensus"),
    "PromptNotFound": (404, "prompt_not_found"),
    "PromptVariableMissing": (400, "prompt_variable_missing"),
    "PromptVariableUnknown": (400, "prompt_variable_unknown"),
    "PromptVariableInvalid": (400, "prompt_variable_invalid"),
    "ModelNotFound": (404, "model_not_found"),
    "ResponseNotFound": (404, "response_not_found"),
    "UnknownURL": (404, "unknown_url"),
    "RouteNotServed": (404, "unknown_url"),
    "MethodNotAllowed": (405, "method_not_allowed"),
    "RequestTimeout": (408, "request_timeout"),
    "TooLarge": (413, "request_too_large"),
    "URITooLong": (414, "uri_too_long"),
    "UnsupportedMediaType": (415, "unsupported_media_type"),
    "UpgradeRequired": (426, "upgrade_required"),
    "HeadersTooLarge": (431, "headers_too_large"),
    "InvalidRequest": (422, "validation_error"),
    "InternalError": (500, "internal_error"),
    "UpstreamReset": (502, "upstream_reset"),
    "UpstreamProtocolError": (502, "upstream_protocol_error"),
    "UpstreamAuthFailed": (502, "upstream_auth_failed"),
    "UpstreamTimeout": (504, "upstream_timeout"),
    "NoBackend": (503, "no_backend_available"),
    "ModelLoading": (503, "model_loading"),
    "Overloaded": (503, "overloaded"),
    "RegistryUnavailable": (503, "registry_unavailable"),
    "ShuttingDown": (503, "shutting_down"),
}

# OpenAI's types of 429
OWN_TYPES = {RateLimited: "tokens", QuotaExceeded: "insufficient_quota"}


def leaves(kind: type[RouterError] = RouterError) -> list[type[RouterError]]:
    # Features and tests have errors of their own.
    below = [child for child in kind.__subclasses__() if child.__module__ == RouterError.__module__]
    return [leaf for child in below for leaf in leaves(child)] if below else [kind]


def example(kind: type[RouterError]) -> RouterError:
    made: dict[type[RouterError], Callable[[], RouterError]] = {
        ModelNotFound: lambda: ModelNotFound("gpt-5", ["a", "b"]),
        ModelNotPriced: lambda: ModelNotPriced("m", "organisation 'team-a'"),
        PromptVariableMissing: lambda: PromptVariableMissing("p", "v"),
        PromptVariableUnknown: lambda: PromptVariableUnknown("p", "v"),
        PromptVariableInvalid: lambda: PromptVariableInvalid("p", "v", "must be a string"),
        RateLimited: lambda: RateLimited("Too many.", "tokens", 1200),
        AuthUnavailable: AuthUnavailable,
        LimitsUnavailable: LimitsUnavailable,
        UnknownURL: lambda: UnknownURL("GET", "/nope"),
        RouteNotServed: lambda: RouteNotServed("m", "/v1/embeddings", ["chat_completions"]),
        UpstreamAuthFailed: lambda: UpstreamAuthFailed("m"),
        NoConsensus: lambda: NoConsensus("m"),
        MethodNotAllowed: lambda: MethodNotAllowed("PUT", "/v1/models", "GET"),
        TooLarge: lambda: TooLarge(10),
        URITooLong: lambda: URITooLong(10),
        InternalError: InternalError,
        NoBackend: lambda: NoBackend("m"),
        ModelLoading: lambda: ModelLoading("It starts.", "hold_timeout"),
        ShuttingDown: ShuttingDown,
    }
    if kind in made:
        return made[kind]()
    if issubclass(kind, UpstreamError):
        return kind("It broke.", Outcome.RESET)
    return kind("It is so.")


@pytest.mark.parametrize("kind", leaves(), ids=lambda kind: kind.__name__)
def test_every_error_is_rendered_with_every_key(kind: type[RouterError]) -> None:
    error = example(kind)

    status, headers, body = render(error, "abc")

    document = orjson.loads(body)
    assert list(document) == ["error", "request_id"]
    assert list(document["error"]) == ["message", "type", "param", "code"]
    assert document["request_id"] == "abc"
    assert (status, document["error"]["code"]) == TABLE[kind.__name__]
    usual = "server_error" if status >= 500 else "invalid_request_error"
    assert document["error"]["type"] == OWN_TYPES.get(kind, usual)
    assert document["error"]["message"].endswith((".", "?"))
    assert headers[:3] == [
        (b"content-type", b"application/json"),
        (b"content-length", b"%d" % len(body)),
        (b"x-request-id", b"abc"),
    ]


def test_the_docstring_draws_the_tree() -> None:
    drawn = set(re.findall(r"\+-- (\w+)", errors.__doc__ or ""))

    assert drawn - {"UpstreamError", "Unavailable"} == {kind.__name__ for kind in leaves()}


@pytest.mark.parametrize("kind", leaves(), ids=lambda kind: kind.__name__)
def test_what_a_client_did_wrong_is_refused_and_nothing_else_is(kind: type[RouterError]) -> None:
    assert (example(kind).outcome is Outcome.REFUSED) == (kind.status < 500)


@pytest.mark.parametrize(
    ("wait", "headers"),
    [
        (1, {b"retry-after": b"1", b"retry-after-ms": b"1"}),
        (1001, {b"retry-after": b"2", b"retry-after-ms": b"1001"}),
        (60_000, {b"retry-after": b"60", b"retry-after-ms": b"60000"}),
        (60_001, {b"retry-after": b"61", b"retry-after-ms": b"60001", b"x-should-retry": b"false"}),
    ],
)
def test_the_wait_of_a_rate_limit_is_not_capped(wait: int, headers: dict[bytes, bytes]) -> None:
    assert dict(RateLimited("Too many.", "requests", wait).headers) == headers


def test_a_few_known_models_are_listed_and_many_are_not() -> None:
    ten, eleven = [f"m{i}" for i in range(10)], [f"m{i}" for i in range(11)]

    assert ModelNotFound("x", ten).message.endswith(f" Known models: {', '.join(ten)}.")
    assert ModelNotFound("x", eleven).message.endswith(" GET /v1/models lists them.")
    assert ModelNotFound("x", []).message == "The model 'x' does not exist. GET /v1/models lists them."
    assert ModelNotFound("x", []).param == "model"


def test_the_parameter_at_fault_is_named() -> None:
    assert orjson.loads(render(InvalidRequest("No.", param="model"), "")[2])["error"]["param"] == "model"


@pytest.mark.parametrize(("given", "told"), [(-1, b"1"), (0, b"1"), (7, b"7"), (60, b"60"), (3600, b"60")])
def test_retry_after_is_what_every_sdk_honours(given: int, told: bytes) -> None:
    assert (b"retry-after", told) in render(Overloaded("Busy.", retry_after=given), "")[1]
    assert (b"retry-after", told) in render(NoBackend("m", given), "")[1]


def test_an_error_that_a_repetition_would_not_cure_says_so() -> None:
    final = UpstreamTimeout("Late.", Outcome.FIRST_BYTE_TIMEOUT, final=True)
    other = UpstreamTimeout("Late.", Outcome.FIRST_BYTE_TIMEOUT)

    assert (b"x-should-retry", b"false") in render(final, "")[1]
    assert all(name != b"x-should-retry" for name, _ in render(other, "")[1])
    assert final.outcome is Outcome.FIRST_BYTE_TIMEOUT


def test_allow_says_which_method_is_right() -> None:
    assert (b"allow", b"GET, HEAD") in render(MethodNotAllowed("PUT", "/", "GET, HEAD"), "")[1]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("", ""),
        ("llama-3", "llama-3"),
        ("a\r\nb\t\x00\x7f", "a??b???"),
        ("\u202e\u200b", "??"),
        ("\ud800", "?"),
        ("ü日本", "ü日本"),
        ("x" * 64, "x" * 64),
        ("x" * 65, "x" * 64 + "..."),
        ("x" * 10_000_000, "x" * 64 + "..."),
    ],
)
def test_what_a_client_sent_is_shown_short_and_harmless(text: str, shown: str) -> None:
    assert printable(text) == shown


def test_names_with_anything_in_them_can_be_rendered() -> None:
    for error in (ModelNotFound("\ud800\n", []), UnknownURL("G\x00T", "/\udfff"), NoBackend("\n" * 999)):
        assert len(render(error, "")[2]) < 400


# The event in a stream that breaks


def test_the_event_is_one_event_with_all_that_the_sdks_look_for() -> None:
    text = error_event("upstream_stream_interrupted", "It broke\nhere.")

    first, second, *end = text.split(b"\n")
    assert (first, second[:6], end) == (b"event: error", b"data: ", [b"", b""])
    document = orjson.loads(second[6:])
    inner = {"message": "It broke\nhere.", "type": "server_error", "param": None, "code": "upstream_stream_interrupted"}
    assert document.pop("error") == inner
    assert document == {
        "type": "error",
        "code": "upstream_stream_interrupted",
        "message": "It broke\nhere.",
        "param": None,
    }


async def broken(start_engine: Start, *before: bytes) -> FakeEngine:
    """An engine whose stream breaks off as the router's would."""
    last = error_event("upstream_stream_interrupted", "It broke.")
    engine: FakeEngine = await start_engine(sse(*before, last, then=lambda line: line.send(LAST_CHUNK)))
    return engine


@pytest.mark.anyio
async def test_the_openai_sdk_raises_on_it_in_a_chat_stream(start_engine: Start) -> None:
    engine = await broken(start_engine, event("a"))

    async with openai.AsyncOpenAI(base_url=f"{engine.url}/v1", api_key="k", max_retries=0) as client:
        stream = await client.chat.completions.create(model="m", messages=[], stream=True)
        got = (await anext(stream)).choices[0].delta.content
        with pytest.raises(openai.APIError, match=r"^It broke\.$") as caught:
            await anext(stream)

    assert (got, caught.value.code) == ("a", "upstream_stream_interrupted")


@pytest.mark.anyio
async def test_the_openai_sdk_raises_on_it_in_a_responses_stream(start_engine: Start) -> None:
    delta = {"type": "response.output_text.delta", "delta": "a", "sequence_number": 1, "item_id": "i"}
    data = orjson.dumps(delta | {"output_index": 0, "content_index": 0, "logprobs": []})
    engine = await broken(start_engine, b"event: response.output_text.delta\ndata: " + data + b"\n\n")

    async with openai.AsyncOpenAI(base_url=f"{engine.url}/v1", api_key="k", max_retries=0) as client:
        stream = await client.responses.create(model="m", input="x", stream=True)
        got = (await anext(stream)).type
        with pytest.raises(openai.APIError, match=r"^It broke\.$") as caught:
            await anext(stream)

    assert (got, caught.value.code) == ("response.output_text.delta", "upstream_stream_interrupted")


@pytest.mark.anyio
async def test_the_openai_sdk_raises_the_class_of_the_status(start_router: Start) -> None:
    served = await start_router()

    async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="k", max_retries=0) as client:
        with pytest.raises(openai.NotFoundError) as missing:
            await client.chat.completions.create(model="nope", messages=[])
        with pytest.raises(openai.UnprocessableEntityError) as invalid:
            await client.post("/chat/completions", body={"model": "m"}, cast_to=object)
        with pytest.raises(openai.InternalServerError) as nobody:
            await client.chat.completions.create(model="m", messages=[])

    assert (missing.value.code, missing.value.param) == ("model_not_found", "model")
    assert (invalid.value.code, invalid.value.param) == ("validation_error", "messages")
    assert (nobody.value.status_code, nobody.value.code) == (503, "no_backend_available")
    assert 1 <= int(nobody.value.response.headers["retry-after"]) <= 60
    assert missing.value.request_id == missing.value.response.headers["x-request-id"]
