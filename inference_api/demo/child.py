"""A child process of the demo: its output is kept in a file, and it does not outlive the demo."""

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

# Loaded before any fork: between fork and exec there is no time to load a library.
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None
_PR_SET_PDEATHSIG = 1


class Child:
    """A running `python -m ...`; whoever makes one stops it."""

    def __init__(self, name: str, arguments: Sequence[str], log: Path, environment: Mapping[str, str]) -> None:
        self.name = name
        self._log = log
        parent = os.getpid()
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                # Ctrl-C goes to the demo alone, which stops its children in order.
                start_new_session=True,
                preexec_fn=lambda: _die_with(parent),
            )
        self.pid = self._process.pid

    @property
    def exit_code(self) -> int | None:
        return self._process.poll()

    def last_lines(self, count: int = 10) -> str:
        lines = self._log.read_text(errors="replace").splitlines()[-count:]
        return "\n".join(f"    {line}" for line in lines) or "    (none)"

    def terminate(self) -> None:
        self._process.terminate()

    def wait(self, patience: float) -> None:
        """Wait for the end, and after `patience` seconds put one to it."""
        try:
            self._process.wait(patience)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def __repr__(self) -> str:
        state = "runs" if self.exit_code is None else f"ended with {self.exit_code}"
        return f"<Child {self.name} {self.pid} {state}>"


def _die_with(parent: int) -> None:  # pragma: no cover - runs in the child, where nothing is measured
    # Even `kill -9` of the demo leaves nothing behind; only Linux has this.
    if _LIBC is not None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
