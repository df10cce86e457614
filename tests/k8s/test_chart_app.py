"""The app's own word on what the chart gives it: settings, catalogue, probes, and the registry's arguments."""

import asyncio
import os
import re
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from inference_api.app import build
from inference_api.settings import Settings
from registry_stub.app import create_app
from registry_stub.cli import _parser
from registry_stub.store import Store
from tests.command import ready
from tests.fakes import FakeEngine
from tests.k8s.chart_values import NAMESPACE
from tests.k8s.charts import (
    MARKED,
    ROOT,
    catalogue,
    environ,
    every_install,
    installed,
    require_helm,
    router_pod,
    settings,
    values_of,
)
from tests.ports import free_port

require_helm()
pytestmark = [pytest.mark.timeout(600), pytest.mark.anyio]


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
    assert environ(installed("full on 1.37"))["INFERENCE_API_MAX_BUFFERED_BYTES"] == "268435456"
    assert settings(installed("keda on 1.37")).registry_refresh == 2.5
    assert environ(installed("endpointslices on 1.37"))["INFERENCE_API_DISCOVERY"] == "endpointslices"
    assert "INFERENCE_API_DISCOVERY" not in environ(installed("default on 1.37"))


def test_each_value_arrives_where_it_is_meant_to() -> None:
    router = MARKED["router"]
    timeouts, drain, limits = router["timeouts"], router["drain"], router["limits"]

    read = settings(installed("marks"))

    assert (read.host, read.port, read.ops_port) == (router["host"], *router["ports"].values())
    assert (read.log_level, read.breaker_failures) == (router["logLevel"], router["settings"]["BREAKER_FAILURES"])
    assert (read.connect_timeout, read.first_byte_timeout) == (timeouts["connect"], timeouts["firstByte"])
    assert (read.idle_timeout, read.total_timeout) == (timeouts["idle"], timeouts["total"])
    assert (read.stream_timeout, read.discovery) == (timeouts["stream"], router["discovery"]["mode"])
    assert (read.drain_delay, read.drain_timeout) == (drain["delaySeconds"], drain["timeoutSeconds"])
    assert (read.max_in_flight, read.max_body_bytes) == (limits["maxInFlight"], limits["maxBodyBytes"])
    assert (read.max_buffered_bytes, read.discovery_interval) == (
        limits["maxBufferedBytes"],
        router["discovery"]["intervalSeconds"],
    )
    assert read.registry_refresh == router["registry"]["refreshSeconds"]


def test_traces_go_by_the_protocol_that_the_router_speaks_and_say_whose_they_are() -> None:
    found = installed("marks")
    otel = MARKED["monitoring"]["otel"]
    variables = router_pod(found)["containers"][0]["env"]
    given = {
        one["name"]: one.get("value") or one["valueFrom"]["fieldRef"]["fieldPath"]
        for one in variables
        if "secretKeyRef" not in one.get("valueFrom", {})
    }

    assert {name: value for name, value in given.items() if name.startswith(("OTEL_", "K8S_"))} == {
        "K8S_POD_NAME": "metadata.name",
        "K8S_NODE_NAME": "spec.nodeName",
        "OTEL_SERVICE_NAME": MARKED["fullnameOverride"],
        "OTEL_EXPORTER_OTLP_ENDPOINT": otel["endpoint"],
        "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf",
        "OTEL_TRACES_SAMPLER": otel["sampler"],
        "OTEL_TRACES_SAMPLER_ARG": otel["samplerArg"],
        "OTEL_RESOURCE_ATTRIBUTES": f"k8s.namespace.name={NAMESPACE},k8s.pod.name=$(K8S_POD_NAME),"
        f"k8s.node.name=$(K8S_NODE_NAME),k8s.cluster.name={MARKED['clusterName']}",
    }
    names = [one["name"] for one in variables]
    # A name is only put in where it was given before.
    assert max(names.index("K8S_POD_NAME"), names.index("K8S_NODE_NAME")) < names.index("OTEL_RESOURCE_ATTRIBUTES")


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
    assert probes["liveness"]["path"] != probes["readiness"]["path"]
    # One that waits for its registry is not killed for that.
    given = environ(found)
    waits = "INFERENCE_API_REGISTRY_REQUIRED" in given or given.get("INFERENCE_API_POLICY") == "registry"
    assert probes["startup"]["path"] == probes["liveness" if waits else "readiness"]["path"]

    router = build(Settings())
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


def test_virtual_models_have_no_backends() -> None:
    found = installed("virtual models")
    read = catalogue(found)

    assert read.problems == read.warnings == []
    assert {name for name, entry in read.items() if not entry.backends} == {"chat", "fastest", "sure"}
    assert read["chat"].model_dump()["split"]["variants"] == {"gpt2": 90, "mistral-7b": 10}


@every_install
def test_tokens_that_the_catalogue_names_are_in_the_environment(name: str) -> None:
    found = installed(name)
    pod = router_pod(found)
    variables = {variable["name"] for variable in pod["containers"][0]["env"]}
    mounts = {mount["name"]: mount["mountPath"] for mount in pod["containers"][0]["volumeMounts"]}
    files = {
        f"{mounts[volume['name']]}/{item['path']}"
        for volume in pod["volumes"]
        for source in volume.get("projected", {}).get("sources", ())
        for item in source["secret"]["items"]
    }

    for entry in catalogue(found).values():
        assert (getattr(entry.credentials, "env", None) or "") in {*variables, ""}
        assert (getattr(entry.credentials, "file", None) or "") in {*files, ""}


@every_install
def test_secrets_are_only_referred_to(name: str) -> None:
    found = installed(name)

    # But for a policy, which has digests.
    assert [secret["metadata"]["name"] for secret in found.of("Secret")] in ([], ["inference-api-policy"])
    for _, _, spec in found.pods():
        for variable in (variable for container in spec["containers"] for variable in container.get("env", ())):
            if variable["name"].endswith(("TOKEN", "KEY", "PASSWORD", "PEPPER", "REDIS_URL")):
                assert "value" not in variable


# The registry


@every_install
def test_the_router_finds_the_registry(name: str) -> None:
    found = installed(name)
    url = settings(found).registry_url
    if found.of("Deployment", "control"):
        ports = {port["name"]: port["port"] for port in found.one("Service", "control")["spec"]["ports"]}
        assert url == f"http://{found.one('Service', 'control')['metadata']['name']}:{ports['http']}"
        return
    if not found.of("Deployment", "registry"):
        assert url == {"keda": "https://registry.example.com/models-api"}.get(
            name.partition(" ")[0], values_of(name)["router"].get("registry", {}).get("url")
        )
        return
    service = found.one("Service", "registry")
    assert url is not None
    assert urlsplit(url).hostname == service["metadata"]["name"]
    assert urlsplit(url).port == {port["name"]: port["port"] for port in service["spec"]["ports"]}["http"]


@every_install
def test_the_registry_accepts_its_arguments(name: str) -> None:
    found = installed(name)
    if not found.of("Deployment", "registry"):
        assert values_of(name)["registry"] in ({"enabled": False}, {"kind": "control-plane"})
        return
    workload = found.one("Deployment", "registry")
    (container,) = workload["spec"]["template"]["spec"]["containers"]
    mounts = {mount["mountPath"]: mount for mount in container["volumeMounts"]}

    read = _parser().parse_args(container["args"])

    assert container["command"] == ["registry-stub"]
    assert workload["spec"]["replicas"] == 1
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert ports == {"http": read.port, "ops": read.ops_port}
    assert not mounts[str(read.database.parent)].get("readOnly")
    assert mounts[str(read.catalogue.parent)]["name"] == "catalogue"
    named = values_of(name).get("registry", {}).get("auth", {}).get("existingSecret")
    sources = {v["name"]: v.get("valueFrom", {}) for v in container.get("env", ())}
    token = sources.get("REGISTRY_STUB_TOKEN", {}).get("secretKeyRef", {})
    # No Secret: no token, and so no changes.
    assert token.get("name") == named


def test_the_registrys_values_arrive() -> None:
    """The address of a cluster that has IPv6 only, too: it is full of colons."""
    (container,) = installed("marks").one("Deployment", "registry")["spec"]["template"]["spec"]["containers"]
    read = _parser().parse_args(container["args"])

    assert (read.host, read.port) == (MARKED["router"]["host"], MARKED["registry"]["service"]["port"])
    assert read.log_level == MARKED["registry"]["logLevel"]


async def test_the_registrys_probes_are_answered(tmp_path: Path) -> None:
    (container,) = installed("default on 1.37").one("Deployment", "registry")["spec"]["template"]["spec"]["containers"]
    with Store(tmp_path / "registry.sqlite3") as store:
        transport = httpx.ASGITransport(create_app(store, ops_port=8000))
        async with httpx.AsyncClient(transport=transport, base_url="http://pod:8000") as client:
            for key in ("startup", "readiness", "liveness"):
                assert container[f"{key}Probe"]["httpGet"]["port"] == "ops"
                assert (await client.get(container[f"{key}Probe"]["httpGet"]["path"])).status_code == 200
            assert (await client.get("/models")).status_code == 404


def registry_of(name: str) -> tuple[dict[str, Any], str | None, bool]:
    """Its pod, the claim that it keeps models in, and whether a change of `models` starts it anew."""
    template = installed(name).one("Deployment", "registry")["spec"]["template"]
    (data,) = [volume for volume in template["spec"]["volumes"] if volume["name"] == "data"]
    anew = "checksum/catalogue" in template["metadata"].get("annotations", {})
    return template["spec"], data.get("persistentVolumeClaim", {}).get("claimName"), anew


def test_what_the_registry_was_told_is_kept_and_values_hold_where_nobody_can_tell_it() -> None:
    """With a Secret the registry is the truth, and has a volume; without one the values are, at each change of them."""
    cases = {name: registry_of(name)[1:] for name in ("default on 1.37", "full on 1.37", "endpointslices on 1.37")}

    assert cases == {
        "default on 1.37": (None, True),
        "full on 1.37": ("inference-api-registry", False),
        # A Secret, and no volume.
        "endpointslices on 1.37": (None, True),
    }
    claims = {o["metadata"]["name"] for o in installed("full on 1.37").of("PersistentVolumeClaim")}
    assert claims == {"inference-api-registry"}
    assert registry_of("a claim of others")[1:] == ("data-inference-api-registry-0", False)
    assert not installed("a claim of others").of("PersistentVolumeClaim")


@every_install
def test_there_is_never_a_second_registry(name: str) -> None:
    for registry in installed(name).of("Deployment", "registry"):
        assert registry["spec"]["replicas"] == 1
        assert registry["spec"]["strategy"] == {"type": "Recreate"}


# All of it


@asynccontextmanager
async def started(module: str, args: list[str], variables: dict[str, str]) -> AsyncIterator[None]:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", module, *args), env={"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT)} | variables
    )
    try:
        yield
    finally:
        process.terminate()
        # SIGTERM is no way to die for either of them.
        assert await asyncio.wait_for(process.wait(), 20) == 0


async def test_what_is_installed_works_and_outlives_its_registry(tmp_path: Path) -> None:
    """The commands, arguments, variables and files of the default install, but for the places of this machine."""
    found = installed("default on 1.37")
    (registry,) = found.one("Deployment", "registry")["spec"]["template"]["spec"]["containers"]
    port, ops, registry_port, registry_ops = free_port(), free_port(), free_port(), free_port()
    (tmp_path / "catalogue.yaml").write_text(found.one("ConfigMap")["data"]["catalogue.yaml"])
    text = " ".join(registry["args"]).replace("/etc/inference-api", str(tmp_path)).replace("/data", str(tmp_path))
    text = re.sub("--ops-port=[0-9]+", f"--ops-port={registry_ops}", text)
    arguments = re.sub("--port=[0-9]+", f"--port={registry_port}", text).split()
    here = {"CATALOGUE": tmp_path / "catalogue.yaml", "PORT": port, "OPS_PORT": ops, "DRAIN_DELAY": 0}
    here |= {"REGISTRY_URL": f"http://127.0.0.1:{registry_port}", "REGISTRY_REFRESH": 1}
    variables = environ(found) | {f"INFERENCE_API_{name}": str(value) for name, value in here.items()}

    async with httpx.AsyncClient(timeout=10, trust_env=False) as client, AsyncExitStack() as stack:
        readyz = f"http://127.0.0.1:{ops}/readyz"

        async def source() -> str:
            answer = await client.get(readyz)
            assert answer.status_code == 200
            told: str = answer.json()["catalogue"]
            return told

        async with started("registry_stub", arguments, {}):
            await ready(client, f"http://127.0.0.1:{registry_ops}/healthz")
            await stack.enter_async_context(started("inference_api", ["serve"], variables))
            await ready(client, readyz)
            assert await source() == "registry"
            listed = (await client.get(f"http://127.0.0.1:{port}/v1/models")).json()["data"]
            assert {model["id"] for model in listed} >= {"llama-3-8b", "mistral-7b", "gpt2"}
            refused = await client.delete(f"http://127.0.0.1:{registry_port}/models/gpt2")
            # No Secret is named, so nobody changes it.
            assert refused.status_code == 403
        async with asyncio.timeout(60):
            while True:
                if await source() == "stale":
                    break
                await asyncio.sleep(0.05)


# helm test


async def test_helm_test_passes_where_the_router_answers(start_router: Callable[..., Any]) -> None:
    (hook,) = [h for h in installed("default on 1.37").hooks if h["metadata"]["name"].endswith("router")]
    served = await start_router(FakeEngine())
    (container,) = hook["spec"]["containers"]
    python, dash_c, program = container["command"]
    url, key, probe, wanted = container["args"]
    assert (python, dash_c, urlsplit(url).hostname) == ("python", "-c", "inference-api")
    assert urlsplit(probe).hostname == "inference-api-ops"

    async def run(base: str, wanted: str = wanted) -> subprocess.CompletedProcess[str]:
        places = [base + urlsplit(url).path, key, base + urlsplit(probe).path]
        command = [sys.executable, "-c", program, *places, wanted]
        return await asyncio.to_thread(subprocess.run, command, text=True, capture_output=True, timeout=30)

    passed, failed = await run(served.url), await run("http://127.0.0.1:1")
    assert passed.returncode == 0
    assert passed.stdout == f"200 at {served.url}/readyz\n1 models at {served.url}/v1/models\n"
    assert failed.returncode == 1

    # One that is to ask for keys must not answer this.
    assert (await run(served.url, "401")).returncode == 1

    empty = await run((await start_router(models=[])).url)
    assert empty.returncode == 1
    assert "0 models at" in empty.stdout
    served.router.probes.state = "draining"
    assert (await run(served.url)).returncode == 1


@pytest.mark.parametrize("name", ["default on 1.37", "keda on 1.37", "endpointslices on 1.37"])
def test_helm_test_asks_services_that_there_are(name: str) -> None:
    found = installed(name)
    services = {o["metadata"]["name"]: [p["port"] for p in o["spec"]["ports"]] for o in found.of("Service")}

    for hook in (hook for hook in found.hooks if hook["kind"] == "Pod"):
        url, _, probe, _ = hook["spec"]["containers"][0]["args"]
        for place in (urlsplit(url), urlsplit(probe)):
            assert place.port in services[place.hostname or ""]
