"""What clients read of a limit."""

import pytest

from inference_api.features.limiting.wording import go_duration, message
from inference_api.policy.rules import Rule


@pytest.mark.parametrize(
    ("ms", "text"),
    [
        (0, b"0s"),
        (12, b"12ms"),
        (1000, b"1s"),
        (1500, b"1.5s"),
        (1230, b"1.23s"),
        (10_000, b"10s"),
        (60_000, b"1m0s"),
        (60_001, b"1m0.001s"),
        (105_000, b"1m45s"),
        (3_600_000, b"1h0m0s"),
        (7_199_999, b"1h59m59.999s"),
    ],
)
def test_a_duration_is_written_as_go_does(ms: int, text: bytes) -> None:
    assert go_duration(ms) == text


def rule(unit: str, amount: int, shown: str, per: int = 60, models: tuple[str, ...] | None = None) -> Rule:
    return Rule("key", "x", unit, amount, per, False, models, shown)


@pytest.mark.parametrize(
    ("limit", "wanted", "wait", "text"),
    [
        (rule("requests", 600, "organisation 'team-a'"), 1, 1200,
         "Rate limit reached for organisation 'team-a': 600 requests per 60 s. Try again in 1.2 s."),
        (rule("output_tokens", 10000, "key 'batch'"), 480, 12_000,
         "Rate limit reached for key 'batch': 10000 output tokens per 60 s, 480 requested. Try again in 12 s."),
        (rule("tokens", 9, "your address", models=("m",)), 4, 10,
         "Rate limit reached for your address: 9 tokens per 60 s for these models, 4 requested. Try again in 0.01 s."),
        (rule("streams", 50, "user 'ana'", per=0), 1, 1000,
         "Rate limit reached for user 'ana': 50 streams at once. Try again in 1 s."),
    ],
)  # fmt: skip
def test_a_message_names_the_limit_and_the_wait(limit: Rule, wanted: int, wait: int, text: str) -> None:
    assert message(limit, limit.amount, wanted, wait) == text
