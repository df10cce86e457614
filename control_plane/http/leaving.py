"""Answers that take long: whoever leaves ends them."""

import asyncio
from collections.abc import Coroutine

from starlette.types import Receive


async def while_there(receive: Receive, answer: Coroutine[None, None, None]) -> None:
    """Run `answer` to its end, or until the client has left. The body of the request must have been read."""
    answering = asyncio.create_task(answer)
    leaving = asyncio.create_task(_left(receive))
    try:
        await asyncio.wait({answering, leaving}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in (answering, leaving):
            task.cancel()
        # Only once it has ended is what it reads closed.
        await asyncio.wait({answering, leaving})
    if not answering.cancelled():
        answering.result()


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
