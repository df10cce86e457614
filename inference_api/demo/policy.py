"""The policy of `inference-api demo --plain --keys`: two organisations, new keys, and limits to run into."""

from typing import Any, NamedTuple

import yaml

from inference_api.policy.keys import NewKey, new_key

# Few enough to be refused by hand, within a minute.
REQUESTS, TOKENS = 5, 100_000
ALLOWED = "llama-3-8b"
# Per million tokens, by model
PRICES = {
    "llama-3-8b": {"input": 0.2, "cached_input": 0.02, "output": 0.6},
    "mistral-7b": {"input": 0.25, "output": 0.75},
    "gpt2": {"input": 0.01, "output": 0.01},
    "phi-3-mini": {"input": 0.05, "output": 0.1},
}


class Keys(NamedTuple):
    """The keys in clear, to be printed once: of `team-a`, which may do little, and of `team-b`."""

    team_a: NewKey
    team_b: NewKey

    @staticmethod
    def new() -> "Keys":
        return Keys(new_key(), new_key())

    def policy(self) -> str:
        """The policy file, as people write it."""
        organisations: list[dict[str, Any]] = [
            {"name": "team-a", "models": [ALLOWED]},
            {"name": "team-b", "limits": [{"tokens": TOKENS, "per": 60}, {"streams": 10}]},
        ]
        keys: list[dict[str, Any]] = [
            {"limits": [{"requests": REQUESTS, "per": 60}], **_entry(self.team_a, "batch", "team-a")},
            {"user": "ana", **_entry(self.team_b, "app", "team-b")},
        ]
        return yaml.safe_dump({"organisations": organisations, "keys": keys}, sort_keys=False)


def _entry(key: NewKey, name: str, organisation: str) -> dict[str, Any]:
    return {"id": key.id, "name": name, "digest": key.digest, "organisation": organisation}
