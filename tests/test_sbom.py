"""What scripts/sbom adds of the image's base."""

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parent.parent / "scripts" / "debian_packages.py"
STATUS = """\
Package: libc6
Status: install ok installed
Architecture: amd64
Version: 2.36-9+deb12u13
Description: GNU C Library
 Version: not this one

Package: gone
Status: deinstall ok config-files
Architecture: amd64
Version: 1

Package: libstdc++6
Status: install ok installed
Architecture: amd64
Version: 12.2.0-14
"""


def test_the_packages_of_the_base_are_added(tmp_path: Path) -> None:
    for name, text in {"var/lib/dpkg/status": STATUS, "etc/os-release": 'ID=debian\nVERSION_ID="12"\n'}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    document = tmp_path / "sbom.json"
    document.write_text(json.dumps({"bomFormat": "CycloneDX", "components": [{"purl": "pkg:pypi/httpx@1"}]}))

    # Twice: what is there already is not added again.
    for _ in range(2):
        subprocess.run([sys.executable, SCRIPT, tmp_path, document], check=True)

    assert [component["purl"] for component in json.loads(document.read_text())["components"]] == [
        "pkg:pypi/httpx@1",
        "pkg:deb/debian/libc6@2.36-9%2Bdeb12u13?arch=amd64&distro=debian-12",
        "pkg:deb/debian/libstdc%2B%2B6@12.2.0-14?arch=amd64&distro=debian-12",
    ]
