"""The one fake engine that speaks: on the wire it is like vLLM, paced and cancellable; it says that it is a demo model.

It serves the demo, and the tests that need a whole API. tests/fakes.py has the engines that are scripted byte by byte,
benchmarks/engine.py the one that costs nothing.
"""

import argparse
import asyncio
import logging
import time
import uuid
from collections.abc import Awaitable, Callable, Sequence

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from inference_api.demo import media, pooling, requests
from inference_api.demo.chat import Chat, Completion
from inference_api.demo.generation import JSON
from inference_api.demo.media import Transcription
from inference_api.demo.messages import Messages
from inference_api.demo.requests import EngineError
from inference_api.demo.responses import Responses
from inference_api.demo.serving import Engine, Faults, Handler

# As vLLM: an idle connection is closed after 5 s, and a stop does not wait for what is being generated.
_KEEP_ALIVE = 5
_STOP_AFTER = 1


def create_engine(
    model: str,
    *,
    tokens_per_second: float = 40,
    max_model_len: int = 131072,
    clock: Callable[[], float] = time.time,
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    new_id: Callable[[], str] = lambda: uuid.uuid4().hex,
    faults: Faults = Faults(),  # noqa: B008  # a value that nothing changes
) -> Starlette:
    """An ASGI app that serves one demo model; the same request gets the same text and token counts."""
    engine = Engine(model, tokens_per_second, max_model_len, clock, sleep, new_id, faults)
    pages = {
        "/v1/models": engine.models,
        "/health": engine.health,
        "/version": engine.version,
        "/metrics": engine.metrics,
    }
    return Starlette(
        routes=[
            *(Route(path, handler, methods=["POST"]) for path, handler in _handlers(engine).items()),
            *(Route(path, handler) for path, handler in pages.items()),
        ],
        exception_handlers={EngineError: _reject, HTTPException: _no_route},
    )


def _handlers(engine: Engine) -> dict[str, Handler]:
    """All that is POSTed, by path."""
    rerank, score = engine.answers(requests.Score, pooling.rerank), engine.answers(requests.Score, pooling.score)
    transcribe = engine.generates(requests.Transcribe, Transcription)
    return {
        "/v1/chat/completions": engine.generates(requests.Chat, Chat),
        "/v1/chat/completions/batch": engine.generates(requests.Batch, Chat),
        "/v1/completions": engine.generates(requests.Complete, Completion),
        "/v1/responses": engine.generates(requests.Respond, Responses),
        "/v1/messages": engine.generates(requests.Anthropic, Messages),
        "/v1/messages/count_tokens": engine.answers(requests.Chat, engine.count_tokens),
        "/v1/embeddings": engine.answers(requests.Pool, pooling.embeddings),
        "/pooling": engine.answers(requests.Pool, pooling.pooling),
        "/classify": engine.answers(requests.Pool, pooling.classify),
        "/v1/moderations": engine.answers(requests.Pool, pooling.moderate),
        "/v1/score": score,
        "/score": score,
        "/v1/rerank": rerank,
        "/rerank": rerank,
        "/v1/audio/transcriptions": transcribe,
        "/v1/audio/translations": transcribe,
        "/v1/audio/speech": engine.answers(requests.Speak, media.speech),
        "/v1/images/generations": engine.answers(requests.Draw, media.images),
        "/tokenize": engine.answers(requests.Pool, engine.tokenize),
        "/detokenize": engine.answers(requests.Detokenize, engine.detokenize),
    }


async def _reject(request: Request, exc: Exception) -> Response:
    assert isinstance(exc, EngineError)
    error = exc.error
    # As vLLM: what the fields' types forbid is reported in OpenAI's words even here.
    if request.url.path.startswith("/v1/messages") and error["type"] != "Bad Request":
        return JSON({"type": "error", "error": {"type": error["type"], "message": error["message"]}}, exc.status)
    return JSON({"error": error}, exc.status)


async def _no_route(request: Request, exc: Exception) -> Response:
    assert isinstance(exc, HTTPException)
    return JSON({"detail": exc.detail}, exc.status_code, exc.headers)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m inference_api.demo.engine", description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--tokens-per-second", type=float, default=40)
    parser.add_argument("--max-model-len", type=int, default=131072)
    parser.add_argument("--delay", type=float, default=0, help="seconds before the first token")
    parser.add_argument("--fail-rate", type=float, default=0, help="share of requests that fail, 0 to 1")
    parser.add_argument("--fail-status", type=int, default=503, help="status of those")
    given = parser.parse_args(arguments)
    app = create_engine(
        given.model,
        tokens_per_second=given.tokens_per_second,
        max_model_len=given.max_model_len,
        faults=Faults(given.delay, given.fail_rate, given.fail_status),
    )
    logging.basicConfig(format="%(asctime)s %(message)s", level=logging.INFO)
    # Health checks and scrapes would hide the requests.
    logging.getLogger("uvicorn.access").addFilter(lambda record: '"GET ' not in record.getMessage())
    uvicorn.run(
        app,
        host=given.host,
        port=given.port,
        log_config=None,
        timeout_keep_alive=_KEEP_ALIVE,
        timeout_graceful_shutdown=_STOP_AFTER,
    )


if __name__ == "__main__":  # pragma: no cover - runs only in children, where nothing is measured
    main()
