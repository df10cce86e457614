"""Adds the Debian packages of a file system to a CycloneDX document: python3 debian_packages.py ROOT FILE

Standard library only, as scripts/sbom runs it with whatever python3 there is.
"""

import json
import sys
from pathlib import Path
from typing import Any
from urllib.parse import quote


def packages(root: Path) -> list[dict[str, Any]]:
    """As components, by what dpkg has written down. Raises OSError where it has not."""
    status = (root / "var/lib/dpkg/status").read_text(encoding="utf-8")
    release = dict(
        line.split("=", 1) for line in (root / "etc/os-release").read_text().splitlines() if line.count("=") == 1
    )
    distribution = f"{release['ID']}-{release.get('VERSION_ID', 'unknown')}".replace('"', "")
    found = [_fields(paragraph) for paragraph in status.split("\n\n") if paragraph.strip()]
    installed = [fields for fields in found if fields["Status"].endswith(" installed")]
    return [_component(fields, distribution) for fields in installed]


def add(document: dict[str, Any], components: list[dict[str, Any]]) -> None:
    """A package that is there already stays as it is."""
    known = {component.get("purl") for component in document["components"]}
    document["components"] += [component for component in components if component["purl"] not in known]


def _fields(paragraph: str) -> dict[str, str]:
    # A line that begins with a blank goes on with the field before it.
    lines = (line for line in paragraph.splitlines() if not line.startswith((" ", "\t")))
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def _component(fields: dict[str, str], distribution: str) -> dict[str, Any]:
    name, version, architecture = fields["Package"], fields["Version"], fields["Architecture"]
    # https://github.com/package-url/purl-spec: a version's `+` and `~` are not its own.
    place = f"pkg:deb/debian/{quote(name, safe='')}@{quote(version, safe='')}"
    purl = f"{place}?arch={architecture}&distro={distribution}"
    return {"type": "library", "bom-ref": purl, "name": name, "version": version, "purl": purl}


def main(root: str, file: str) -> None:
    path = Path(file)
    document = json.loads(path.read_text())
    add(document, packages(Path(root)))
    path.write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
