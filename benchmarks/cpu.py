"""What a program (a process and its children) has used: CPU time and memory, as the kernel counts them."""

import os
import resource
import time
from pathlib import Path

_PROC = Path("/proc")
_TICK_NS = 1_000_000_000 // os.sysconf("SC_CLK_TCK")


def members(session: int) -> frozenset[int]:
    """The pids of a session: a program that was started as its leader, and its children."""
    pids = (int(entry.name) for entry in _PROC.iterdir() if entry.name.isdigit())
    return frozenset(pid for pid in pids if _stat(pid)[3:4] == [str(session)])


def cpu_ns(pids: frozenset[int]) -> int:
    """CPU time of all threads of these processes, living and dead.

    The kernel's CPU clock of a process (clock_getcpuclockid(3)) is the utime + stime of /proc/PID/stat without the
    rounding to 10 ms, which would be 5 % of the cheapest runs.
    """
    return sum(time.clock_gettime_ns(~pid << 3 | 2) for pid in pids)


def ticks(pids: frozenset[int]) -> tuple[int, int]:
    """Clock ticks spent in user code and in the kernel: too coarse to measure with, fine enough to split a total."""
    stats = [fields for pid in pids if (fields := _stat(pid))]
    return sum(int(f[11]) for f in stats), sum(int(f[12]) for f in stats)


def busy_ns(core: int) -> int:
    """What everybody has used of a core, and what the hypervisor took, in steps of 10 ms."""
    for line in (_PROC / "stat").read_text().splitlines():
        name, *fields = line.split()
        if name == f"cpu{core}":
            user, nice, system, _idle, _iowait, irq, softirq, steal = (int(field) for field in fields[:8])
            return (user + nice + system + irq + softirq + steal) * _TICK_NS
    return 0


def yardstick_ns(core: int) -> int:
    """CPU time of a fixed piece of work on a core. Where it differs between two samples, the machine did."""
    home = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    try:
        return min(_fixed_work() for _ in range(3))
    finally:
        os.sched_setaffinity(0, home)


def _fixed_work() -> int:
    start, total = time.thread_time_ns(), 0
    for number in range(100_000):
        total += number
    return time.thread_time_ns() - start


def resident_bytes(pids: frozenset[int]) -> int:
    """Resident memory as ps shows it; cheap enough to ask for in the middle of a load."""
    return sum(int((_PROC / str(pid) / "statm").read_text().split()[1]) for pid in pids) * resource.getpagesize()


def proportional_bytes(pids: frozenset[int]) -> int:
    """Resident memory, with the pages that processes share counted by their share."""
    return sum(_proportional(pid) for pid in pids)


def _stat(pid: int) -> list[str]:
    # The command's name is in parentheses and may hold anything, so the fields count from the last one.
    try:
        return (_PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return []


def _proportional(pid: int) -> int:
    for line in (_PROC / str(pid) / "smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    return 0
