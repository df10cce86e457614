"""Policies for tests: keys whose secrets are known, and the files that list them."""

import json
from pathlib import Path
from typing import Any, NamedTuple

from inference_api.policy.keys import NewKey, new_key

PEPPER = "0123456789abcdef0123456789abcdef"


class Example(NamedTuple):
    """The key of the contract, whose digests are fixed."""

    key: str = "sk-ia-k3v9Qm2XbT7a-AbCdEfGhIjKlMnOpQrStUvWxYz0123456789abcdefg01vVfr"
    id: str = "k3v9Qm2XbT7a"
    digest: str = "sha256:6f328c10ea289f25df518b331fb8b9e1ce7e11285b92e6b57d77009fe7c16a1d"
    peppered: str = "hmac-sha256:6b7014679b80a02ff94a6f1e3eea0fb7c4447190a186f62990db6176dd5023dc"


EXAMPLE = Example()


def entry(key: NewKey | Example = EXAMPLE, name: str = "batch", **more: Any) -> dict[str, Any]:
    """The policy's entry of a key."""
    return {"id": key.id, "name": name, "digest": key.digest, **more}


def policy_of(*entries: dict[str, Any], **sections: Any) -> dict[str, Any]:
    """A policy with these keys, and with the organisations that they name."""
    names = dict.fromkeys(one["organisation"] for one in entries if one.get("organisation"))
    return {"organisations": [{"name": name} for name in names], "keys": list(entries), **sections}


def write(path: Path, policy: Any) -> Path:
    """Write a policy as JSON, whole: a reader sees the old one or the new one."""
    new = path.with_suffix(".new")
    new.write_text(policy if isinstance(policy, str) else json.dumps(policy))
    new.replace(path)
    return path


def bearer(key: str = EXAMPLE.key) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


__all__ = ["EXAMPLE", "PEPPER", "Example", "NewKey", "bearer", "entry", "new_key", "policy_of", "write"]
