"""The command line over /api/v1."""


def main() -> int:
    raise SystemExit("inference-control: not built yet")
