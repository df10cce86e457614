"""Child processes of the demo."""

import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from inference_api.demo import die_with_parent
from inference_api.demo.child import Child

Start = Callable[..., Child]

_ECHO = "import sys\nprint('begun', *sys.argv[1:], flush=True)\n"
_STUBBORN = _ECHO + "import signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\nprint('deaf', flush=True)\n"


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Run a Python text as a module in a child."""
    children: list[Child] = []

    def run(text: str, *arguments: str) -> Child:
        (tmp_path / "child_under_test.py").write_text(text)
        environment = {"PYTHONPATH": str(tmp_path)}
        children.append(Child("model", ["child_under_test", *arguments], tmp_path / "model.log", environment))
        return children[-1]

    yield run
    for child in children:
        child.wait(0)


def test_a_child_gets_its_arguments_and_its_output_is_kept(start: Start) -> None:
    child = start(_ECHO, "a", "b")
    child.wait(30)
    assert child.ended
    assert child.last_lines() == "    begun a b"
    assert str(child) == f"model (process {child.pid}) ended with exit code 0"


def test_only_the_last_lines_are_shown(start: Start) -> None:
    child = start("print(*range(20), sep='\\n')")
    child.wait(30)
    assert child.last_lines(2) == "    18\n    19"


def test_a_child_without_output_says_so(start: Start) -> None:
    child = start("")
    child.wait(30)
    assert child.last_lines() == "    (none)"


def test_a_child_is_terminated(start: Start) -> None:
    child = start("import time\ntime.sleep(60)")
    assert str(child) == f"model (process {child.pid}) runs"
    child.terminate()
    child.wait(30)
    assert str(child).endswith("ended with signal SIGTERM")


def test_a_child_that_does_not_listen_is_killed(start: Start) -> None:
    child = start(_STUBBORN + "time.sleep(60)")
    while "deaf" not in child.last_lines():
        assert not child.ended
    child.terminate()
    child.wait(0.1)
    assert str(child).endswith(f"ended with signal {signal.SIGKILL.name}")


def test_nothing_is_run_for_a_parent_that_has_ended_already() -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    ran = subprocess.run(
        [sys.executable, "-m", die_with_parent.__name__, str(gone.pid), "this"], capture_output=True, check=False
    )
    assert (ran.returncode, ran.stdout, ran.stderr) == (1, b"", b"")
