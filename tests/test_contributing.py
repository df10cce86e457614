"""CONTRIBUTING.md is right: its feature and its balancing algorithm are taken from the page, added, and served."""

import re
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from types import ModuleType
from typing import Any

import httpx
import orjson
import pytest

from inference_api import app
from inference_api.core import Outside
from inference_api.errors import Overloaded
from inference_api.feature import Feature
from inference_api.http.accounts import Accounts
from inference_api.http.dispatch import Dispatch
from inference_api.http.identify import Identify
from inference_api.models import Call, Reply
from inference_api.observe.account import Record
from inference_api.observe.log import Fields
from inference_api.routing.fleet import Model
from inference_api.settings import PREFIX, SettingsError, load_settings
from tests.conftest import Served, serving
from tests.fakes import CHAT, COMPLETION, FakeEngine, hang, json_response, post, raw, raw_client, until
from tests.features.test_contract import ALWAYS

pytestmark = pytest.mark.anyio
Start = Callable[..., Any]
ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "CONTRIBUTING.md").read_text()
FEATURE = PAGE.split("## Add a feature in one file\n")[1].split("\n## ")[0]
BALANCING = PAGE.split("## Add a balancing algorithm in one file\n")[1].split("\n## ")[0]
RED = {"x-team": "red"}


def code_in(part: str) -> list[str]:
    """The blocks of Python in a part of the page."""
    return re.findall(r"^```python\n(.*?)^```", part, re.MULTILINE | re.DOTALL)


@pytest.fixture
def teams(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module of the page, with its lines in `app`."""
    source, line, _ = code_in(FEATURE)
    assert "teams.FEATURE" in line
    module = ModuleType("inference_api.features.teams")
    exec(compile(source, "teams.py", "exec"), module.__dict__)
    monkeypatch.setattr(app, "FEATURES", (*app.FEATURES, module.FEATURE))
    monkeypatch.setattr(app, "GROUPS", (*app.GROUPS, module.FEATURE.options))
    return module


@pytest.fixture
async def start_teams(teams: ModuleType, tmp_path: Path) -> AsyncIterator[Callable[..., Any]]:
    """`await start_teams(engine, INFERENCE_API_...=..., features=...)` -> a Served router with the module's feature."""
    async with AsyncExitStack() as stack:

        async def start(engine: FakeEngine, *features: Feature, **environ: str) -> Served:
            catalogue = tmp_path / "catalogue.json"
            catalogue.write_bytes(orjson.dumps({"models": [{"name": "m", "backends": [engine.url]}]}))
            settings = load_settings({PREFIX + "CATALOGUE": str(catalogue), **environ}, app.GROUPS)
            lines: list[Fields] = []
            router = app.build(settings, Outside(write_line=lines.append), features)
            url = await stack.enter_async_context(serving(router, settings))
            client = await stack.enter_async_context(httpx.AsyncClient(base_url=url, timeout=10, trust_env=False))
            return Served(router, url, client, lines)

        yield start


async def test_the_feature_of_the_page_does_what_the_page_says(start_engine: Start, start_teams: Start) -> None:
    engine = await start_engine(raw(json_response(COMPLETION)))
    records: list[Record] = []
    served: Served = await start_teams(engine, Feature("all", record=records.append), INFERENCE_API_TEAMS="red, blue")
    url, body = "/v1/chat/completions", orjson.dumps(CHAT)
    headers = {"content-type": "application/json"}

    whole = await served.client.post(url, content=body, headers=headers | RED)
    nobody = await served.client.post(url, content=body, headers=headers)
    other = await served.client.post(url, content=body, headers=headers | {"x-team": "green"})
    listed = [await served.client.get("/v1/models", headers=given) for given in (RED, {})]
    probes = [await served.client.get(path) for path in ("/healthz", "/readyz", "/metrics")]

    assert (whole.status_code, whole.content) == (200, orjson.dumps(COMPLETION))
    assert [request.body for request in engine.requests] == [body]
    assert "x-team" not in engine.requests[0].names
    for refused in (nobody, other, listed[1]):
        answer = refused.json()
        assert (refused.status_code, answer["error"]["code"]) == (401, "unknown_team")
        assert answer["request_id"] == refused.headers["x-request-id"]
    assert listed[0].status_code == 200
    assert [probe.status_code for probe in probes] == [200] * 3
    await until(lambda: len(served.lines) == 5)
    codes = [None, "unknown_team", "unknown_team", None, "unknown_team"]
    assert [line.get("code") for line in served.lines] == codes == [record.code for record in records]
    assert [record.caller and record.caller.id for record in records] == ["red", None, None, "red", None]
    assert await served.metric("inference_api_requests_total", code="401") == 3
    assert await served.metric("inference_api_team_requests_total", team="red") == 2
    assert await served.metric("inference_api_team_requests_total", team="blue") == 0


async def test_the_feature_leaves_the_short_cuts_and_is_not_built_where_it_is_off(
    start_engine: Start, start_teams: Start
) -> None:
    engine = await start_engine()
    on: Served = await start_teams(engine, INFERENCE_API_TEAMS="red")
    off: Served = await start_teams(engine)
    accounts = [served.router.app for served in (on, off)]

    assert all(isinstance(one, Accounts) for one in accounts)
    assert [type(getattr(one, "app", None)) for one in accounts] == [Identify, Dispatch]
    assert [served.router.features.keys() - ALWAYS for served in (on, off)] == [{"teams"}, set()]
    assert (await off.chat()).status_code == 200


def test_a_wrong_name_of_its_setting_is_suggested(teams: ModuleType) -> None:
    with pytest.raises(SettingsError, match="INFERENCE_API_TEAMS"):
        load_settings({PREFIX + "TEAM": "red"}, app.GROUPS)


async def test_the_layer_of_the_page_counts_exactly(start_engine: Start, start_router: Start) -> None:
    *_, source = code_in(FEATURE)
    open_calls: set[str] = set()
    namespace: dict[str, Any] = {"open_calls": open_calls}
    exec("from inference_api.models import *\nfrom inference_api.routing.fleet import Model\n" + source, namespace)
    engine = await start_engine()
    served: Served = await start_router(engine, features=[Feature("counted", send=namespace["counted"])])

    assert [(await served.chat(stream=stream)).status_code for stream in (False, True)] == [200, 200]
    engine.script = raw(b"garbage\r\n\r\n", close=True)
    assert (await served.chat()).status_code == 502
    engine.script = hang
    async with raw_client(served.port) as client:
        await client.send(post("/v1/chat/completions", CHAT))
        await until(lambda: len(open_calls) == 1 and engine.busy)
    await until(lambda: not open_calls)
    await until(lambda: len(served.lines) == 4)

    async def full(call: Call, model: Model) -> Reply:
        raise Overloaded("full", retry_after=1)

    call = Call(None, "m", False, b"", [], "1", [])  # type: ignore[arg-type]
    with pytest.raises(Overloaded):
        await namespace["counted"](full)(call, None)
    assert open_calls == set()


def test_the_feature_of_the_page_keeps_the_rules_of_the_sources(tmp_path: Path) -> None:
    source, _, _ = code_in(FEATURE)
    for folder in ("inference_api", "tests"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", *(path.name for path in ROOT.glob("*.md"))):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    (tmp_path / "inference_api/features/teams.py").write_text(source)
    module = tmp_path / "inference_api/app.py"
    with_it = re.sub(
        r"^(FEATURES = \(.*?)^\)", r"\1    teams.FEATURE,\n)", module.read_text(), flags=re.MULTILINE | re.DOTALL
    )
    imported = "from inference_api.features import "
    assert "    teams.FEATURE,\n)" in with_it
    module.write_text(with_it.replace(imported, f"{imported}teams\n{imported}", 1))

    names = ["tests/test_glossary.py", "tests/test_architecture.py", "tests/features/test_contract.py"]
    off = "not test_contract or off or adds_none"
    run = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-k", off, *names]
    done = subprocess.run(run, check=False, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]


def test_every_part_of_a_feature_is_explained() -> None:
    rows = re.findall(r"^\| ((?:`\w+`(?:, )?)+) \| ", FEATURE, re.MULTILINE)
    explained = [name for row in rows for name in re.findall(r"`(\w+)`", row)]

    assert sorted(explained) == sorted(set(Feature._fields) - {"name"})


def test_the_balancing_of_the_page_keeps_the_contract(tmp_path: Path) -> None:
    source, line = code_in(BALANCING)
    for folder in ("inference_api", "tests"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    [path] = re.findall(r"the whole of `(inference_api/routing/\w+\.py)`", BALANCING)
    (tmp_path / path).write_text(source)
    module = tmp_path / "inference_api/routing/balance.py"
    text = module.read_text()
    name = re.findall(r": (\w+),", line)[0]
    imported = f"from inference_api.routing.{Path(path).stem} import {name}\n"
    marked = "BALANCERS: dict[str, MakeBalancer] = {\n"
    assert marked in text
    at = text.index("from inference_api.routing.balancer")
    module.write_text((text[:at] + imported + text[at:]).replace(marked, marked + line))

    names = ["tests/routing/test_balance.py", "tests/test_architecture.py"]
    run = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *names]
    done = subprocess.run(run, check=False, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]

    entry = {"models": [{"name": "m", "backends": ["http://127.0.0.1:1"], "balancing": "three_choices"}]}
    catalogue = tmp_path / "catalogue.json"
    for balancing, code, told in (("three_choices", 0, "valid"), ("three_choises", 2, "three_choices")):
        entry["models"][0]["balancing"] = balancing
        catalogue.write_bytes(orjson.dumps(entry))
        check = [sys.executable, "-m", "inference_api", "check", "--catalogue", str(catalogue)]
        checked = subprocess.run(check, check=False, cwd=tmp_path, capture_output=True, text=True, timeout=60)
        assert (checked.returncode, told in checked.stdout + checked.stderr) == (code, True), checked
