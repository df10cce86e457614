import fcntl
import logging
import os
import re
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from registry_stub.cli import main

SEED = """
models:
  - {name: llama-3-8b, aliases: [llama3], backends: [{url: "http://llama:8000"}]}
  - {name: bad, "odd\\nkey": 1}
  - {name: gpt2}
  - {name: llama3}
"""
Start = Callable[..., "Process"]


class Process:
    """`python -m registry_stub serve` on a free port, ready to answer."""

    def __init__(self, database: Path, *options: str, **environment: str) -> None:
        command = [sys.executable, "-m", "registry_stub", "serve", "--port", "0", "--database", str(database), *options]
        self.popen = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, **environment})
        assert self.popen.stderr
        self.log = ""
        for line in self.popen.stderr:
            self.log += line
            if found := re.search(r"listening on (http://\S+),", line):
                self.url = found[1]
                return
        raise AssertionError(self.log)

    def stop(self, number: int = signal.SIGTERM) -> int:
        self.popen.send_signal(number)
        self.log += self.popen.communicate(timeout=20)[1]
        return self.popen.returncode


@pytest.fixture
def start(database: Path) -> Iterator[Start]:
    started: list[Process] = []

    def start(*options: str, **environment: str) -> Process:
        started.append(Process(database, *options, **environment))
        return started[-1]

    yield start
    for process in started:
        if process.popen.poll() is None:
            process.stop(signal.SIGKILL)


@pytest.fixture
def seed(tmp_path: Path) -> Path:
    path = tmp_path / "seed.yaml"
    path.write_text(SEED)
    return path


def names(url: str) -> list[str]:
    return [model["name"] for model in httpx.get(f"{url}/models").json()["models"]]


def refusal(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The one line with which `registry-stub serve` refuses to start."""
    assert main(["serve", "--port", "0", *argv]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("registry-stub: ")
    assert output.err.count("\n") == 1
    return output.err


def test_an_acknowledged_put_survives_a_kill(start: Start) -> None:
    first = start()
    for version in range(20):
        body = {"name": "a", "version": str(version)}
        assert httpx.put(f"{first.url}/models/a", json=body).status_code in (201, 200)
    created = httpx.put(f"{first.url}/models/b", json={"name": "b"})
    assert (created.status_code, first.stop(signal.SIGKILL)) == (201, -signal.SIGKILL)
    second = start()
    assert httpx.get(f"{second.url}/models/b").headers["etag"] == created.headers["etag"]
    assert httpx.get(f"{second.url}/models/a").json()["version"] == "19"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_process_well(start: Start, number: int) -> None:
    process = start()
    assert process.stop(number) == 0
    assert "Traceback" not in process.log


def test_a_log_that_nobody_reads_holds_nobody_up(start: Start) -> None:
    process = start()
    assert process.popen.stderr
    fcntl.fcntl(process.popen.stderr, fcntl.F_SETPIPE_SZ, 4096)
    address = ("127.0.0.1", httpx.URL(process.url).port or 0)
    for _ in range(300):
        with socket.create_connection(address) as client:
            # A line for each: "Invalid HTTP request received."
            client.sendall(b"\r\nno request\r\n\r\n")
            client.recv(100)
    assert httpx.get(f"{process.url}/healthz").status_code == 200
    assert process.stop() == 0
    assert process.log.count("Invalid HTTP request") == 300


def test_a_second_process_on_the_same_database_is_refused(start: Start, database: Path) -> None:
    first = start()
    command = [sys.executable, "-m", "registry_stub", "serve", "--port", "0", "--database", str(database)]
    second = subprocess.run(command, check=False, capture_output=True, text=True, timeout=20)
    assert second.returncode == 2
    assert re.fullmatch(rf"registry-stub: database '{database}' is in use .* stop that one or .*\n", second.stderr)
    assert httpx.get(f"{first.url}/healthz").status_code == 200


def test_an_empty_database_is_seeded_once_and_each_refused_entry_has_a_line(start: Start, seed: Path) -> None:
    first = start("--catalogue", str(seed))
    assert names(first.url) == ["llama-3-8b", "gpt2"]
    assert httpx.get(f"{first.url}/models/gpt2").json()["created"] == pytest.approx(time.time(), abs=60)
    refused = [line for line in first.log.splitlines() if "refused model" in line]
    assert len(refused) == 2
    assert r"'bad': unknown key 'odd\nkey'" in refused[0]
    assert "'llama3': the name 'llama3' is taken" in refused[1]
    httpx.delete(f"{first.url}/models/gpt2")
    first.stop()
    seed.unlink()
    assert names(start("--catalogue", str(seed)).url) == ["llama-3-8b"]


def test_a_token_from_the_environment_guards_writes_and_stays_out_of_the_log(start: Start) -> None:
    process = start("--log-level", "debug", REGISTRY_STUB_TOKEN="s3cret\n")
    url = f"{process.url}/models/a"
    assert httpx.put(url, json={"name": "a"}).status_code == 401
    assert httpx.put(url, json={"name": "a"}, headers={"Authorization": "Bearer s3cret"}).status_code == 201
    assert process.stop() == 0
    assert "s3cret" not in process.log


def test_a_token_can_have_a_variable_of_its_own(start: Start) -> None:
    process = start("--token-env", "MY_TOKEN", MY_TOKEN="mine", REGISTRY_STUB_TOKEN="other")
    for token, status in (("other", 401), ("mine", 404)):
        headers = {"Authorization": f"Bearer {token}"}
        assert httpx.delete(f"{process.url}/models/a", headers=headers).status_code == status


@pytest.mark.parametrize(
    ("value", "options", "reason"),
    [
        (None, ["--token-env", "MY_TOKEN"], "MY_TOKEN is not set; set it to the token"),
        (" \n", ["--token-env", "MY_TOKEN"], "MY_TOKEN is empty; set it to the token"),
        ("", [], "REGISTRY_STUB_TOKEN is empty; set it to a token, or unset it to go without"),
    ],
)
def test_a_missing_token_does_not_leave_writes_open(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    database: Path,
    value: str | None,
    options: list[str],
    reason: str,
) -> None:
    for name in ("MY_TOKEN", "REGISTRY_STUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    if value is not None:
        monkeypatch.setenv(options[-1] if options else "REGISTRY_STUB_TOKEN", value)
    assert reason in refusal(capsys, "--database", str(database), *options)
    assert not database.exists()


def test_a_file_that_is_not_a_database_is_refused(database: Path, capsys: pytest.CaptureFixture[str]) -> None:
    database.write_bytes(os.urandom(5000))
    assert "file is not a database" in refusal(capsys, "--database", str(database))


def test_a_directory_that_cannot_be_written_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tmp_path.chmod(0o555)
    superuser = os.geteuid() == 0
    if superuser:
        # Permissions do not hold the superuser; be somebody else for a moment.
        os.seteuid(65534)
    try:
        assert "Permission denied" in refusal(capsys, "--database", str(tmp_path / "r.sqlite3"))
    finally:
        if superuser:
            os.seteuid(0)
        tmp_path.chmod(0o755)


def test_an_unreadable_seed_is_refused(database: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = refusal(capsys, "--database", str(database), "--catalogue", "none.yaml")
    assert "catalogue 'none.yaml' cannot" in told
    assert told.rstrip().endswith("; --catalogue must name a file that can")


def test_a_port_in_use_is_refused_and_the_database_released(database: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        for _ in range(2):
            line = refusal(capsys, "--database", str(database), "--port", port)
            assert f"'127.0.0.1' port {port}: Address already in use; choose another" in line


def test_a_nonsense_host_is_refused(database: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = refusal(capsys, "--database", str(database), "--host", "a..b")
    assert "'a..b' port 0: that is no host name; choose another --host" in line


@pytest.mark.parametrize("argv", [[], ["--port", "8081"], ["serve", "--port", "65536"], ["serve", "--port", "http"]])
def test_a_wrong_command_line_is_told_how_it_should_be(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(argv)
    assert "usage: registry-stub" in capsys.readouterr().err


def test_help_shows_every_option_and_examples(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["registry-stub", "serve", "--help"])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_module("registry_stub", run_name="__main__")
    output = capsys.readouterr().out
    for word in (
        "--host",
        "--port",
        "--ops-port",
        "--database",
        "--catalogue",
        "--token-env",
        "--log-level",
        "8081",
        "curl -X PUT",
    ):
        assert word in output


@pytest.fixture
def signals() -> Iterator[None]:
    """main() changes the handlers of the process, which here is the test runner."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def running(caplog: pytest.LogCaptureFixture, *argv: str) -> tuple[int, list[str]]:
    """Run main() in this thread until another has listed the models and sent SIGTERM: (exit code, names)."""
    caplog.set_level(logging.INFO)
    listed: list[str] = []

    def visit() -> None:
        while not (found := re.search(r"listening on (http://\S+),", caplog.text)):
            time.sleep(0.01)
        try:
            listed.extend(names(found[1]))
        finally:
            os.kill(os.getpid(), signal.SIGTERM)

    visitor = threading.Thread(target=visit, daemon=True)
    visitor.start()
    code = main(["serve", "--port", "0", *argv])
    visitor.join(20)
    return code, listed


@pytest.mark.usefixtures("signals")
def test_what_was_seeded_is_served_again_and_the_catalogue_not_read(
    database: Path, seed: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("REGISTRY_STUB_TOKEN", raising=False)
    options = ("--database", str(database), "--catalogue", str(seed))
    for seeded in (False, True):
        assert running(caplog, *options) == (0, ["llama-3-8b", "gpt2"])
        assert ("is not read" in caplog.text) == seeded
        caplog.clear()


@pytest.mark.parametrize(
    ("host", "token", "status"),
    [("0.0.0.0", None, 403), ("0.0.0.0", "s3cret", 401), ("127.0.0.1", None, 201), ("localhost", None, 201)],
)
def test_without_a_token_only_this_machine_may_change_models(
    start: Start, host: str, token: str | None, status: int
) -> None:
    """Who can write can send a model's prompts, and the tokens of its backends, anywhere."""
    process = start("--host", host, **({"REGISTRY_STUB_TOKEN": token} if token else {}))
    url = process.url.replace("0.0.0.0", "127.0.0.1")
    assert httpx.put(f"{url}/models/a", json={"name": "a"}).status_code == status
    process.stop()
    assert ("takes no changes; set REGISTRY_STUB_TOKEN" in process.log) == (status == 403)


def test_metrics_can_have_a_port_of_their_own(start: Start) -> None:
    """Who reads metrics need not reach the port that models are changed on."""
    process = start("--ops-port", "0")
    found = re.search(r"metrics on (http://\S+)", process.log)
    assert found
    main, ops = process.url, found[1]
    paths = ("/metrics", "/healthz", "/models")

    assert [httpx.get(main + path).status_code for path in paths] == [404, 200, 200]
    assert [httpx.get(ops + path).status_code for path in paths] == [200, 200, 404]
    assert httpx.put(f"{ops}/models/a", json={"name": "a"}).status_code == 404
    assert 'route="models"' in httpx.get(f"{ops}/metrics").text
    # The port is that of the connection, whatever the client says of it.
    lie = {"Host": ops.removeprefix("http://")}
    assert httpx.get(f"{main}/metrics", headers=lie).status_code == 404
    assert process.stop() == 0


def test_one_port_for_both_is_refused(database: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        line = refusal(capsys, "--database", str(database), "--ops-port", port)
    assert f"port {port}: Address already in use; choose another --host or --ops-port" in line


# As a network file system would: a preloaded mmap refuses to share the index of the write-ahead log.
_REFUSING = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>
static void *mapped(const char *symbol, void *at, size_t n, int prot, int flags, int fd, off_t from) {
    void *(*real)(void *, size_t, int, int, int, off_t) = dlsym(RTLD_NEXT, symbol);
    char link[64], name[512];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t size = fd >= 0 && (flags & MAP_SHARED) ? readlink(link, name, sizeof name) : 0;
    if (size > 4 && !memcmp(name + size - 4, "-shm", 4)) { errno = ENODEV; return MAP_FAILED; }
    return real(at, n, prot, flags, fd, from);
}
void *mmap(void *at, size_t n, int prot, int flags, int fd, off_t from) { return mapped("mmap", at, n, prot, flags, fd, from); }
void *mmap64(void *at, size_t n, int prot, int flags, int fd, off_t from) { return mapped("mmap64", at, n, prot, flags, fd, from); }
"""  # noqa: E501


def test_it_serves_and_keeps_models_on_a_file_system_that_shares_no_memory(start: Start, tmp_path: Path) -> None:
    if not (compiler := shutil.which("cc")):
        pytest.skip("there is no C compiler here, to make a file system that shares no memory")
    (source, library) = (tmp_path / "refusing.c", tmp_path / "refusing.so")
    source.write_text(_REFUSING)
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
    first = start(LD_PRELOAD=str(library))
    assert "shares no memory (SQLITE_IOERR_SHMMAP)" in first.log
    assert httpx.put(f"{first.url}/models/a", json={"name": "a"}).status_code == 201
    first.stop(signal.SIGKILL)
    assert names(start(LD_PRELOAD=str(library)).url) == ["a"]


def has_ipv6() -> bool:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True


@pytest.mark.usefixtures("signals")
@pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6")
def test_an_ipv6_address_is_announced_as_a_url(database: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert running(caplog, "--database", str(database), "--host", "::1") == (0, [])
    assert "listening on http://[::1]:" in caplog.text


@pytest.mark.usefixtures("signals")
def test_rows_that_no_longer_read_are_named_and_not_seeded_over(
    start: Start, database: Path, seed: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    first = start()
    httpx.put(f"{first.url}/models/a", json={"name": "a"})
    first.stop()
    subprocess.run([sys.executable, "-c", _SPOIL, str(database)], check=True)
    options = ("--database", str(database), "--catalogue", str(seed))
    assert running(caplog, *options) == (0, [])
    assert re.search(rf"registry-stub: database '{database}': refused model 'a': ", capsys.readouterr().err)


_SPOIL = """
import sqlite3, sys
with sqlite3.connect(sys.argv[1]) as database:
    database.execute("UPDATE models SET entry = '{}'")
"""
