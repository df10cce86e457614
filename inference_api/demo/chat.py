"""/v1/chat/completions, its /batch, and /v1/completions."""

from collections.abc import Iterator
from typing import Any

from inference_api.demo import model
from inference_api.demo.generation import Event, Work
from inference_api.demo.model import Generation


class Choices:
    """An answer that is a list of choices, in the chunks that OpenAI began with; here with deltas of text alone."""

    prefix = kind = chunk_kind = ""
    empty: dict[str, Any] = {"delta": {"content": ""}}
    end = b"data: [DONE]\n\n"

    def __init__(self, work: Work) -> None:
        self.work = work

    def document(self) -> dict[str, Any] | str:
        choices = [
            {"index": index, **self.whole(index, one), "logprobs": self.logprobs(one.tokens, []), **_end(one)}
            for index, one in enumerate(self.work.generations)
        ]
        return {**self._head(self.kind), "choices": choices, "usage": self.work.usage}

    def opening(self) -> Iterator[Event]:
        return iter(())

    def token(self, index: int, position: int, token: str) -> Iterator[Event]:
        for content in self.pieces(index, position, token):
            logprobs = self.logprobs([token], self.work.generations[index].tokens[:position])
            end = {"finish_reason": None, "stop_reason": None, "token_ids": None}
            yield self.chunk({"index": index, **content, "logprobs": logprobs, **end})

    def closing(self) -> Iterator[Event]:
        for index, generation in enumerate(self.work.generations):
            yield self.chunk({"index": index, **self.empty, "logprobs": None, **_end(generation)})
        if (options := self.work.asked.stream_options) and options.include_usage:
            yield self.chunk(usage=self.work.usage)

    def chunk(self, *choices: dict[str, Any], **more: Any) -> Event:
        return {**self._head(self.chunk_kind), "choices": choices, **more}

    def whole(self, index: int, generation: Generation) -> dict[str, Any]:
        return {"text": generation.text}

    def pieces(self, index: int, position: int, token: str) -> Iterator[dict[str, Any]]:
        yield {"delta": {"content": token}}

    def logprobs(self, tokens: list[str], before: list[str]) -> dict[str, Any] | None:
        return None

    def _head(self, kind: str) -> dict[str, Any]:
        work = self.work
        return {"id": f"{self.prefix}-{work.id}", "object": kind, "created": work.created, "model": work.model}


class Chat(Choices):
    prefix, kind, chunk_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def whole(self, index: int, generation: Generation) -> dict[str, Any]:
        tool, text = generation.tool, generation.text
        said = {"content": None, "tool_calls": [self._call(index, tool, text)]} if tool else {"content": text}
        return {"message": {"role": "assistant", "refusal": None, "tool_calls": [], **said}}

    def opening(self) -> Iterator[Event]:
        for index in range(len(self.work.generations)):
            delta = {"role": "assistant", "content": ""}
            choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
            # vLLM has this key in the first chunk only.
            yield self.chunk(choice, prompt_token_ids=None)

    def pieces(self, index: int, position: int, token: str) -> Iterator[dict[str, Any]]:
        tool = self.work.generations[index].tool
        if tool is None:
            yield from super().pieces(index, position, token)
            return
        if position == 0:
            yield {"delta": {"tool_calls": [{"index": 0, **self._call(index, tool, "")}]}}
        yield {"delta": {"tool_calls": [{"index": 0, "function": {"arguments": token}}]}}

    def logprobs(self, tokens: list[str], before: list[str]) -> dict[str, Any] | None:
        if not self.work.asked.logprobs:
            return None
        count = self.work.asked.top_logprobs or 0
        content = []
        for token in tokens:
            likeliest = [
                {"token": text, "logprob": value, "bytes": list(text.encode())}
                for text, value in model.logprobs(token, count)
            ]
            content.append({**likeliest[0], "top_logprobs": likeliest[:count]})
        return {"content": content}

    def _call(self, index: int, name: str, arguments: str) -> dict[str, Any]:
        function = {"name": name, "arguments": arguments}
        return {"id": f"chatcmpl-tool-{self.work.id}-{index}", "type": "function", "function": function}


class Completion(Choices):
    prefix, kind, chunk_kind = "cmpl", "text_completion", "text_completion"
    empty = {"text": ""}

    def pieces(self, index: int, position: int, token: str) -> Iterator[dict[str, Any]]:
        yield {"text": token}

    def logprobs(self, tokens: list[str], before: list[str]) -> dict[str, Any] | None:
        if self.work.asked.logprobs is None:
            return None
        likeliest = [model.logprobs(token, self.work.asked.logprobs) for token in tokens]
        start = len("".join(before))
        return {
            "text_offset": [start + len("".join(tokens[:position])) for position in range(len(tokens))],
            "token_logprobs": [first[0][1] for first in likeliest],
            "tokens": tokens,
            "top_logprobs": [dict(one) for one in likeliest],
        }


def _end(generation: Generation) -> dict[str, Any]:
    reason = "tool_calls" if generation.tool and generation.finish_reason == "stop" else generation.finish_reason
    return {"finish_reason": reason, "stop_reason": generation.stop_reason, "token_ids": None}
