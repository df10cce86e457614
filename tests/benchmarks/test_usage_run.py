"""The run with few requests: kill -9 of routers and control plane, a full disk, and no record too few."""

import subprocess
import sys
from pathlib import Path

from benchmarks.usage_plane import Line, read


def test_every_request_that_an_engine_answered_has_one_record() -> None:
    command = [sys.executable, "-m", "benchmarks.usage_run", "--requests", "6000"]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=150, cwd=root)

    assert (done.returncode, done.stdout.splitlines()[-1], done.stderr) == (0, "PASS", "")


def test_what_a_kill_tore_is_no_record(tmp_path: Path) -> None:
    journal = tmp_path / "journal"
    assert list(read(journal)) == []
    journal.write_bytes(b"a-1 r1 200 3 5\na-2 r2 200\na-3 r3 502 -1 -1\na-4 r4 200 1 5")

    assert list(read(journal)) == [Line("a-1", "r1", 200, 3, 5), Line("a-3", "r3", 502, -1, -1)]
