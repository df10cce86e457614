"""The settings of the policy: where it comes from, and the peppers of its digests."""

from pathlib import Path
from typing import Any

from pydantic import Field, SecretStr, field_validator

from inference_api.settings import Group

# Value of POLICY: from the registry, instead of a file
REGISTRY = "registry"
_SHORTEST_PEPPER = 32


class Options(Group):
    policy: str | None = Field(
        default=None,
        min_length=1,
        description="YAML or JSON file of keys, limits, budgets and prompts, or `registry`; unset: there are none",
    )
    policy_cache: Path | None = Field(
        default=None,
        description="file with the last policy and overrides of the registry, for starts without a registry",
    )
    key_pepper: SecretStr | None = Field(
        default=None,
        description="HMAC key of `hmac-sha256` digests, at least 32 characters; `new,old` while it is replaced",
    )

    @field_validator("key_pepper", mode="before")
    @classmethod
    def _long(cls, value: Any) -> Any:
        given = value.get_secret_value() if isinstance(value, SecretStr) else value
        if isinstance(given, str):
            peppers = given.split(",")
            if len(peppers) > 2 or any(len(pepper) < _SHORTEST_PEPPER for pepper in peppers):
                raise ValueError(f"must be at least {_SHORTEST_PEPPER} characters without commas, or two such: new,old")
        return value

    @property
    def peppers(self) -> tuple[str, ...]:
        """The first one is for new keys."""
        return () if self.key_pepper is None else tuple(self.key_pepper.get_secret_value().split(","))
