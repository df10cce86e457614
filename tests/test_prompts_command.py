"""`inference-api prompts`: what a stored prompt puts into a request, without a request."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from inference_api.cli import main
from tests.policies import FakeRegistry, write

POLICY: dict[str, Any] = {
    "organisations": [{"name": "team-a"}],
    "prompts": [
        {
            "name": "support",
            "organisation": "team-a",
            "labels": {"production": 2},
            "versions": [
                {
                    "version": 2,
                    "messages": [{"role": "system", "content": "You help with {{product}}, {{times}} times."}],
                    "variables": {
                        "product": {"required": True, "trusted": True},
                        "times": {"type": "number", "default": 1, "trusted": True},
                    },
                },
                {"version": 3, "text": "Hé {{a}}", "variables": {"a": {}}},
            ],
        }
    ],
}


@pytest.fixture
def policy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = write(tmp_path / "policy.json", POLICY)
    monkeypatch.setenv("INFERENCE_API_POLICY", str(path))
    return path


def rendered(capsys: pytest.CaptureFixture[str], *options: str) -> Any:
    assert main(["prompts", "render", "support", *options]) == 0
    return json.loads(capsys.readouterr().out)


def system(times: str) -> list[dict[str, str]]:
    return [{"role": "system", "content": f"You help with a=b, {times} times."}]


@pytest.mark.parametrize(
    ("options", "shown"),
    [
        (["--var", "product=a=b"], {"messages": system("1")}),
        (["--var", "product=a=b", "--var", "times=2.5", "--route", "responses"], {"input": system("2.5")}),
        (["--version", "production", "--var", "product=a=b"], {"messages": system("1")}),
        (["--version", "3", "--var", 'a="{{a}}'], {"prompt": 'Hé "{{a}}'}),
    ],
)
def test_the_members_of_a_body(
    options: list[str], shown: Any, policy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert rendered(capsys, *options) == shown


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["nope"], "The prompt 'nope' does not exist."),
        (["support", "--version", "beta"], "The prompt 'support' has no version or label 'beta'."),
        (["support"], "The prompt 'support' needs the variable 'product'."),
        (["support", "--var", "product=x", "--var", "y=z"], "The prompt 'support' has no variable 'y'."),
        (["support", "--var", "product=x", "--var", "times=many"], "must be a number."),
        (["support", "--version", "3", "--route", "responses"], "is a text, for completions only."),
    ],
)
def test_what_cannot_be_rendered(
    arguments: list[str], says: str, policy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["prompts", "render", *arguments]) == 1
    captured = capsys.readouterr()
    assert (captured.out, says in captured.err) == ("", True)


def test_wrong_options(policy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prompts", "render", "support", "--var", "product"]) == 2
    monkeypatch.delenv("INFERENCE_API_POLICY")
    assert main(["prompts", "render", "support"]) == 2
    monkeypatch.setenv("INFERENCE_API_POLICY", "registry")
    assert main(["prompts", "render", "support"]) == 2
    monkeypatch.setenv("INFERENCE_API_POLICY", str(policy.with_name("none.yaml")))
    assert main(["prompts", "render", "support"]) == 2

    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(": ")[2][:30] for line in lines] == [
        "--var product: must be NAME=VA",
        "INFERENCE_API_POLICY: is not s",
        "INFERENCE_API_POLICY='registry",
        f"policy '{policy.with_name('none.yaml')}"[:30],
    ]


@pytest.mark.anyio
async def test_the_policy_of_the_registry(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    async with FakeRegistry(POLICY) as registry:
        given = {"POLICY": "registry", "REGISTRY_URL": registry.url, "REGISTRY_TOKEN": "token"}
        for name, value in given.items():
            monkeypatch.setenv(f"INFERENCE_API_{name}", value)
        found = await asyncio.to_thread(main, ["prompts", "render", "support", "--version", "3"])
        shown = json.loads(capsys.readouterr().out)
        registry.status = "503 Service Unavailable"
        away = await asyncio.to_thread(main, ["prompts", "render", "support"])

    assert (found, shown) == (0, {"prompt": "Hé "})
    assert (away, "the registry does not give the policy" in capsys.readouterr().err) == (2, True)
    assert registry.polls[0].header("authorization") == "Bearer token"
