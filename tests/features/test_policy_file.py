"""POLICY=path: the policy of a file, at the start and when it changes."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from inference_api.policy.source import Policies
from inference_api.settings import SettingsError
from tests.conftest import Served
from tests.fakes import until
from tests.policies import EXAMPLE, PEPPER, entry, policy_of, write

pytestmark = pytest.mark.anyio
Start = Callable[..., Any]

YAML = """
# The keys of the batch jobs
organisations:
  - &team {name: team-a, models: ["llama-*", m]}
keys:
  - {id: k3v9Qm2XbT7a, name: batch, digest: "sha256:6f328c10ea289f25df518b331fb8b9e1ce7e11285b92e6b57d77009fe7c16a1d",
     organisation: team-a, expires: 2127-01-31T00:00:00Z}
limits: []
anonymous:
  limits: [{requests: 10, per: 60}]
"""


def policies(served: Served) -> Policies:
    found = served.router.core.provided(Policies)
    assert found is not None
    return found


async def test_a_file_is_read_at_the_start(tmp_path: Path, start_router: Start) -> None:
    path = tmp_path / "policy.yaml"
    path.write_text(YAML)

    served: Served = await start_router(policy=str(path))

    found = policies(served).current
    assert found is not None
    assert (found.keys, [row[1] for row in found.rows()], list(found.organisations)) == (1, ["batch"], ["team-a"])
    assert await served.metric("inference_api_policy_keys") == 1
    assert await served.metric("inference_api_policy_age_seconds") < 5


REFUSED: dict[str, tuple[str, str]] = {
    "not YAML": ("keys: [", "it is not valid YAML: while parsing a flow node"),
    "twice in a mapping": (
        "keys: [{id: a, id: b}]",
        "it is not valid YAML: the key 'id' is given twice, in lines 1 and 1",
    ),
    "twice at the top": ("keys: []\nlimits: []\nkeys: []", "it is not valid YAML: the key 'keys' is given twice"),
    "two documents": ("keys: []\n---\nkeys: []", "it is not valid YAML: it has more than one document"),
    "a list": ("- keys", "it is not valid YAML: a policy is a mapping"),
    "empty": ("", "it is not valid YAML: a policy is a mapping"),
    "no list": ("keys: 1", "keys: must be a list"),
    "unknown section": ("key: []", "key: there is no such key; use organisations, keys, limits, budgets, prompts, "),
    "organisation": (
        'keys: [{id: k3v9Qm2XbT7a, name: a, organisation: b, digest: "' + EXAMPLE.digest + '"}]',
        "keys.0.organisation: 'b' is not in organisations",
    ),
    "no pepper": (
        'keys: [{id: k3v9Qm2XbT7a, name: a, digest: "' + EXAMPLE.peppered + '"}]',
        "keys.0.digest: 'hmac-sha256' needs INFERENCE_API_KEY_PEPPER",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
async def test_a_bad_file_ends_the_start(case: str, tmp_path: Path, start_router: Start) -> None:
    text, reason = REFUSED[case]
    path = tmp_path / "policy.yaml"
    path.write_text(text)

    with pytest.raises(SettingsError) as caught:
        await start_router(policy=str(path))

    assert str(caught.value).startswith(f"policy '{path}': {reason}")
    assert "\n" not in str(caught.value)


async def test_a_file_that_is_not_there_ends_the_start(tmp_path: Path, start_router: Start) -> None:
    with pytest.raises(SettingsError, match=r"^policy '.*none.json': it cannot be read: No such file"):
        await start_router(policy=str(tmp_path / "none.json"))


async def test_a_changed_file_is_read_and_a_bad_one_changes_nothing(
    tmp_path: Path, start_router: Start, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(tmp_path / "policy.json", policy_of(entry()))
    served: Served = await start_router(policy=str(path), key_pepper=PEPPER)
    seen: list[int] = []
    policies(served).on_change(lambda policy: seen.append(policy.keys))
    first = policies(served).current

    write(path, policy_of())
    await until(lambda: seen)
    assert set(seen) == {0}
    second = policies(served).current
    assert second is not first

    write(path, '{"keys": [{}]}')
    await until(lambda: "could not be reloaded" in caplog.text)
    served.router.reload()
    served.router.reload()
    await asyncio.sleep(0)
    assert policies(served).current is second
    assert [line.message for line in caplog.records if "could not" in line.message] == [
        f"the policy could not be reloaded, the previous one stays: policy '{path}': keys.0.id: is required"
    ]

    write(path, policy_of({**entry(), "digest": EXAMPLE.peppered}))
    served.router.reload()
    # Twice, if an earlier reload has read it already.
    await until(lambda: seen[:2] == [0, 1])


async def test_the_previous_policy_is_freed(tmp_path: Path, start_router: Start) -> None:
    path = write(tmp_path / "policy.json", policy_of(entry()))
    served: Served = await start_router(policy=str(path))
    first = policies(served).current
    assert first is not None

    write(path, policy_of())
    served.router.reload()

    await until(lambda: policies(served).current is not first)
    await until(lambda: not len(first.digests))
