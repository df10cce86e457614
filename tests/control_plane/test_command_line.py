"""`inference-control` as a process, against a real control plane: what it prints, and how it ends."""

import asyncio
import json
import os
import re
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from inference_control.resources import RESOURCES
from tests.control_plane.conftest import NOON, Running
from tests.control_plane.model_writers import GGUF_SHAPES, LLAMA_GGUF, gguf
from tests.control_plane.test_fleet import backend, report
from tests.ports import free_port

ROOT = Path(__file__).parents[2]
# Each command is a process.
pytestmark = [pytest.mark.anyio, pytest.mark.timeout(240)]


class Ran(NamedTuple):
    code: int
    out: str
    err: str


async def control(plane: Running | None, *arguments: str, stdin: str = "", **variables: Any) -> Ran:
    """Run one command as the platform admin; a variable of None is not set."""
    chosen: dict[str, str | None] = {"PYTHONPATH": str(Path(__file__).parents[2])}
    if plane is not None:
        token = plane.admin.headers["authorization"].removeprefix("Bearer ")
        chosen |= {"INFERENCE_CONTROL_URL": plane.url, "INFERENCE_CONTROL_TOKEN": token}
    environment = {**os.environ, **chosen, **variables}
    # A file, not a pipe: a command that reads nothing may have ended before anything is written.
    with tempfile.TemporaryFile() as read:
        read.write(stdin.encode())
        read.seek(0)
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "inference_control", *arguments),
            env={name: value for name, value in environment.items() if value is not None},
            stdin=read,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
    out, err = await asyncio.wait_for(process.communicate(), 120)
    assert process.returncode is not None
    return Ran(process.returncode, out.decode(), err.decode())


async def test_a_model_from_its_making_to_its_end(sqlite_plane: Running, tmp_path: Path) -> None:
    made = await control(
        sqlite_plane, "models", "create", "org/gpt2", "--set", 'backends=["http://10.0.0.1:8000"]', "--set", "version=1"
    )
    again = await control(sqlite_plane, "models", "create", "org/gpt2", "--set", 'backends=["http://10.0.0.1:8000"]')
    changed = await control(sqlite_plane, "models", "set", "org/gpt2", "--set", "version=2", "--json")
    listed = await control(sqlite_plane, "models", "list")
    (tmp_path / "entry.yaml").write_text("name: org/gpt2\nbackends: ['http://10.0.0.9:8000']\n")
    whole = await control(sqlite_plane, "models", "set", "org/gpt2", "--file", str(tmp_path / "entry.yaml"), "--json")
    deleted = await control(sqlite_plane, "models", "delete", "org/gpt2")
    gone = await control(sqlite_plane, "models", "get", "org/gpt2")

    assert [made.code, again.code, changed.code, whole.code, deleted.code, gone.code] == [0, 1, 0, 0, 0, 1]
    assert made.out.startswith("name: ")
    assert again.err.startswith("inference-control: precondition_failed: The object exists")
    assert json.loads(changed.out)["version"] == "2"
    assert json.loads(changed.out)["backends"] == [{"url": "http://10.0.0.1:8000"}]
    assert listed.out == "NAME      VERSION  BACKENDS\norg/gpt2  2        http://10.0.0.1:8000\n"
    assert "version" not in json.loads(whole.out)
    assert "not_found" in gone.err


async def test_a_key_is_made_rotated_changed_and_ended(sqlite_plane: Running) -> None:
    made = await control(sqlite_plane, "keys", "create", "--set", "name=batch", "--json")
    key = json.loads(made.out)
    rotated = await control(sqlite_plane, "keys", "rotate", key["id"], "--set", "overlap=60", "--json")
    limited = await control(
        sqlite_plane, "keys", "set", key["id"], "--set", 'limits=[{"requests": 60, "per": 60}]', "--json"
    )
    ended = await control(sqlite_plane, "keys", "delete", key["id"])
    listed = await control(sqlite_plane, "keys", "list", "--filter", "state=ended", "--json")

    assert [ran.code for ran in (made, rotated, limited, ended)] == [0, 0, 0, 0]
    assert key["key"].startswith(f"sk-ia-{key['id']}-")
    assert json.loads(rotated.out)["key"] != key["key"]
    assert json.loads(limited.out)["limits"] == [{"requests": 60, "per": 60}]
    assert [one["state"] for one in json.loads(listed.out)] == ["ended"]


async def test_an_organisation_with_members(sqlite_plane: Running) -> None:
    await control(sqlite_plane, "organisations", "create", "--set", "name=team-a", "--set", "title=Team A")
    user = await control(
        sqlite_plane, "users", "create", "--set", "name=max", "--set", "email=max@example.org", "--json"
    )
    joined = await control(sqlite_plane, "members", "create", "team-a/max", "--set", "role=member")
    raised = await control(sqlite_plane, "members", "set", "team-a/max", "--set", "role=admin")
    listed = await control(sqlite_plane, "members", "list", "team-a", "--json")
    left = await control(sqlite_plane, "members", "delete", "team-a/max")

    assert [user.code, joined.code, raised.code, left.code] == [0, 0, 0, 0], (user, joined, raised, left)
    assert "setup_url" in json.loads(user.out)
    assert [(one["user"], one["role"]) for one in json.loads(listed.out)] == [("max", "admin")]


async def test_a_prompt_with_versions_and_labels(sqlite_plane: Running) -> None:
    await control(sqlite_plane, "prompts", "create", "--set", "name=support")
    version = {"messages": [{"role": "system", "content": "Help."}]}
    added = await control(sqlite_plane, "versions", "create", "support", "--file", "-", stdin=json.dumps(version))
    labelled = await control(sqlite_plane, "labels", "create", "support/production", "--set", "version=1")
    listed = await control(sqlite_plane, "prompts", "list")

    assert [added.code, labelled.code] == [0, 0], (added, labelled)
    assert listed.out.splitlines()[1].split() == ["support", "production=1", "1"]


async def test_a_drain_and_its_acknowledgement(sqlite_plane: Running) -> None:
    await sqlite_plane.router.put("/routers/r-1", json=report(backend(), backend("10.0.0.2:8000")))
    body = ["--set", "backend=10.0.0.1:8000", "--set", "action=drain", "--set", "reason=new driver"]
    made = await control(sqlite_plane, "overrides", "create", *body, "--json")
    listed = await control(sqlite_plane, "overrides", "list")
    backends = await control(sqlite_plane, "backends", "list")
    ended = await control(sqlite_plane, "overrides", "delete", json.loads(made.out)["id"])

    assert [made.code, ended.code] == [0, 0]
    assert listed.out.splitlines()[0].split() == ["ID", "BACKEND", "ACTION", "REASON", "CREATED", "BY", "ACKNOWLEDGED"]
    assert "new driver" in listed.out
    assert listed.out.splitlines()[1].split()[-1] == "0/1"
    assert backends.out.splitlines()[1].split()[:3] == ["m", "10.0.0.1:8000", "ready"]


async def test_lists_follow_their_pages(sqlite_plane: Running) -> None:
    for number in range(5):
        await sqlite_plane.admin.put(f"/models/m{number}", json={"name": f"m{number}", "backends": ["http://x:1"]})

    whole = await control(sqlite_plane, "models", "list", "--json")
    some = await control(sqlite_plane, "models", "list", "--json", "--limit", "3")

    assert len(json.loads(whole.out)) == 5
    assert len(json.loads(some.out)) == 3


async def test_usage_and_settings_and_me(sqlite_plane: Running) -> None:
    sqlite_plane.clock.now = NOON
    usage = await control(
        sqlite_plane, "usage", "get", "--filter", "start=2026-11-27T00:00:00Z", "--filter", "end=2026-11-28T00:00:00Z",
        "--filter", "bucket=1d", "--filter", "group_by=model", "--filter", "group_by=key",
    )  # fmt: skip
    settings = await control(sqlite_plane, "settings", "list")
    me = await control(sqlite_plane, "me", "get")

    assert [usage.code, settings.code, me.code] == [0, 0, 0], (usage, settings, me)
    assert usage.out.splitlines()[-1].split()[:4] == ["total", "total", "0", "0"]
    assert "SOURCE" in settings.out
    assert "platform_role: admin" in " ".join(me.out.split())


@pytest.mark.parametrize(
    ("arguments", "variables", "code", "message"),
    [
        (["models", "list"], {"INFERENCE_CONTROL_TOKEN": None}, 2, "INFERENCE_CONTROL_TOKEN is not set"),
        (["models", "list"], {"INFERENCE_CONTROL_URL": "localhost"}, 2, "must be an http:// or https:// URL"),
        (["models", "list"], {"INFERENCE_CONTROL_TOKEN": "mt-ia-x"}, 1, "not_authenticated"),
        (["models", "set", "m", "--set", "x"], {}, 2, "--set 'x': must be NAME=VALUE"),
        (["models", "set", "m"], {}, 2, "there is nothing to send"),
        (["keys", "create", "--file", "nowhere.yaml"], {}, 2, "'nowhere.yaml' cannot be read: No such file"),
        (["keys", "create", "--file", "-"], {}, 2, "'-' must have one object"),
        (["keys", "create", "--set", "nmae=x"], {}, 1, "validation_error"),
        (["keys", "list", "--filter", "state=x"], {}, 1, "validation_error"),
        (["nothing", "list"], {}, 2, "invalid choice"),
        (["backends", "create"], {}, 2, "invalid choice"),
        (["models", "list", "--limit", "0"], {}, 2, "'0' is not a number from 1"),
    ],
)
async def test_what_cannot_be_done_is_said(
    sqlite_plane: Running, arguments: list[str], variables: dict[str, Any], code: int, message: str
) -> None:
    ran = await control(sqlite_plane, *arguments, **variables)

    assert ran.code == code
    assert ran.out == ""
    assert message in ran.err
    assert "Traceback" not in ran.err


async def test_no_control_plane() -> None:
    url = f"http://127.0.0.1:{free_port()}"
    variables: dict[str, Any] = {"INFERENCE_CONTROL_URL": url, "INFERENCE_CONTROL_TOKEN": "mt-ia-x"}

    assert (await control(None, "models", "list", **variables)).code == 3


async def test_a_token_that_would_go_unencrypted_is_warned_of() -> None:
    variables: dict[str, Any] = {"INFERENCE_CONTROL_URL": "http://203.0.113.1:1/", "INFERENCE_CONTROL_TOKEN": "mt-ia-x"}
    variables |= {"http_proxy": f"http://127.0.0.1:{free_port()}"}

    assert "unencrypted" in (await control(None, "models", "list", **variables)).err


async def test_a_model_is_inspected(start_sqlite: Callable[..., Any], tmp_path: Path) -> None:
    file = tmp_path / "tiny.gguf"
    file.write_bytes(gguf(LLAMA_GGUF, GGUF_SHAPES))
    plane = await start_sqlite(model_roots=str(tmp_path))
    shown = await control(plane, "inspect", str(file))
    whole = await control(plane, "inspect", str(tmp_path), "--json")
    off = await control(plane, "inspect", "org/model")
    listed = await control(plane, "inspections", "list", "--json")

    assert (shown.code, whole.code, off.code) == (0, 0, 1), (shown.err, whole.err)
    assert re.search(r"parameters: +12,352\n", shown.out)
    assert "2 x 2 layers x 2 KV heads x 16 x 2 bytes = 256 bytes" in shown.out
    assert re.search(r"\nNVIDIA T4 +15.0 +1 +yes ", shown.out)
    assert re.search(r"max_model_len: 2048", shown.out)
    assert json.loads(whole.out)["result"]["parameters"] == 12_352
    assert "inspection_disabled" in off.err
    assert [one["source"] for one in json.loads(listed.out)] == ["folder", "file"]


@pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("*.md")), ids=lambda page: page.name)
def test_commands_in_the_documentation_can_be_given(page: Path) -> None:
    commands = re.findall(r"^(?: {4})?inference-control ([a-z-]+) (\S+)", page.read_text(), re.MULTILINE)

    assert [one for one in commands if one[0] != "inspect" and one[1] not in RESOURCES[one[0]].verbs] == []
