"""What a database cannot store, or reports: one value is refused, nothing of it is in the log."""

import logging
from typing import Any

import pytest
from sqlalchemy import insert, text
from sqlalchemy.exc import DBAPIError, IntegrityError

from control_plane.data.tables import organisations
from tests.control_plane.conftest import NOON, Running
from tests.control_plane.test_fleet import backend, report

pytestmark = pytest.mark.anyio


def a_record(**changes: Any) -> dict[str, Any]:
    return {
        "id": "9f3c5a1e77b04d21-1", "kind": "request", "at": NOON, "router": "r1", "request_id": "q", "key_id": None,
        "organisation": None, "user": None, "end_user": None, "asked_model": "m", "model": "m", "backend": None,
        "route": "chat_completions", "stream": False, "status": 200, "outcome": "ok", "code": None, "attempts": 1,
        "fallback": False, "variant": None, "cache": None, "prompt": None, "votes": None, "input_tokens": 1,
        "cached_input_tokens": None, "output_tokens": 1, "reasoning_tokens": None, "usage_source": "reported",
        "latency_ms": 1.0, "ttft_ms": None, "queued_ms": 0, "bytes": 1, "cost_nanos": None, **changes,
    }  # fmt: skip


@pytest.mark.parametrize(
    "change",
    [
        {"asked_model": "a\0b"},
        {"backend": "a\0b"},
        {"input_tokens": 2**63},
        {"attempt_details": [{"backend": "\0", "outcome": "ok", "status": 0, "start_ms": 0, "duration_ms": 0}]},
    ],
)
async def test_a_record_that_cannot_be_stored_is_refused_alone(plane: Running, change: dict[str, Any]) -> None:
    good, bad = a_record(), a_record(id="9f3c5a1e77b04d21-2", **change)

    answer = await plane.router.post("/usage", json={"records": [good, bad]})

    assert answer.status_code == 200, answer.text
    assert answer.json()["accepted"] == 1
    assert [(one["index"], one["code"]) for one in answer.json()["refused"]] == [(1, "validation_error")]


async def test_a_report_with_any_text_is_stored(plane: Running) -> None:
    body = report(backend(state="open", reason="a\0b \U0001f600", circuit="open"))

    answer = await plane.router.put("/routers/r-1", json=body)

    assert answer.status_code == 200, answer.text
    shown = (await plane.admin.get("/api/v1/routers")).json()["data"][0]
    assert shown["backends"][0]["reason"] == "a?b \U0001f600"


@pytest.mark.parametrize("path", ["/routers/r%00", "/activations/m%00", "/models/m%00", "/api/v1/models/m%00"])
async def test_a_url_with_nul_is_refused(plane: Running, path: str) -> None:
    method = "PUT" if "routers" in path else "POST" if "activations" in path else "GET"

    answer = await plane.router.request(method, path, json=report() if method == "PUT" else {"router": "r-1"})

    assert answer.status_code in (400, 401, 404, 422), answer.text


async def test_values_are_not_in_errors(plane: Running, caplog: pytest.LogCaptureFixture) -> None:
    secret = "title-that-nobody-must-see"
    statement = insert(organisations).values(name="x", title=secret, limits=[], disabled=False, created_at=1)

    async def twice() -> None:
        async with plane.plane.database.main.write() as connection:
            await connection.execute(statement)
            await connection.execute(statement)

    with pytest.raises(IntegrityError) as caught:
        await twice()

    assert secret not in str(caught.value)
    assert secret not in caplog.text


async def test_a_statement_that_is_wrong_is_no_outage(plane: Running, caplog: pytest.LogCaptureFixture) -> None:
    if plane.plane.database.dialect == "sqlite":
        pytest.skip("SQLite reports it as it does a failing disk")

    async def ask() -> None:
        async with plane.plane.database.main.read() as connection:
            await connection.execute(text("SELECT x FROM nowhere"))

    with caplog.at_level(logging.ERROR), pytest.raises(DBAPIError):
        await ask()

    assert "the database failed" not in caplog.text
