"""What stands in for the providers: each one's path, its header for the key, and the shapes of its errors."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import orjson

from tests.fakes import COMPLETION, DONE, LAST_CHUNK, SSE_HEAD, FakeEngine, Line, Received, chunk, event, json_response

FOLDER = Path(__file__).parents[1] / "examples" / "providers"
KEY = "sk-right"
# What a request of OpenAI's chat API usually has
_CHAT_FIELDS = ("model", "messages", "stream", "max_tokens", "temperature")
MESSAGE = {
    "id": "msg_1",
    "type": "message",
    "role": "assistant",
    "model": "claude",
    "content": [{"type": "text", "text": "hi"}],
    "stop_reason": "end_turn",
    "usage": {"input_tokens": 3, "output_tokens": 5},
}


class Refusal(NamedTuple):
    """An answer of a provider that is no success; `{key}` in it is the wrong key."""

    status: str
    document: Any

    def answer(self, key: str = "", headers: bytes = b"") -> bytes:
        text = orjson.dumps(self.document).decode().replace("{key}", key)
        return json_response(orjson.loads(text), self.status, headers)


class Provider(NamedTuple):
    """One provider. `file`: its example; `path`: where requests arrive; `key`: name and beginning of the header.

    `unknown_field` is None where unknown fields are ignored. `needs`: further headers, without which it refuses.
    """

    file: str
    model: str
    path: str
    key: tuple[str, str]
    wrong_key: Refusal
    not_found: Refusal
    throttled: Refusal
    unknown_field: Refusal | None
    fields: Sequence[str] = (*_CHAT_FIELDS, "stream_options")
    needs: tuple[tuple[str, str], ...] = ()
    route: str = "/v1/chat/completions"
    answer: Any = COMPLETION


def _openai(message: str, kind: str = "invalid_request_error", code: Any = None) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}


def _anthropic(kind: str, message: str) -> dict[str, Any]:
    return {"type": "error", "error": {"type": kind, "message": message}, "request_id": "req_1"}


def _google(code: int, status: str, message: str) -> list[dict[str, Any]]:
    return [{"error": {"code": code, "message": message, "status": status}}]


_EXTRA = {"type": "extra_forbidden", "loc": ["body", "nonsense"], "msg": "Extra inputs are not permitted", "input": 1}
_BEARER = ("authorization", "Bearer ")
PROVIDERS = (
    Provider(
        "openai",
        "gpt-5-mini",
        "/v1/chat/completions",
        _BEARER,
        Refusal("401 Unauthorized", _openai("Incorrect API key provided: {key}.", code="invalid_api_key")),
        Refusal("404 Not Found", _openai("Invalid URL (POST /v1/nowhere/chat/completions)")),
        Refusal("429 Too Many Requests", _openai("Rate limit reached", "requests", "rate_limit_exceeded")),
        Refusal("400 Bad Request", _openai("Unknown parameter: 'nonsense'.", code="unknown_parameter")),
        needs=(("openai-project", "proj_example"),),
    ),
    Provider(
        "anthropic",
        "claude",
        "/v1/messages",
        ("x-api-key", ""),
        Refusal("401 Unauthorized", _anthropic("authentication_error", "invalid x-api-key")),
        Refusal("404 Not Found", _anthropic("not_found_error", "Not Found")),
        Refusal("429 Too Many Requests", _anthropic("rate_limit_error", "Number of requests has exceeded your limit")),
        Refusal("400 Bad Request", _anthropic("invalid_request_error", "nonsense: Extra inputs are not permitted")),
        fields=_CHAT_FIELDS,
        needs=(("anthropic-version", "2023-06-01"),),
        route="/v1/messages",
        answer=MESSAGE,
    ),
    Provider(
        "anthropic-chat",
        "claude-chat",
        "/v1/chat/completions",
        _BEARER,
        Refusal("401 Unauthorized", _openai("invalid x-api-key", code="authentication_error")),
        Refusal("404 Not Found", _openai("Not Found", code="not_found_error")),
        Refusal("429 Too Many Requests", _openai("Too many requests", code="rate_limit_error")),
        None,
    ),
    Provider(
        "azure",
        "gpt-5-mini",
        "/openai/v1/chat/completions",
        ("api-key", ""),
        Refusal("401 Unauthorized", {"error": {"code": "401", "message": "Access denied due to invalid key"}}),
        Refusal("404 Not Found", {"error": {"code": "404", "message": "Resource not found"}}),
        Refusal("429 Too Many Requests", {"error": {"code": "429", "message": "Requests have exceeded the limit"}}),
        Refusal("400 Bad Request", _openai("Unrecognized request argument supplied: nonsense")),
    ),
    Provider(
        "gemini",
        "gemini",
        "/v1beta/openai/chat/completions",
        _BEARER,
        # Not 401: see docs/providers.md
        Refusal("400 Bad Request", _google(400, "INVALID_ARGUMENT", "API key not valid.")),
        Refusal("404 Not Found", _google(404, "NOT_FOUND", "Requested entity was not found.")),
        Refusal("429 Too Many Requests", _google(429, "RESOURCE_EXHAUSTED", "You exceeded your current quota.")),
        Refusal("400 Bad Request", _google(400, "INVALID_ARGUMENT", 'Unknown name "nonsense": Cannot find field.')),
    ),
    Provider(
        "mistral",
        "mistral-small",
        "/v1/chat/completions",
        _BEARER,
        Refusal("401 Unauthorized", {"message": "Unauthorized", "request_id": "1"}),
        Refusal("404 Not Found", {"message": "no Route matched with those values"}),
        Refusal("429 Too Many Requests", {"message": "Requests rate limit exceeded"}),
        Refusal("422 Unprocessable Entity", {"object": "error", "message": {"detail": [_EXTRA]}}),
        fields=_CHAT_FIELDS,
    ),
    Provider(
        "together",
        "llama-3.3-70b",
        "/v1/chat/completions",
        _BEARER,
        Refusal("401 Unauthorized", _openai("Invalid API key provided.", code="invalid_api_key")),
        Refusal("404 Not Found", _openai("Not found")),
        Refusal("429 Too Many Requests", _openai("You have reached the rate limit", "model_rate_limit")),
        None,
    ),
    Provider(
        "groq",
        "llama-3.3-70b",
        "/openai/v1/chat/completions",
        _BEARER,
        Refusal("401 Unauthorized", _openai("Invalid API Key", code="invalid_api_key")),
        Refusal("404 Not Found", _openai("Unknown request URL: POST /nowhere", code="unknown_url")),
        Refusal("429 Too Many Requests", _openai("Rate limit reached", "tokens", "rate_limit_exceeded")),
        Refusal("400 Bad Request", _openai("property 'nonsense' is unsupported")),
    ),
    Provider(
        "openrouter",
        "llama-3.3-70b",
        "/api/v1/chat/completions",
        _BEARER,
        Refusal("401 Unauthorized", {"error": {"message": "User not found.", "code": 401}}),
        Refusal("404 Not Found", {"error": {"message": "Not Found", "code": 404}}),
        Refusal("429 Too Many Requests", {"error": {"message": "Rate limit exceeded", "code": 429}}),
        None,
        needs=(("http-referer", "https://app.example"), ("x-title", "Example")),
    ),
    Provider(
        "cohere",
        "command-a",
        "/compatibility/v1/chat/completions",
        _BEARER,
        Refusal("401 Unauthorized", {"id": "1", "message": "invalid api token"}),
        Refusal("404 Not Found", {"id": "1", "message": "Not Found"}),
        Refusal("429 Too Many Requests", {"id": "1", "message": "You are using a Trial key"}),
        Refusal("422 Unprocessable Entity", {"id": "1", "message": "invalid request: unknown field 'nonsense'"}),
    ),
)


class FakeProvider(FakeEngine):
    """A provider on a free port. `is_busy`: it answers 429 with this Retry-After."""

    def __init__(self, provider: Provider) -> None:
        super().__init__(self._answer)
        self.provider = provider
        self.retry_after: int | None = None

    async def _answer(self, request: Received, line: Line) -> None:
        await line.send(*self._parts(request))

    def _parts(self, request: Received) -> Sequence[bytes]:
        provider = self.provider
        name, scheme = provider.key
        given = [value for header, value in request.headers if header == name]
        if request.target != provider.path:
            return [provider.not_found.answer()]
        if given != [scheme + KEY]:
            return [provider.wrong_key.answer(" ".join(given))]
        if any(request.header(needed) != value for needed, value in provider.needs):
            return [json_response({"error": {"message": f"needed: {provider.needs}"}}, "400 Bad Request")]
        if self.retry_after is not None:
            return [provider.throttled.answer(headers=b"retry-after: %d\r\n" % self.retry_after)]
        body = orjson.loads(request.body)
        if provider.unknown_field is not None and body.keys() - set(provider.fields):
            return [provider.unknown_field.answer()]
        if body.get("stream"):
            return [SSE_HEAD, chunk(event()), chunk(DONE) + LAST_CHUNK]
        return [json_response(provider.answer)]


def example(file: str, url: str) -> str:
    """The example of a provider, with its backends at `url`."""
    return re.sub(r"https://[^\"]+\"\]", f'{url}"]', (FOLDER / f"{file}.yaml").read_text())
