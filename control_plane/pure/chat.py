"""A chat completion as the playground asks for it, and the answer as it comes."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

# Bytes of one event at most; what is longer is no event of a chat.
_LONGEST = 4 * 1024 * 1024
# Characters of an answer that are kept
MOST = 1024 * 1024


class Turn(NamedTuple):
    """One message. `role`: system, user or assistant."""

    role: str
    content: str


class Question(NamedTuple):
    """`prompt`: id, version and variables of a stored prompt. `parameters`: as the API names them."""

    turns: tuple[Turn, ...] = ()
    prompt: Mapping[str, Any] | None = None
    parameters: Mapping[str, Any] = {}

    def body(self, model: str) -> dict[str, Any]:
        """Without `stream`."""
        prompt = {} if self.prompt is None else {"prompt": self.prompt}
        return {"model": model, **prompt, "messages": [turn._asdict() for turn in self.turns], **self.parameters}


def request_body(question: Question, model: str) -> bytes:
    """What the router gets: a stream with usage at its end."""
    streamed = {"stream": True, "stream_options": {"include_usage": True}}
    # Half of a surrogate pair is no text; a browser sends none.
    return json.dumps({**question.body(model), **streamed}, ensure_ascii=False).encode("utf-8", "replace")


class Problem(NamedTuple):
    """An error of the router, or of an engine."""

    message: str
    code: str | None = None


@dataclass
class Transcript:
    """An answer, read as it comes: events of a stream, or JSON as a whole. Engines may send anything.

    `full`: it is longer than anybody reads; the rest need not be read.
    """

    text: str = ""
    reasoning: str = ""
    finish: str | None = None
    model: str | None = None
    usage: Mapping[str, Any] = field(default_factory=dict)
    problem: Problem | None = None
    ended: bool = False
    full: bool = False
    _rest: bytes = b""

    def feed(self, data: bytes) -> bool:
        """Read some bytes of a stream; returns whether there was text in them."""
        before = len(self.text) + len(self.reasoning)
        *lines, self._rest = (self._rest + data).split(b"\n")
        if len(self._rest) > _LONGEST:
            self._rest, self.problem = b"", Problem("The answer has an event that is too long.")
        for line in lines:
            if line.startswith(b"data:") and not self.full:
                self._read(line[5:].strip())
        return len(self.text) + len(self.reasoning) > before

    def take(self, body: bytes) -> None:
        """Read a whole answer that is no stream."""
        self._read(body)
        self.ended = True

    @property
    def input_tokens(self) -> int | None:
        return _count(self.usage.get("prompt_tokens"))

    @property
    def output_tokens(self) -> int | None:
        return _count(self.usage.get("completion_tokens"))

    @property
    def cached_tokens(self) -> int | None:
        details = self.usage.get("prompt_tokens_details")
        return _count(details.get("cached_tokens")) if isinstance(details, dict) else None

    def _read(self, data: bytes) -> None:
        if data == b"[DONE]":
            self.ended = True
            return
        try:
            found = _object(json.loads(data))
            calls = _calls(found)
        except (ValueError, RecursionError):
            return
        if error := _object(found.get("error")):
            message = _text(error.get("message")) or "The answer ended with an error."
            self.problem = Problem(message, _text(str(error.get("code") or "")) or None)
        self.model = _text(found.get("model")) or self.model
        self.usage = _object(found.get("usage")) or self.usage
        for choice in _list(found.get("choices")):
            self._add(_object(choice))
        self.text += calls
        if len(self.text) + len(self.reasoning) > MOST:
            self.full = True
            self.problem = self.problem or Problem(
                f"The answer is longer than {MOST} characters: the rest is left out."
            )

    def _add(self, choice: Mapping[str, Any]) -> None:
        part = _part(choice)
        self.text += _text(part.get("content")) or _text(part.get("refusal"))
        self.reasoning += _text(part.get("reasoning_content")) or _text(part.get("reasoning"))
        self.finish = _text(choice.get("finish_reason")) or self.finish


def _part(choice: Mapping[str, Any]) -> Mapping[str, Any]:
    return _object(choice.get("delta")) or _object(choice.get("message"))


def _calls(found: Mapping[str, Any]) -> str:
    """Of tools, a line for each."""
    parts = [_part(_object(choice)) for choice in _list(found.get("choices"))]
    calls = [call for part in parts for call in _list(part.get("tool_calls"))]
    return _text("".join(f"{json.dumps(call, ensure_ascii=False)}\n" for call in calls))


def _object(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _text(value: Any) -> str:
    """Half of a surrogate pair is no text, and no page can have it."""
    return value.encode("utf-8", "replace").decode() if isinstance(value, str) else ""


def _count(value: Any) -> int | None:
    return value if type(value) is int and 0 <= value < 2**53 else None
