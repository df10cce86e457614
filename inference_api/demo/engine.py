"""A toy engine: on the wire it is like vLLM, paced and cancellable; what it says is that it is a toy."""

import argparse
import asyncio
import time
import uuid
from collections.abc import Awaitable, Callable, Sequence

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from inference_api.demo.responses import JSON
from inference_api.demo.schema import EngineError
from inference_api.demo.serving import Engine

# As vLLM: an idle connection is closed after 5 s, and a stop does not wait for what is being generated.
_KEEP_ALIVE = 5
_STOP_AFTER = 1


def create_engine(
    model: str,
    *,
    tokens_per_second: float = 40,
    max_model_len: int = 4096,
    clock: Callable[[], float] = time.time,
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    new_id: Callable[[], str] = lambda: uuid.uuid4().hex,
) -> Starlette:
    """An ASGI app that serves one toy model; the same request gets the same text and token counts."""
    engine = Engine(model, tokens_per_second, max_model_len, clock, sleep, new_id)
    return Starlette(
        routes=[
            Route("/v1/chat/completions", engine.chat, methods=["POST"]),
            Route("/v1/completions", engine.completions, methods=["POST"]),
            Route("/v1/embeddings", engine.embeddings, methods=["POST"]),
            Route("/tokenize", engine.tokenize, methods=["POST"]),
            Route("/detokenize", engine.detokenize, methods=["POST"]),
            Route("/v1/models", engine.models),
            Route("/health", engine.health),
            Route("/version", engine.version),
            Route("/metrics", engine.metrics),
        ],
        exception_handlers={EngineError: _refuse, HTTPException: _no_route},
    )


async def _refuse(request: Request, exc: Exception) -> Response:
    assert isinstance(exc, EngineError)
    return JSON(exc.body, exc.status)


async def _no_route(request: Request, exc: Exception) -> Response:
    assert isinstance(exc, HTTPException)
    return JSON({"detail": exc.detail}, exc.status_code, exc.headers)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m inference_api.demo.engine", description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--tokens-per-second", type=float, default=40)
    parser.add_argument("--max-model-len", type=int, default=4096)
    given = parser.parse_args(arguments)
    app = create_engine(given.model, tokens_per_second=given.tokens_per_second, max_model_len=given.max_model_len)
    uvicorn.run(
        app,
        host=given.host,
        port=given.port,
        log_config=None,
        access_log=False,
        timeout_keep_alive=_KEEP_ALIVE,
        timeout_graceful_shutdown=_STOP_AFTER,
    )


if __name__ == "__main__":  # pragma: no cover - runs only in children, where nothing is measured
    main()
