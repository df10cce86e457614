"""The documents are true: every setting, metric, error, route and file they name exists, and none is missing."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from inference_api.app import ENTRY, GROUPS
from inference_api.errors import RouterError
from inference_api.features import (
    adapters,
    budgets,
    cache,
    consensus,
    cost,
    engine_load,
    fallback,
    hedge,
    keys,
    overrides,
    policy,
    prompts,
    race,
    realtime,
    reports,
    shadow,
    usage,
)
from inference_api.features.delivery.sender import Answer, Delivery
from inference_api.features.limiting.amounts import Estimates
from inference_api.features.limits import Limiter
from inference_api.features.queueing import activation, waits
from inference_api.features.splitting import metrics as splitting
from inference_api.features.stores.memory import MemoryStore
from inference_api.http.routes import INFERENCE_ROUTES
from inference_api.observe.families import Families
from inference_api.observe.metrics import Metrics
from inference_api.policy.source import Policies
from inference_api.routing.balance import make_balancer
from inference_api.routing.catalogue import load_catalogue
from inference_api.routing.fleet import Fleet
from inference_api.routing.registry import RegistryStatus
from inference_api.settings import PREFIX, fields_of

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PATTERNS = ("*.md", "docs/**/*.md", "k8s/**/*.md", "examples/**/*.md", "benchmarks/*.md", ".github/**/*.md")
DOCUMENTS = sorted(path for pattern in PATTERNS for path in ROOT.glob(pattern))
# Settings of the worked example in CONTRIBUTING.md
EXAMPLES = {PREFIX + "TEAMS", PREFIX + "TEAM"}
# It names what there was.
CURRENT = [path for path in DOCUMENTS if path.name != "CHANGELOG.md"]


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize(
    ("options", "file"), [([], "configuration.md"), (["--control-plane"], "control-plane-configuration.md")]
)
def test_the_configuration_pages_are_made_from_the_settings(options: list[str], file: str) -> None:
    command = [sys.executable, str(ROOT / "scripts" / "configuration.py"), *options]
    made = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)

    assert made.stdout == (DOCS / file).read_text(), "run scripts/configuration.py --write"


async def nobody(batch: bytes) -> Answer:
    raise NotImplementedError


def test_every_metric_is_documented_with_its_labels() -> None:
    page = (DOCS / "metrics.md").read_text()
    rows = re.findall(r"^\| `(inference_api_\w+)` \| (\w+) \| ?([\w, ]*?) ?\| \S.* \|$", page, re.MULTILINE)
    documented = {name: (kind, labels.split(", ") if labels else []) for name, kind, labels in rows}

    fleet = Fleet(make_balancer)
    core = Families(Metrics(dict), lambda: RegistryStatus("static", 0, 0.0, {}))()
    policies = Policies("policy.yaml")
    features = (
        *engine_load.families(fleet),
        *overrides.families({}),
        *reports.families({}),
        *policy.families(policies),
        *realtime.families({}, {}),
        *keys.Keys(policies).collect(),
        *Limiter(policies, MemoryStore(), Estimates()).collect(),
        *usage.families({"logged": 0}, Delivery(nobody)),
        *cost.families({}),
        *adapters.families([]),
        *waits.families({}, {}),
        *activation.families({}),
        *budgets.families({}, None),
        *prompts.families({}),
        *cache.families(({}, {}, {}), (0, 0), {}),
        *race.families({}),
        *splitting.families({}, {}, {}, {}),
        *fallback.families({}),
        *consensus.families({}),
        *hedge.families({}),
        *shadow.families({}),
    )
    exported = {
        family.name + ("_total" if family.kind == "counter" else ""): (family.kind, list(family.labels))
        for family in (*core, *features)
    }

    assert documented == exported
    assert len(rows) == len(documented)


def is_ours(module: str) -> bool:
    """A module of the package; not one that a test has made."""
    return module.startswith("inference_api.") and module in sys.modules


def test_every_error_code_is_documented() -> None:
    page = (DOCS / "http.md").read_text()

    def leaves(kind: type[RouterError]) -> list[type[RouterError]]:
        # Tests have errors of their own.
        ours = [child for child in kind.__subclasses__() if is_ours(child.__module__)]
        found = [leaf for child in ours for leaf in leaves(child)]
        return found or [kind]

    for kind in leaves(RouterError):
        assert re.search(rf"^\| {kind.status} \|.*`{kind.code}`", page, re.MULTILINE), kind.__name__


@pytest.mark.parametrize("path", [route.path for route in INFERENCE_ROUTES])
def test_every_route_is_documented(path: str) -> None:
    assert f"`{path}`" in (DOCS / "http.md").read_text()


@pytest.mark.parametrize("page", [ROOT / "README.md", DOCS / "routing.md"], ids=name)
def test_a_catalogue_in_a_document_is_valid(page: Path, tmp_path: Path) -> None:
    blocks = re.findall(r"^```yaml\n(# catalogue\.yaml.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    path = tmp_path / "catalogue.yaml"

    for block in blocks:
        path.write_text(block)
        catalogue = load_catalogue(path, ENTRY)
        assert not catalogue.problems
        assert len(catalogue) == len(yaml.safe_load(block)["models"])
    assert blocks


def test_every_decision_is_in_the_index() -> None:
    index = (DOCS / "adr" / "index.md").read_text()

    assert re.findall(r"\((\d{4}-[\w-]+\.md)\)", index) == sorted(path.name for path in DOCS.glob("adr/0*.md"))


@pytest.mark.parametrize("path", CURRENT, ids=name)
def test_every_link_script_and_setting_exists(path: Path) -> None:
    text = path.read_text()

    for target in re.findall(r"\]\((?![a-z]+:)([^)#\s]+)[^)]*\)", text):
        assert (path.parent / target).exists(), target
    for script in re.findall(r"(?<![\w./-])scripts/[\w.-]*\w", text):
        assert (ROOT / script).exists(), script
    settings = {PREFIX + field.upper() for field in fields_of(GROUPS)}
    assert set(re.findall(rf"{PREFIX}[A-Z_]*[A-Z]", text)) <= settings | EXAMPLES


@pytest.mark.parametrize("path", CURRENT, ids=name)
def test_every_test_that_is_named_exists(path: Path) -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+)`)?", path.read_text())

    for file, case in named:
        assert (ROOT / file).exists(), file
        assert f"def {case}" in (ROOT / file).read_text(), case


@pytest.mark.parametrize("path", DOCUMENTS, ids=name)
def test_nothing_is_left_to_be_filled_in(path: Path) -> None:
    assert re.findall(r"@@|\b(?:TODO|TBD|FIXME|XXX)\b", path.read_text()) == []
