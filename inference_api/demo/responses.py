"""/v1/responses: typed events, each with a number."""

from collections.abc import Iterator
from itertools import count
from typing import Any

from inference_api.demo.generation import Event, Work
from inference_api.demo.requests import Respond


class Responses:
    """One response, with one item: a message or a function call."""

    end = b""

    def __init__(self, work: Work) -> None:
        assert isinstance(work.asked, Respond)
        self._work, self._asked = work, work.asked
        (self._generation,) = work.generations
        self._status = "completed" if self._generation.finish_reason == "stop" else "incomplete"
        self._numbers = count()
        self._item_id = f"{'fc' if self._generation.tool else 'msg'}_{work.id}"
        self._place = {"item_id": self._item_id, "output_index": 0}
        self._part_place = {**self._place, "content_index": 0}

    def document(self) -> dict[str, Any]:
        work = self._work
        details = {
            "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
            "output_tokens_details": {"reasoning_tokens": 0},
        }
        tokens = {"input_tokens": work.prompt_tokens, "output_tokens": work.completion_tokens}
        usage = {**tokens, "total_tokens": work.usage["total_tokens"], **details}
        text = self._generation.text
        return self._response(self._status, [self._item(text, self._status)], usage)

    def opening(self) -> Iterator[Event]:
        for kind in ("created", "in_progress"):
            yield self._event(kind, response=self._response("in_progress", [], None))
        yield self._event("output_item.added", output_index=0, item=self._item(None, "in_progress"))
        if not self._generation.tool:
            yield self._event("content_part.added", **self._part_place, part=_part(""))

    def token(self, index: int, position: int, token: str) -> Iterator[Event]:
        if self._generation.tool:
            yield self._event("function_call_arguments.delta", **self._place, delta=token)
        else:
            yield self._event("output_text.delta", **self._part_place, delta=token, logprobs=[])

    def closing(self) -> Iterator[Event]:
        text, tool = self._generation.text, self._generation.tool
        if tool:
            yield self._event("function_call_arguments.done", **self._place, name=tool, arguments=text)
        else:
            yield self._event("output_text.done", **self._part_place, text=text, logprobs=[])
            yield self._event("content_part.done", **self._part_place, part=_part(text))
        yield self._event("output_item.done", output_index=0, item=self._item(text, self._status))
        # As vLLM: of what was cut, only the status says so.
        yield self._event("completed", response=self.document())

    def _event(self, kind: str, **fields: Any) -> Event:
        return {"type": f"response.{kind}", "sequence_number": next(self._numbers), **fields}

    def _item(self, text: str | None, status: str) -> dict[str, Any]:
        """The message or call; `text` is None before there is any."""
        head = {"id": self._item_id, "status": status}
        if self._generation.tool:
            call = {"call_id": f"call_{self._work.id}", "name": self._generation.tool, "arguments": text or ""}
            return {**head, "type": "function_call", **call}
        content = [] if text is None else [_part(text)]
        return {**head, "type": "message", "role": "assistant", "content": content}

    def _response(self, status: str, output: list[Any], usage: dict[str, Any] | None) -> dict[str, Any]:
        asked = self._asked
        tools = [{"type": "function", **tool.model_dump(), "strict": None} for tool in asked.tools or []]
        return {
            "id": f"resp_{self._work.id}",
            "object": "response",
            "created_at": self._work.created,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": asked.system and asked.system.text,
            "max_output_tokens": asked.limit,
            "metadata": None,
            "model": self._work.model,
            "output": output,
            "parallel_tool_calls": True,
            "temperature": 1.0 if asked.temperature is None else asked.temperature,
            "tool_choice": asked.tool_choice or "auto",
            "tools": tools,
            "top_p": asked.top_p or 1.0,
            "usage": usage,
        }


def _part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": None}
