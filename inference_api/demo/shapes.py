"""What a toy engine generates, chat completions and completions, in the shapes of vLLM's JSON and events."""

from collections.abc import AsyncIterator, Awaitable, Callable
from itertools import zip_longest
from typing import Any, NamedTuple, Protocol

import orjson

from inference_api.demo.toy import Generation


class Shape(Protocol):
    """How one route names and lays out what was generated."""

    prefix: str
    object: str
    chunk_object: str

    def choice(self, index: int, generation: Generation) -> dict[str, Any]: ...
    def opening(self, index: int) -> dict[str, Any] | None: ...
    def delta(self, index: int, token: str) -> dict[str, Any]: ...
    def finish(self, index: int, generation: Generation) -> dict[str, Any]: ...


class Chat:
    prefix, object, chunk_object = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def choice(self, index: int, generation: Generation) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": generation.text, "refusal": None, "tool_calls": []}
        return {"index": index, "message": message, "logprobs": None, **_end(generation)}

    def opening(self, index: int) -> dict[str, Any]:
        return {"index": index, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}

    def delta(self, index: int, token: str) -> dict[str, Any]:
        rest = {"logprobs": None, "finish_reason": None, "token_ids": None}
        return {"index": index, "delta": {"content": token}, **rest}

    def finish(self, index: int, generation: Generation) -> dict[str, Any]:
        return {"index": index, "delta": {"content": ""}, "logprobs": None, **_end(generation)}


class Completion:
    prefix, object, chunk_object = "cmpl", "text_completion", "text_completion"

    def choice(self, index: int, generation: Generation) -> dict[str, Any]:
        return {"index": index, "text": generation.text, "logprobs": None, **_end(generation)}

    def opening(self, index: int) -> None:
        """A completion has no role to begin with."""

    def delta(self, index: int, token: str) -> dict[str, Any]:
        rest = {"logprobs": None, "finish_reason": None, "stop_reason": None, "token_ids": None}
        return {"index": index, "text": token, **rest}

    def finish(self, index: int, generation: Generation) -> dict[str, Any]:
        return {"index": index, "text": "", "logprobs": None, **_end(generation)}


class Work(NamedTuple):
    """A checked request: what to generate, at what pace, and how to lay it out."""

    shape: Shape
    id: str
    created: int
    model: str
    prompt_tokens: int
    generations: list[Generation]
    # Waits for the time of one token.
    tick: Callable[[], Awaitable[None]]

    @property
    def _steps(self) -> list[tuple[str | None, ...]]:
        """All choices advance together, one token each, as in a batch."""
        return list(zip_longest(*(generation.tokens for generation in self.generations)))

    @property
    def usage(self) -> dict[str, Any]:
        completion = sum(len(generation.tokens) for generation in self.generations)
        total = self.prompt_tokens + completion
        return {"prompt_tokens": self.prompt_tokens, "total_tokens": total, "completion_tokens": completion}

    def document(self) -> dict[str, Any]:
        choices = [self.shape.choice(index, generation) for index, generation in enumerate(self.generations)]
        return {**self._head(self.shape.object), "choices": choices, "usage": self.usage}

    async def finish(self) -> None:
        for _ in self._steps:
            await self.tick()

    async def events(self, include_usage: bool) -> AsyncIterator[bytes]:
        for index in range(len(self.generations)):
            if opening := self.shape.opening(index):
                # vLLM has this key in the first chunk only.
                yield self._event([opening], prompt_token_ids=None)
        for step in self._steps:
            await self.tick()
            for index, token in enumerate(step):
                if token is not None:
                    yield self._event([self.shape.delta(index, token)])
        for index, generation in enumerate(self.generations):
            yield self._event([self.shape.finish(index, generation)])
        if include_usage:
            yield self._event([], usage=self.usage)
        yield b"data: [DONE]\n\n"

    def _event(self, choices: list[dict[str, Any]], **more: Any) -> bytes:
        return b"data: " + orjson.dumps({**self._head(self.shape.chunk_object), "choices": choices, **more}) + b"\n\n"

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}


def _end(generation: Generation) -> dict[str, Any]:
    return {"finish_reason": generation.finish_reason, "stop_reason": generation.stop_reason, "token_ids": None}
