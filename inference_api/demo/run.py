"""`inference-api demo`: demo engines and everything real in front of them, as processes here, until Ctrl-C."""

import re
import sys
import tempfile
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

from inference_api.demo.full import Full
from inference_api.demo.plain import Plain
from inference_api.demo.policy import Keys
from inference_api.demo.processes import DemoError, stop_signals

_EXTRA = "control-plane"
_WITHOUT = (
    "The demo runs plain, without control plane and console: pip install 'inference-api[control-plane]' adds them.\n"
)


def is_installed(distribution: str = "inference-api", extra: str = _EXTRA) -> bool:
    """Whether all that an extra of a distribution asks for is there."""
    try:
        wanted = metadata.requires(distribution) or []
        for requirement in wanted:
            if re.search(rf"extra == ['\"]{extra}['\"]", requirement):
                metadata.distribution(re.split(r"[^\w.-]", requirement, maxsplit=1)[0])
    except metadata.PackageNotFoundError:
        return False
    return True


def run_demo(
    host: str = "127.0.0.1",
    port: int = 8000,
    tokens_per_second: float = 40,
    keys: bool = False,
    plain: bool = False,
    installed: Callable[[], bool] = is_installed,
) -> int:
    """Run the demo until SIGINT or SIGTERM; 0 after that, 1 if it could not start or go on.

    `plain`: without control plane, as where that is not `installed`; only then `keys` says whether API keys are asked
    for.
    """
    try:
        with stop_signals() as stopping, tempfile.TemporaryDirectory(prefix="inference-api-demo-") as directory:
            if not tokens_per_second > 0:
                raise DemoError(f"--tokens-per-second must be more than 0, not {tokens_per_second:g}")
            bare = not plain and not installed()
            demo = Plain(Path(directory), stopping) if plain or bare else Full(Path(directory), stopping)
            try:
                if isinstance(demo, Plain):
                    text = demo.begin(host, port, tokens_per_second, Keys.new() if keys else None)
                else:
                    text = demo.begin(host, port, tokens_per_second)
                if not stopping:
                    print(f"{_WITHOUT}\n{text}" if bare else text, flush=True)
                demo.watch()
            finally:
                demo.stop()
    except DemoError as exc:
        print(f"inference-api demo: {exc}", file=sys.stderr)
        return 1
    return 0
