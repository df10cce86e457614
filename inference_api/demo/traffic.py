"""`python -m inference_api.demo.traffic FILE`: a few requests a second, as the callers of the demo would send them.

FILE is JSON: `routers`, their URLs; `keys`, by name; `seed`; `rate`, requests a second. What becomes of a request is
reported by the routers: here answers are read and forgotten.
"""

import argparse
import asyncio
import json
import math
import random
import signal
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import httpx

from inference_api.demo.seed import PROMPT

# More than one in flight, and never many
_MOST = 16
# Seconds from one busy time to the next
_WAVE = 600
_TOPICS = (
    "The harbour opens at six.",
    "Wie kommt man zum Bahnhof?",
    "我的订单在哪里?",
    "Summarise the minutes of Monday.",
    "Give me three names for a ferry.",
    "Write a haiku about queues.",
)


class Ask(NamedTuple):
    """One request. `leaves_after`: chunks of the answer after which its client leaves; None: it stays."""

    key: str
    path: str
    body: Mapping[str, Any]
    leaves_after: int | None = None


def asks(random: random.Random) -> Iterator[Ask]:
    """What callers ask, for ever: mostly what is answered, and some of what is refused."""
    while True:
        drawn = random.random()
        text = random.choice(_TOPICS)
        if drawn < 0.02:
            yield _chat("chatbot", "llama-4-9000b", text, random)
        elif drawn < 0.04:
            # Not one of its models
            yield _chat("chatbot", "gpt2", text, random)
        elif drawn < 0.10:
            yield Ask("notebook", "/v1/embeddings", {"model": "gpt2", "input": [text]})
        elif drawn < 0.25:
            # More than its limit allows
            yield _chat("nightly", random.choice(("llama3", "mistral-7b")), text, random)
        elif drawn < 0.35:
            yield _translation(text, random)
        elif drawn < 0.55:
            yield _chat("translate", random.choice(("llama-3-8b", "mistral-7b")), text, random)
        elif drawn < 0.85:
            yield _chat("chatbot", random.choice(("chat", "llama-3-8b")), text, random)
        else:
            yield _chat("notebook", random.choice(("gpt2", "chat")), text, random)


def _chat(key: str, model: str, text: str, random: random.Random, **more: Any) -> Ask:
    stream = random.random() < 0.6
    body = {
        "model": model,
        "messages": [{"role": "user", "content": text}],
        "max_tokens": random.randint(8, 32),
        "stream": stream,
        **more,
    }
    return Ask(key, "/v1/chat/completions", body, random.randint(1, 6) if stream and random.random() < 0.08 else None)


def _translation(text: str, random: random.Random) -> Ask:
    prompt = {"id": PROMPT, "variables": {"language": random.choice(("English", "German", "Chinese"))}}
    return _chat("translate", "mistral-7b", text, random, prompt=prompt)


async def run(routers: Sequence[str], keys: Mapping[str, str], seed: int, rate: float) -> None:
    """Ask until cancelled: `rate` requests a second, more and fewer in waves."""
    drawn, slots = random.Random(seed), asyncio.Semaphore(_MOST)
    loop = asyncio.get_running_loop()
    async with httpx.AsyncClient(trust_env=False, timeout=60) as client, asyncio.TaskGroup() as tasks:
        for ask in asks(drawn):
            wave = 1 + 0.6 * math.sin(2 * math.pi * loop.time() / _WAVE)
            await asyncio.sleep(min(drawn.expovariate(rate * wave), 5))
            await slots.acquire()
            task = tasks.create_task(send(client, drawn.choice(routers), keys[ask.key], ask))
            task.add_done_callback(lambda done: slots.release())


async def send(client: httpx.AsyncClient, router: str, key: str, ask: Ask) -> None:
    """Send one request, and read its answer as its client would."""
    request = client.stream("POST", f"{router}{ask.path}", json=ask.body, headers={"authorization": f"Bearer {key}"})
    try:
        async with request as answer:
            read = 0
            async for _ in answer.aiter_raw():
                read += 1
                if read == ask.leaves_after:
                    break
    except httpx.HTTPError:
        # A router that is away, or an answer that broke off: those are there to be looked at.
        return


async def _until_stopped(given: Mapping[str, Any]) -> None:
    running = asyncio.ensure_future(run(**given))
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, running.cancel)
    await asyncio.wait([running])
    if not running.cancelled():
        running.result()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m inference_api.demo.traffic", description=__doc__)
    parser.add_argument("file", type=Path)
    given = json.loads(parser.parse_args(arguments).file.read_text())
    asyncio.run(_until_stopped(given))


if __name__ == "__main__":  # pragma: no cover - runs only in children, where nothing is measured
    main()
