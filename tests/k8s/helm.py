"""Real Helm, for the tests of the chart: jobs as JSON on stdin, what came of them as JSON on stdout.

Runs as `python -m tests.k8s.helm` in the environment of scripts/helm-tools, which has Helm (helm-sdkpy) and needs a
newer Python than the project. HELM_DRIVER=memory must be in its environment: releases are kept in the process.
"""

import asyncio
import copy
import json
import sys
import warnings
from typing import Any

import helm_sdkpy
import yaml

from tests.k8s.fake_api import FakeApi
from tests.k8s.fake_rules import schema_problem

Json = dict[str, Any]

RELEASE, NAMESPACE = "inference-api", "inference"


async def run(job: Json) -> Json:
    """Install a chart into a cluster of its own and do `steps` with it: what there is then, or what went wrong.

    `objects` are as Helm has them, `upgraded` and `left` as the cluster has.

    `ssa`: by server-side apply; `there`: objects that somebody else has made. `upgrade` has values to upgrade to, and
    then it is uninstalled.
    """
    with FakeApi(job["kubernetes"], job.get("custom", True)) as api:
        for path, body in job.get("there", {}).items():
            api.post(path, body, "somebody")
        api.sent.clear()
        config = helm_sdkpy.Configuration(namespace=NAMESPACE, kubeconfig=api.kubeconfig)
        try:
            result = await _step(api, config, job, "install", job["values"])
            hooks = [yaml.safe_load(hook["manifest"]) for hook in result.get("hooks") or ()]
            if problem := next(filter(None, (schema_problem(hook, api.release) for hook in hooks)), None):
                return {"error": problem}
            found = {"objects": [*api.sent.values()], "hooks": hooks, "notes": result["info"].get("notes", "")}
            if "upgrade" in job:
                upgraded = await _step(api, config, job, "upgrade", job["upgrade"])
                found["upgrade_hooks"] = [yaml.safe_load(hook["manifest"]) for hook in upgraded.get("hooks") or ()]
                found["upgraded"] = _objects(api)
                await _step(api, config, job, "uninstall", None)
            for what, value in job.get("steps", ()):
                await _step(api, config, job, what, value)
        except helm_sdkpy.HelmError as exc:
            return {"error": str(exc)}
        return {**found, "left": _objects(api)}


async def _step(api: FakeApi, config: Any, job: Json, what: str, value: Any) -> Any:
    chart, ssa = job["chart"], job.get("ssa", False)
    match what:
        case "install":
            install = helm_sdkpy.Install(config)
            return await install.run(RELEASE, chart, value, wait=False, timeout=20, server_side_apply=ssa)
        case "upgrade":
            return await helm_sdkpy.Upgrade(config).run(RELEASE, chart, value, wait=False, timeout=20)
        case "rollback":
            return await _rollback(config, value)
        case "uninstall":
            return await helm_sdkpy.Uninstall(config).run(RELEASE, wait=False)
        case "scale":
            return api.scale(f"/apis/apps/v1/namespaces/{NAMESPACE}/deployments/{RELEASE}", value)
    raise ValueError(what)


async def _rollback(config: Any, revision: int) -> None:
    try:
        await helm_sdkpy.Rollback(config).run(RELEASE, revision)
    except helm_sdkpy.HelmError as exc:
        # helm_sdkpy does not say how to wait for what by then is changed.
        if "wait strategy not set" not in str(exc):
            raise


def _objects(api: FakeApi) -> list[Json]:
    return copy.deepcopy([*api.objects.values()])


async def lint(chart: str) -> dict[str, Any]:
    return {"lint": await helm_sdkpy.Lint(helm_sdkpy.Configuration()).run(chart)}


async def main() -> None:
    # helm_sdkpy frees the handle of a configuration that could not be made.
    warnings.simplefilter("ignore")
    jobs = json.load(sys.stdin)
    # Helm spends its time waiting, for its own rate limit among others.
    results = await asyncio.gather(*(lint(job["lint"]) if "lint" in job else run(job) for job in jobs.values()))
    json.dump(dict(zip(jobs, results, strict=True)), sys.stdout)


if __name__ == "__main__":
    asyncio.run(main())
