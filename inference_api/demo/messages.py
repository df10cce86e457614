"""/v1/messages: Anthropic's API."""

from collections.abc import Iterator
from typing import Any

import orjson

from inference_api.demo.generation import Event, Work

_REASONS = {"stop": "end_turn", "length": "max_tokens"}


class Messages:
    """One message, with one block: a text or the use of a tool."""

    end = b""

    def __init__(self, work: Work) -> None:
        self._work = work
        (self._generation,) = work.generations

    def document(self) -> dict[str, Any]:
        text, tool = self._generation.text, self._generation.tool
        whole = self._generation.finish_reason == "stop"
        filled: dict[str, Any] = {"input": orjson.loads(text) if whole else {}} if tool else {"text": text}
        return self._message([{**self._block, **filled}], self._end, self._usage(self._work.completion_tokens))

    def opening(self) -> Iterator[Event]:
        end = {"stop_reason": None, "stop_sequence": None}
        yield {"type": "message_start", "message": self._message([], end, self._usage(0))}
        yield {"type": "content_block_start", "index": 0, "content_block": self._block}

    def token(self, index: int, position: int, token: str) -> Iterator[Event]:
        text = {"type": "text_delta", "text": token}
        delta = {"type": "input_json_delta", "partial_json": token} if self._generation.tool else text
        yield {"type": "content_block_delta", "index": 0, "delta": delta}

    def closing(self) -> Iterator[Event]:
        yield {"type": "content_block_stop", "index": 0}
        yield {"type": "message_delta", "delta": self._end, "usage": self._usage(self._work.completion_tokens)}
        yield {"type": "message_stop"}

    @property
    def _block(self) -> dict[str, Any]:
        if tool := self._generation.tool:
            return {"type": "tool_use", "id": f"toolu_{self._work.id}", "name": tool, "input": {}}
        return {"type": "text", "text": ""}

    @property
    def _end(self) -> dict[str, Any]:
        reason, stop = self._generation.finish_reason, self._generation.stop_reason
        tool_use = self._generation.tool and reason == "stop"
        return {
            "stop_reason": "tool_use" if tool_use else "stop_sequence" if stop else _REASONS[reason],
            "stop_sequence": stop,
        }

    def _usage(self, output: int) -> dict[str, int]:
        return {"input_tokens": self._work.prompt_tokens, "output_tokens": output}

    def _message(self, content: list[Any], end: dict[str, Any], usage: dict[str, int]) -> dict[str, Any]:
        head = {"id": f"msg_{self._work.id}", "type": "message", "role": "assistant", "model": self._work.model}
        return {**head, "content": content, **end, "usage": usage}
