"""Ports that stay ours."""

import contextlib
import secrets
import socket


def free_port() -> int:
    """A port below the range from which the kernel serves whoever asks for any (from 32768 on).

    So neither another worker's server nor the end of a connection gets it between two uses of a test, or after an
    engine has stopped.
    """
    while True:
        port = 10_000 + secrets.randbelow(22_000)
        with contextlib.suppress(OSError), socket.socket() as sock:
            sock.bind(("127.0.0.1", port))
            return port
