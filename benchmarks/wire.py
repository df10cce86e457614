"""The bytes of the benchmark: what the client asks, what the engine answers, and the check that one fits the other."""

import gzip
import json
import math
import re
from dataclasses import dataclass

_KEY = b"sk-benchmark"
MODEL = "llama-3-8b"
EMBEDDINGS_PATH = "/v1/embeddings"

_ID = "chatcmpl-9f86d081884c7d659a2feaa0c55ad015"
_PROMPT = "Explain in one sentence why the sky is blue and why it turns red in the evening."
_ANSWER = (
    "Short wavelengths scatter more on air molecules than long ones, so blue reaches the eye from everywhere, while"
    " in the evening the longer path takes the blue out and leaves the red."
)


class BadAnswer(Exception):
    """An answer that is not what the engine sent, or not a complete one. The run stops: its numbers mean nothing."""


# What the engine says.


def _dump(document: object) -> bytes:
    return json.dumps(document, separators=(",", ":")).encode()


def _answer() -> bytes:
    message: dict[str, object] = {
        "role": "assistant",
        "content": _ANSWER,
        "refusal": None,
        "tool_calls": [],
        "reasoning_content": None,
    }
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": "stop", "stop_reason": None}
    usage = {"prompt_tokens": 27, "total_tokens": 71, "completion_tokens": 44, "prompt_tokens_details": None}
    head = {"id": _ID, "object": "chat.completion", "created": 1763690000, "model": MODEL}
    return _dump({**head, "choices": [choice], "usage": usage})


def _chunk(delta: dict[str, str], finish: str | None = None) -> dict[str, object]:
    choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
    head = {"id": _ID, "object": "chat.completion.chunk", "created": 1763690000, "model": MODEL}
    return {**head, "choices": [choice]}


def _event(document: object) -> bytes:
    return b"data: " + _dump(document) + b"\n\n"


def frame(event: bytes) -> bytes:
    """One piece of a chunked body."""
    return b"%x\r\n%b\r\n" % (len(event), event)


def _embeddings() -> bytes:
    """One vector of a megabyte of text: as many digits as an engine sends, in no pattern that repeats soon."""
    vector = [round(math.sin(n * n), 17) for n in range(51_000)]
    data = [{"index": 0, "object": "embedding", "embedding": vector}]
    usage = {"prompt_tokens": 27, "total_tokens": 27, "completion_tokens": 0, "prompt_tokens_details": None}
    head = {"id": _ID.replace("chatcmpl", "embd"), "object": "list", "created": 1763690000, "model": MODEL}
    return _dump({**head, "data": data, "usage": usage})


ANSWER = _answer()
EMBEDDINGS = _embeddings()
# Both end like this, and nothing within them does.
JSON_END = ANSWER[-20:]
MODELS = _dump(
    {"object": "list", "data": [{"id": MODEL, "object": "model", "created": 1763690000, "owned_by": "vllm"}]}
)
_STAMP_WIDTH = 20
_STAMPED = _event(_chunk({"content": f" {'0' * _STAMP_WIDTH}"}))
_BEFORE, _AFTER = (frame(_STAMPED)).split(b"0" * _STAMP_WIDTH)
FIRST_EVENT = _event(_chunk({"role": "assistant", "content": ""}))
_LAST_EVENT = _event(_chunk({"content": ""}, "stop"))
_USAGE_EVENT = _event(
    {**_chunk({}), "choices": [], "usage": {"prompt_tokens": 27, "total_tokens": 227, "completion_tokens": 200}}
)
STREAM_END = frame(_LAST_EVENT) + frame(_USAGE_EVENT) + frame(b"data: [DONE]\n\n") + b"0\r\n\r\n"
STREAM_HEAD = (
    b"HTTP/1.1 200 OK\r\ndate: Fri, 21 Nov 2025 02:00:00 GMT\r\nserver: uvicorn\r\n"
    b"content-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n"
)
STAMP = re.compile(rb'"content": ?" (\d{%d})"' % _STAMP_WIDTH)


def stamped_frame(now: int) -> bytes:
    """An event that carries the moment it was sent, so that the client can tell how long the router held it."""
    return b"%b%020d%b" % (_BEFORE, now, _AFTER)


# What the client asks.


def request(port: int, tokens: int = 0, interval: float = 0.0, prompt: int = 0, model: str = MODEL) -> bytes:
    """A chat request as the OpenAI SDK sends it; with `tokens`, for a stream of that many stamped events.

    `prompt`: bytes of text to ask with; 0 for a short question.

    `seed` tells the engine the milliseconds between two events: a field that every router knows and passes.
    """
    text = (_PROMPT + "\n") * (prompt // len(_PROMPT)) if prompt else _PROMPT
    body: dict[str, object] = {
        "model": model,
        "messages": [{"role": "system", "content": "You are terse."}, {"role": "user", "content": text}],
        "temperature": 0.7,
        "max_tokens": tokens or 64,
        "seed": round(interval * 1000),
    }
    if tokens:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    return _post(port, "/v1/chat/completions", _dump(body))


def embeddings_request(port: int) -> bytes:
    """A short question with a long answer."""
    return _post(port, EMBEDDINGS_PATH, _dump({"model": MODEL, "input": _PROMPT, "encoding_format": "float"}))


def with_key(request: bytes, key: str) -> bytes:
    """The same request with another key."""
    return request.replace(_KEY, key.encode())


def _post(port: int, path: str, content: bytes) -> bytes:
    head = (
        f"POST {path} HTTP/1.1",
        f"Host: 127.0.0.1:{port}",
        "Accept-Encoding: gzip, deflate",
        "Connection: keep-alive",
        "Accept: application/json",
        "Content-Type: application/json",
        "User-Agent: OpenAI/Python 2.8.0",
        "X-Stainless-Lang: python",
        "X-Stainless-Package-Version: 2.8.0",
        "X-Stainless-OS: Linux",
        "X-Stainless-Arch: x64",
        "X-Stainless-Runtime: CPython",
        "X-Stainless-Runtime-Version: 3.11.7",
        "X-Stainless-Async: async:asyncio",
        "X-Stainless-Retry-Count: 0",
        "X-Stainless-Read-Timeout: 600",
        f"Authorization: Bearer {_KEY.decode()}",
        f"Content-Length: {len(content)}",
    )
    return "\r\n".join(head).encode() + b"\r\n\r\n" + content


# What the client checks, after the measured part.


@dataclass(frozen=True, slots=True)
class Checked:
    """What an answer held: its events (none in a JSON answer), and whether the body is the engine's, byte for byte."""

    events: int
    exact: bool


def check(raw: bytes, tokens: int) -> Checked:
    """Read a whole response, head and all. Raises BadAnswer."""
    body = _body(raw)
    return _check_stream(body, tokens) if tokens else _check_json(body)


def check_embeddings(raw: bytes) -> Checked:
    """The same for an answer with embeddings. Raises BadAnswer."""
    body = _body(raw)
    if body == EMBEDDINGS:
        return Checked(0, True)
    try:
        vector = json.loads(body)["data"][0]["embedding"]
    except (ValueError, LookupError, TypeError):
        raise BadAnswer(f"these are no embeddings: {body[:300]!r}") from None
    if vector != json.loads(EMBEDDINGS)["data"][0]["embedding"]:
        raise BadAnswer("the embeddings are not the engine's")
    return Checked(0, False)


def _body(raw: bytes) -> bytes:
    head, _, body = raw.partition(b"\r\n\r\n")
    head = head.lower()
    if b"\r\ntransfer-encoding: chunked" in head:
        body = _dechunk(body)
    # No engine does this, but one router does.
    return gzip.decompress(body) if b"\r\ncontent-encoding: gzip" in head else body


def _check_json(body: bytes) -> Checked:
    try:
        content = json.loads(body)["choices"][0]["message"]["content"]
    except (ValueError, LookupError, TypeError):
        raise BadAnswer(f"this is not a chat completion: {body[:300]!r}") from None
    if content != _ANSWER:
        raise BadAnswer(f"the answer says {content!r}, the engine said {_ANSWER!r}")
    return Checked(0, body == ANSWER)


def _check_stream(body: bytes, tokens: int) -> Checked:
    events = [event for event in body.split(b"\n\n") if event.startswith(b"data:")]
    if not events or events[-1] not in (b"data: [DONE]", b"data:[DONE]"):
        raise BadAnswer(f"the stream does not end with [DONE] but with {body[-300:]!r}")
    if (stamps := len(STAMP.findall(body))) != tokens:
        raise BadAnswer(f"the stream has {stamps} stamped events, the engine sent {tokens}")
    blank = STAMP.sub(b'"content":" %b"' % (b"0" * _STAMP_WIDTH), body)
    sent = FIRST_EVENT + _STAMPED * tokens + _LAST_EVENT + _USAGE_EVENT + b"data: [DONE]\n\n"
    return Checked(len(events) - 1, blank == sent)


def _dechunk(body: bytes) -> bytes:
    pieces: list[bytes] = []
    at = 0
    while True:
        end = body.find(b"\r\n", at)
        try:
            size = int(body[at:end].split(b";")[0], 16)
        except ValueError:
            raise BadAnswer(f"broken chunk framing at byte {at}: {body[at : at + 80]!r}") from None
        if not size:
            return b"".join(pieces)
        pieces.append(body[end + 2 : end + 2 + size])
        at = end + 4 + size
