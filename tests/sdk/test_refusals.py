"""What the official SDKs make of a router with keys, limits and budgets: the right exception, and no retry in vain."""

import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from inference_api.demo.engine import create_engine
from inference_api.settings import Settings
from tests.conftest import serving
from tests.policies import entry, new_key, policy_of, write
from tests.sdk.clients import SDKS, Asked, Outcome, ask, node_sdks

pytestmark = pytest.mark.anyio

# Seconds. A window is refused in until it is over, and for a while after that, at most as long again.
SHORT, HOUR = 2, 3600
KEYS: dict[str, dict[str, Any]] = {
    "free": {},
    "named": {"models": ["m"]},
    "short": {"limits": [{"requests": 1, "per": SHORT}]},
    "long": {"limits": [{"requests": 1, "per": HOUR}]},
    "spent": {"budget": {"requests": 1, "per": "day"}},
}
MADE = {name: new_key() for name in KEYS}

Ask = Callable[..., Any]


@pytest.fixture
async def url(start_router: Callable[..., Any], tmp_path: Path) -> AsyncIterator[str]:
    served: Any = SimpleNamespace(app=create_engine("m", tokens_per_second=1000))
    policy = policy_of(*(entry(MADE[name], name, **more) for name, more in KEYS.items()))
    async with serving(served, Settings()) as engine:
        router = await start_router(
            models=[{"name": n, "served_model_name": "m", "backends": [{"url": engine}]} for n in ("m", "other")],
            auth="keys",
            policy=str(write(tmp_path / "policy.json", json.dumps(policy))),
        )
        yield router.url


@pytest.fixture(params=SDKS)
def by(request: pytest.FixtureRequest, url: str) -> Ask:
    """Ask by one of the SDKs with a key of KEYS, or with another text."""
    sdk: str = request.param
    if sdk.startswith("node"):
        place, reason = node_sdks()
        if not place:
            pytest.skip(reason)

    async def by(key: str, **more: Any) -> Outcome:
        return await ask(sdk, Asked(url, MADE[key].key if key in MADE else key, **more))

    return by


def statuses(outcome: Outcome) -> list[int]:
    return [answer.status for answer in outcome.answers]


@pytest.mark.parametrize("stream", [False, True])
async def test_a_key_is_let_through(by: Ask, stream: bool) -> None:
    assert (await by("free", stream=stream)).error is None


async def test_a_wrong_key_is_an_authentication_error_and_not_tried_again(by: Ask) -> None:
    outcome = await by("sk-wrong", retries=2)

    assert (outcome.error, outcome.code) == ("AuthenticationError", "invalid_api_key")
    assert "The API key is missing or not valid. Send it as 'Authorization: Bearer <key>'." in outcome.message
    assert statuses(outcome) == [401]


async def test_a_model_of_others_is_a_permission_error_and_not_tried_again(by: Ask) -> None:
    outcome = await by("named", model="other", retries=2)

    assert (outcome.error, outcome.code) == ("PermissionDeniedError", "model_not_found")
    assert "The model 'other' does not exist, or this API key may not use it." in outcome.message
    assert statuses(outcome) == [403]


@pytest.mark.parametrize("stream", [False, True])
async def test_a_limit_is_a_rate_limit_error(by: Ask, stream: bool) -> None:
    outcome = await by("long", times=2, stream=stream)

    assert (outcome.error, outcome.code) == ("RateLimitError", "rate_limit_exceeded")
    assert f"Rate limit reached for key 'long': 1 requests per {HOUR} s. Try again in" in outcome.message
    assert statuses(outcome) == [429]


async def test_the_sdk_waits_as_long_as_it_is_told_and_is_then_let_through(by: Ask) -> None:
    outcome = await by("short", times=2, retries=3)

    assert outcome.error is None
    assert statuses(outcome)[0] == 429
    assert statuses(outcome)[-1] == 200
    for refused, after in zip(outcome.answers, outcome.answers[1:], strict=False):
        assert refused.wait is not None
        assert 0 < refused.wait <= 2 * SHORT
        # Not by a back-off of its own: that is half a second at first.
        assert refused.wait - 0.01 <= after.at - refused.at < refused.wait + 5


async def test_the_sdk_does_not_wait_for_longer_than_a_minute(by: Ask) -> None:
    """`x-should-retry: false`: two more tries would be answered alike."""
    outcome = await by("long", times=2, retries=2)

    assert outcome.error == "RateLimitError"
    assert statuses(outcome) == [429]


async def test_a_budget_that_is_used_up_is_not_tried_again(by: Ask) -> None:
    outcome = await by("spent", times=2, retries=2)

    assert (outcome.error, outcome.code) == ("RateLimitError", "insufficient_quota")
    assert "Budget used up for key 'spent': 1 requests per day. It resets at" in outcome.message
    assert statuses(outcome) == [429]
