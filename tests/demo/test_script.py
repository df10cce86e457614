"""scripts/demo in a directory of its own, with stand-ins for what it calls."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "demo"


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    (tmp_path / "scripts").mkdir()
    shutil.copy(SCRIPT, tmp_path / "scripts")
    (tmp_path / "pyproject.toml").touch()
    return tmp_path


def command(path: Path, *lines: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(["#!/bin/sh", *lines]) + "\n")
    path.chmod(0o755)


def run(clone: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PATH": f"{clone / 'bin'}:{os.environ['PATH']}"}
    command = [str(clone / "scripts" / "demo"), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, cwd="/", check=False)


def test_without_python3_venv_it_says_what_to_install(clone: Path) -> None:
    command(clone / "bin" / "python3", "exit 1")
    ran = run(clone)
    assert (ran.returncode, ran.stdout) == (1, "")
    assert ran.stderr.endswith("fix: sudo apt-get install python3-venv\n")
    assert len(ran.stderr.splitlines()) == 1


def test_what_is_installed_is_started_with_the_options_given(clone: Path) -> None:
    command(clone / ".venv" / "bin" / "pip", "exit 1")
    command(clone / ".venv" / "bin" / "inference-api", 'echo "$@"')
    os.utime(clone / "pyproject.toml", (0, 0))
    ran = run(clone, "--port", "8001")
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "demo --port 8001\n", "")


def test_a_missing_environment_is_made_and_installed_into(clone: Path) -> None:
    venv = clone / ".venv" / "bin"
    command(clone / "installed", 'echo "$@"')
    command(clone / "pip", "touch -d tomorrow installed", f"mv installed {venv}/inference-api")
    command(clone / "bin" / "python3", f'if [ "$1" = -m ]; then mkdir -p {venv}; mv pip {venv}/pip; fi')
    ran = run(clone, "--help")
    assert (ran.returncode, ran.stdout) == (0, "demo --help\n")
    assert ran.stderr.startswith("scripts/demo: the first run makes .venv and installs into it")


def test_a_failed_installation_is_shown_and_stops(clone: Path) -> None:
    command(clone / ".venv" / "bin" / "pip", "echo no such package >&2", "exit 3")
    ran = run(clone)
    assert ran.returncode == 3
    assert "no such package" in ran.stderr
