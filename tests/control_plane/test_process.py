"""`control-plane serve` and `migrate` as processes: how they start, refuse to, and end."""

import asyncio
import signal
import sys
from pathlib import Path

import pytest

from tests.control_plane.conftest import SERVICE_TOKEN
from tests.control_plane.processes import environment, run, served
from tests.fakes import until
from tests.ports import free_port
from tests.postgresql import PostgreSQL

# Several processes start at once on a machine that may be busy.
pytestmark = [pytest.mark.anyio, pytest.mark.timeout(240)]
BEARER = {"authorization": f"Bearer {SERVICE_TOKEN}"}


async def test_it_serves_and_ends_with_a_poll_open(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/cp.sqlite3"
    async with served(tmp_path, url, service_token=SERVICE_TOKEN) as plane:
        etag = (await plane.client.get("/overrides", headers=BEARER)).headers["etag"]
        headers = BEARER | {"if-none-match": etag, "prefer": "wait=30"}
        waiting = asyncio.create_task(plane.client.get("/overrides", headers=headers))
        # Another request of the same connection pool is answered meanwhile.
        assert (await plane.client.get("/healthz")).status_code == 200

        code = await plane.stop()
        answer = await waiting

    assert code == 0
    assert answer.status_code == 304
    assert SERVICE_TOKEN not in plane.output


async def test_the_machine_side_has_a_port_of_its_own(tmp_path: Path) -> None:
    api_port = free_port()
    url = f"sqlite:///{tmp_path}/cp.sqlite3"
    async with served(tmp_path, url, "--api-port", str(api_port)) as plane:
        there = await plane.client.get("/api/v1/models")
        here = await plane.client.get(f"http://127.0.0.1:{api_port}/api/v1/models")
        models = await plane.client.get(f"http://127.0.0.1:{api_port}/models")

    assert [there.status_code, here.status_code, models.status_code] == [404, 401, 404]
    assert there.json()["error"]["code"] == "unknown_url"


async def test_a_second_one_on_the_same_file_is_refused(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/cp.sqlite3"
    async with served(tmp_path, url):
        code, _, err = await run("serve", database_url=url, port="0")

    assert code == 2
    assert "in use by another control plane" in err


async def test_pods_that_migrate_at_once_are_one(server: PostgreSQL) -> None:
    url = server.url(server.create())

    ran = await asyncio.gather(*(run("migrate", database_url=url) for _ in range(3)))
    check = await run("migrate", "--check", database_url=url)

    assert [code for code, _, _ in ran] == [0, 0, 0]
    assert check == (0, "main: is up to date\nusage: is up to date\n", "")


async def test_a_schema_that_is_behind_is_refused_on_postgresql(server: PostgreSQL) -> None:
    url = server.url(server.create())

    code, _, err = await run("serve", database_url=url, port="0")
    check, out, _ = await run("migrate", "--check", database_url=url)

    assert code == 2
    assert err.startswith("control-plane: CONTROL_PLANE_DATABASE_URL: the schema of main is empty")
    assert "run `control-plane migrate`" in err
    assert check == 1
    assert out.startswith("main: empty -> ")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_it_ends_in_the_middle_of_queries(tmp_path: Path, number: int) -> None:
    url = f"sqlite:///{tmp_path}/cp.sqlite3"
    async with served(tmp_path, url, service_token=SERVICE_TOKEN) as plane:
        body = {"router": "r1", "reason": "hold", "waiting": 1}
        asked = [asyncio.create_task(plane.client.post("/activations/x", json=body, headers=BEARER)) for _ in range(50)]
        await until(lambda: any(task.done() for task in asked))

        assert await plane.stop(number) == 0
        await asyncio.gather(*asked, return_exceptions=True)


@pytest.mark.parametrize(
    ("module", "extra", "command"),
    [
        ("asyncpg", "postgres", ["migrate"]),
        ("asyncpg", "postgres", ["migrate", "--check"]),
        ("asyncpg", "postgres", ["serve", "--port", "0"]),
        ("sqlalchemy", "control-plane", ["--version"]),
    ],
)
async def test_an_extra_that_is_missing_is_named(module: str, extra: str, command: list[str]) -> None:
    missing = f"import sys; sys.modules[{module!r}] = None; from control_plane.__main__ import main; sys.exit(main())"
    variables = {"CONTROL_PLANE_DATABASE_URL": "postgresql://tests@127.0.0.1:1/nowhere"}
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", missing, *command), env=environment(variables), stderr=asyncio.subprocess.PIPE
    )
    _, err = await process.communicate()

    assert process.returncode == 2
    assert err.decode().splitlines()[-1].endswith(f"pip install 'inference-api[{extra}]'")
    assert b"Traceback" not in err


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prot": "1"}, "CONTROL_PLANE_PROT: there is no such setting; did you mean CONTROL_PLANE_PORT?"),
        ({"port": "x"}, "CONTROL_PLANE_PORT='x': "),
        ({"service_token": "short"}, "CONTROL_PLANE_SERVICE_TOKEN='***': must be one word of at least 32"),
        ({"database_url": "mysql://me:secret@h/x"}, "CONTROL_PLANE_DATABASE_URL='mysql://***@h/x': must be sqlite"),
        ({"password_login": "off"}, "CONTROL_PLANE_PASSWORD_LOGIN='off': needs CONTROL_PLANE_OIDC_ISSUER"),
        ({"migrate": "maybe"}, "CONTROL_PLANE_MIGRATE='maybe': must be one of auto, check"),
        ({"currency": "eur"}, "CONTROL_PLANE_CURRENCY='eur': "),
        ({"database_url": "sqlite:////nowhere/x.sqlite3"}, "cannot be locked through '/nowhere/x.sqlite3.lock'"),
        ({"public_url": "console.example.org"}, "CONTROL_PLANE_PUBLIC_URL='console.example.org': must be an http://"),
    ],
)
async def test_a_wrong_setting_is_named(settings: dict[str, str], message: str, tmp_path: Path) -> None:
    code, out, err = await run("serve", **{"port": "0", "database_url": f"sqlite:///{tmp_path}/x.sqlite3", **settings})

    assert code == 2
    assert err.startswith("control-plane: ")
    assert message in err
    assert "secret" not in out + err


async def test_a_command_makes_the_first_admin_and_another_password(tmp_path: Path) -> None:
    url, file = f"sqlite:///{tmp_path}/cp.sqlite3", tmp_path / "password"
    file.write_text("a long enough password\n")
    email = ("bootstrap", "--email", "root@example.org")
    by_file = await run(*email, "--password-file", str(file), database_url=url)
    again = await run(*email, database_url=url)
    async with served(tmp_path, url) as plane:
        reset = await run(*email, "--reset", database_url=url, public_url=plane.url)
        body = {"email": "root@example.org", "password": "a long enough password"}
        login = await plane.client.post("/api/v1/session", json=body, headers={"sec-fetch-site": "same-origin"})
        page = await plane.client.get(reset[1].strip())
        assert "first admin" not in plane.output

    assert by_file == (0, "root@example.org is a platform admin and can log in\n", "")
    assert again[0] == 1
    assert "--reset gives another password" in again[2]
    assert reset[1].startswith(f"{plane.url}/console/setup?token=")
    assert login.json()["platform_role"] == "admin"
    assert 'value="root@example.org"' in page.text


async def test_a_command_prints_urls_that_log_in(tmp_path: Path) -> None:
    url, file = f"sqlite:///{tmp_path}/cp.sqlite3", tmp_path / "password"
    file.write_text("a long enough password\n")
    await run("bootstrap", "--email", "root@example.org", "--password-file", str(file), database_url=url)
    async with served(tmp_path, url) as plane:
        made = await run("users", "login-link", "root", database_url=url, public_url=plane.url)
        unknown = await run("users", "login-link", "root", "nobody", database_url=url, public_url=plane.url)
        other = await run("users", "login-link", "root", database_url=url, public_url=plane.url)
        page = await plane.client.get(other[1].strip())
        pressed = await plane.client.post(other[1].strip(), headers={"sec-fetch-site": "same-origin"})
        me = await plane.client.get("/api/v1/me")

    assert (made[0], made[2]) == (0, "")
    assert made[1].startswith(f"{plane.url}/console/login?token=")
    assert unknown[:2] == (1, "")
    assert unknown[2] == "control-plane: no link: root, nobody must be users who may log in\n"
    assert "Sign in as root" in page.text
    assert (pressed.status_code, me.json()["platform_role"]) == (303, "admin")


async def test_a_first_password_that_is_weak_ends_the_start(tmp_path: Path) -> None:
    file = tmp_path / "password"
    file.write_text("password1234\n")
    settings = {"admin_email": "root@example.org", "admin_password_file": str(file)}

    code, _, err = await run("serve", database_url=f"sqlite:///{tmp_path}/cp.sqlite3", port="0", **settings)

    assert code == 2
    assert err == (
        "control-plane: CONTROL_PLANE_ADMIN_EMAIL='root@example.org': "
        "the password is one of those that are tried first; choose another\n"
    )
