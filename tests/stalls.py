"""`pytest --stalls SECONDS`: the process stands still so long, twice in each test, as on a machine with too much to do.

What fails then has a deadline that depends on the machine.
"""

import ctypes
import random
import threading
from collections.abc import Generator

import pytest

# Seconds between two of them, on average
_BETWEEN = 0.04


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--stalls", type=float, metavar="SECONDS", help="stand still so long, twice in each test")


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Generator[None, object, object]:
    seconds = pyfuncitem.config.getoption("stalls")
    if seconds is None:
        return (yield)
    over = threading.Event()
    stalling = threading.Thread(target=_stall, args=(seconds, over), daemon=True)
    stalling.start()
    try:
        return (yield)
    finally:
        over.set()
        stalling.join()


def _stall(seconds: float, over: threading.Event) -> None:
    # Of PyDLL, which keeps the interpreter's lock: no other thread runs.
    sleep = ctypes.PyDLL(None).usleep
    for _ in range(2):
        if over.wait(random.expovariate(1 / _BETWEEN)):
            return
        sleep(round(seconds * 1e6))
