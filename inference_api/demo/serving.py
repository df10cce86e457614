"""The engine's handlers: from a request to paced events, to one document, or to a rejection."""

import asyncio
import random
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, NamedTuple, TypeVar

import orjson
from starlette.datastructures import UploadFile
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from inference_api import __version__
from inference_api.demo import model
from inference_api.demo.generation import API, JSON, EventStream, Work, stream
from inference_api.demo.instances import Schema, instance
from inference_api.demo.pooling import Card
from inference_api.demo.requests import Asked, Chat, Detokenize, EngineError, Generate, Pool, parse
from inference_api.demo.telemetry import Record, Telemetry

_Read = TypeVar("_Read", bound=Asked)
# After so many tokens a stream that fails breaks off.
_BREAKS_AFTER = 3
_FAILS = "The demo engine fails now and then."
Handler = Callable[[Request], Awaitable[Response]]


class Faults(NamedTuple):
    """`delay`: seconds before the first token; `rate`: share of requests, 0 to 1, that fail, with this status."""

    delay: float = 0
    rate: float = 0
    status: int = 503
    random: Callable[[], float] = random.random


class BrokenOff(Exception):
    """A stream that ends in its middle, as that of an engine that crashes."""


class Engine:
    """One demo model and its metrics. `clock`: seconds since 1970; `sleep`: waits for seconds."""

    def __init__(
        self,
        name: str,
        tokens_per_second: float,
        max_model_len: int,
        clock: Callable[[], float],
        sleep: Callable[[float], Awaitable[None]],
        new_id: Callable[[], str],
        faults: Faults = Faults(),  # noqa: B008  # a value that nothing changes
    ) -> None:
        if not tokens_per_second > 0:
            raise ValueError(f"tokens_per_second must be more than 0, not {tokens_per_second}")
        self._name = name
        self._interval = 1 / tokens_per_second
        self._max_model_len = max_model_len
        self._clock = clock
        self._sleep = sleep
        self._new_id = new_id
        self._faults = faults
        self._telemetry = Telemetry(name, max_model_len)

    # Generation

    def generates(self, kind: type[Generate], api: type[API]) -> Handler:
        """The handler of a route that reads a `kind` and answers in the layout of `api`."""

        async def handle(request: Request) -> Response:
            work = self._work(await self._read(request, kind), self._card(request))
            fails = self._faults.random() < self._faults.rate
            # Of streams that fail every other one has begun by then.
            breaks = fails and bool(work.asked.stream) and self._faults.random() < 0.5
            if fails and not breaks:
                raise EngineError(_FAILS, None, "InternalServerError", self._faults.status)
            record = Record(self._telemetry, work.prompt_tokens, work.generations)
            tick = partial(self._tick, record, breaks)
            if work.asked.stream:
                return EventStream(stream(api(work), work, tick), self._telemetry.running(record))
            with self._telemetry.running(record):
                await self._generate(work, tick, request)
            document = api(work).document()
            return PlainTextResponse(document) if isinstance(document, str) else JSON(document)

        return handle

    async def _generate(self, work: Work, tick: Callable[[], Awaitable[None]], request: Request) -> None:
        """Wait until the work is done or the client is gone; in the second case nobody reads the answer."""

        async def finish() -> None:
            for _ in work.steps:
                await tick()

        # The body has been read: all that can still be received is that the client left.
        tasks = asyncio.ensure_future(finish()), asyncio.ensure_future(request.receive())
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()

    async def _tick(self, record: Record, breaks: bool) -> None:
        await self._sleep(self._interval if record.steps else self._interval + self._faults.delay)
        record.step()
        if breaks and record.steps == _BREAKS_AFTER:
            raise BrokenOff(_FAILS)

    def _work(self, asked: Generate, card: Card) -> Work:
        prompts = asked.prompts
        limit = self._limit(asked.limit, max(prompt.length for prompt in prompts))
        generations = [self._answer(asked, said, limit) for said in asked.said for _ in range(asked.n or 1)]
        return Work(asked, *card, sum(prompt.length for prompt in prompts), generations)

    def _answer(self, asked: Generate, said: str, limit: int) -> model.Generation:
        if tool := asked.tool(said):
            written = _written({"type": "object", **tool.parameters}, "tools")
            return model.generate(written, limit)._replace(tool=tool.name)
        schema = asked.schema_asked
        text = model.reply(self._name, said) if schema is None else _written(schema, "response_format")
        return model.generate(text, limit, [asked.stop] if isinstance(asked.stop, str) else asked.stop or [])

    def _limit(self, asked: int | None, prompt_tokens: int) -> int:
        room = self._max_model_len - prompt_tokens
        if asked is not None and asked < 1:
            raise EngineError(f"max_tokens must be at least 1, got {asked}.", "max_tokens")
        if asked is not None and asked > self._max_model_len:
            message = f"max_tokens={asked} cannot be greater than max_model_len={self._max_model_len}."
            raise EngineError(message, "max_tokens")
        if room < (asked or 1):
            message = (
                f"This model's maximum context length is {self._max_model_len} tokens. However, your request has "
                f"{prompt_tokens} input tokens and asks for {asked or 1} more."
            )
            raise EngineError(message, "input_text")
        return asked or room

    # Everything else

    def answers(self, kind: type[_Read], make: Callable[[_Read, Card], dict[str, Any] | Response]) -> Handler:
        """The handler of a route that reads a `kind` and answers at once."""

        async def handle(request: Request) -> Response:
            answer = make(await self._read(request, kind), self._card(request))
            return answer if isinstance(answer, Response) else JSON(answer)

        return handle

    def count_tokens(self, asked: Chat, card: Card) -> dict[str, Any]:
        return {"input_tokens": asked.prompts[0].length}

    def tokenize(self, asked: Pool, card: Card) -> dict[str, Any]:
        ids = [model.token_id(token) for token in model.tokenize(asked.prompts[0].text)]
        return {"count": len(ids), "max_model_len": self._max_model_len, "tokens": ids, "token_strs": None}

    def detokenize(self, asked: Detokenize, card: Card) -> dict[str, Any]:
        return {"prompt": "".join(model.token_text(number) for number in asked.tokens)}

    async def models(self, request: Request) -> Response:
        card = {
            "id": self._name,
            "object": "model",
            "created": int(self._clock()),
            "owned_by": "inference-api-demo",
            "root": self._name,
            "parent": None,
            "max_model_len": self._max_model_len,
            "permission": [],
        }
        return JSON({"object": "list", "data": [card]})

    async def health(self, request: Request) -> Response:
        return Response()

    async def version(self, request: Request) -> Response:
        return JSON({"version": f"{__version__}+demo"})

    async def metrics(self, request: Request) -> Response:
        return Response(self._telemetry.page(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def _read(self, request: Request, kind: type[_Read]) -> _Read:
        asked = parse(kind, await _body(request))
        if asked.model and asked.model != self._name:
            raise EngineError(f"The model `{asked.model}` does not exist.", "model", "NotFoundError", 404)
        return asked

    def _card(self, request: Request) -> Card:
        return Card(request.headers.get("x-request-id") or self._new_id(), int(self._clock()), self._name)


def _written(schema: Schema, field: str) -> str:
    """The JSON of what fits a schema."""
    try:
        return orjson.dumps(instance(schema)).decode()
    except (AttributeError, LookupError, TypeError, ValueError) as exc:
        raise EngineError(f"The schema in `{field}` cannot be used: {exc}", field) from None


async def _body(request: Request) -> bytes | dict[str, Any]:
    """JSON, or the fields of a form and the size of its file."""
    wanted = "multipart/form-data" if request.url.path.startswith("/v1/audio/trans") else "application/json"
    content_type = request.headers.get("content-type", "")
    if content_type.partition(";")[0].strip().lower() != wanted:
        raise EngineError(f"The content type must be {wanted}, not {content_type!r}.", "body", "Bad Request")
    if wanted == "application/json":
        return await request.body()
    async with request.form() as form:
        file = form.get("file")
        return {**form, "file": len(await file.read()) if isinstance(file, UploadFile) else None}
