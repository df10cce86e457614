"""A child process of the demo: its output is kept in a file, and it does not outlive the demo."""

import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path


class Child:
    """A running `python -m ...`; whoever makes one stops it."""

    def __init__(
        self,
        name: str,
        arguments: Sequence[str],
        log: Path,
        environment: Mapping[str, str],
        script: Path | None = None,
    ) -> None:
        """`script`: a file for `sh` that starts the same, where that takes more than the arguments."""
        self.name = name
        self._script = script
        self._log = log
        self._arguments = arguments
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "inference_api.demo.die_with_parent", str(os.getpid()), *arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                # Ctrl-C goes to the demo alone, which stops its children in order.
                start_new_session=True,
            )
        self.pid = self._process.pid

    @property
    def ended(self) -> bool:
        return self._process.poll() is not None

    @property
    def command(self) -> str:
        """The shell command that starts the same again, as a process that the demo does not own."""
        if self._script is not None:
            return shlex.join(["sh", str(self._script)])
        return shlex.join([sys.executable, "-m", *self._arguments])

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

    def __str__(self) -> str:
        """What it is and how it is, as the beginning of a sentence."""
        code = self._process.poll()
        if code is None:
            return f"{self.name} (process {self.pid}) runs"
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        return f"{self.name} (process {self.pid}) ended with {how}"
