"""The official SDKs of OpenAI and Anthropic, of Python and Node, each asked in the same way."""

import asyncio
import json
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any, NamedTuple

import anthropic
import openai

ROOT = Path(__file__).parent.parent.parent
SDKS = ("python-openai", "python-anthropic", "node-openai", "node-anthropic")
HELLO: list[Any] = [{"role": "user", "content": "Hello"}]


class Answer(NamedTuple):
    """One answer of the router: its status, the wait in `retry-after-ms`, and when it came."""

    status: int
    wait: float | None
    at: float


class Outcome(NamedTuple):
    """What the caller of an SDK gets: the class of its error, if any, and every answer that the SDK had for that."""

    error: str | None
    status: int | None
    message: str
    code: str | None
    answers: list[Answer]


class Asked(NamedTuple):
    """What to ask with, and how often; the outcome is that of the last time."""

    url: str
    key: str
    model: str = "m"
    retries: int = 0
    times: int = 1
    stream: bool = False


async def ask(sdk: str, asked: Asked) -> Outcome:
    language, _, provider = sdk.partition("-")
    return await (_by_python(provider, asked) if language == "python" else _by_node(provider, asked))


def node_sdks() -> tuple[str, str]:
    """Where the SDKs of Node are; else the empty string, and why they are not there."""
    if shutil.which("node") is None or shutil.which("npm") is None:
        return "", "node or npm is not on PATH (Debian: apt-get install nodejs npm)"
    done = subprocess.run([ROOT / "scripts/node-sdks"], check=False, capture_output=True, text=True, timeout=300)
    return done.stdout.strip(), done.stderr.strip().rpartition("\n")[2]


async def _by_python(provider: str, asked: Asked) -> Outcome:
    answers: list[Answer] = []

    async def note(response: Any) -> None:
        answers.append(_answer(response.status_code, response.headers.get("retry-after-ms"), time.perf_counter()))

    module = openai if provider == "openai" else anthropic
    options: dict[str, Any] = {"api_key": asked.key, "max_retries": asked.retries}
    # Whichever HTTP library the SDK brings.
    options["http_client"] = module.DefaultAsyncHttpxClient(event_hooks={"response": [note]}, trust_env=False)
    question: dict[str, Any] = {"model": asked.model, "messages": HELLO, "stream": asked.stream, "max_tokens": 2}
    found = Outcome(None, 200, "", None, answers)
    client: Any
    if provider == "openai":
        client = openai.AsyncOpenAI(base_url=f"{asked.url}/v1", **options)
        create = client.chat.completions.create
    else:
        client = anthropic.AsyncAnthropic(base_url=asked.url, **options)
        create = client.messages.create
    async with client:
        for _ in range(asked.times):
            answers.clear()
            try:
                await create(**question)
            except (openai.APIStatusError, anthropic.APIStatusError) as exc:
                body: Any = exc.body
                # OpenAI's SDK takes the envelope off.
                code = body.get("error", body).get("code")
                found = Outcome(type(exc).__name__, exc.status_code, exc.message, code, answers)
            else:
                found = Outcome(None, 200, "", None, answers)
    return found


async def _by_node(provider: str, asked: Asked) -> Outcome:
    document = {"sdks": node_sdks()[0], "sdk": provider, **asked._asdict()}
    process = await asyncio.create_subprocess_exec(
        "node", str(Path(__file__).with_name("ask.mjs")), json.dumps(document), stdout=asyncio.subprocess.PIPE
    )
    printed, _ = await process.communicate()
    assert process.returncode == 0
    told = json.loads(printed)
    answers = [_answer(**answer) for answer in told.pop("answers")]
    return Outcome(**told, answers=answers)


def _answer(status: int, wait: str | None, at: float) -> Answer:
    return Answer(status, None if wait is None else float(wait) / 1000, at)
