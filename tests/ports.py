"""Ports that stay ours."""

import contextlib
import os
import secrets
import socket

# Of each of the workers among which the tests are shared out, and of whatever else runs.
_EACH = 2_000
_SHARES = 11


def free_port() -> int:
    """A port below the range from which the kernel serves whoever asks for any (from 32768 on), and of this worker's.

    So neither another worker's server nor the end of a connection gets it before it is used, between two uses of a
    test, or after an engine has stopped.
    """
    worker = os.environ.get("PYTEST_XDIST_WORKER", "").removeprefix("gw")
    share = 1 + int(worker) % (_SHARES - 1) if worker else 0
    while True:
        port = 10_000 + share * _EACH + secrets.randbelow(_EACH)
        with contextlib.suppress(OSError), socket.socket() as sock:
            sock.bind(("127.0.0.1", port))
            return port
