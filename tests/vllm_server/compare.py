"""Compares two JUnit reports of vLLM's tests: `python compare.py DIRECT ROUTER`; exit code 1: they differ unexpectedly.

`expected.txt` beside this file lists the tests that may differ, `file::test` a line, with the reason behind a `#`.
"""

import sys
import xml.etree.ElementTree as ET
from collections import Counter
from pathlib import Path

EXPECTED = Path(__file__).with_name("expected.txt")


def verdicts(report: Path) -> dict[str, str]:
    """Test -> passed, failed, error or skipped."""
    found: dict[str, str] = {}
    for case in ET.parse(report).iter("testcase"):
        tags = {child.tag for child in case}
        verdict = next((tag for tag in ("error", "failure", "skipped") if tag in tags), "passed")
        found[f"{case.get('classname', '').removeprefix('tests.entrypoints.')}::{case.get('name')}"] = verdict
    return found


def expected() -> dict[str, str]:
    """Test, without its parameters -> why it may differ."""
    lines = [line.partition("#") for line in EXPECTED.read_text().splitlines() if line.strip()]
    return {test.strip(): why.strip() for test, _, why in lines if test.strip()}


def main(direct: Path, router: Path) -> int:
    one, other, known = verdicts(direct), verdicts(router), expected()
    differ = {test: (one.get(test, "absent"), other.get(test, "absent")) for test in one | other}
    differ = {test: pair for test, pair in differ.items() if pair[0] != pair[1]}
    unexplained = 0
    for test, (before, after) in sorted(differ.items()):
        why = known.get(test.partition("[")[0])
        unexplained += why is None
        print(
            f"{'differs' if why is None else 'expected'}: {test}: {before} direct, {after} by the router; {why or ''}"
        )
    print(f"direct: {dict(Counter(one.values()))}, router: {dict(Counter(other.values()))}")
    print(f"{unexplained} unexplained differences in {len(one | other)} tests")
    return 1 if unexplained or "passed" not in one.values() else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
