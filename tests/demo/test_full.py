"""`inference-api demo`: control plane, two routers, engines and traffic; what it prints works as printed."""

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from inference_api.demo.run import run_demo
from tests.demo.test_run import Running, children, end, interrupted, is_alive, start, until

# Ten processes start.
pytestmark = pytest.mark.timeout(240)
needs_curl = pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    running = start(tmp_path_factory.mktemp("demo"), plain=False)
    yield running
    end(running)


@pytest.fixture(scope="module")
def admin(demo: Running) -> Iterator[httpx.Client]:
    """A client of the API, logged in by the link that is printed first."""
    with httpx.Client(trust_env=False, timeout=30) as client:
        link = re.findall(r"^http.*token=.*$", demo.printed, re.MULTILINE)[0]
        assert "Sign in as Ana Castro" in client.get(link).text
        # As a browser on the page does
        assert client.post(link, headers={"origin": demo.url}).status_code == 303
        assert client.get(f"{demo.url}/console/").status_code == 200
        client.base_url = httpx.URL(f"{demo.url}/api/v1")
        assert client.get("/me").json()["platform_role"] == "admin"
        yield client


def shell(demo: Running, command: str) -> str:
    """What a printed command prints, in a shell with the printed key."""
    (key,) = re.findall(r"^export KEY=(\S+)$", demo.printed, re.MULTILINE)
    ran = subprocess.run(
        ["sh", "-c", command], env=os.environ | {"KEY": key}, capture_output=True, text=True, check=True
    )
    return ran.stdout


@needs_curl
def test_the_printed_commands_work_as_printed(demo: Running) -> None:
    lines = re.findall(r"^curl .*$", demo.printed, re.MULTILINE)
    asked, streamed, prompted, woken = (shell(demo, line) for line in lines)
    (failing,) = re.findall(r"^for n in .*$", demo.printed, re.MULTILINE)
    (code,) = re.findall(r"^import os\nfrom openai.*?^print.*?$", demo.printed, re.MULTILINE | re.DOTALL)
    (link,) = re.findall(r"^(sh .*) ana$", demo.printed, re.MULTILINE)

    assert "I am a demo model named" in asked
    assert streamed.endswith("data: [DONE]\n\n")
    assert "I am a demo model named mistral-7b" in prompted
    assert "I am a demo model named phi-3-mini" in woken
    assert len(re.findall(r"^x-request-id: ", shell(demo, failing), re.MULTILINE)) == 20
    assert shell(demo, f"{sys.executable} -c '{code}'").startswith("I am a demo model named")
    assert shell(demo, f"{link} mei").startswith(f"{demo.url}/console/login?token=")


def test_two_routers_report_and_what_they_did_is_usage(demo: Running, admin: httpx.Client) -> None:
    def recent() -> list[Any]:
        # Those of the day before have other ids.
        boots = {one["boot"] for one in admin.get("/routers").json()["data"]}
        found = admin.get("/requests", params={"limit": 200}).json()["data"]
        return [one for one in found if one["id"].split("-")[0] in boots]

    until(lambda: {one["lost"] for one in admin.get("/routers").json()["data"]} == {False})
    until(lambda: len({one["router"] for one in recent()}) == 2)
    backends = admin.get("/backends").json()["data"]
    usage = admin.get("/usage", params={"group_by": "organisation"}).json()

    assert [one["agree"] for one in backends] == ["2/2"] * 6
    assert {row["group"]["organisation"] for row in usage["rows"] if row["group"]} >= {"sued", "support-cn", "research"}
    assert usage["totals"]["requests"] > 400
    assert usage["totals"]["errors"] > 0

    titles = {one["title"] for one in admin.get("/organisations").json()["data"]}
    keys = admin.get("/keys").json()["data"]
    prompts = admin.get("/prompts").json()["data"]

    assert titles == {"Übersetzung Süd", "客服团队", "Research"}
    assert {key["state"] for key in keys} == {"ok", "ended"}
    assert [(one["labels"], one["latest"]) for one in prompts] == [({"production": 1, "next": 2}, 2)]


@needs_curl
@pytest.mark.skipif(sys.platform != "linux", reason="looks at /proc")
def test_a_router_ends_and_comes_back_and_ctrl_c_leaves_nothing(tmp_path: Path) -> None:
    demo = start(tmp_path, plain=False)
    (wake,) = re.findall(r"^curl .*phi-3-mini.*$", demo.printed, re.MULTILINE)
    assert "I am a demo model named phi-3-mini" in shell(demo, wake)
    (folder,) = re.findall(r"every process is in (\S+)", demo.printed)
    pids = children(demo.process.pid)
    # The control plane has the engine that was woken, below what watches it.
    below = [one for pid in pids for child in children(pid) for one in (child, *children(child))]
    router = next(pid for pid in pids if b"\0inference_api\0serve" in Path(f"/proc/{pid}/cmdline").read_bytes())
    os.kill(router, signal.SIGKILL)
    assert demo.process.stdout is not None
    while "router on port" not in (line := demo.process.stdout.readline()):
        assert line
    again = [demo.process.stdout.readline() for _ in range(3)][1].strip()
    port = re.findall(r"on port (\d+)", line)[0]
    with subprocess.Popen(["sh", "-c", f"exec {again}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as one:
        until(lambda: _is_ready(f"http://127.0.0.1:{port}"))
        one.terminate()

    assert "the other router goes on" in line
    assert len(pids) == 9
    assert end(demo) == (0, "")
    assert len(below) == 2
    assert [pid for pid in (*pids, *below) if is_alive(pid)] == []
    assert not Path(folder).exists()


def _is_ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/readyz", trust_env=False).status_code == 200
    except httpx.TransportError:
        return False


def test_the_demo_runs_in_this_process_until_sigint() -> None:
    """The same as above, where it is measured."""
    interrupted(lambda: run_demo(port=0, tokens_per_second=400))


def test_a_signal_during_the_start_ends_it_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM))
    timer.start()
    assert run_demo(port=0) == 0
    timer.join()
    assert capsys.readouterr() == ("", "")
