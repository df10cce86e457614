"""The commands as a newcomer and an operator use them: real engines, and a real router where one is asked."""

import asyncio
import os
import signal
import ssl
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from inference_api.cli import main
from inference_api.routing.causes import cause_of
from tests.command import catalogue_of, command, log_of, ready
from tests.conftest import Served
from tests.fakes import CHAT, FakeEngine, hang, json_response, raw, until
from tests.ports import free_port

pytestmark = pytest.mark.anyio
Start = Callable[..., Any]


def written(tmp_path: Path, *models: Any) -> str:
    path = tmp_path / "catalogue.yaml"
    path.write_text(yaml.safe_dump({"models": list(models)}))
    return str(path)


async def run(*argv: str, **environ: str) -> tuple[int, list[str], list[str]]:
    """A command as a process: (exit code, lines of stdout, lines of stderr)."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "inference_api", *argv),
        env={**os.environ, **environ},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await asyncio.wait_for(process.communicate(), 30)
    assert process.returncode is not None
    return process.returncode, out.decode().splitlines(), err.decode().splitlines()


# Options


@pytest.mark.parametrize(
    ("argv", "usage", "said"),
    [
        (
            ("serve", "--prot", "1"),
            "usage: inference-api serve",
            "unrecognized arguments: --prot 1; did you mean --port?",
        ),
        (("serve", "--zzz"), "usage: inference-api serve", "unrecognized arguments: --zzz\n"),
        (("check", "--conect"), "usage: inference-api check", "did you mean --connect?"),
    ],
)
def test_an_option_that_is_unknown_is_told_with_the_usage_of_its_command(
    argv: tuple[str, ...], usage: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(list(argv))

    err = capsys.readouterr().err
    assert caught.value.code == 2
    assert err.startswith(usage)
    assert said in err


# serve --backend


async def test_serve_takes_models_from_its_options(tmp_path: Path, start_engine: Start) -> None:
    engines: list[FakeEngine] = [await start_engine() for _ in range(3)]
    options = [f"--backend=m={engine.url}" for engine in engines[:2]] + [f"--backend=org/n={engines[2].url}"]
    async with command(tmp_path, options=options, catalogue=None) as router:
        await ready(router.client)
        models = (await router.client.get("/v1/models")).json()["data"]
        answer = await router.client.post("/v1/chat/completions", json=CHAT | {"model": "org/n"})
        code, out, err = await router.stop()

    assert ([model["id"] for model in models], answer.status_code) == (["m", "org/n"], 200)
    assert len(engines[2].requests) == 1
    assert (code, err) == (0, "")
    serving = log_of(out)[0]
    assert (serving["models"], serving["backends"], serving["catalogue"]) == (["m", "org/n"], 3, "--backend")


@pytest.mark.parametrize(
    ("argv", "environ", "line"),
    [
        (["m"], {}, "--backend 'm': must be NAME=URL, as in --backend llama-3-8b=http://10.0.0.11:8000"),
        (["m="], {}, "--backend 'm=': must be NAME=URL"),
        (["=http://u:secret@h"], {}, "--backend '***': must be NAME=URL"),
        (
            ["m=ftp://h"],
            {},
            "--backend m=...: backends.0.url: backend url 'ftp://h' must start with http:// or https://",
        ),
        (["my model=http://h"], {}, "--backend my model=...: name 'my model': no spaces"),
        (["m=http://h", "--catalogue", "c.yaml"], {}, "--backend stands for a catalogue, and --catalogue names one"),
        (["m=http://h"], {"INFERENCE_API_CATALOGUE": "c"}, "and INFERENCE_API_CATALOGUE names one"),
    ],
)
def test_a_backend_that_makes_no_sense_is_refused(
    argv: list[str],
    environ: dict[str, str],
    line: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, value in environ.items():
        monkeypatch.setenv(name, value)

    assert main(["serve", "--backend", *argv]) == 2

    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith("inference-api: --backend ")
    assert line in err


# check


def test_check_warns_of_what_is_probably_not_meant(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("BACKEND_TOKEN", raising=False)
    catalogue = written(
        tmp_path,
        {"name": "a"},
        {"name": "b", "backends": ["http://b/v1"], "credentials": {"env": "BACKEND_TOKEN"}},
        {
            "name": "c",
            "backends": ["http://c"],
            "credentials": {"file": f"{tmp_path}/BACKEND_C"},
            "policy": "two_choices",
        },
    )

    assert main(["check", "--catalogue", catalogue]) == 0

    out, err = capsys.readouterr()
    assert out == f"settings and catalogue are valid: 3 models, 2 backends in {catalogue}\n"
    assert err.splitlines() == [
        "warning: model 'a' has no backends: every request for it gets 503",
        "warning: model 'b': the variable BACKEND_TOKEN of its credentials is not set; no token is sent",
        f"warning: model 'c': the token of {tmp_path}/BACKEND_C cannot be used: No such file or directory",
        "warning: model 'c': the key 'policy' is now 'balancing'; the old name will be refused",
        "warning: model 'b': the url 'http://b/v1' ends in /v1, which is ignored: every route has its own /v1",
    ]


def test_check_warns_of_a_catalogue_without_models(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    catalogue = written(tmp_path)

    assert main(["check", "--catalogue", catalogue]) == 0
    assert capsys.readouterr().err == f"warning: {catalogue}: `models` is an empty list\n"


def test_check_warns_of_the_packaged_catalogue(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check"]) == 0
    assert capsys.readouterr().err.startswith("warning: no catalogue is named, so the packaged one is used")


def test_one_model_is_no_plural(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["check", "--catalogue", written(tmp_path, {"name": "a", "backends": ["http://a", "http://b", "http://c"]})])

    assert "valid: 1 model, 3 backends in " in capsys.readouterr().out


# check --connect


def serving_models(engine: FakeEngine, *names: str) -> None:
    engine.page = raw(json_response({"object": "list", "data": [{"id": name} for name in names]}))


async def test_check_connects_to_every_backend(tmp_path: Path, start_engine: Start) -> None:
    hub = "mistralai/Mistral-7B"
    good, other, many, locked = [await start_engine() for _ in range(4)]
    serving_models(good, "a", "b")
    serving_models(other, hub)
    serving_models(many, "x", "y")
    locked.page = raw(json_response({}, "401 Unauthorized"))
    dead = f"http://127.0.0.1:{free_port()}"
    catalogue = written(
        tmp_path,
        {"name": "a", "backends": [good.url, dead]},
        {"name": "mistral-7b", "backends": [other.url, many.url]},
        {"name": "served", "served_model_name": "mistralai/Mistral-7B", "backends": [other.url]},
        {"name": "any", "engine": "tgi", "backends": [other.url]},
        {"name": "locked", "backends": [locked.url]},
    )

    code, out, err = await run("check", "--connect", "--catalogue", catalogue)

    rows = [line.split(maxsplit=3) for line in out]
    places = [url.removeprefix("http://") for url in (good.url, dead, other.url, many.url, locked.url)]
    assert (code, err) == (1, [])
    assert rows == [
        ["MODEL", "BACKEND", "RESULT", "DETAIL"],
        ["a", places[0], "ok"],
        ["a", places[1], "failed", "connect_failed: connection refused"],
        [
            "mistral-7b",
            places[2],
            "name",
            'serves "mistralai/Mistral-7B"; set served_model_name: "mistralai/Mistral-7B"',
        ],
        ["mistral-7b", places[3], "name", 'serves "x", "y"; set served_model_name to one of them'],
        ["served", places[2], "ok"],
        ["any", places[2], "ok"],
        ["locked", places[4], "failed", "upstream_4xx: 401 Unauthorized for /v1/models; set its credentials"],
    ]


async def test_check_looks_for_adapters_that_are_assumed(tmp_path: Path, start_engine: Start) -> None:
    engine = await start_engine()
    serving_models(engine, "m", "x")
    catalogue = written(
        tmp_path,
        {"name": "m", "backends": [engine.url], "adapters": ["x"]},
        {"name": "n", "served_model_name": "m", "backends": [engine.url], "adapters": ["y", "z"]},
        {"name": "o", "served_model_name": "m", "backends": [engine.url], "adapters": ["y"], "discover": True},
    )

    code, out, _ = await run("check", "--connect", "--catalogue", catalogue)

    place = engine.url.removeprefix("http://")
    assert code == 1
    assert [line.split(maxsplit=3) for line in out[1:]] == [
        ["m", place, "ok"],
        ["n", place, "name", 'lacks the adapters "y", "z"; load them, or set discover: true'],
        ["o", place, "ok"],
    ]


def test_check_warns_of_adapters_that_are_not_served(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    backends = ["http://10.0.0.1"]
    one = {"name": "a", "backends": backends, "adapters": ["x", "b", "short"]}
    two = {"name": "b", "aliases": ["short"], "backends": backends, "adapters": ["x", "y"]}
    main(["check", "--catalogue", written(tmp_path, one, two, {"name": "c", "discover": True})])

    assert [line for line in capsys.readouterr().err.splitlines() if "discover" in line or "adapters" in line] == [
        "warning: model 'a': adapters: 'b' is the name of a model, which is served instead",
        "warning: model 'a': adapters: 'short' is the name of a model, which is served instead",
        "warning: model 'b': adapters: 'x' is one of the model 'a', too; none is served",
        "warning: model 'c': discover: there are no backends to ask",
    ]


async def test_check_connects_to_no_backend_of_a_registry_and_says_so(tmp_path: Path, start_engine: Start) -> None:
    engine = await start_engine()
    serving_models(engine, "m")
    catalogue = written(tmp_path, {"name": "m", "backends": [engine.url]})
    registry = {"INFERENCE_API_REGISTRY_URL": "http://127.0.0.1:1"}

    code, out, err = await run("check", "--connect", "--catalogue", catalogue, **registry)

    assert (code, len(out), len(err)) == (0, 2, 1)
    assert err[0].startswith(f"warning: --connect asks the backends of {catalogue}, the fallback; ")


async def test_check_sends_the_credentials_of_the_entry(tmp_path: Path, start_engine: Start) -> None:
    engine = await start_engine()
    sent: list[str | None] = []

    async def page(request: Any, line: Any) -> None:
        sent.append(request.header("x-api-key"))
        await line.send(json_response({"data": [{"id": "m"}]}))

    engine.page = page
    entry = {"name": "m", "backends": [engine.url], "credentials": {"env": "BACKEND_KEY", "header": "x-api-key"}}

    code, out, _ = await run("check", "--connect", "--catalogue", written(tmp_path, entry), BACKEND_KEY="s3cret")

    assert (code, sent) == (0, ["s3cret"])
    assert "s3cret" not in "".join(out)


@pytest.mark.parametrize(
    ("page", "detail"),
    [
        (raw(b"", close=True), "reset: "),
        (raw(b"nonsense\r\n\r\n", close=True), "protocol_error: "),
        (raw(json_response({"data": 5})), "protocol_error: the answer to /v1/models is not a list of models"),
        (raw(json_response({}, "500 Internal Server Error")), "upstream_5xx: 500 Internal Server Error"),
    ],
)
async def test_check_tells_how_a_backend_failed(tmp_path: Path, start_engine: Start, page: Any, detail: str) -> None:
    engine = await start_engine(hang)
    engine.page = page

    code, out, _ = await run(
        "check", "--connect", "--catalogue", written(tmp_path, {"name": "m", "backends": [engine.url]})
    )

    assert code == 1
    assert f"  failed  {detail}" in out[1]


def test_the_cause_of_a_failure_is_the_systems_word() -> None:
    outer = OSError("All connection attempts failed")
    outer.__cause__ = ExceptionGroup("", [ConnectionRefusedError(111, "Connection refused"), OSError(1, "x")])

    assert cause_of(outer) == "connection refused"
    assert cause_of(TimeoutError()) == "no answer in time"
    assert cause_of(ValueError()) == "ValueError"


async def test_check_says_that_a_backend_speaks_no_tls(tmp_path: Path, start_engine: Start) -> None:
    engine = await start_engine()
    url = engine.url.replace("http://", "https://")

    code, out, _ = await run("check", "--connect", "--catalogue", written(tmp_path, {"name": "m", "backends": [url]}))

    assert code == 1
    assert "  failed  connect_failed: no TLS: " in out[1]


async def test_check_trusts_whom_the_router_trusts(tmp_path: Path, certificate: Path) -> None:
    own = str(certificate.with_name("cert.pem"))
    async with FakeEngine(certificate=certificate) as engine:
        check = ("check", "--connect", "--catalogue", written(tmp_path, {"name": "m", "backends": [engine.url]}))

        assert (await run(*check, SSL_CERT_FILE=own))[0] == 0
        assert (await run(*check))[0] == 1


def test_the_cause_of_a_refused_certificate_is_its_fault() -> None:
    refused = ssl.SSLCertVerificationError(1, "certificate verify failed")
    refused.verify_message = "self-signed certificate"

    assert cause_of(refused) == "its certificate is refused: self-signed certificate"


# models --url


async def test_models_of_a_running_router(start_engine: Start, start_router: Start) -> None:
    served: Served = await start_router(await start_engine(), entry={"aliases": ["m1", "m2"], "owner": "team"})
    await until(lambda: served.router.core.fleet.models["m"].max_model_len)

    code, out, err = await run("models", "--url", f"{served.url}/v1")

    assert (code, err) == (0, [])
    assert [line.split() for line in out] == [
        ["MODEL", "VERSION", "OWNER", "CONTEXT", "ALIASES"],
        ["m", "1", "team", "1024", "m1,m2"],
    ]


@pytest.mark.parametrize("argv", [("models",), ("status",)])
async def test_a_router_that_is_not_there_is_exit_code_3(argv: tuple[str, ...]) -> None:
    url = f"http://127.0.0.1:{free_port()}"

    code, out, err = await run(*argv, "--url", url)

    assert (code, out, len(err)) == (3, [], 1)
    assert err[0].startswith(f"inference-api: {url}/")
    assert err[0].endswith(": connection refused; --url must name a router that runs")


async def test_a_url_of_no_router_is_told_with_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert await asyncio.to_thread(main, ["status", "--url", "127.0.0.1:8000"]) == 3
    assert capsys.readouterr().err == (
        "inference-api: --url '127.0.0.1:8000': must be the URL of a router, such as http://127.0.0.1:8000\n"
    )


def test_models_warns_of_the_packaged_catalogue(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models"]) == 0
    assert capsys.readouterr().err.startswith("warning: no catalogue is named, so the packaged one is used")


async def test_static_models_were_created_when_their_file_was_written(start_router: Start, tmp_path: Path) -> None:
    served: Served = await start_router(models=[{"name": "m", "owner": "team"}, {"name": "n", "created": 5}])
    cards = (await served.client.get("/v1/models")).json()["data"]

    written_at = int((tmp_path / "catalogue.json").stat().st_mtime)
    assert [(card["owned_by"], card["created"]) for card in cards] == [("team", written_at), ("unknown", 5)]


# serve, from its first line to its last


async def test_serve_tells_at_its_start_who_cannot_be_reached_and_why(tmp_path: Path, start_engine: Start) -> None:
    engine, dead = await start_engine(), f"127.0.0.1:{free_port()}"
    options = [f"--backend=m={engine.url}", f"--backend=m=http://{dead}"]
    async with command(tmp_path, options=options, catalogue=None) as router:
        await until(lambda: "cannot be reached" in router.output, 10)
        _, out, _ = await router.stop()

    [told] = [line for line in log_of(out) if line["event"] == "a backend cannot be reached"]
    assert (told["level"], told["model"], told["backend"], told["cause"]) == (
        "warning",
        "m",
        dead,
        "connection refused",
    )


async def test_serve_tells_what_is_probably_not_meant(tmp_path: Path) -> None:
    async with command(tmp_path, catalogue=None, host="0.0.0.0") as router:
        await ready(router.client)
        _, out, _ = await router.stop()

    serving, *warnings = log_of(out)[:3]
    assert (serving["event"], serving["catalogue"], serving["backends"]) == ("serving", "packaged", 3)
    assert [line["level"] for line in warnings] == ["warning", "warning"]
    assert warnings[0]["event"].startswith("serve without a catalogue: ")
    assert "there is no authentication and no TLS" in warnings[1]["event"]


async def test_serve_shows_no_password(tmp_path: Path, start_engine: Start) -> None:
    registry = f"http://user:s3cret@127.0.0.1:{free_port()}"
    async with command(tmp_path, await start_engine(), registry_url=registry) as router:
        await ready(router.client)
        _, out, _ = await router.stop()

    assert "s3cret" not in out
    assert log_of(out)[0]["registry"].startswith("http://***@127.0.0.1:")


async def test_serve_on_a_terminal_is_read_by_people(tmp_path: Path, start_engine: Start) -> None:
    engine = await start_engine()
    async with command(tmp_path, engine, log_format="console") as router:
        await ready(router.client)
        _, out, _ = await router.stop()

    first = out.splitlines()[0]
    assert f"serving address=127.0.0.1:{router.port} models=m backends=1 catalogue=" in first
    assert "\x1b" not in out


async def test_ctrl_c_tells_what_it_waits_for(tmp_path: Path, start_engine: Start) -> None:
    engine = await start_engine(hang)
    async with command(tmp_path, engine, drain_timeout=30) as router:
        await ready(router.client)
        request = asyncio.create_task(router.client.post("/v1/chat/completions", json=CHAT))
        await until(lambda: engine.busy)
        router.tell(signal.SIGINT)
        await until(lambda: "waiting for 1 request, at most 30 s; Ctrl-C again ends now" in router.output)
        router.tell(signal.SIGINT)
        code, _, _ = await router.stop()
        answer = await request

    assert (code, answer.status_code) == (0, 503)


async def test_a_catalogue_that_is_edited_is_read_again_and_told(tmp_path: Path, start_engine: Start) -> None:
    engine = await start_engine()
    async with command(tmp_path, engine) as router:
        await ready(router.client)
        catalogue_of(tmp_path, engine, aliases=["n"])
        router.process.send_signal(signal.SIGHUP)
        await until(lambda: "reloaded" in router.output and "changed" in router.output)
        answer = await router.client.post("/v1/chat/completions", json=CHAT | {"model": "n"})
        _, out, _ = await router.stop()

    assert answer.status_code == 200
    told = next(line for line in log_of(out) if line["event"] == "the static catalogue was reloaded")
    assert (told["models"], told["changed"]) == (1, ["m"])


@pytest.mark.parametrize(("environ", "coloured"), [({}, True), ({"NO_COLOR": "1"}, False), ({"TERM": "dumb"}, False)])
async def test_a_terminal_has_colours_unless_it_wants_none(
    tmp_path: Path, start_engine: Start, environ: dict[str, str], coloured: bool
) -> None:
    ours, theirs = os.openpty()
    try:
        environ = {"NO_COLOR": "", "TERM": "xterm"} | environ
        async with command(tmp_path, await start_engine(), environ=environ, stdout=theirs) as router:
            await ready(router.client)
            await router.client.get("/nope")
            await router.stop()
        told = os.read(ours, 65536).decode()
    finally:
        os.close(ours)
        os.close(theirs)

    assert "serving address=" in told
    assert ("\x1b[33m404\x1b[0m" in told, "\x1b" in told) == (coloured, coloured)


@pytest.mark.parametrize(("level", "statuses"), [("info", [404, 503]), ("warning", [503]), ("error", [])])
async def test_a_request_that_was_not_served_is_logged_at_the_level_warning(
    tmp_path: Path, level: str, statuses: list[int]
) -> None:
    async with command(tmp_path, log_level=level) as router:
        await ready(router.client, "/healthz")
        await router.client.get("/nope")
        await router.client.post("/v1/chat/completions", json=CHAT)
        _, out, _ = await router.stop()

    assert [line["status"] for line in log_of(out) if line["event"] == "request"] == statuses
