"""`python -m inference_api.demo.die_with_parent PARENT MODULE ...`: MODULE ends when PARENT does, even by `kill -9`."""

import ctypes
import os
import runpy
import signal
import sys

_PR_SET_PDEATHSIG = 1


def main() -> None:  # pragma: no cover - runs only in children, where nothing is measured
    parent, module, *arguments = sys.argv[1:]
    # Linux alone has this; elsewhere the children end with Ctrl-C and SIGTERM, not with `kill -9`.
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    # The parent may have ended before it was asked for.
    if os.getppid() != int(parent):
        sys.exit(1)
    sys.argv[1:] = arguments
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":  # pragma: no cover
    main()
