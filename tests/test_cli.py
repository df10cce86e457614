"""The command line: what each command prints, where, and the exit code."""

import logging
import os
import runpy
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import orjson
import pytest

import inference_api
from inference_api.app import GROUPS
from inference_api.cli import main
from inference_api.demo import run as demo_run
from inference_api.observe.log import LogHandler
from inference_api.settings import PREFIX, fields_of
from tests.ports import free_port

CATALOGUE = """
models:
  - name: llama-3-8b
    version: "3"
    owner: ml-platform
    backends: [{url: http://a:8000}, {url: http://b:8000}]
    balancing: round_robin
    aliases: [llama3, l3]
  - {name: idle, engine: tgi}
"""


@pytest.fixture
def catalogue(tmp_path: Path) -> Path:
    path = tmp_path / "catalogue.yaml"
    path.write_text(CATALOGUE)
    return path


@pytest.fixture
def _logging() -> Iterator[None]:
    """`serve` takes over the logging of the process; give it back."""
    root, server = logging.getLogger(), logging.getLogger("uvicorn.error")
    kept = root.handlers[:], root.level, server.filters[:], server.level
    hooks = sys.excepthook, sys.unraisablehook, threading.excepthook
    yield
    sys.excepthook, sys.unraisablehook, threading.excepthook = hooks
    logging.captureWarnings(False)
    for handler in root.handlers:
        if isinstance(handler, LogHandler):
            handler.close()
    root.handlers[:], root.level, server.filters[:], server.level = kept


def stopped(*argv: str) -> int:
    """The exit code of a command that argparse ends by itself."""
    with pytest.raises(SystemExit) as caught:
        main(list(argv))
    assert isinstance(caught.value.code, int)
    return caught.value.code


# Help


@pytest.mark.parametrize("command", [(), ("serve",), ("check",), ("status",), ("models",), ("demo",)])
def test_every_command_has_help(command: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert stopped(*command, "--help") == 0

    out, err = capsys.readouterr()
    assert out.startswith(" ".join(["usage: inference-api", *command]))
    assert err == ""


def test_the_help_names_the_commands_and_a_way_to_begin(capsys: pytest.CaptureFixture[str]) -> None:
    stopped("--help")

    out = capsys.readouterr().out
    assert all(f"\n    {name} " in out for name in ("serve", "check", "status", "models", "demo"))
    assert "\n  inference-api demo\n" in out


@pytest.mark.parametrize("command", ["serve", "check", "models"])
def test_the_help_of_a_command_lists_every_variable(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    stopped(command, "--help")

    lines = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line.startswith(f"  {PREFIX}")]
    assert lines == [PREFIX + name.upper() for name in fields_of(GROUPS)]


def test_the_help_shows_defaults_as_they_would_be_written(capsys: pytest.CaptureFixture[str]) -> None:
    stopped("serve", "--help")

    out = capsys.readouterr().out
    assert "listen port (default: 8000)" in out
    assert "(default: packaged catalogue.yaml)" in out
    assert "503 and 504; comma-separated (default: 503)" in out
    assert "comma-separated (default: none)" in out
    assert "base URL of the model registry (default: unset)" in out
    assert "frozenset" not in out


def test_the_version_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert stopped("--version") == 0
    assert capsys.readouterr().out == f"inference-api {inference_api.__version__}\n"


@pytest.mark.parametrize(
    "argv", [(), ("nope",), ("serve", "--nope"), ("check", "--port", "1"), ("demo", "--port", "x")]
)
def test_a_command_line_that_makes_no_sense_shows_the_usage(
    argv: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert stopped(*argv) == 2
    assert capsys.readouterr().err.startswith("usage: inference-api")


# check


def test_check_says_that_all_is_well(catalogue: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "--catalogue", str(catalogue)]) == 0

    out, err = capsys.readouterr()
    assert out == f"settings and catalogue are valid: 2 models, 2 backends in {catalogue}\n"
    assert err == "warning: model 'idle' has no backends: every request for it gets 503\n"


def test_check_reads_the_packaged_catalogue_when_nothing_is_set(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check"]) == 0
    assert "3 models, 3 backends in " in capsys.readouterr().out


def test_check_names_every_bad_entry(catalogue: Path, capsys: pytest.CaptureFixture[str]) -> None:
    catalogue.write_text("models: [{name: a, polizy: x}, {name: b}, {name: c, backends: [{url: 'ftp://h'}]}]")

    assert main(["check", "--catalogue", str(catalogue)]) == 2

    out, err = capsys.readouterr()
    first, second = err.splitlines()
    assert out == ""
    assert first.startswith(f"inference-api: {catalogue}: model 'a': unknown key 'polizy'")
    assert second.startswith(f"inference-api: {catalogue}: model 'c': backends.0.url: ")


@pytest.mark.parametrize(
    ("text", "reason"),
    [(None, "cannot be read: No such file"), ("models: [", "is not YAML: "), ("a: 1", "is a mapping")],
)
def test_check_names_a_file_that_cannot_be_used(
    text: str | None, reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "catalogue.yaml"
    if text is not None:
        path.write_text(text)

    assert main(["check", "--catalogue", str(path)]) == 2

    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith(f"inference-api: catalogue '{path}'")
    assert reason in err


@pytest.mark.parametrize("command", ["check", "models", "serve"])
def test_settings_that_cannot_be_used_stop_every_command(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("INFERENCE_API_PROT", "1")
    monkeypatch.setenv("INFERENCE_API_IDLE_TIMEOUT", "soon")

    assert main([command]) == 2

    out, err = capsys.readouterr()
    assert out == ""
    assert [line.split(" ")[:2] for line in err.splitlines()] == [
        ["inference-api:", "INFERENCE_API_PROT:"],
        ["inference-api:", "INFERENCE_API_IDLE_TIMEOUT='soon':"],
    ]


@pytest.mark.parametrize(
    ("option", "named"),
    [
        ("--port", "INFERENCE_API_PORT='no good': "),
        ("--registry-url", "INFERENCE_API_REGISTRY_URL='no good': "),
        ("--host", ": cannot listen on no good:"),
        ("--catalogue", "catalogue 'no good' cannot be read: "),
    ],
)
@pytest.mark.usefixtures("_logging")
def test_an_option_comes_before_its_variable(
    option: str, named: str, catalogue: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    good = {"PORT": "8000", "REGISTRY_URL": "http://registry", "HOST": "127.0.0.1", "CATALOGUE": str(catalogue)}
    for name, value in good.items():
        monkeypatch.setenv(PREFIX + name, value)

    assert main(["serve", option, "no good"]) == 2

    err = capsys.readouterr().err
    assert named in err
    assert err.count("\n") == 1


def test_the_catalogue_may_be_named_by_its_variable(
    catalogue: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("INFERENCE_API_CATALOGUE", str(catalogue))

    assert main(["check"]) == 0
    assert str(catalogue) in capsys.readouterr().out


# models


def test_models_are_listed_in_a_table(catalogue: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "--catalogue", str(catalogue)]) == 0

    assert [line.split() for line in capsys.readouterr().out.splitlines()] == [
        ["MODEL", "VERSION", "OWNER", "ENGINE", "BALANCING", "ALIASES", "BACKENDS"],
        ["llama-3-8b", "3", "ml-platform", "vllm", "round_robin", "llama3,l3", "http://a:8000", "http://b:8000"],
        ["idle", "1", "unknown", "tgi", "two_choices", "none", "none"],
    ]


def test_the_columns_of_the_table_stand_below_each_other(catalogue: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["models", "--catalogue", str(catalogue)])

    heading, *rows = capsys.readouterr().out.splitlines()
    assert [row.index("http") for row in rows if "http" in row] == [heading.index("BACKENDS")]
    assert rows[1][heading.index("ENGINE") :].startswith("tgi ")


def test_a_catalogue_without_models_is_a_table_without_rows(
    catalogue: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    catalogue.write_text("models: []")

    assert main(["models", "--catalogue", str(catalogue)]) == 0
    assert capsys.readouterr().out.splitlines() == ["MODEL  VERSION  OWNER  ENGINE  BALANCING  ALIASES  BACKENDS"]


# serve


def watch(number: int, host: str, ports: list[int], seen: list[int]) -> None:
    """Wait for the router in this process, look at its ports, and send the signal; if it never comes, send none."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            seen[:] = [httpx.get(f"http://{host}:{port}/metrics", trust_env=False).status_code for port in ports]
        except httpx.TransportError:
            time.sleep(0.02)
        else:
            os.kill(os.getpid(), number)
            return


@pytest.mark.parametrize(
    ("number", "host", "answers"), [(signal.SIGTERM, "127.0.0.1", [404, 200]), (signal.SIGINT, "[::1]", [200])]
)
@pytest.mark.usefixtures("_logging")
def test_serve_serves_until_the_signal(
    number: int,
    host: str,
    answers: list[int],
    catalogue: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    ports = [free_port() for _ in answers]
    if len(ports) > 1:
        monkeypatch.setenv("INFERENCE_API_OPS_PORT", str(ports[1]))
    handler = signal.getsignal(number)
    seen: list[int] = []
    watcher = threading.Thread(target=watch, args=(number, host, ports, seen))

    watcher.start()
    code = main(["serve", "--host", host.strip("[]"), "--port", str(ports[0]), "--catalogue", str(catalogue)])
    watcher.join()

    logging.getLogger().handlers[0].flush()
    assert (code, seen) == (0, answers)
    lines = [orjson.loads(line) for line in capsys.readouterr().out.splitlines()]
    # Of the backends, which are nowhere, there may be a word between them.
    assert (lines[0]["event"], lines[-1]["event"]) == ("serving", "stopped")
    assert lines[0]["address"] == f"{host}:{ports[0]}"
    assert signal.getsignal(number) == handler


@pytest.mark.usefixtures("_logging")
def test_serve_does_not_start_on_a_port_in_use(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]

        assert main(["serve", "--port", str(port)]) == 2

    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith(f"inference-api: INFERENCE_API_PORT={port}: cannot listen on 127.0.0.1:{port} (")
    assert err.endswith("); set INFERENCE_API_PORT to a free port\n")


@pytest.mark.usefixtures("_logging")
def test_serve_does_not_start_when_the_port_of_the_probes_is_in_use(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        monkeypatch.setenv("INFERENCE_API_OPS_PORT", str(taken.getsockname()[1]))

        assert main(["serve", "--port", str(free_port())]) == 2

    assert "INFERENCE_API_OPS_PORT=" in capsys.readouterr().err


# demo


def test_demo_is_run_with_what_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def run_demo(*arguments: Any, **options: bool) -> int:
        asked.append((*arguments, options))
        return 7

    monkeypatch.setattr(demo_run, "run_demo", run_demo)

    assert main(["demo"]) == 7
    assert main(["demo", "--host", "0.0.0.0", "--port", "81", "--tokens-per-second", "2.5"]) == 7
    assert main(["demo", "--plain", "--keys"]) == 7
    assert asked == [
        ("127.0.0.1", 8000, 40, {"keys": False, "plain": False}),
        ("0.0.0.0", 81, 2.5, {"keys": False, "plain": False}),
        ("127.0.0.1", 8000, 40, {"keys": True, "plain": True}),
    ]


# python -m


def test_the_package_can_be_run_as_a_module(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["inference-api", "check"])

    with pytest.raises(SystemExit) as caught:
        runpy.run_module("inference_api", run_name="__main__")

    assert caught.value.code == 0
    assert "valid" in capsys.readouterr().out


@pytest.mark.usefixtures("_logging")
def test_serve_watches_a_cluster_only_in_one(
    catalogue: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    monkeypatch.setenv(f"{PREFIX}DISCOVERY", "endpointslices")

    assert main(["serve", "--catalogue", str(catalogue)]) == 2
    told = capsys.readouterr().err
    assert f"{PREFIX}DISCOVERY=endpointslices: KUBERNETES_SERVICE_HOST is not set" in told
