"""Fetches a source distribution from the package index and unpacks its tests: `python sdist.py FILE SHA256 DIRECTORY`.

Not by `pip download`, which would build it to learn its dependencies.
"""

import hashlib
import io
import json
import subprocess
import sys
import tarfile
import urllib.request


def index_url() -> str:
    """The index that pip uses."""
    command = [sys.executable, "-m", "pip", "config", "get", "global.index-url"]
    found = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    return found or "https://pypi.org/simple"


def main(name: str, sha256: str, directory: str) -> None:
    project = f"{index_url().rstrip('/')}/{name.rpartition('-')[0]}/"
    request = urllib.request.Request(project, headers={"accept": "application/vnd.pypi.simple.v1+json"})
    with urllib.request.urlopen(request) as answer:
        files = {file["filename"]: file["url"] for file in json.load(answer)["files"]}
    with urllib.request.urlopen(files[name]) as answer:
        archive = answer.read()
    if hashlib.sha256(archive).hexdigest() != sha256:
        raise SystemExit(f"{name}: the SHA-256 is not {sha256}")
    with tarfile.open(fileobj=io.BytesIO(archive)) as unpacked:
        # Not the package: an installed one is to be tested.
        tests = [member for member in unpacked.getmembers() if member.name.split("/")[1:2] == ["tests"]]
        unpacked.extractall(directory, tests, filter="data")


if __name__ == "__main__":
    main(*sys.argv[1:])
