"""Engines that list models and LoRA adapters as vLLM does, and may change what they list."""

from typing import Any

import orjson

from tests.fakes import FakeEngine, Line, Received, answer, json_response, raw

NOT_FOUND = {
    "error": {"message": "The model `x` does not exist.", "type": "NotFoundError", "param": "model", "code": 404}
}


def card(name: str, parent: str | None = None, root: str | None = None, **more: Any) -> dict[str, Any]:
    """A card as vLLM's: adapters have no length."""
    length = None if parent else 1024
    root = root or (f"/loras/{name}" if parent else "/models/base")
    return {"id": name, "object": "model", "root": root, "parent": parent, "max_model_len": length, **more}


class ListingEngine(FakeEngine):
    """`m` and its adapters; a request for a name that it does not list is a 404, as vLLM's."""

    def __init__(self, *adapters: str, names: tuple[str, ...] = ("m",)) -> None:
        super().__init__(self._answer)
        self.names = names
        self.adapters: list[str] = []
        self.says(*adapters)

    def says(self, *adapters: str) -> None:
        """From now on it has, and lists, these adapters."""
        self.adapters = [*adapters]
        self.lists(*(card(name) for name in self.names), *(card(name, self.names[0]) for name in adapters))

    def lists(self, *cards: Any) -> None:
        self.page = raw(json_response({"object": "list", "data": [*cards]}))

    @property
    def models(self) -> list[str]:
        """What it was asked for."""
        return [orjson.loads(request.body)["model"] for request in self.requests]

    async def _answer(self, request: Received, line: Line) -> None:
        if self.models[-1] in {*self.names, *self.adapters}:
            await answer(request, line)
        else:
            await line.send(json_response(NOT_FOUND, "404 Not Found"))
