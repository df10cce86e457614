"""What the image is made of: nothing goes to the builder that it does not copy, and nothing is installed unpinned."""

import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

import inference_api

ROOT = Path(__file__).parent.parent
DOCKERFILE = (ROOT / "Dockerfile").read_text()


def copied() -> set[str]:
    """What the Dockerfile takes from the source tree."""
    lines = re.findall(r"^COPY (?!--from)(.+)$", DOCKERFILE, re.MULTILINE)
    return {source for line in lines for source in line.split()[:-1]}


def test_the_builder_gets_what_is_copied_and_nothing_else() -> None:
    rules = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if not line.startswith("#")]

    assert rules[0] == "*"
    assert {rule.removeprefix("!") for rule in rules if rule.startswith("!")} == copied()
    assert all((ROOT / source).exists() for source in copied())


def test_every_package_with_a_command_is_in_the_image() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages = set(project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"])

    assert packages <= copied()
    assert {place.partition(".")[0] for place in project["project"]["scripts"].values()} == packages


def test_the_version_is_that_of_the_package() -> None:
    assert f"ARG VERSION={inference_api.__version__}\n" in DOCKERFILE


def test_the_process_is_told_the_revision() -> None:
    stage = DOCKERFILE.rpartition("\nFROM ")[2]

    assert 'ARG REVISION=""\n' in stage
    assert 'ENV IMAGE_REVISION="${REVISION}"\n' in stage
    assert stage.index("ARG REVISION") < stage.index("ENV IMAGE_REVISION")
    # The name that the command reads.
    assert '"IMAGE_REVISION"' in (ROOT / "inference_api/commands/serve.py").read_text()


@pytest.mark.parametrize("lock", ["requirements.lock", "requirements-build.lock"])
def test_everything_is_pinned_by_hash(lock: str) -> None:
    text = (ROOT / lock).read_text()
    pinned = re.findall(r"^([\w.-]+)==\S+ \\\n    --hash=sha256:[0-9a-f]{64}", text, re.MULTILINE)

    assert pinned
    assert len(pinned) == len(re.findall(r"^[A-Za-z0-9]", text, re.MULTILINE))
    assert f"--require-hashes --only-binary :all: -r {lock}" in DOCKERFILE


def test_the_image_has_what_the_chart_can_turn_on() -> None:
    """Traces, limits that routers count together, the control plane: extras, and no choice of who builds the image."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    needed = ("otel", "redis", "control-plane", "postgres", "oidc")
    wanted = {re.split(r"[\[<>=]", need)[0].lower() for extra in needed for need in extras[extra]}
    pinned = re.findall(r"^([\w.-]+)==", (ROOT / "requirements.lock").read_text(), re.MULTILINE)

    assert wanted <= {*pinned}


def test_nothing_is_installed_without_a_lock() -> None:
    installs = re.findall(r"pip (?:install|wheel) ([^&\n]+)", DOCKERFILE)

    assert all("--require-hashes" in options or "--no-deps" in options for options in installs)


def test_the_test_of_the_image_says_what_it_lacks(tmp_path: Path) -> None:
    (tmp_path / "dirname").symlink_to(shutil.which("dirname") or "")
    done = subprocess.run(
        ["/bin/bash", ROOT / "scripts/image-test"],
        env={"PATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 0
    assert "skipped: buildah is not installed" in done.stdout
