"""What dashboards, alerts and the demo's engines call vLLM's metrics is what vLLM calls them."""

import httpx
import pytest

from inference_api.demo.telemetry import Telemetry
from tests.e2e.conftest import Engines
from tests.k8s import chart_files

pytestmark = pytest.mark.e2e


def test_the_series_of_vllm_are_called_what_we_call_them(engines: Engines) -> None:
    url = engines["gpt2"][0].url
    exported = chart_files.sample_names(httpx.get(f"{url}/metrics", timeout=10, trust_env=False).text)
    expressions = [expression for _, expression in chart_files.panel_expressions()]
    expressions += [rule["expr"] for rule in chart_files.rules()]
    used = {name for expression in expressions for name in chart_files.metrics(expression) if name.startswith("vllm:")}
    demo = chart_files.sample_names(Telemetry("gpt2", 10).page().decode())

    assert len(used) > 10
    assert used | demo <= exported
