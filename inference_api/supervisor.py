"""`python supervisor.py DIRECTORY COMMAND ...`: runs a command that never outlives who started it, nor do its children.

stdin is a pipe: when its other end closes, as it does at the death of whoever holds it, even by `kill -9`, all that the
command has started is killed. SIGTERM goes to the command alone. When the command has ended, what it has left is
killed, and the exit code is its own: 128 and the number of the signal, if one has ended it.

The environment is that of the command, so this is to run as `python -I -S`, and imports only the standard library.
"""

import ctypes
import os
import select
import signal
import subprocess
import sys
from contextlib import suppress
from functools import partial
from pathlib import Path

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
# Exit codes as those of shells: found and not to be run, and not found
_NOT_EXECUTABLE, _NOT_FOUND = 126, 127


def end_with(parent: int) -> None:
    """Have the kernel kill this process when its parent ends. Linux alone has this."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    # The parent may have ended before it was asked for.
    if os.getppid() != parent:
        os._exit(1)


def main() -> int:  # pragma: no cover - runs only in children, where nothing is measured
    directory, *command = sys.argv[1:]
    # Orphans of the command become children of this process, rather than of the first one.
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    woken, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: None)
    try:
        started = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            cwd=directory,
            preexec_fn=partial(end_with, os.getpid()),  # noqa: PLW1509  # there is one thread
        )
    except OSError as exc:
        sys.stderr.write(f"{exc.filename!r}: {exc.strerror}\n")
        return _NOT_FOUND if isinstance(exc, FileNotFoundError) else _NOT_EXECUTABLE
    code = _wait(started.pid, woken)
    _kill_children()
    return code


def _wait(pid: int, woken: int) -> int:
    """The exit code of the command, once it has ended; 137 if the pipe was closed."""
    while True:
        readable, _, _ = select.select([0, woken], [], [])
        if woken in readable and signal.SIGTERM in os.read(woken, 1024):
            os.kill(pid, signal.SIGTERM)
        # As long as it is not waited for, its number is no other's.
        while (ended := _ended())[0]:
            if ended[0] == pid:
                code = os.waitstatus_to_exitcode(ended[1])
                return code if code >= 0 else 128 - code
        if 0 in readable and not os.read(0, 1024):
            return 128 + signal.SIGKILL


def _ended() -> tuple[int, int]:
    """A child that has ended, and how; 0: none has."""
    try:
        return os.waitpid(-1, os.WNOHANG)
    except ChildProcessError:
        return 0, 0


def _kill_children() -> None:
    """Kill all that is left: the children of what is killed become children of this process, and are next."""
    path = Path(f"/proc/self/task/{os.getpid()}/children")
    with suppress(ChildProcessError):
        while True:
            if not path.exists():
                # There are no such lists: a group is the next best.
                os.killpg(0, signal.SIGKILL)
            for child in path.read_text().split():
                with suppress(ProcessLookupError, PermissionError):
                    os.kill(int(child), signal.SIGKILL)
            os.waitpid(-1, 0)


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value)


if __name__ == "__main__":
    sys.exit(main())
