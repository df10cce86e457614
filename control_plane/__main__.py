"""`control-plane`, and `python -m control_plane`."""

import sys


def main() -> int:
    try:
        from control_plane.cli import main as run
    except ModuleNotFoundError as exc:
        print(
            f"control-plane: the extra is not installed ({exc}); pip install 'inference-api[control-plane]'",
            file=sys.stderr,
        )
        return 2
    return run()


if __name__ == "__main__":
    sys.exit(main())
