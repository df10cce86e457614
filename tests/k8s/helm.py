"""Real Helm, for the tests of the chart: jobs as JSON on stdin, what came of them as JSON on stdout.

Runs as `python -m tests.k8s.helm` in the environment of scripts/helm-tools, which has Helm (helm-sdkpy) and needs a
newer Python than the project. HELM_DRIVER=memory must be in its environment: releases are kept in the process.
"""

import asyncio
import json
import sys
import warnings
from typing import Any

import helm_sdkpy
import yaml

from tests.k8s.fake_api import FakeApi, schema_problem

RELEASE, NAMESPACE = "inference-api", "inference"


async def run(job: dict[str, Any]) -> dict[str, Any]:
    """Install a chart into a cluster of its own; `upgrade` has values to upgrade to, and then it is uninstalled."""
    chart, values, release = job["chart"], job["values"], job["kubernetes"]
    with FakeApi(release, job.get("custom", True)) as api:
        config = helm_sdkpy.Configuration(namespace=NAMESPACE, kubeconfig=api.kubeconfig)
        try:
            result = await helm_sdkpy.Install(config).run(RELEASE, chart, values, wait=False, timeout=20)
            hooks = [yaml.safe_load(hook["manifest"]) for hook in result.get("hooks") or ()]
            if problem := next(filter(None, (schema_problem(hook, release) for hook in hooks)), None):
                return {"error": problem}
            installed = list(api.objects.values())
            if "upgrade" in job:
                await helm_sdkpy.Upgrade(config).run(RELEASE, chart, job["upgrade"], wait=False, timeout=20)
                upgraded = list(api.objects.values())
                await helm_sdkpy.Uninstall(config).run(RELEASE, wait=False)
                return {"objects": installed, "upgraded": upgraded, "left": list(api.objects.values())}
        except helm_sdkpy.HelmError as exc:
            return {"error": str(exc)}
        return {"objects": installed, "hooks": hooks, "notes": result["info"]["notes"]}


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
