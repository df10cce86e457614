"""`inference-api demo --plain`: real processes, the real router, the printed commands as printed."""

import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import NamedTuple

import httpx
import pytest

from inference_api.demo.processes import DemoError, Processes, stop_signals
from inference_api.demo.run import is_installed, run_demo

HELLO = {"model": "llama-3-8b", "messages": [{"role": "user", "content": "Hello"}]}


class Running(NamedTuple):
    process: subprocess.Popen[str]
    url: str
    printed: str


def until(reached: Callable[[], bool], patience: float = 30) -> None:
    deadline = time.monotonic() + patience
    while not reached():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def start(directory: Path, *options: str, plain: bool = True) -> Running:
    """`inference-api demo` on a free port, once it has printed its guide; its files are in `directory`."""
    # A variable of the router that is none: the demo must not hand it on.
    environment = {**os.environ, "TMPDIR": str(directory), "INFERENCE_API_NONSENSE": "1"}
    command = [sys.executable, "-m", "inference_api", "demo", "--port", "0", "--tokens-per-second", "400", *options]
    command += ["--plain"] if plain else []
    printed = ""
    # Between the choice of a free port and its use another test may take it.
    for _ in range(3):
        process = subprocess.Popen(
            command,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        assert process.stdout is not None
        printed = ""
        for line in process.stdout:
            printed += line
            if "Ctrl-C ends it." in line:
                return Running(process, re.findall(r"http://[\d.]+:\d+", printed)[0], printed)
        process.stdout.close()
        process.wait(30)
        if "Address already in use" not in printed:
            break
    raise AssertionError(printed)


def end(demo: Running, number: signal.Signals = signal.SIGINT) -> tuple[int, str]:
    demo.process.send_signal(number)
    rest, _ = demo.process.communicate(timeout=30)
    return demo.process.returncode, rest.strip()


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def answers(url: str) -> bool:
    try:
        return httpx.get(url, trust_env=False).is_success
    except httpx.TransportError:
        return False


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    running = start(tmp_path_factory.mktemp("demo"))
    yield running
    end(running)


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_the_printed_curl_commands_work_as_printed(demo: Running) -> None:
    commands = re.findall(r"^curl .*$", demo.printed, re.MULTILINE)
    answered, streamed, called = [
        subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=True).stdout for command in commands
    ]
    content = json.loads(answered)["choices"][0]["message"]["content"]
    assert content.startswith("I am a demo model named llama-3-8b, not a language model.")
    assert streamed.count("data: ") > 40
    assert streamed.endswith("data: [DONE]\n\n")
    (call,) = json.loads(called)["choices"][0]["message"]["tool_calls"]
    assert call["function"] == {"name": "get_weather", "arguments": '{"city":"demo"}'}


def test_the_printed_python_works_as_printed(demo: Running) -> None:
    (code,) = re.findall(r"^from openai.*?^print.*?$", demo.printed, re.MULTILINE | re.DOTALL)
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.startswith("I am a demo model named gpt2, not a language model.")
    assert ran.stdout.endswith("You said: Hello\n")


def test_the_models_come_from_the_registry(demo: Running) -> None:
    ready = httpx.get(f"{demo.url}/readyz", trust_env=False).json()
    listed = httpx.get(f"{demo.url}/v1/models", trust_env=False).json()
    assert ready["catalogue"] == "registry"
    assert [card["id"] for card in listed["data"]] == ["llama-3-8b", "mistral-7b", "gpt2"]


def test_a_model_has_an_alias(demo: Running) -> None:
    assert httpx.post(f"{demo.url}/v1/chat/completions", json={**HELLO, "model": "llama3"}, trust_env=False).is_success


def test_the_announced_logs_of_engines_have_their_requests(demo: Running) -> None:
    httpx.post(f"{demo.url}/v1/chat/completions", json={**HELLO, "model": "gpt2"}, trust_env=False)
    (directory,) = re.findall(r"every process is in (\S+)", demo.printed)
    (log,) = Path(directory).glob("gpt2*.log")
    assert '"POST /v1/chat/completions HTTP/1.1" 200' in log.read_text()
    assert "GET /health" not in log.read_text()


def test_the_printed_kill_takes_a_backend_away_and_the_printed_command_brings_it_back(demo: Running) -> None:
    (command,) = re.findall(r"^kill \d+$", demo.printed, re.MULTILINE)
    subprocess.run(["sh", "-c", command], check=True)
    assert demo.process.stdout is not None
    while "llama-3-8b on port" not in (line := demo.process.stdout.readline()):
        assert line
    assert "the router goes on without it" in line
    for _ in range(6):
        response = httpx.post(f"{demo.url}/v1/chat/completions", json=HELLO, trust_env=False)
        assert response.status_code == 200

    again = [demo.process.stdout.readline() for _ in range(3)][1].strip()
    port = re.findall(r"on port (\d+)", line)[0]
    with subprocess.Popen(["sh", "-c", f"exec {again}"], stderr=subprocess.DEVNULL) as engine:
        until(lambda: answers(f"http://127.0.0.1:{port}/health"))
        (card,) = httpx.get(f"http://127.0.0.1:{port}/v1/models", trust_env=False).json()["data"]
        engine.terminate()
    assert card["id"] == "llama-3-8b"


@pytest.mark.skipif(sys.platform != "linux", reason="looks at /proc")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_everything_with_code_0_and_without_a_word(tmp_path: Path, number: signal.Signals) -> None:
    demo = start(tmp_path)
    pids = children(demo.process.pid)
    assert len(pids) == 6
    assert end(demo, number) == (0, "")
    assert [pid for pid in pids if is_alive(pid)] == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux can end the children of a killed process")
def test_a_killed_demo_leaves_no_process_behind(tmp_path: Path) -> None:
    demo = start(tmp_path)
    pids = children(demo.process.pid)
    assert len(pids) == 6
    assert end(demo, signal.SIGKILL)[0] == -signal.SIGKILL
    until(lambda: not any(is_alive(pid) for pid in pids))


def test_an_open_stream_does_not_hold_up_the_end(tmp_path: Path) -> None:
    demo = start(tmp_path, "--tokens-per-second", "1")
    asked = {"model": "gpt2", "prompt": "Hello", "stream": True}
    with httpx.stream("POST", f"{demo.url}/v1/completions", json=asked, trust_env=False, timeout=30) as response:
        next(response.iter_raw())
        assert end(demo) == (0, "")


def interrupted(demo: Callable[[], int]) -> str:
    """What a demo in this process, where it is measured, prints until SIGINT."""
    printed, over = io.StringIO(), threading.Event()

    def interrupt() -> None:
        until(lambda: over.is_set() or "Ctrl-C ends it." in printed.getvalue(), 200)
        if not over.is_set():
            os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with redirect_stdout(printed):
        code = demo()
    over.set()
    thread.join()
    assert code == 0
    return printed.getvalue()


def test_the_demo_runs_in_this_process_until_sigint() -> None:
    before = signal.getsignal(signal.SIGINT)
    interrupted(lambda: run_demo(port=0, tokens_per_second=400, plain=True))
    assert signal.getsignal(signal.SIGINT) is before


def test_a_signal_during_the_start_ends_it_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM))
    timer.start()
    assert run_demo(port=0, plain=True) == 0
    timer.join()
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(("before", "heard"), [(signal.SIG_DFL, [signal.SIGHUP]), (signal.SIG_IGN, [])])
def test_a_closed_terminal_is_a_signal_to_stop_unless_started_with_nohup(
    before: signal.Handlers, heard: list[int]
) -> None:
    previous = signal.signal(signal.SIGHUP, before)
    try:
        with stop_signals() as stopping:
            os.kill(os.getpid(), signal.SIGHUP)
        assert stopping == heard
        assert signal.getsignal(signal.SIGHUP) is before
    finally:
        signal.signal(signal.SIGHUP, previous)


def test_a_port_in_use_is_named_with_the_fix(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert run_demo(port=port) == 1
    message = f"inference-api demo: port {port} on 127.0.0.1: address already in use; choose another one, say --port "
    assert capsys.readouterr().err.startswith(message)


@pytest.mark.parametrize("plain", [True, False])
@pytest.mark.parametrize(
    ("host", "port", "pace", "message"),
    [
        ("127.0.0.1", 70000, 40, "70000 is not a port; choose another one, say --port 8001"),
        ("no.such.host.invalid", 0, 40, "cannot listen on 'no.such.host.invalid'"),
        ("127.0.0.1", 0, 0, "--tokens-per-second must be more than 0, not 0"),
    ],
)
def test_options_that_cannot_be_used_are_named(
    capsys: pytest.CaptureFixture[str], host: str, port: int, pace: float, message: str, plain: bool
) -> None:
    assert run_demo(host, port, pace, plain=plain) == 1
    assert capsys.readouterr().err.startswith(f"inference-api demo: {message}")


@pytest.fixture
def processes(tmp_path: Path) -> Iterator[Processes]:
    demo = Processes(tmp_path, stopping=[])
    yield demo
    demo.stop()


def test_a_process_that_ends_before_it_is_ready_is_named_with_its_last_words(processes: Processes) -> None:
    processes.start("registry", "json.tool", "/no/such/file")
    with pytest.raises(DemoError, match=r"registry \(process \d+\) ended with exit code 2(.|\n)*/no/such/file"):
        processes.wait_for(["http://127.0.0.1:1/healthz"])


def test_a_process_that_is_not_ready_in_time_is_named(tmp_path: Path) -> None:
    processes = Processes(tmp_path, stopping=[], ready_within=0.3)
    with pytest.raises(DemoError, match=r"http://127.0.0.1:1/healthz did not answer 200 within 0.3 s"):
        processes.wait_for(["http://127.0.0.1:1/healthz"])


def test_the_demo_goes_on_with_one_router_of_two(processes: Processes) -> None:
    printed = io.StringIO()
    processes.start("router on port 1", "json.tool", "/no/such/file", settings={"SECRET": "it's"})
    until(lambda: processes.children[0].ended)
    processes.start("router on port 2", "http.server", "0")
    with redirect_stdout(printed):
        thread = threading.Thread(target=processes.watch)
        thread.start()
        until(lambda: "the other router goes on" in printed.getvalue())
        processes.stopping.append(signal.SIGINT)
        thread.join()
    again = printed.getvalue().split("To start it again:")[1].strip()
    ran = subprocess.run(["sh", "-c", again], capture_output=True, text=True, check=False)

    assert "/no/such/file" in ran.stderr
    assert "it's" not in printed.getvalue()


def test_a_command_that_fails_is_named_with_its_words(processes: Processes) -> None:
    with pytest.raises(DemoError, match=r"json.tool /no/such/file: (.|\n)*No such file"):
        processes.run("json.tool", "/no/such/file", settings={})


def test_an_extra_is_installed_if_all_that_it_asks_for_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "toy-1.dist-info").mkdir()
    (tmp_path / "toy-1.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: toy\nVersion: 1\n"
        "Requires-Dist: no-such-distribution[x]>=1; extra == 'more'\nRequires-Dist: httpx>=0.1; extra == 'less'\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))

    assert is_installed()
    assert is_installed("toy", "less")
    assert not is_installed("toy", "more")
    assert not is_installed("no-such-distribution")


def test_without_the_extra_it_runs_plain_and_says_how_to_get_the_rest() -> None:
    printed = interrupted(lambda: run_demo(port=0, tokens_per_second=400, installed=lambda: False))

    first, second = printed.splitlines()[:2]
    assert first.endswith("pip install 'inference-api[control-plane]' adds them.")
    assert second == ""
    assert "kill " in printed


def test_the_demo_cannot_go_on_without_its_router(processes: Processes) -> None:
    processes.start("router", "json.tool", "/no/such/file")
    with pytest.raises(DemoError, match=r"router .* ended with exit code 2"):
        processes.watch()


def test_the_demo_goes_on_without_an_engine(tmp_path: Path) -> None:
    stopping: list[int] = []
    processes, printed = Processes(tmp_path, stopping), io.StringIO()
    processes.start("gpt2 on port 1", "json.tool", "/no/such/file")
    with redirect_stdout(printed):
        thread = threading.Thread(target=processes.watch)
        thread.start()
        until(lambda: "goes on without it" in printed.getvalue())
        time.sleep(0.3)
        stopping.append(signal.SIGINT)
        thread.join()
    assert printed.getvalue().count("gpt2 on port 1") == 1
