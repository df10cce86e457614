"""What the registry tells Prometheus."""

import re
import shutil
import subprocess
from pathlib import Path

import httpx
import pytest
from starlette.types import Receive, Scope, Send

from registry_stub.metrics import Counted, Metrics
from registry_stub.store import Store

PAGE = (Path(__file__).parent.parent.parent / "docs" / "metrics.md").read_text()


def counts(client: httpx.Client) -> dict[str, float]:
    """The samples by their names and labels, without buckets, times and what the process itself has."""
    lines = client.get("/metrics").text.splitlines()
    samples = [line.rpartition(" ") for line in lines if line.startswith("model_registry_")]
    return {
        re.sub(r"^model_registry_", "", name): float(value)
        for name, _, value in samples
        if not re.search("_bucket|_created|_sum", name)
    }


def test_requests_are_counted_by_route_and_answer(client: httpx.Client) -> None:
    client.put("/models/a", json={"name": "a"})
    client.put("/models/a/b", content=b"{")
    client.get("/models")
    client.get("/models/")
    client.get("/models/nope")
    client.get("/nowhere")
    client.patch("/models/a")
    seen = counts(client)

    assert {name: value for name, value in seen.items() if name.startswith("http_requests_total")} == {
        'http_requests_total{code="201",method="PUT",route="model"}': 1,
        'http_requests_total{code="415",method="PUT",route="model"}': 1,
        'http_requests_total{code="200",method="GET",route="models"}': 2,
        'http_requests_total{code="404",method="GET",route="model"}': 1,
        'http_requests_total{code="404",method="GET",route="other"}': 1,
        'http_requests_total{code="405",method="other",route="model"}': 1,
    }
    assert seen['http_request_duration_seconds_count{method="PUT",route="model"}'] == 2
    assert seen["models"] == 1


def test_the_first_scrape_has_the_models_and_the_build(client: httpx.Client) -> None:
    (build,) = [name for name in counts(client) if name.startswith("build_info")]

    assert counts(client)["models"] == 0
    assert 'version="' in build
    assert "process_resident_memory_bytes" in client.get("/metrics").text


@pytest.mark.parametrize(
    ("accept", "kind"),
    [
        ("application/openmetrics-text", "application/openmetrics-text"),
        ("application/openmetrics-text;q=0", "text/plain"),
    ],
)
def test_a_scraper_gets_the_format_that_it_takes(client: httpx.Client, accept: str, kind: str) -> None:
    answer = client.get("/metrics", headers={"accept": accept})

    assert answer.headers["content-type"].startswith(f"{kind}; version=")
    assert answer.text.endswith("# EOF\n") == (kind != "text/plain")


@pytest.mark.anyio
async def test_what_ends_without_an_answer_is_a_500(store: Store) -> None:
    metrics = Metrics(lambda: 0)

    async def broken(scope: Scope, receive: Receive, send: Send) -> None:
        raise RuntimeError("no")

    transport = httpx.ASGITransport(Counted(broken, metrics))
    async with httpx.AsyncClient(transport=transport, base_url="http://registry") as client:
        with pytest.raises(RuntimeError):
            await client.get("/models")

    assert metrics.requests.labels("GET", "models", "500")._value.get() == 1


def test_promtool_finds_nothing_to_complain_about(client: httpx.Client) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not on PATH (Debian: apt-get install prometheus)")
    client.get("/models")
    page = client.get("/metrics").content

    checked = subprocess.run([promtool, "check", "metrics"], input=page, capture_output=True, check=False)

    assert (checked.returncode, checked.stdout, checked.stderr) == (0, b"", b"")


def test_the_documentation_lists_them(client: httpx.Client) -> None:
    families = set(re.findall(r"^# TYPE (model_registry_\S+) ", client.get("/metrics").text, re.MULTILINE))

    assert set(re.findall(r"`(model_registry_\w+)`", PAGE)) == {f for f in families if not f.endswith("_created")}
