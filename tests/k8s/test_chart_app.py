"""The app's own word on what the chart gives it: settings, catalogue, probes, and the registry's arguments."""

import asyncio
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from inference_api.app import Router
from inference_api.settings import Settings
from registry_stub.app import create_app
from registry_stub.cli import _parser
from registry_stub.store import Store
from tests.fakes import FakeEngine
from tests.k8s.charts import catalogue, environ, every_install, installed, needs_helm, router_pod, settings, values_of

pytestmark = [needs_helm, pytest.mark.timeout(300), pytest.mark.anyio]


@every_install
def test_the_router_accepts_its_environment(name: str) -> None:
    found = installed(name)
    read = settings(found)

    ports = {port["name"]: port["containerPort"] for port in router_pod(found)["containers"][0]["ports"]}
    assert ports == {"http": read.port, "ops": read.ops_port}
    assert read.host == "0.0.0.0"


def test_each_value_arrives() -> None:
    """Numbers as people write them, lists as the settings want them."""
    read = settings(installed("full on 1.37"))

    assert (read.stream_timeout, read.drain_delay, read.drain_timeout) == (3600, 20, 3600)
    assert (read.max_body_bytes, read.breaker_failures, read.retry_budget) == (33554432, 3, 0.5)
    assert read.retry_on_status == {429, 503}
    assert read.forward_headers == {"x-vllm-priority"}
    assert settings(installed("keda on 1.37")).registry_refresh == 2.5
    assert environ(installed("endpointslices on 1.37"))["INFERENCE_API_DISCOVERY"] == "endpointslices"
    assert "INFERENCE_API_DISCOVERY" not in environ(installed("default on 1.37"))


@every_install
def test_the_grace_period_is_the_sum_and_no_stream_is_longer_than_the_drain(name: str) -> None:
    found = installed(name)
    read, grace = settings(found), router_pod(found)["terminationGracePeriodSeconds"]

    assert grace - read.drain_delay - read.drain_timeout == 15
    longest = [entry.timeouts.total or 0 for entry in catalogue(found).values()]
    assert read.drain_timeout >= max(read.stream_timeout, read.total_timeout, *longest, 0)


@every_install
async def test_probes_ask_for_paths_that_the_app_has(name: str) -> None:
    found = installed(name)
    container = router_pod(found)["containers"][0]
    probes = {key: container[f"{key}Probe"]["httpGet"] for key in ("startup", "readiness", "liveness")}
    assert {probe["port"] for probe in probes.values()} == {"ops"}
    assert probes["liveness"]["path"] != probes["readiness"]["path"] == probes["startup"]["path"]

    router = Router(Settings())
    router.probes.state = "ready"
    async with httpx.AsyncClient(transport=httpx.ASGITransport(router.ops), base_url="http://pod") as client:
        for probe in probes.values():
            assert (await client.get(probe["path"])).status_code == 200
        router.drain()
        assert (await client.get(probes["readiness"]["path"])).status_code == 503
        assert (await client.get(probes["liveness"]["path"])).status_code == 200


@every_install
def test_the_catalogue_is_accepted_as_a_whole(name: str) -> None:
    found = installed(name)
    read = catalogue(found)
    mounts = {mount["mountPath"]: mount["name"] for mount in router_pod(found)["containers"][0]["volumeMounts"]}

    assert read.problems == []
    assert str(settings(found).catalogue) == "/etc/inference-api/catalogue.yaml"
    assert mounts["/etc/inference-api"] == "catalogue"
    assert all(entry.backends for entry in read.values())


@every_install
def test_tokens_that_the_catalogue_names_are_in_the_environment(name: str) -> None:
    found = installed(name)
    variables = {variable["name"] for variable in router_pod(found)["containers"][0]["env"]}

    for entry in catalogue(found).values():
        wanted = getattr(entry.credentials, "env", None)
        assert wanted is None or wanted in variables


@every_install
def test_secrets_are_only_referred_to(name: str) -> None:
    found = installed(name)

    assert not found.of("Secret")
    for _, _, spec in found.pods():
        for variable in (variable for container in spec["containers"] for variable in container.get("env", ())):
            if variable["name"].endswith(("TOKEN", "KEY", "PASSWORD")):
                assert "value" not in variable


# The registry


@every_install
def test_the_router_finds_the_registry(name: str) -> None:
    found = installed(name)
    url = settings(found).registry_url
    if not found.of("StatefulSet", "registry"):
        assert url == {"keda": "https://registry.example.com/models-api"}.get(
            name.partition(" ")[0], values_of(name)["router"].get("registry", {}).get("url")
        )
        return
    service = found.one("Service", "registry")
    assert url is not None
    assert urlsplit(url).hostname == service["metadata"]["name"]
    assert urlsplit(url).port == service["spec"]["ports"][0]["port"]


@every_install
def test_the_registry_accepts_its_arguments(name: str) -> None:
    found = installed(name)
    if not found.of("StatefulSet", "registry"):
        assert values_of(name)["registry"] == {"enabled": False}
        return
    workload = found.one("StatefulSet", "registry")
    (container,) = workload["spec"]["template"]["spec"]["containers"]
    mounts = {mount["mountPath"]: mount for mount in container["volumeMounts"]}

    read = _parser().parse_args(container["args"])

    assert container["command"] == ["registry-stub"]
    assert workload["spec"]["replicas"] == 1
    assert read.port == container["ports"][0]["containerPort"]
    assert not mounts[str(read.database.parent)].get("readOnly")
    assert mounts[str(read.catalogue.parent)]["name"] == "catalogue"
    assert "REGISTRY_STUB_TOKEN" in {variable["name"] for variable in container["env"]}


async def test_the_registrys_probes_are_answered(tmp_path: Path) -> None:
    (container,) = installed("default on 1.37").one("StatefulSet")["spec"]["template"]["spec"]["containers"]
    with Store(tmp_path / "registry.sqlite3") as store:
        transport = httpx.ASGITransport(create_app(store))
        async with httpx.AsyncClient(transport=transport, base_url="http://pod") as client:
            for key in ("startup", "readiness", "liveness"):
                assert (await client.get(container[f"{key}Probe"]["httpGet"]["path"])).status_code == 200


def test_models_of_the_values_arrive_again_where_the_registry_forgets() -> None:
    """Without a volume it is filled at each start, so new models are a reason to; with one it is left alone."""

    def checksum(name: str) -> bool:
        metadata = installed(name).one("StatefulSet")["spec"]["template"]["metadata"]
        return "checksum/catalogue" in metadata.get("annotations", {})

    assert checksum("endpointslices on 1.37")
    assert not checksum("default on 1.37")


# helm test


async def test_helm_test_passes_where_the_router_answers(start_router: Callable[..., Any]) -> None:
    (hook,) = [h for h in installed("default on 1.37").hooks if h["metadata"]["name"].endswith("router")]
    served = await start_router(FakeEngine())
    (container,) = hook["spec"]["containers"]
    python, dash_c, program = container["command"]
    url, key = container["args"]
    assert (python, dash_c, urlsplit(url).hostname) == ("python", "-c", "inference-api")

    async def run(base: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", program, base + urlsplit(url).path, key]
        return await asyncio.to_thread(subprocess.run, command, text=True, capture_output=True, timeout=30)

    passed, failed = await run(served.url), await run("http://127.0.0.1:1")
    assert (passed.returncode, passed.stdout) == (0, f"1 models at {served.url}/v1/models\n")
    assert failed.returncode == 1
