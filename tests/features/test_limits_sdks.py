"""A refusal as the SDKs of OpenAI and Anthropic see it, and whether their own retry waits as long as it says."""

from collections.abc import AsyncIterator, Callable
from typing import Any

import anthropic
import openai
import pytest
from anthropic import AsyncAnthropic
from openai import AsyncOpenAI

from inference_api.features.stores.memory import unix_ms
from tests.conftest import Served
from tests.fakes import COMPLETION, json_response, raw, until
from tests.features.limited import Limited, key

pytestmark = pytest.mark.anyio
Start = Callable[..., Any]
Ask = Callable[[int], Any]
HELLO: Any = [{"role": "user", "content": "hello"}]
MESSAGE = {
    "id": "msg_1",
    "type": "message",
    "role": "assistant",
    "model": "m",
    "content": [{"type": "text", "text": "hi"}],
    "stop_reason": "end_turn",
    "usage": {"input_tokens": 1, "output_tokens": 1},
}


@pytest.fixture(params=["openai", "anthropic"])
def sdk(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
async def asking(sdk: str) -> AsyncIterator[Callable[[Served, int], Any]]:
    """`await asking(served, retries)` asks once, with so many retries of the SDK's own."""
    clients: list[Any] = []

    async def ask(served: Served, retries: int) -> Any:
        if sdk == "openai":
            client = AsyncOpenAI(base_url=f"{served.url}/v1", api_key="a", max_retries=retries)
            clients.append(client)
            return await client.chat.completions.create(model="m", messages=HELLO)
        claude = AsyncAnthropic(base_url=served.url, auth_token="a", api_key=None, max_retries=retries)
        clients.append(claude)
        return await claude.messages.create(model="m", messages=HELLO, max_tokens=9)

    yield ask
    for client in clients:
        await client.close()


async def start(sdk: str, limits: Limited, start_engine: Start, start_router: Start) -> Served:
    engine = await start_engine(raw(json_response(COMPLETION if sdk == "openai" else MESSAGE)))
    served: Served = await start_router(engine, features=limits.features)
    return served


async def test_a_refusal_is_a_rate_limit_error_with_the_message(
    sdk: str, asking: Any, start_engine: Start, start_router: Start
) -> None:
    served = await start(
        sdk, Limited(keys=[key("a", limits=[{"requests": 1, "per": 3600}])]), start_engine, start_router
    )
    await asking(served, 0)
    kind = openai.RateLimitError if sdk == "openai" else anthropic.RateLimitError

    # It would wait for more than a minute: `x-should-retry: false` keeps it from that.
    with pytest.raises(kind, match=r"Rate limit reached for key 'a': 1 requests per 3600 s\. Try again in ") as caught:
        await asking(served, 2)

    error: Any = caught.value
    assert error.status_code == 429
    assert error.response.headers["x-should-retry"] == "false"
    await until(lambda: len(served.lines) == 2)


async def test_the_retry_of_the_sdk_waits_as_long_as_the_answer_says(
    sdk: str, asking: Any, start_engine: Start, start_router: Start
) -> None:
    limits = Limited(clock=unix_ms, keys=[key("a", limits=[{"requests": 1, "per": 1}])])
    served = await start(sdk, limits, start_engine, start_router)

    for _ in range(2):
        await asking(served, 2)

    # One retry: after its wait the request is let through. (A timer may be a millisecond early.)
    await until(lambda: [line["status"] for line in served.lines].count(200) == 2)
    assert len(served.lines) in (3, 4)
