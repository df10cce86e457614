"""`control-plane import`, `export` and `copy`: what goes out comes in again, on both databases."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from sqlalchemy import select

from control_plane.cli import main
from control_plane.data import schema, tables
from control_plane.data.database import Database, parse_url
from control_plane.services import lending
from inference_api.app import ENTRY
from inference_api.policy.source import read_file
from inference_api.routing.catalogue import load_catalogue
from registry_stub.store import Store
from tests.control_plane import teams
from tests.control_plane.acts import act_of
from tests.control_plane.conftest import NOON, Running
from tests.control_plane.test_keys import made, policy_of
from tests.control_plane.test_policy import TEAMS, Caller
from tests.policies import EXAMPLE, entry

pytestmark = pytest.mark.anyio
POLICY = {
    "organisations": [
        {"name": "team-a", "limits": [{"requests": 600, "per": 60}], "budget": {"cost": 500, "per": "month"}}
    ],
    "keys": [entry(organisation="team-a", user="ana", models=["llama-*"], expires="2027-01-31T00:00:00Z")],
    "anonymous": {"limits": [{"requests": 10, "per": 60}]},
    "limits": [{"scope": "user", "requests": 120, "per": 60}],
    "budgets": [{"scope": "user", "name": "ana", "tokens": 5000000, "per": "day"}],
    "prompts": [{"name": "support", "labels": {"production": 1}, "versions": [{"version": 1, "text": "Hello"}]}],
}
BACKENDS = [{"url": "http://10.0.0.1:8000"}]
MODELS: list[dict[str, Any]] = [
    {"name": "gpt2", "aliases": ["g"], "backends": BACKENDS, "price": {"input": 0.5, "output": 1.5}},
    {"name": "gpt3", "backends": BACKENDS},
    {"name": "chat", "split": {"variants": {"gpt2": 1, "gpt3": 2}}},
]
MADE = ["model gpt2: created", "model gpt3: created", "model chat: created"]


class Commands:
    """Runs commands over one database."""

    def __init__(self, url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.url = url
        self._monkeypatch = monkeypatch
        self._capsys = capsys

    async def run(self, *arguments: Any, url: str | None = None) -> tuple[int, list[str], str]:
        """Exit code, lines, and what is on stderr."""
        self._monkeypatch.setenv("CONTROL_PLANE_DATABASE_URL", url or self.url)
        self._capsys.readouterr()
        code = await asyncio.to_thread(main, [str(one) for one in arguments])
        out, err = self._capsys.readouterr()
        return code, out.splitlines(), err


@pytest.fixture
def commands(database_url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Commands:
    return Commands(database_url, monkeypatch, capsys)


@pytest.fixture
def sqlite_commands(sqlite_url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Commands:
    return Commands(sqlite_url, monkeypatch, capsys)


async def empty(folder: Path, name: str = "other") -> str:
    """Another migrated database."""
    (folder / name).mkdir()
    url = f"sqlite:///{folder}/{name}/control-plane.sqlite3"
    await schema.migrate(parse_url(url))
    return url


def written(path: Path, document: Any) -> Path:
    path.write_text(yaml.safe_dump(document))
    return path


async def test_whatever_is_stored_goes_out_and_comes_in_again(
    start_plane: Callable[..., Any], commands: Commands, tmp_path: Path
) -> None:
    plane: Running = await start_plane()
    for name in TEAMS:
        await teams.organisation(plane, name, budget={"cost": 1, "per": "month"})
    caller = Caller(plane, seed=7)
    for _ in range(120):
        await caller.call()
    lent = await lending.lend(plane.plane, act_of(plane, platform_role="admin"), lending.Borrower("playground"))
    file, again = tmp_path / "policy.yaml", tmp_path / "again.yaml"
    assert await commands.run("export", "policy", "--output", file) == (0, [], "")
    assert lent.id not in file.read_text()
    other = await empty(tmp_path)
    code, lines, _ = await commands.run("import", file, url=other)
    assert (code, len(lines) > 3) == (0, True)
    assert await commands.run("import", file, url=other) == (0, [], "")
    await commands.run("export", "policy", "--output", again, url=other)

    # PostgreSQL keeps no order of members.
    assert yaml.safe_load(again.read_text()) == yaml.safe_load(file.read_text())
    assert read_file(file, peppered=False).keys > 0
    assert file.stat().st_mode & 0o777 == 0o600


async def test_a_policy_is_taken_over_line_by_line(plane: Running, commands: Commands, tmp_path: Path) -> None:
    other = await made(plane.admin)
    etag = (await plane.router.get("/policy")).headers["etag"]
    file = written(tmp_path / "policy.yaml", POLICY)
    tried = await commands.run("import", file, "--dry-run")
    assert [one["name"] for one in (await policy_of(plane))["keys"]] == ["batch"]
    done = await commands.run("import", file)

    assert (tried[0], len(tried[1])) == (0, 6)
    assert done[1][:2] == ["organisation team-a: created", f"key {EXAMPLE.id}: created"]
    assert done[1][-2:] == ["prompt support: created", "setting anonymous.limits: created"]
    # The process that serves learns of it.
    headers = {"if-none-match": etag, "prefer": "wait=25"}
    found = (await plane.router.get("/policy", headers=headers)).json()
    assert {one["id"] for one in found["keys"]} == {EXAMPLE.id, other["id"]}
    assert {section: found[section] for section in POLICY if section != "keys"} == {
        section: items for section, items in POLICY.items() if section != "keys"
    }
    changed = {**POLICY, "limits": [{"scope": "user", "requests": 60, "per": 60}], "keys": [entry(name="renamed")]}
    _, lines, _ = await commands.run("import", written(file, changed))
    assert [line.split()[0::2] for line in lines] == [["key", "updated"], ["limit", "updated"]]
    rows = await all_rows(commands.url, [tables.audit])
    kinds = {(row["actor_kind"], row["action"]) for row in rows["audit"]}
    assert ("system", "key.update") in kinds
    assert EXAMPLE.digest not in str(rows)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"keys": [entry(organisation="nowhere")]}, "keys.0.organisation: 'nowhere' is not in organisations"),
    ({"keys": [{**entry(), "digest": EXAMPLE.peppered}]}, "needs CONTROL_PLANE_KEY_PEPPER"),
    ({"keyz": []}, "keyz: there is no such key"),
    ({"limits": [{"scope": "user", "requests": 1}]}, "limits.0: give `per`"),
    ({"budgets": [{"scope": "user", "cost": 1e300, "per": "day"}]}, "a number that is too large"),
    ({"prompts": [{"name": "support", "versions": [{"version": 1, "text": "Bye"}]}]}, "versions never change"),
    ({"organisations": [{"name": "gone"}]}, "the organisation 'gone' has ended"),
    ({"keys": [entry(), {**entry(), "id": "x" * 12}]}, "the digest is given twice"),
    ({"keys": [{**entry(), "id": "x" * 12}]}, "is taken by what is stored"),
    (
        {"budgets": [{"scope": "organisation", "name": "team-a", "cost": 1, "per": "month"}]},
        "is not in organisations",
    ),
]


async def test_what_is_not_valid_changes_nothing(
    sqlite_plane: Running, sqlite_commands: Commands, tmp_path: Path
) -> None:
    await teams.organisation(sqlite_plane, "gone", disabled=True, ended_at=NOON)
    file = written(tmp_path / "policy.yaml", POLICY)
    assert (await sqlite_commands.run("import", file))[0] == 0
    before = await all_rows(sqlite_commands.url, tables.metadata.sorted_tables)
    for change, reason in REFUSED:
        code, lines, err = await sqlite_commands.run("import", written(file, {"limits": [], **change}))

        assert (code, lines) == (1, [])
        assert err.startswith(f"control-plane: {file}: ")
        assert reason in err
    assert await all_rows(sqlite_commands.url, tables.metadata.sorted_tables) == before


async def test_a_catalogue_goes_out_and_comes_in_again(commands: Commands, tmp_path: Path) -> None:
    file, again = tmp_path / "models.yaml", tmp_path / "again.yaml"
    taken = await commands.run("import", written(file, {"models": MODELS}))
    assert taken == (0, MADE, "")
    assert await commands.run("import", file) == (0, [], "")
    code, lines, _ = await commands.run("export", "models")
    file.write_text("\n".join(lines))
    assert list(load_catalogue(file, ENTRY)) == ["gpt2", "gpt3", "chat"]
    other = await empty(tmp_path)
    await commands.run("import", file, url=other)
    await commands.run("export", "models", "--output", again, url=other)

    assert code == 0
    assert yaml.safe_load(again.read_text()) == yaml.safe_load(file.read_text())
    clash = {"models": [{"name": "new", "aliases": ["gpt2"]}]}
    assert (await commands.run("import", written(file, clash)))[0] == 1


async def test_the_models_of_a_registry_stub_come_in(sqlite_commands: Commands, tmp_path: Path) -> None:
    path = tmp_path / "registry.sqlite3"
    with Store(path) as store:
        store.seed([ENTRY.model_validate(one) for one in MODELS], now=1_700_000_000)
        # While the stub serves it.
        assert (await sqlite_commands.run("import", path))[1] == [
            "model gpt2: created",
            "model gpt3: created",
            "model chat: created",
        ]
        _, lines, _ = await sqlite_commands.run("export", "models")

        assert yaml.safe_load("\n".join(lines))["models"][0]["created"] == 1_700_000_000


async def test_another_file_is_refused(sqlite_commands: Commands, tmp_path: Path) -> None:
    file = tmp_path / "file.yaml"
    for content in ("", "{", "- 1", "models: 1", "what: []", "models: [{name: a, backend: x}]"):
        file.write_text(content)
        code, lines, err = await sqlite_commands.run("import", file)

        assert (code, lines, err.count("\n")) == (1, [], 1)
    assert (await sqlite_commands.run("import", tmp_path / "nothing"))[0] == 1


async def all_rows(url: str, listed: Any) -> dict[str, list[dict[str, Any]]]:
    database = Database(parse_url(url))
    try:
        found = {}
        for table in listed:
            store = database.main if table.metadata is tables.metadata else database.usage
            async with store.read() as connection:
                rows = await connection.execute(select(table).order_by(*table.primary_key))
                found[table.name] = [dict(row) for row in rows.mappings()]
        return found
    finally:
        await database.close()
