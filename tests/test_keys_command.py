"""`inference-api keys` and what `check` and `serve` say of a policy."""

import io
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from inference_api.cli import main
from inference_api.policy.keys import digest, is_well_formed
from inference_api.policy.reading import read, run
from tests.command import command, log_of, ready
from tests.policies import EXAMPLE, PEPPER, entry, new_key, policy_of, write

PREFIX = "INFERENCE_API_"


class Stdin:
    """What a command reads."""

    def __init__(self, text: str) -> None:
        self.buffer = io.BytesIO(text.encode())


def made(capsys: pytest.CaptureFixture[str], *options: str) -> tuple[str, str]:
    """Key and entry of `keys new`, as printed."""
    assert main(["keys", "new", *options]) == 0
    key, empty, line = capsys.readouterr().out.splitlines()
    assert empty == ""
    return key, line


def test_a_new_key_and_its_entry(capsys: pytest.CaptureFixture[str]) -> None:
    key, line = made(capsys, "--name", "batch", "--organisation", "team-a")

    assert is_well_formed(key.encode())
    id = key[6:18]
    # Quoted if YAML would take it for a number
    rest = f'name: batch, digest: "{digest(key.encode())}", organisation: team-a}}'
    assert line in (f"- {{id: {id}, {rest}", f'- {{id: "{id}", {rest}')


def test_an_entry_is_a_policys_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    """For any id, also one that YAML takes for a number, and any name."""
    options = ["--user", "ana", "--models", "llama-*", "--models", "chat", "--expires", "2027-01-31T00:00:00Z"]
    lines = {
        name: made(capsys, "--name", name, *options)[1] for name in ["yes", "a: b", 'quo"te', "- x", "ünï", "12"] * 5
    }

    policy = run(read("keys:\n" + "\n".join(f"  {line}" for line in lines.values()), peppered=False, is_yaml=True))

    assert {row.name for row in policy.rows()} == set(lines)
    assert {(row.user, row.expires) for row in policy.rows()} == {("ana", 1801353600.0)}
    assert all('models: ["llama-*", chat], expires: 2027-01-31T00:00:00Z}' in line for line in lines.values())


def test_a_new_key_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["keys", "new", "--name", "a", "--json"]) == 0

    found = json.loads(capsys.readouterr().out)
    assert found["entry"] == {"id": found["key"][6:18], "name": "a", "digest": digest(found["key"].encode())}


def test_a_pepper_makes_an_hmac_with_the_first(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(f"{PREFIX}KEY_PEPPER", f"{PEPPER},{'o' * 32}")

    key, line = made(capsys, "--name", "a")

    assert digest(key.encode(), PEPPER) in line


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--name", ""], "--name: must have at least 1 character"),
        (["--name", "a", "--expires", "soon"], "--expires: must be a time in UTC, such as 2027-01-31T00:00:00Z"),
        (["--name", "a", "--organisation", "a b"], "--organisation: must match pattern"),
        (["--name", "a", "--models", "a b"], "--models: must match pattern"),
    ],
)
def test_a_key_that_no_policy_would_take(options: list[str], reason: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["keys", "new", *options]) == 2

    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith(f"inference-api: {reason}")


OLD = new_key()
VERIFIED: list[tuple[str, dict[str, Any], int, str]] = [
    (EXAMPLE.key, {}, 0, "valid k3v9Qm2XbT7a batch"),
    (EXAMPLE.key, {"organisation": "team-a"}, 0, "valid k3v9Qm2XbT7a batch team-a"),
    (f"  {EXAMPLE.key}\r\n", {}, 0, "valid k3v9Qm2XbT7a batch"),
    (EXAMPLE.key[:-1] + "s", {}, 1, "invalid: checksum"),
    ("x", {}, 1, "invalid: checksum"),
    ("", {}, 1, "invalid: checksum"),
    (new_key().key, {}, 1, "invalid: unknown"),
    (EXAMPLE.key, {"expires": "2026-01-31T00:00:00Z"}, 1, "invalid: expired 2026-01-31T00:00:00Z"),
    (EXAMPLE.key, {"disabled": True}, 1, "invalid: disabled"),
    (
        OLD.key,
        {"previous": {"digest": OLD.digest, "until": "2026-01-01T00:00:00Z"}},
        1,
        "invalid: expired 2026-01-01T00:00:00Z",
    ),
    (OLD.key, {"previous": {"digest": OLD.digest, "until": "2126-01-01T00:00:00Z"}}, 0, "valid k3v9Qm2XbT7a batch"),
]


@pytest.mark.parametrize("case", range(len(VERIFIED)))
def test_a_key_is_verified(
    case: int,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    key, more, code, said = VERIFIED[case]
    path = write(tmp_path / "policy.json", policy_of(entry(**more)))

    for named, argv in ((path, ["keys", "verify", "-"]), (None, ["keys", "verify", "--policy", str(path)])):
        if named is not None:
            monkeypatch.setenv(f"{PREFIX}POLICY", str(named))
        else:
            monkeypatch.delenv(f"{PREFIX}POLICY")
        monkeypatch.setattr(sys, "stdin", Stdin(key))
        assert main(argv) == code
        assert capsys.readouterr() == (said + "\n", "")


def test_without_a_policy_only_the_form_is_verified(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for source in ("", "registry"):
        if source:
            monkeypatch.setenv(f"{PREFIX}POLICY", source)
        monkeypatch.setattr(sys, "stdin", Stdin(EXAMPLE.key))
        assert main(["keys", "verify"]) == 0
        assert capsys.readouterr().out == "well-formed k3v9Qm2XbT7a\n"


def test_a_policy_that_cannot_be_read_is_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", Stdin(EXAMPLE.key))

    assert main(["keys", "verify", "--policy", str(tmp_path / "none.yaml")]) == 2

    assert capsys.readouterr().err.startswith(f"inference-api: policy '{tmp_path}/none.yaml': it cannot be read: ")


def test_a_key_on_the_command_line_is_refused_and_not_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["keys", "verify", EXAMPLE.key]) == 2

    out, err = capsys.readouterr()
    assert (out, err) == (
        "",
        "inference-api: keys verify reads the key from stdin: others see the arguments of a command\n",
    )


# check and serve


@pytest.fixture
def catalogue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "catalogue.yaml"
    path.write_text(yaml.safe_dump({"models": [{"name": "m", "backends": ["http://10.0.0.1:8000"]}]}))
    monkeypatch.setenv(f"{PREFIX}CATALOGUE", str(path))
    return path


def test_check_reads_the_policy_and_warns(
    catalogue: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(
        tmp_path / "policy.json",
        policy_of(entry(models=["gone"], limits=[{"requests": 1, "per": 1, "precise": True}]), budgets=[BUDGET]),
    )
    monkeypatch.setenv(f"{PREFIX}POLICY", str(path))

    assert main(["check"]) == 0

    out, err = capsys.readouterr()
    valid = f"settings, catalogue and policy are valid: 1 model, 1 backend in {catalogue}, 1 key in {path}\n"
    assert out == valid
    warnings = err.splitlines()
    assert warnings[0] == f"warning: policy '{path}': key 'batch': no model matches 'gone'"
    assert any("precise" in line and "LIMITS" in line for line in warnings)
    assert any("budgets" in line and "USAGE" in line for line in warnings)


BUDGET = {"scope": "all", "tokens": 10, "per": "day"}
WRONG: list[tuple[dict[str, str], str]] = [
    ({"POLICY": "/none.yaml"}, "policy '/none.yaml': it cannot be read: "),
    ({"AUTH": "on"}, "INFERENCE_API_AUTH='on': must be one of off, keys"),
    ({"AUTH": "keys"}, "INFERENCE_API_AUTH='keys': needs INFERENCE_API_POLICY; "),
    ({"POLICY": "registry"}, "INFERENCE_API_POLICY='registry': needs INFERENCE_API_REGISTRY_URL; "),
    ({"POLICY": ""}, "INFERENCE_API_POLICY='': must have at least 1 character"),
    ({"POLICY_CACHE": "/tmp/c"}, "INFERENCE_API_POLICY_CACHE='/tmp/c': is used with INFERENCE_API_POLICY=registry "),
    ({"KEY_PEPPER": "secret"}, "INFERENCE_API_KEY_PEPPER='***': must be at least 32 characters without commas, or two"),
    ({"KEY_PEPPER": f"{PEPPER},short"}, "INFERENCE_API_KEY_PEPPER='***': must be at least 32 characters"),
    ({"KEY_PEPPER": ",".join([PEPPER] * 3)}, "INFERENCE_API_KEY_PEPPER='***': must be at least 32 characters"),
    ({"REGISTRY_TOKEN": "two words"}, "INFERENCE_API_REGISTRY_TOKEN='***': must be one word"),
]


@pytest.mark.parametrize(("environ", "said"), WRONG)
def test_what_does_not_go_together_ends_with_one_line(
    environ: dict[str, str],
    said: str,
    catalogue: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in environ.items():
        monkeypatch.setenv(PREFIX + name, value)

    assert main(["check"]) == 2

    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith(f"inference-api: {said}")


def test_check_refuses_an_entry_that_passes_keys_on(
    catalogue: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    catalogue.write_text("models: [{name: m, credentials: passthrough}]")
    monkeypatch.setenv(f"{PREFIX}POLICY", str(write(tmp_path / "policy.json", policy_of())))
    assert main(["check"]) == 0
    capsys.readouterr()

    monkeypatch.setenv(f"{PREFIX}AUTH", "keys")
    assert main(["check"]) == 2

    assert capsys.readouterr().err == (
        f"inference-api: {catalogue}: model 'm': credentials: passthrough would send the callers' keys to its "
        "backends; INFERENCE_API_AUTH=keys refuses that\n"
    )


@pytest.mark.anyio
@pytest.mark.parametrize("auth", ["off", "keys"])
async def test_serve_says_what_holds(auth: str, tmp_path: Path) -> None:
    path = write(tmp_path / "policy.json", policy_of(entry()))

    async with command(tmp_path, host="0.0.0.0", auth=auth, policy=path) as router:
        await ready(router.client, "/readyz")
        code, out, err = await router.stop()

    assert (code, err) == (0, "")
    lines = log_of(out)
    [serving] = [line for line in lines if line["event"] == "serving"]
    assert serving["policy"] == {"source": str(path), "keys": 1}
    assert ("keys" in serving["features"]) == (auth == "keys")
    warned = [line for line in lines if "there is no authentication" in line["event"]]
    assert len(warned) == (auth == "off")
    assert not re.search("sk-ia-", out)
