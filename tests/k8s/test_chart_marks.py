"""No value is without effect: each has a mark of its own in marked-values.yaml, and that is in what Helm installs.

A word of a fixed list, say Always, may be there for another reason: where such values go is asked for one by one.
"""

import json
from functools import cache
from typing import Any

import pytest

from tests.k8s.charts import MARKED, MARKED_INSTALLS, installed, require_helm
from tests.k8s.test_chart_values import VALUES, leaves

require_helm()
pytestmark = pytest.mark.timeout(600)

# What is added up before it is told; a registry of each image, which that of all images replaces; what is looked for
# elsewhere: tests/k8s/test_chart.py leaves an alert out.
UNMARKED = {
    *("router.drain.reserveSeconds", "engines.drain.reserveSeconds"),
    *("image.registry", "engines.images.vllm.registry", "engines.images.tgi.registry"),
    "monitoring.prometheusRule.disabled",
}


COMPONENTS = ("router", "registry", "engine")


@cache
def everything() -> str:
    return "".join(json.dumps(installed(name).objects) for name in MARKED_INSTALLS)


def scalars(value: Any) -> list[Any]:
    if isinstance(value, dict | list):
        return [scalar for inner in (value.values() if isinstance(value, dict) else value) for scalar in scalars(inner)]
    return [value]


def at(values: dict[str, Any], path: tuple[str, ...]) -> Any:
    return at(values[path[0]], path[1:]) if path else values


def test_every_value_has_a_mark() -> None:
    """A new value is added to marked-values.yaml, and found below; a switch need only be on in one of the installs."""
    marked = set(leaves(MARKED))
    missing = [path for path in leaves(VALUES) if not any(path == mark[: len(path)] for mark in marked)]

    assert missing == []


@pytest.mark.parametrize("path", [path for path in leaves(MARKED) if ".".join(path) not in UNMARKED], ids=".".join)
def test_its_mark_is_in_what_is_installed(path: tuple[str, ...]) -> None:
    marks = [str(scalar) for scalar in scalars(at(MARKED, path)) if not isinstance(scalar, bool | None)]

    assert [mark for mark in marks if mark not in everything()] == []


def test_words_of_fixed_lists_are_where_they_are_meant_to_be() -> None:
    found, router, engines = installed("marks"), MARKED["router"], MARKED["engines"]
    (service,) = [o for o in found.of("Service", "router") if o["spec"].get("clusterIP") != "None"]
    claims = found.of("PersistentVolumeClaim", "engine")
    pods = {component: found.of("Deployment", component)[0] for component in COMPONENTS}
    contexts = {name: pod["spec"]["template"]["spec"]["securityContext"] for name, pod in pods.items()}

    assert service["spec"]["type"] == router["service"]["type"]
    spread = pods["router"]["spec"]["template"]["spec"]["topologySpreadConstraints"]
    assert {one["whenUnsatisfiable"] for one in spread} == {router["topologySpread"]["whenUnsatisfiable"]}
    assert claims
    assert all(claim["spec"]["accessModes"] == engines["cache"]["accessModes"] for claim in claims)
    assert contexts["router"] == contexts["registry"] == router["podSecurityContext"]
    assert contexts["engine"] == engines["podSecurityContext"]
