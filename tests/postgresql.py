"""A real PostgreSQL on a free port of 127.0.0.1, run by an unprivileged user, with a database for each test."""

import getpass
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path

import pytest

from tests.ports import free_port

# Debian keeps the server's programs out of PATH.
_FOLDERS = sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
_FOUND = next((folder for folder in _FOLDERS if (folder / "initdb").exists()), None) or (
    Path(found).parent if (found := shutil.which("initdb")) else None
)
_USER = "tests"


class PostgreSQL:
    """A running server, which a test can kill, hang and start again."""

    def __init__(self, programs: Path, folder: Path) -> None:
        self._programs = programs
        self._folder = folder
        self._numbers = count(1)
        self.port = free_port()

    def url(self, database: str) -> str:
        return f"postgresql://{_USER}@127.0.0.1:{self.port}/{database}"

    def initialise(self) -> None:
        self._run("initdb", "-D", str(self._data), "-A", "trust", "-U", _USER, "-E", "UTF8", "--no-sync")

    def start(self) -> None:
        # Without fsync: nothing here survives the machine.
        options = f"-k {self._folder} -p {self.port} -h 127.0.0.1 -F -c max_connections=200"
        self._run("pg_ctl", "-D", str(self._data), "-o", options, "-l", str(self._folder / "log"), "-w", "start")

    def stop(self, mode: str = "fast") -> None:
        """`immediate` is a crash."""
        self._run("pg_ctl", "-D", str(self._data), "-m", mode, "-w", "stop", check=False)

    def hang(self) -> None:
        """It accepts connections, as the kernel does, and answers nothing."""
        self._signal(signal.SIGSTOP)

    def go_on(self) -> None:
        self._signal(signal.SIGCONT)

    def create(self, template: str = "template0") -> str:
        """A new database; its name."""
        name = f"test{next(self._numbers)}"
        self.run("postgres", f'CREATE DATABASE "{name}" TEMPLATE "{template}"')
        return name

    def drop(self, name: str) -> None:
        self.run("postgres", f'DROP DATABASE IF EXISTS "{name}" WITH (FORCE)')

    def run(self, database: str, statement: str) -> str:
        """The output of one statement, unaligned."""
        options = ["-h", "127.0.0.1", "-p", str(self.port), "-U", _USER, "-d", database, "-q", "-A", "-t"]
        psql = str(self._programs / "psql")
        ran = subprocess.run([psql, *options, "-c", statement], capture_output=True, text=True, check=True, timeout=60)
        return ran.stdout.strip()

    @property
    def _data(self) -> Path:
        return self._folder / "data"

    def _signal(self, number: int) -> None:
        parent = int((self._data / "postmaster.pid").read_text().splitlines()[0])
        for pid in [parent, *_children(parent)]:
            os.kill(pid, number)

    def _run(self, program: str, *arguments: str, check: bool = True) -> None:
        command: Sequence[str] = [str(self._programs / program), *arguments]
        # It refuses to run as root.
        user = "nobody" if getpass.getuser() == "root" else None
        subprocess.run(
            command, check=check, user=user, group="nogroup" if user else None, cwd=self._folder,
            stdout=subprocess.DEVNULL, timeout=120, env={"PATH": os.environ["PATH"], "LC_ALL": "C.UTF-8"},
        )  # fmt: skip


def _children(parent: int) -> Iterator[int]:
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            # The name of the program, in parentheses, may have spaces.
            if int(stat.read_text().rpartition(")")[2].split()[1]) == parent:
                yield int(stat.parent.name)


@contextmanager
def postgresql() -> Iterator[PostgreSQL]:
    if _FOUND is None:
        pytest.skip("PostgreSQL is not installed (Debian: postgresql)")
    # Not pytest's folder: another user must be able to enter it.
    with tempfile.TemporaryDirectory(prefix="postgresql-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        if getpass.getuser() == "root":
            nobody = pwd.getpwnam("nobody")
            os.chown(folder, nobody.pw_uid, nobody.pw_gid)
        server = PostgreSQL(_FOUND, folder)
        server.initialise()
        server.start()
        try:
            yield server
        finally:
            server.stop("immediate")
