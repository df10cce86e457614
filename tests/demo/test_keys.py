"""`inference-api demo --plain --keys`: the printed commands show what keys, limits and usage records do."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from inference_api.demo.policy import REQUESTS, Keys
from inference_api.demo.run import run_demo
from inference_api.policy.reading import read, run
from tests.demo.test_run import Running, end, interrupted, start, until

pytestmark = pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    running = start(tmp_path_factory.mktemp("demo"), "--keys")
    yield running
    end(running)


def keys_of(demo: Running) -> dict[str, str]:
    return dict(re.findall(r"^export (TEAM_[AB])=(\S+)$", demo.printed, re.MULTILINE))


def printed(demo: Running, beginning: str) -> list[str]:
    """What the printed commands that begin so print, in a shell with the keys."""
    commands = re.findall(f"^{re.escape(beginning)}.*$", demo.printed, re.MULTILINE)
    environment = os.environ | keys_of(demo)
    return [
        subprocess.run(["sh", "-c", command], env=environment, capture_output=True, text=True, check=True).stdout
        for command in commands
    ]


def test_without_a_key_and_for_another_model_it_is_refused(demo: Running) -> None:
    none, forbidden = printed(demo, "curl -i ")

    assert none.startswith("HTTP/1.1 401 ")
    assert 'www-authenticate: Bearer realm="inference-api"' in none
    assert '"code":"invalid_api_key"' in none
    assert forbidden.startswith("HTTP/1.1 403 ")
    assert "The model 'gpt2' does not exist, or this API key may not use it." in forbidden


def test_a_key_sees_its_own_models(demo: Running) -> None:
    (listed, *_) = printed(demo, f"curl {demo.url}/v1/models")

    assert [model["id"] for model in json.loads(listed)["data"]] == ["llama-3-8b"]


def test_past_its_limit_a_key_has_to_wait(demo: Running) -> None:
    (answers,) = printed(demo, "for n in")

    statuses = [int(status) for status in re.findall(r"^HTTP/1.1 (\d+)", answers, re.MULTILINE)]
    assert statuses == [200] * REQUESTS + [429]
    assert re.search(r"^retry-after: \d+", answers, re.MULTILINE)
    assert f"Rate limit reached for key 'batch': {REQUESTS} requests per 60 s. Try again in" in answers
    assert f"x-ratelimit-limit-requests: {REQUESTS}" in answers


def test_every_request_is_a_record_with_its_cost(demo: Running) -> None:
    (answered, *_) = printed(demo, f"curl {demo.url}/v1/chat/completions")
    assert "I am a demo model" in answered

    records = []

    def has_come() -> bool:
        (line,) = printed(demo, "grep ")
        records.append(json.loads(line) if line else {})
        return records[-1].get("organisation") == "team-b"

    until(has_come)
    record = records[-1]
    assert (record["event"], record["user"]) == ("usage", "ana")
    assert record["output_tokens"] > 0
    assert record["cost_nanos"] > 0


def test_the_printed_python_works_as_printed(demo: Running) -> None:
    (code,) = re.findall(r"^import os\nfrom openai.*?^print.*?$", demo.printed, re.MULTILINE | re.DOTALL)
    environment = os.environ | keys_of(demo)
    ran = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)

    assert ran.stdout.startswith("I am a demo model named gpt2")


def test_keys_are_printed_and_kept_nowhere(demo: Running) -> None:
    (directory,) = re.findall(r"every process is in (\S+)", demo.printed)
    files = [path for path in Path(directory).rglob("*") if path.is_file()]

    assert len(keys_of(demo)) == 2
    assert any(path.name == "policy.yaml" for path in files)
    for path in files:
        for key in keys_of(demo).values():
            assert key.encode() not in path.read_bytes(), path


def test_the_demo_runs_with_keys_in_this_process() -> None:
    interrupted(lambda: run_demo(port=0, tokens_per_second=400, keys=True, plain=True))


def test_its_policy_is_one_that_the_router_takes() -> None:
    policy = run(read(yaml.safe_load(Keys.new().policy()), peppered=False))

    assert policy.keys == 2
