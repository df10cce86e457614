"""`python -m inference_api.demo.die_with_parent PARENT MODULE ...`: MODULE ends when PARENT does, even by `kill -9`."""

import runpy
import sys

from inference_api.supervisor import end_with


def main() -> None:  # pragma: no cover - runs only in children, where nothing is measured
    parent, module, *arguments = sys.argv[1:]
    end_with(int(parent))
    sys.argv[1:] = arguments
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":  # pragma: no cover
    main()
