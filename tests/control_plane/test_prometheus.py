"""A Prometheus that is not as it should be: each fault is a sentence with what to do, and without an address."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from control_plane.clients.prometheus import Prometheus, PrometheusFailed
from control_plane.data.database import Database, parse_url
from tests.control_plane.conftest import NOON, Running, management_token
from tests.control_plane.processes import served
from tests.fakes import FakeEngine, Line, Received, ScriptedServer, hang, json_response, raw, until
from tests.ports import free_port

pytestmark = pytest.mark.anyio
Start = Callable[..., Any]


async def refused(start_sqlite: Start, script: Any, **settings: Any) -> tuple[int, dict[str, Any], list[Received]]:
    """What a caller is told, and what was asked."""
    got: list[Received] = []

    async def noted(request: Received, line: Line) -> None:
        got.append(request)
        await script(request, line)

    async with ScriptedServer(noted) as server:
        plane = await start_sqlite(prometheus_url=server.url, **settings)
        answer = await plane.admin.get("/api/v1/metrics/in_flight")
    assert "127.0.0.1" not in answer.text
    return answer.status_code, answer.json().get("error", answer.json()), got


async def test_without_one_it_says_which_setting_gives_it(sqlite_plane: Running) -> None:
    answer = await sqlite_plane.admin.get("/api/v1/metrics/in_flight")

    assert (answer.status_code, answer.json()["error"]["code"]) == (409, "metrics_not_configured")
    assert "CONTROL_PLANE_PROMETHEUS_URL" in answer.json()["error"]["message"]
    assert (await sqlite_plane.admin.get("/api/v1/metrics")).status_code == 200


@pytest.mark.parametrize(
    ("script", "status", "code", "words"),
    [
        (raw(json_response({}, "401 Unauthorized")), 502, "prometheus_failed", "CONTROL_PLANE_PROMETHEUS_TOKEN"),
        (raw(json_response({}, "403 Forbidden")), 502, "prometheus_failed", "CONTROL_PLANE_PROMETHEUS_TOKEN"),
        (raw(json_response({"errorType": "execution"}, "422 No")), 502, "prometheus_failed", "422 (execution)"),
        (raw(json_response({"errorType": "http://127.0.0.1"}, "503 No")), 503, "prometheus_away", "answers 503."),
        (raw(json_response({"status": "success"})), 502, "prometheus_failed", "CONTROL_PLANE_PROMETHEUS_URL"),
        (raw(json_response([1])), 502, "prometheus_failed", "CONTROL_PLANE_PROMETHEUS_URL"),
        (raw(b"HTTP/1.1 200 OK\r\ncontent-length: 6\r\n\r\n<html>"), 502, "prometheus_failed", "does not speak"),
        (raw(b"\x16\x03\x01\r\n\r\n", close=True), 503, "prometheus_away", "cannot be reached"),
    ],
    ids=["401", "403", "422", "503", "empty", "list", "HTML", "TLS"],
)
async def test_what_is_wrong_with_it_is_said(
    start_sqlite: Start, script: Any, status: int, code: str, words: str
) -> None:
    found, error, _ = await refused(start_sqlite, script)

    assert (found, error["code"]) == (status, code)
    assert words in error["message"]


async def test_one_that_is_away_or_slow_may_come_back(start_sqlite: Start) -> None:
    gone = await start_sqlite(prometheus_url=f"http://127.0.0.1:{free_port()}")
    answer = await gone.admin.get("/api/v1/metrics/in_flight")
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "prometheus_away")
    assert answer.headers["retry-after"] == "15"

    asked = []

    async def silent(request: Received, line: Line) -> None:
        asked.append(request)
        await hang(request, line)

    async with ScriptedServer(silent) as server:
        client = Prometheus(server.url, timeout=0.2)
        with pytest.raises(PrometheusFailed, match="not answered within"):
            await client.at("up", NOON)
        await client.close()
    assert len(asked) == 1


async def test_the_token_goes_there_alone(start_sqlite: Start) -> None:
    elsewhere: list[Received] = []

    async def other(request: Received, line: Line) -> None:
        elsewhere.append(request)
        await line.send(json_response({}))

    async with ScriptedServer(other) as server:
        moved = raw(f"HTTP/1.1 307 Moved\r\nlocation: {server.url}\r\ncontent-length: 0\r\n\r\n".encode())
        status, error, got = await refused(start_sqlite, moved, prometheus_token="secret-token")

    assert (status, error["code"]) == (502, "prometheus_failed")
    assert [one.header("authorization") for one in got] == ["Bearer secret-token"]
    assert [(one.method, one.target) for one in got] == [("POST", "/api/v1/query_range")]
    assert elsewhere == []


def matrix(count: int, **more: Any) -> dict[str, Any]:
    values = [[NOON / 1000, "1"], [NOON / 1000 - 15, "+Inf"], [NOON / 1000 - 30, "NaN"]]
    result = [{"metric": {"model_name": f"m{place}"}, "values": values} for place in range(count)]
    return {"status": "success", "data": {"resultType": "matrix", "result": result}, **more}


async def test_of_many_series_the_first_fifty_are_shown(start_sqlite: Start) -> None:
    status, found, _ = await refused(start_sqlite, raw(json_response(matrix(1200, warnings=["a store is away"]))))

    assert status == 200
    assert len(found["series"]) == 50
    assert [value for _, value in found["series"][0]["points"]][-3:] == [None, None, 1]
    assert found["warnings"][0] == "a store is away"
    assert "1200 series" in found["warnings"][1]


async def test_an_answer_beyond_all_bounds_is_not_read(start_sqlite: Start) -> None:
    whole = raw(json_response(matrix(60_000)))
    status, error, _ = await refused(start_sqlite, whole)

    assert (status, error["code"]) == (502, "prometheus_failed")
    assert "4 MiB" in error["message"]


async def test_many_who_look_at_once_cost_one_question(start_sqlite: Start) -> None:
    got: list[Received] = []
    go_on = asyncio.Event()

    async def late(request: Received, line: Line) -> None:
        got.append(request)
        await go_on.wait()
        await line.send(json_response(matrix(1)))

    async with ScriptedServer(late) as server:
        plane = await start_sqlite(prometheus_url=server.url)
        several = [asyncio.create_task(plane.admin.get("/api/v1/metrics/in_flight")) for _ in range(5)]
        await until(lambda: got)
        go_on.set()
        answers: list[httpx.Response] = await asyncio.gather(*several)
        plane.clock.advance(14)
        # Of a time that is round: the same one.
        answers.append(await plane.admin.get("/api/v1/metrics/in_flight"))
        assert [answer.status_code for answer in answers] == [200] * 6
        assert len(got) == 1
        plane.clock.advance(1)
        await plane.admin.get("/api/v1/metrics/in_flight")
        assert len(got) == 2


async def test_it_is_trusted_as_routers_trust_their_backends(
    tmp_path: Path, sqlite_url: str, certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    database = Database(parse_url(sqlite_url))
    token = await management_token(database, "ana", "admin")
    await database.close()
    nothing = {"status": "success", "data": {"resultType": "vector", "result": []}}
    codes = []
    async with FakeEngine(raw(json_response(nothing)), certificate=certificate) as engine:
        for trusted in (None, certificate.with_name("cert.pem")):
            if trusted is not None:
                monkeypatch.setenv("SSL_CERT_FILE", str(trusted))
            async with served(tmp_path, sqlite_url, prometheus_url=engine.url) as running:
                headers = {"authorization": f"Bearer {token}"}
                codes.append((await running.client.get("/api/v1/metrics/in_flight", headers=headers)).status_code)

    assert codes == [503, 200]
