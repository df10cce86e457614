"""Incidents, as an operator meets them: found, understood, ended, seen to be over; and the log of an engine."""

import asyncio
import os
import re
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import httpx
import pytest
from playwright.sync_api import expect

from inference_api.demo.processes import free_ports
from tests.browser.conftest import Visitor, World, running
from tests.control_plane.fake_cluster import FakeCluster

PATIENCE = 60_000
T = TypeVar("T")


class Cluster:
    """A cluster in a thread with a loop of its own: the driver of the browser keeps the one here."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._fake = FakeCluster()

    def __enter__(self) -> "Cluster":
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._fake.__aenter__(), self._loop).result(30)
        return self

    def __exit__(self, *exc: object) -> None:
        asyncio.run_coroutine_threadsafe(self._fake.stop(), self._loop).result(30)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(30)
        self._loop.close()

    @property
    def settings(self) -> dict[str, str]:
        names = {"NAMESPACE": self._fake.namespace, "URL": self._fake.url, "SCALE": "on", "LOGS": "on"}
        return {f"CONTROL_PLANE_KUBERNETES_{name}": value for name, value in names.items()}

    def do(self, what: Callable[[FakeCluster], T]) -> T:
        """Something happens in the cluster, and then all that follows from it."""

        async def done() -> T:
            found = what(self._fake)
            self._fake.settle()
            return found

        return asyncio.run_coroutine_threadsafe(done(), self._loop).result(30)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with Cluster() as cluster:
        yield cluster


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory, cluster: Cluster) -> Iterator[World]:
    """A demo in which things break."""
    with running(tmp_path_factory.mktemp("demo"), rate=4, yesterday=False, settings=cluster.settings) as world:
        yield world


def test_a_backend_dies_and_is_replaced(own: World, visit: Visitor) -> None:
    engine = own.child("llama-3-8b")
    label = f"127.0.0.1:{re.findall(r'[0-9]+$', engine.name)[0]}"
    tab = visit(own, "/console/")
    expect(tab.locator("main")).to_contain_text("llama-3-8b", timeout=PATIENCE)
    os.kill(engine.pid, signal.SIGKILL)

    # Found: the page says it by itself, and why.
    bad = (
        tab.locator("#live")
        .locator("tr, li, article, section")
        .filter(has_text="llama-3-8b")
        .filter(has_text="degraded")
        .first
    )
    expect(bad).to_be_visible(timeout=PATIENCE)
    expect(bad).to_contain_text(label, timeout=PATIENCE)
    # Explained
    bad.get_by_role("link", name=re.compile("llama-3-8b")).first.click()
    row = tab.get_by_role("row").filter(has_text=label).first
    expect(row).to_contain_text(re.compile("connect|refused|unhealthy"), timeout=PATIENCE)
    # Drained
    tab.goto(f"{own.url}/console/backends?model=llama-3-8b")
    tab.get_by_role("link", name=f"Drain {label}").click()
    tab.get_by_label("Reason").fill("its machine is gone")
    tab.get_by_role("dialog").get_by_role("button", name="Drain").click()
    expect(tab.locator("#live")).to_contain_text("2 of 2", timeout=PATIENCE)
    # Replaced: another engine, and the entry names it.
    port = free_ports(1)[0]
    options = ("--model", "llama-3-8b", "--port", str(port), "--tokens-per-second", "200")
    own.demo.start(f"llama-3-8b on port {port}", "inference_api.demo.engine", *options)
    own.until(lambda: own.answers(f"http://127.0.0.1:{port}/health"))
    tab.goto(f"{own.url}/console/models/llama-3-8b?tab=entry")
    entry = tab.get_by_label(re.compile("^Entry"))
    entry.fill(entry.input_value().replace(label, f"127.0.0.1:{port}"))
    tab.get_by_role("button", name="Check").click()
    expect(tab.locator("main")).to_contain_text(f"127.0.0.1:{port}")
    tab.get_by_role("button", name="Save").click()

    # Seen to be over
    tab.goto(f"{own.url}/console/backends?model=llama-3-8b")
    new = tab.get_by_role("row").filter(has_text=f"127.0.0.1:{port}").first
    expect(new).to_contain_text("ready", timeout=PATIENCE)
    tab.goto(f"{own.url}/console/requests?model=llama-3-8b&backend=127.0.0.1:{port}")
    expect(tab.get_by_role("table").get_by_role("row").nth(1)).to_be_visible(timeout=PATIENCE)


def test_a_failed_request_is_found_by_its_id_in_two_clicks(own: World, visit: Visitor) -> None:
    failed = own.failure()
    tab = visit(own, "/console/")
    # One
    tab.get_by_role("link", name="Requests", exact=True).first.click()
    tab.get_by_label("Request id").fill(failed[:12])
    # Two
    tab.get_by_label("Request id").press("Enter")

    expect(tab.locator("h1")).to_contain_text(failed, timeout=PATIENCE)
    main = tab.locator("main")
    expect(main).to_contain_text("failed")
    expect(main).to_contain_text("127.0.0.1:")
    expect(main.get_by_role("figure").filter(has_text="What happened")).to_contain_text("answered 5")
    runbook = main.get_by_role("link", name=re.compile("runbook", re.IGNORECASE)).first
    expect(runbook).to_have_attribute("href", re.compile("#"))


def test_a_leaked_key_is_ended_everywhere(own: World, visit: Visitor) -> None:
    key = own.demo.keys["translate"]
    asked = {"model": "mistral-7b", "max_tokens": 1, "messages": [{"role": "user", "content": "hello"}]}
    with httpx.Client(trust_env=False, timeout=30, headers={"authorization": f"Bearer {key.secret}"}) as client:
        own.until(
            lambda: all(
                client.post(f"{url}/v1/chat/completions", json=asked).status_code == 200 for url in own.demo.routers
            )
        )
        tab = visit(own, "/console/keys")
        # The whole secret, as it was found; it never becomes a part of a URL.
        tab.get_by_label("a leaked key").fill(key.secret)
        tab.get_by_label("a leaked key").press("Enter")
        expect(tab.locator("h1")).to_contain_text("translate")
        assert key.secret not in tab.url
        expect(tab.locator("main")).to_contain_text("last 24 hours")
        # Who pastes a secret wants to end it.
        tab.get_by_role("dialog").get_by_role("button", name=re.compile("^End")).click()
        expect(tab.locator("main")).to_contain_text("ended")
        expect(tab.locator("main")).to_contain_text("2 of 2", timeout=PATIENCE)

        assert [client.post(f"{url}/v1/chat/completions", json=asked).status_code for url in own.demo.routers] == [
            401,
            401,
        ]
    secrets = [
        path for path in Path(own.demo.directory).glob("*.log") if key.secret in path.read_text(errors="replace")
    ]
    assert secrets == []
    assert not any(key.secret in request.url for watched in visit.watched for request in watched.requests)


@pytest.mark.timeout(300)
def test_a_log_is_followed_as_text(own: World, cluster: Cluster, visit: Visitor) -> None:
    name = "gpt2"
    cluster.do(lambda fake: fake.deployment(name))
    pod = cluster.do(lambda fake: fake.pods_of(name)[0].name)
    cluster.do(lambda fake: fake.log(pod, "INFO it is ready"))
    made = {"driver": "kubernetes", "object": name}
    own.admin.put(f"/api/v1/deployments/{name}", json=made, headers={"if-none-match": "*"}).raise_for_status()
    tab = visit(own, f"/console/models/{name}?tab=logs", role="operator")
    log, told = tab.locator("#log"), tab.locator("#followed")
    expect(log).to_contain_text("INFO it is ready", timeout=PATIENCE)

    tab.get_by_role("button", name="Follow").click()
    expect(told).to_contain_text("Following")
    cluster.do(lambda fake: fake.log(pod, "<img src=x onerror=alert(1)> \x1b[31mred\x1b[0m \x07 \u202e."))
    expect(log).to_contain_text("<img src=x onerror=alert(1)> red \\x07 \\u202e.", timeout=PATIENCE)
    assert log.locator("img").count() == 0

    tab.get_by_role("button", name="Pause").click()
    expect(told).to_have_text("Paused.")
    cluster.do(lambda fake: fake.log(pod, "INFO written meanwhile"))
    tab.get_by_role("button", name="Follow").click()
    # From the last lines on, so nothing is missed and nothing is there twice.
    expect(log).to_contain_text("INFO written meanwhile", timeout=PATIENCE)
    assert (log.inner_text().count("INFO it is ready"), log.inner_text().count("written meanwhile")) == (1, 1)

    steps = [f"INFO step {number}" for number in range(6000)]
    cluster.do(lambda fake: fake.log(pod, *steps))
    expect(log).to_contain_text("INFO step 5999", timeout=PATIENCE)
    assert log.locator("span").count() == 5000

    cluster.do(lambda fake: fake.fail(name))
    expect(tab.get_by_role("button", name="Follow")).to_be_visible(timeout=PATIENCE)
    expect(told).not_to_contain_text("Following")
    expect(told).not_to_be_empty()


@pytest.mark.timeout(300)
def test_an_engine_without_memory_is_understood_and_scaled(own: World, cluster: Cluster, visit: Visitor) -> None:
    name = "mistral-7b"
    cluster.do(lambda fake: fake.deployment(name))
    made = {"driver": "kubernetes", "object": name, "max": 3}
    own.admin.put(f"/api/v1/deployments/{name}", json=made, headers={"if-none-match": "*"}).raise_for_status()
    tab = visit(own, f"/console/models/{name}?tab=engine", role="operator")
    expect(tab.locator("#live")).to_contain_text("Ready: 1 of 1.", timeout=PATIENCE)
    # It is killed, as the kernel does it; the cluster says so.
    engines = [child for child in own.demo.children if child.name.startswith(name)]
    for engine in engines:
        os.kill(engine.pid, signal.SIGKILL)
    lines = [
        "INFO model_runner.py:1110] Loading model weights took 14.9888 GB",
        "ERROR engine.py:389] torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.",
    ]
    cluster.do(lambda fake: fake.fail(name, reason="OOMKilled", code=137, previous=lines))

    # Found
    tab.goto(f"{own.url}/console/")
    bad = tab.locator("#bad").get_by_role("row").filter(has_text=name).filter(has_text="OOMKilled")
    expect(bad).to_be_visible(timeout=PATIENCE)
    expect(bad).to_contain_text("failing", timeout=PATIENCE)
    bad.get_by_role("link", name=f"Engine of {name}").click()
    expect(tab.locator("#live")).to_contain_text("exit code 137")
    # Its previous log says why.
    tab.get_by_role("link", name=re.compile("^Previous log of")).click()
    expect(tab.locator("#log")).to_contain_text("CUDA out of memory. Tried to allocate 2.00 GiB.")
    # Triaged: the cause has its section of the runbook.
    tab.get_by_role("link", name="Triage").last.click()
    tab.locator("main").get_by_role("button", name="Triage").click()
    group = tab.get_by_role("row").filter(has_text="CUDA out of memory").first
    expect(group).to_be_visible(timeout=PATIENCE)
    runbook = group.get_by_role("link", name=re.compile("^Runbook: "))
    section = (runbook.text_content() or "").removeprefix("Runbook: ")
    runbook.click()
    expect(tab.locator("h2:target, h1")).to_contain_text([section])
    # Scaled, with a reason
    tab.goto(f"{own.url}/console/models/{name}?tab=engine")
    tab.get_by_role("link", name="Scale", exact=True).click()
    dialog = tab.get_by_role("dialog")
    dialog.get_by_label("Instances").fill("2")
    dialog.get_by_label(re.compile("^Reason")).fill("one alone runs out of memory")
    dialog.get_by_role("button", name="Scale").click()
    expect(tab.locator("main")).to_contain_text("The number of instances is set.")
    cluster.do(lambda fake: fake.restart(name))
    for engine in engines:
        port = re.findall(r"[0-9]+$", engine.name)[0]
        own.demo.start(engine.name, "inference_api.demo.engine", "--model", name, "--port", port)

    # Seen to be over, and written down
    expect(tab.locator("#live")).to_contain_text("Ready: 2 of 2.", timeout=PATIENCE)
    tab.goto(f"{own.url}/console/")
    expect(tab.locator("#live")).not_to_contain_text("OOMKilled", timeout=PATIENCE)
    tab.goto(f"{own.url}/console/audit")
    row = tab.locator("main section, main tr").filter(has_text="deployment.scale").first
    expect(row).to_contain_text(name)
    expect(row).to_contain_text("one alone runs out of memory")
