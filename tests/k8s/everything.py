"""Settings of a router that has every feature on, whose metrics dashboards and alerts are about."""

import json
from pathlib import Path
from typing import Any

from tests.policies import EXAMPLE, bearer, entry, policy_of, write
from tests.ports import free_port

HEADERS = bearer(EXAMPLE.key)
PRICE = {"input": 0.2, "output": 0.6}


def everything(folder: Path, registry: str, **sections: Any) -> dict[str, Any]:
    """Keys, limits that nobody counts together as Redis is away, usage for a registry, and budgets."""
    key = entry(
        organisation="team-a",
        limits=[{"requests": 1000000, "per": 60}, {"requests": 1, "per": 3600, "models": ["limited"]}],
    )
    policy = policy_of(key, budgets=[{"scope": "all", "tokens": 10**12, "per": "day"}], **sections)
    return {
        "load_signal_interval": 0.5,
        "auth": "keys",
        "policy": str(write(folder / "policy.json", json.dumps(policy))),
        "limits": "redis",
        "redis_url": f"redis://127.0.0.1:{free_port()}/0",
        "usage": "registry",
        "usage_spool": folder / "spool",
        "registry_url": registry,
        "report_interval": 0.5,
    }
