"""The handlers of a toy engine: from a request to paced events, to one document, or to a refusal."""

import asyncio
import base64
import struct
from collections.abc import Awaitable, Callable
from functools import partial
from typing import TypeVar

from starlette.requests import Request
from starlette.responses import Response

from inference_api import __version__
from inference_api.demo import toy
from inference_api.demo.responses import JSON, EventStream
from inference_api.demo.schema import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    EmbeddingRequest,
    EngineError,
    ModelRequest,
    TokenizeRequest,
    bad_request,
    parse,
    texts,
)
from inference_api.demo.shapes import Chat, Completion, Shape, Work
from inference_api.demo.telemetry import Record, Telemetry

_DIMENSIONS = 64

_Asked = TypeVar("_Asked", bound=ModelRequest)


class Engine:
    """One toy model, and what it tells of its work."""

    def __init__(
        self,
        model: str,
        tokens_per_second: float,
        max_model_len: int,
        clock: Callable[[], float],
        sleep: Callable[[float], Awaitable[None]],
        new_id: Callable[[], str],
    ) -> None:
        if not tokens_per_second > 0:
            raise ValueError(f"tokens_per_second must be more than 0, not {tokens_per_second}")
        # configuration
        self._model = model
        self._interval = 1 / tokens_per_second
        self._max_model_len = max_model_len
        self._clock = clock
        self._sleep = sleep
        self._new_id = new_id
        # shared
        self._telemetry = Telemetry(model, max_model_len)

    # Generation

    async def chat(self, request: Request) -> Response:
        return await self._generate(request, await self._read(request, ChatRequest), Chat())

    async def completions(self, request: Request) -> Response:
        return await self._generate(request, await self._read(request, CompletionRequest), Completion())

    async def _generate(self, request: Request, asked: ChatRequest | CompletionRequest, shape: Shape) -> Response:
        work, record = self._work(request, asked, shape)
        if asked.stream:
            return EventStream(work.events(asked.include_usage), partial(self._telemetry.running, record))
        await self._finish(work, record, request)
        return JSON(work.document())

    async def _finish(self, work: Work, record: Record, request: Request) -> None:
        """Wait until the work is done or the client is gone; in the second case nobody reads the answer."""
        # The body has been read: all that can still be received is that the client left.
        tasks = asyncio.ensure_future(work.finish()), asyncio.ensure_future(request.receive())
        with self._telemetry.running(record):
            try:
                await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for task in tasks:
                    task.cancel()

    def _work(self, request: Request, asked: ChatRequest | CompletionRequest, shape: Shape) -> tuple[Work, Record]:
        prompts = asked.prompts
        limit = self._limit(asked, max(prompt.length for prompt in prompts))
        generations = [
            toy.generate(toy.reply(self._model, said), limit, asked.stops)
            for said in asked.said
            for _ in range(asked.n or 1)
        ]
        prompt_tokens = sum(prompt.length for prompt in prompts)
        record = Record(self._telemetry, prompt_tokens, generations)
        work = Work(
            shape=shape,
            id=f"{shape.prefix}-{self._request_id(request)}",
            created=int(self._clock()),
            model=self._model,
            prompt_tokens=prompt_tokens,
            generations=generations,
            tick=partial(self._tick, record),
        )
        return work, record

    def _limit(self, asked: ChatRequest | CompletionRequest, prompt_tokens: int) -> int:
        room = self._max_model_len - prompt_tokens
        if asked.limit is not None and asked.limit < 1:
            raise bad_request(f"max_tokens must be at least 1, got {asked.limit}.", "max_tokens")
        if asked.limit is not None and asked.limit > self._max_model_len:
            message = f"max_tokens={asked.limit} cannot be greater than max_model_len={self._max_model_len}."
            raise bad_request(message, "max_tokens")
        if room < (asked.limit or 1):
            message = (
                f"This model's maximum context length is {self._max_model_len} tokens. However, your request has "
                f"{prompt_tokens} input tokens and asks for {asked.limit or 1} more."
            )
            raise bad_request(message, "input_text")
        return asked.limit or room

    async def _tick(self, record: Record) -> None:
        await self._sleep(self._interval)
        record.step()

    # Everything else

    async def embeddings(self, request: Request) -> Response:
        asked = await self._read(request, EmbeddingRequest)
        inputs = texts(asked.input)
        vectors = [toy.embed(one.text, asked.dimensions or _DIMENSIONS) for one in inputs]
        data = [
            {"index": index, "object": "embedding", "embedding": _encoded(vector, asked.encoding_format)}
            for index, vector in enumerate(vectors)
        ]
        count = sum(one.length for one in inputs)
        head = {"id": f"embd-{self._request_id(request)}", "object": "list", "created": int(self._clock())}
        usage = {"prompt_tokens": count, "total_tokens": count, "completion_tokens": 0}
        return JSON({**head, "model": self._model, "data": data, "usage": usage})

    async def tokenize(self, request: Request) -> Response:
        tokens = toy.tokenize((await self._read(request, TokenizeRequest)).text)
        ids = [toy.token_id(token) for token in tokens]
        return JSON({"count": len(ids), "max_model_len": self._max_model_len, "tokens": ids, "token_strs": None})

    async def detokenize(self, request: Request) -> Response:
        asked = await self._read(request, DetokenizeRequest)
        return JSON({"prompt": "".join(toy.token_text(number) for number in asked.tokens)})

    async def models(self, request: Request) -> Response:
        card = {
            "id": self._model,
            "object": "model",
            "created": int(self._clock()),
            "owned_by": "inference-api-demo",
            "root": self._model,
            "parent": None,
            "max_model_len": self._max_model_len,
            "permission": [],
        }
        return JSON({"object": "list", "data": [card]})

    async def health(self, request: Request) -> Response:
        return Response()

    async def version(self, request: Request) -> Response:
        return JSON({"version": f"{__version__}+toy"})

    async def metrics(self, request: Request) -> Response:
        return Response(self._telemetry.page(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def _read(self, request: Request, kind: type[_Asked]) -> _Asked:
        asked = parse(kind, await request.body(), request.headers.get("content-type", ""))
        if asked.model and asked.model != self._model:
            raise EngineError(404, "NotFoundError", f"The model `{asked.model}` does not exist.", "model")
        return asked

    def _request_id(self, request: Request) -> str:
        return request.headers.get("x-request-id") or self._new_id()


def _encoded(vector: list[float], encoding: str | None) -> list[float] | str:
    if encoding != "base64":
        return vector
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
