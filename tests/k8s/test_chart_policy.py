"""Keys, limits and usage: what the router is told of them, where it finds them, and who else may know."""

import asyncio
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml

from inference_api.policy.reading import read, run
from tests.fakes import FakeEngine
from tests.k8s.chart_values import POLICY
from tests.k8s.charts import MARKED, Json, environ, every_install, installed, require_helm, router_pod

require_helm()
pytestmark = pytest.mark.timeout(600)

PREFIX = "INFERENCE_API_"
OWN = (
    "AUTH",
    "POLICY",
    "POLICY_CACHE",
    "LIMITS",
    "LIMITS_ON_FAILURE",
    "LIMITS_SHARE",
    "USAGE",
    "USAGE_SPOOL",
    "CURRENCY",
)


def told(name: str) -> dict[str, str]:
    """The settings of these features."""
    given = environ(installed(name))
    return {setting: given[PREFIX + setting] for setting in OWN if PREFIX + setting in given}


def secrets(name: str) -> dict[str, tuple[str, str]]:
    """Where the settings that are secrets come from."""
    variables = router_pod(installed(name))["containers"][0]["env"]
    sources = {v["name"].removeprefix(PREFIX): v.get("valueFrom", {}).get("secretKeyRef") for v in variables}
    return {name: (source["name"], source["key"]) for name, source in sources.items() if source}


def mounted(name: str) -> dict[str, tuple[Json, bool]]:
    """By path: the volume, and whether it can be written to."""
    pod = router_pod(installed(name))
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    mounts = pod["containers"][0]["volumeMounts"]
    return {m["mountPath"]: (volumes[m["name"]], not m.get("readOnly")) for m in mounts}


def test_off_means_nothing_of_it() -> None:
    assert told("default on 1.37") == {}
    assert not secrets("default on 1.37")
    assert not any("policy" in path or "usage" in path for path in mounted("default on 1.37"))


def test_a_policy_in_the_values_is_a_secret_that_the_router_has_as_a_file() -> None:
    assert told("keys") == {
        "AUTH": "keys",
        "POLICY": "/etc/inference-api-policy/policy.yaml",
        "LIMITS": "local",
        "LIMITS_ON_FAILURE": "share",
        # As many as there are pods.
        "LIMITS_SHARE": "2",
        "USAGE": "log",
        "CURRENCY": "EUR",
    }
    secret = installed("keys").one("Secret")
    volume, writable = mounted("keys")["/etc/inference-api-policy"]
    (source,) = volume["projected"]["sources"]
    assert source["secret"] == {
        "name": secret["metadata"]["name"],
        "items": [{"key": "policy.yaml", "path": "policy.yaml"}],
    }
    assert not writable
    text = policy_of(secret)
    assert yaml.safe_load(text) == POLICY
    # Numbers as people write them, times as text.
    assert "20000000" in text
    assert run(read(yaml.safe_load(text), peppered=False)).keys == 1


@every_install
def test_the_router_accepts_its_policy(name: str) -> None:
    for secret in installed(name).of("Secret"):
        assert run(read(yaml.safe_load(policy_of(secret)), peppered=False)).number


def policy_of(secret: Json) -> str:
    text: str = secret["stringData"]["policy.yaml"]
    return text


def test_a_changed_policy_restarts_nothing() -> None:
    """Files are read again; a roll would end all streams."""
    before, after = installed("a changed policy").objects, installed("a changed policy").upgraded
    deployments = [[o["spec"] for o in objects if o["kind"] == "Deployment"] for objects in (before, after)]
    policies = [[policy_of(o) for o in objects if o["kind"] == "Secret"] for objects in (before, after)]

    assert deployments[0] == deployments[1]
    assert policies[0] != policies[1]


def test_limits_are_shared_by_as_many_pods_as_there_are_at_least() -> None:
    assert told("keys, an HPA")["LIMITS_SHARE"] == "3"
    assert told("marks with a policy")["LIMITS_SHARE"] == str(MARKED["router"]["rateLimits"]["share"])
    notes = installed("keys, an HPA").notes
    assert "Each pod counts limits for itself, 3 of them sharing each limit" in notes
    assert "with more pods than that more is let through" in notes


def test_a_policy_of_others_is_mounted_by_the_key_that_it_has() -> None:
    policy = MARKED["router"]["policy"]
    volume, _ = mounted("marks with a policy of others")["/etc/inference-api-policy"]

    (source,) = volume["projected"]["sources"]
    assert source["secret"]["name"] == policy["existingSecret"]
    assert source["secret"]["items"] == [{"key": policy["existingSecretKey"], "path": "policy.yaml"}]
    assert not installed("marks with a policy of others").of("Secret")


def test_a_control_plane_gives_the_policy_and_takes_the_usage() -> None:
    assert told("a control plane") == {
        "AUTH": "keys",
        "POLICY": "registry",
        "POLICY_CACHE": "/var/lib/inference-api-policy/policy.json",
        "LIMITS": "redis",
        "LIMITS_ON_FAILURE": "share",
        "LIMITS_SHARE": "2",
        "USAGE": "registry",
        "USAGE_SPOOL": "/var/lib/inference-api-usage",
    }
    assert secrets("a control plane") == {
        "REGISTRY_TOKEN": ("service-token", "token"),
        "KEY_PEPPER": ("pepper", "pepper"),
        "REDIS_URL": ("redis", "url"),
    }
    assert environ(installed("a control plane"))["INFERENCE_API_TRUSTED_PROXIES"] == "10.0.0.0/8,fd00::/8"
    assert not installed("a control plane").of("Secret")


def test_what_is_kept_is_where_it_can_be_written() -> None:
    mounts = mounted("a control plane")

    for path, size in (("/var/lib/inference-api-policy", "192Mi"), ("/var/lib/inference-api-usage", "128Mi")):
        volume, writable = mounts[path]
        assert writable
        assert volume["emptyDir"] == {"sizeLimit": size}
    # With /tmp, what the node must have for it.
    requests = router_pod(installed("a control plane"))["containers"][0]["resources"]["requests"]
    assert requests["ephemeral-storage"] == f"{256 + 192 + 128}Mi"


def test_a_spool_on_a_volume_outlives_the_release() -> None:
    (claim,) = installed("marks with a spool").of("PersistentVolumeClaim", "router")
    volume, writable = mounted("marks with a spool")["/var/lib/inference-api-usage"]

    assert volume["persistentVolumeClaim"] == {"claimName": claim["metadata"]["name"]}
    assert claim["metadata"]["annotations"]["helm.sh/resource-policy"] == "keep"
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    assert writable
    assert not installed("marks with a control plane").of("PersistentVolumeClaim", "router")


def test_words_of_fixed_lists_are_where_they_are_meant_to_be() -> None:
    given = told("marks with a policy")

    assert given["LIMITS_ON_FAILURE"] == MARKED["router"]["rateLimits"]["onFailure"]
    assert given["LIMITS"] == MARKED["router"]["rateLimits"]["store"]
    assert told("marks with a control plane")["USAGE"] == MARKED["router"]["usage"]["mode"]


def test_the_router_may_connect_to_redis_and_the_control_plane() -> None:
    (policy,) = installed("a control plane").of("NetworkPolicy", "router")
    ports = {port["port"] for rule in policy["spec"]["egress"] for port in rule["ports"] if "to" not in rule}

    assert ports >= {6380, 8443}


def test_a_pod_that_waits_for_its_policy_is_not_killed_for_that() -> None:
    def startup(name: str) -> Any:
        return router_pod(installed(name))["containers"][0]["startupProbe"]["httpGet"]["path"]

    assert startup("a control plane") == "/healthz"
    assert startup("keys") == "/readyz"


def test_the_notes_tell_of_keys_and_warn_of_none() -> None:
    notes = installed("keys").notes

    assert 'curl http://127.0.0.1:8000/v1/models -H "Authorization: Bearer $KEY"' in notes
    assert "in the Secret inference-api-policy, has them as digests" in notes
    assert "exec deploy/inference-api -- inference-api keys new --name NAME" in notes
    assert "from https://control.example.com:8443, has them as digests" in installed("a control plane").notes
    assert "keys" not in installed("default on 1.37").notes.replace("Set router.auth.mode to keys", "")


def test_helm_test_wants_a_router_with_keys_to_refuse_it() -> None:
    wanted = {
        name: [h["spec"]["containers"][0]["args"][-1] for h in installed(name).hooks if h["kind"] == "Pod"]
        for name in ("default on 1.37", "keys", "a control plane")
    }

    assert wanted == {"default on 1.37": ["200", "200"], "keys": ["200", "401"], "a control plane": ["401"]}


@pytest.mark.anyio
async def test_helm_test_passes_where_keys_are_asked_for_and_fails_where_they_are_not(
    start_router: Callable[..., Any], tmp_path: Path
) -> None:
    """The router has the policy of the install, as a pod would."""
    (hook,) = [h for h in installed("keys").hooks if h["metadata"]["name"].endswith("test-router")]
    (container,) = hook["spec"]["containers"]
    policy = tmp_path / "policy.yaml"
    policy.write_text(policy_of(installed("keys").one("Secret")))
    asking = await start_router(FakeEngine(), auth=told("keys")["AUTH"], policy=str(policy))
    open_to_all = await start_router(FakeEngine())

    async def tested(base: str) -> subprocess.CompletedProcess[str]:
        _, _, program = container["command"]
        url, key, probe, wanted = container["args"]
        places = [base + urlsplit(url).path, key, base + urlsplit(probe).path, wanted]
        command = [sys.executable, "-c", program, *places]
        return await asyncio.to_thread(subprocess.run, command, text=True, capture_output=True, timeout=30)

    passed, failed = await tested(asking.url), await tested(open_to_all.url)
    assert (passed.returncode, passed.stderr) == (0, "")
    assert f"401 invalid_api_key at {asking.url}/v1/models" in passed.stdout
    assert failed.returncode == 1
