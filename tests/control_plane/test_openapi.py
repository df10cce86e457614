"""The OpenAPI document and its page; what it says is what happens, by schemathesis and by a client made from it."""

import asyncio
import base64
import hashlib
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from control_plane.http.api.access import ROUTES
from tests.control_plane.conftest import Running, management_token

pytestmark = pytest.mark.anyio
BIN = Path(sys.executable).parent
OPENAPI = "/api/v1/openapi.json"


async def document(plane: Running) -> dict[str, Any]:
    answer = await plane.client.get(OPENAPI)
    assert answer.status_code == 200
    found: dict[str, Any] = answer.json()
    return found


async def test_every_operation_is_described_with_examples(sqlite_plane: Running) -> None:
    found = await document(sqlite_plane)
    assert found["openapi"].startswith("3.1")
    assert set(found["components"]["securitySchemes"]) == {"bearer", "session"}
    for path, operations in found["paths"].items():
        for method, operation in operations.items():
            assert operation["summary"], path
            assert operation["description"].rstrip("`.").endswith(("everyone", "in", *ROUTES.values())), path
            assert {"400", "422", "503"} <= set(operation["responses"])
            bodies = [operation["requestBody"]] if "requestBody" in operation else []
            good = [answer for status, answer in operation["responses"].items() if status < "300"]
            for one in (*bodies, *good):
                for kind, content in one.get("content", {}).items():
                    assert "example" in content or kind != "application/json", (method, path)
    missing = [name for name in re.findall(r'"#/components/schemas/([^"]+)"', json.dumps(found))
               if name not in found["components"]["schemas"]]  # fmt: skip
    assert missing == []


async def test_every_route_is_in_the_table_and_in_the_document(sqlite_plane: Running) -> None:
    found = await document(sqlite_plane)
    listed = {(method.upper(), path) for path, operations in found["paths"].items() for method in operations}

    assert listed == {(method, path.replace(":path}", "}")) for method, path in ROUTES}


async def test_the_page_asks_nobody_else(sqlite_plane: Running) -> None:
    page = await sqlite_plane.client.get("/api/v1/docs")

    assert page.headers["content-type"].startswith("text/html")
    assert "/keys/{id}/rotate" in page.text
    # The URLs in it are text of examples.
    style = re.findall("<style>(.*?)</style>", page.text)[0]
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    policy = page.headers["content-security-policy"].split("; ")
    assert {"default-src 'none'", f"style-src 'sha256-{digest}'", "frame-ancestors 'none'"} <= set(policy)
    assert "style=" not in page.text
    assert re.findall(r"<(script|link|img|iframe)|(?:src|href)=.?https?:|@import|url\(", page.text) == []


async def run(*command: str, cwd: Path) -> tuple[int, str]:
    process = await asyncio.create_subprocess_exec(
        *command,
        cwd=cwd,
        env={**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}", "NO_COLOR": "1"},
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        async with asyncio.timeout(300):
            output, _ = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode is not None
    return process.returncode, output.decode(errors="replace")


@pytest.mark.timeout(330)
async def test_nothing_else_happens_than_what_it_says(sqlite_plane: Running, tmp_path: Path) -> None:
    token = await management_token(sqlite_plane.plane.database, "tester", "admin")
    code, output = await run(
        str(BIN / "schemathesis"),
        "run",
        f"{sqlite_plane.url}{OPENAPI}",
        f"--header=Authorization: Bearer {token}",
        "--checks=not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance",
        "--phases=examples,fuzzing",
        "--max-examples=4",
        "--seed=1",
        "--generation-database=none",
        "--max-failures=20",
        cwd=tmp_path,
    )

    assert code == 0, output[-8000:]


CALLS = """
import sys
from client import AuthenticatedClient
from client.api.keys import create_key_keys_post as create, list_keys_keys_get as listing
from client.api.keys import end_key_keys_id_delete as end
from client.models import KeyBody

with AuthenticatedClient(base_url=sys.argv[1], token=sys.argv[2], raise_on_unexpected_status=True) as client:
    made = create.sync_detailed(client=client, body=KeyBody(name="generated"))
    assert made.parsed.key.startswith("sk-ia-"), made
    names = [key.name for key in listing.sync(client=client).data]
    assert names == ["generated"], names
    ended = end.sync_detailed(made.parsed.id, client=client, if_match=made.headers["etag"])
    assert ended.status_code == 204, ended
    assert listing.sync(client=client).data[0].state == "ended"
"""


async def test_a_client_that_is_made_from_it_works(sqlite_plane: Running, tmp_path: Path) -> None:
    file = tmp_path / "openapi.json"
    file.write_text(json.dumps(await document(sqlite_plane)))
    options = ("--path", str(file), "--output-path", str(tmp_path / "client"), "--meta", "none")
    code, output = await run(str(BIN / "openapi-python-client"), "generate", *options, cwd=tmp_path)
    assert code == 0, output
    assert "Warning" not in output, output
    (tmp_path / "calls.py").write_text(CALLS)
    token = await management_token(sqlite_plane.plane.database, "tester", "admin")
    code, output = await run(sys.executable, "calls.py", f"{sqlite_plane.url}/api/v1", token, cwd=tmp_path)

    assert code == 0, output
