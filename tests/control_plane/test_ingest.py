"""POST /usage: each id is stored once, one bad record is refused alone, what is acknowledged is there."""

import gzip
import json
import zlib
from typing import Any

import pytest

from control_plane.data.partitions import listed
from control_plane.http.ingest import decompress
from tests.control_plane.conftest import NOON, Running
from tests.control_plane.usage import DAY, record, rows, send, taken

pytestmark = pytest.mark.anyio


async def test_a_record_is_stored_with_every_field(plane: Running) -> None:
    tried = [
        {"backend": "10.0.0.11:8000", "outcome": "connect_failed", "status": 0, "start_ms": 0.4, "duration_ms": 1.1},
        {"backend": "10.0.0.12:8000", "outcome": "ok", "status": 200, "start_ms": 1.6, "duration_ms": 2310.2},
    ]
    sent = record(
        key_id="k3v9Qm2XbT7a", organisation="team-a", user="ana", end_user="24d4b96f58da6d4a", variant="llama-3-8b",
        cache="miss", prompt="support@2", votes="2/3", reasoning_tokens=7, queued_ms=1.5, attempt_details=tried,
    )  # fmt: skip

    assert await taken(plane, sent) == {"accepted": 1, "duplicates": 0, "refused": []}

    (row,) = await rows(plane)
    assert {name: row._mapping[name] for name in sent} == sent
    assert (row.received_at, row.key_name) == (NOON, None)


async def test_an_id_is_stored_once_whatever_its_time_is(plane: Running) -> None:
    first = record()
    other_day = {**first, "at": NOON - DAY}

    answers = [await taken(plane, first, first, other_day), await taken(plane, other_day), await taken(plane, first)]

    assert [(answer["accepted"], answer["duplicates"]) for answer in answers] == [(1, 2), (0, 1), (0, 1)]
    assert [row.at for row in await rows(plane)] == [first["at"]]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"kind": "other"}, "kind: "),
        ({"at": "now"}, "at: "),
        ({"at": True}, "at: "),
        ({"id": "short"}, "id: "),
        ({"status": 600}, "status: "),
        ({"input_tokens": -1}, "input_tokens: "),
        ({"input_tokens": 2**60}, "input_tokens: "),
        ({"model": "a\x00b"}, "model: must have printable characters only"),
        ({"attempt_details": [{}]}, "attempt_details.0.backend: "),
        ({"latency_ms": None}, "latency_ms: "),
    ],
)
async def test_a_bad_record_is_refused_alone(sqlite_plane: Running, changes: dict[str, Any], reason: str) -> None:
    good, bad = record(), record(**changes)

    answer = await taken(sqlite_plane, bad, good, 5)

    assert answer["accepted"] == 1
    first, second = answer["refused"]
    assert (first["index"], first["id"], first["code"]) == (0, bad["id"], "validation_error")
    assert first["message"].startswith(reason)
    assert second == {"index": 2, "id": None, "code": "validation_error", "message": "a record must be an object"}


async def test_a_missing_field_is_refused_and_an_unknown_one_ignored(sqlite_plane: Running) -> None:
    missing = record()
    del missing["variant"]

    answer = await taken(sqlite_plane, missing, record(invented={"a": 1}))

    assert (answer["accepted"], answer["refused"][0]["message"]) == (1, "variant: field required")


@pytest.mark.parametrize(
    ("offset", "message"),
    [
        (-9 * DAY, "at is 9 days in the past; records of -7 days to +5 minutes are taken"),
        (-7 * DAY - 1, "at is 7 days in the past; records of -7 days to +5 minutes are taken"),
        (300_001, "at is 5 minutes in the future; records of -7 days to +5 minutes are taken"),
        (3_600_000, "at is 1 hour in the future; records of -7 days to +5 minutes are taken"),
        (-7 * DAY, None),
        (300_000, None),
    ],
)
async def test_a_clock_that_is_off_is_refused(sqlite_plane: Running, offset: int, message: str | None) -> None:
    sent = record(at=NOON + offset)

    answer = await taken(sqlite_plane, sent)

    expected = {"index": 0, "id": sent["id"], "code": "clock_skew", "message": message}
    assert answer["refused"] == ([] if message is None else [expected])
    assert answer["accepted"] == (1 if message is None else 0)


async def test_gzip_is_read_and_a_bomb_is_not(sqlite_plane: Running) -> None:
    headers = {"content-encoding": "gzip", "content-type": "application/json"}
    body = gzip.compress(json.dumps({"records": [record()]}).encode())
    bomb = gzip.compress(b"[" * 200 * 1024 * 1024)

    answers = [
        await sqlite_plane.router.post("/usage", content=content, headers=headers)
        for content in (body, bomb, b"no gzip", body[:-9], gzip.compress(b"{"))
    ]

    assert [answer.status_code for answer in answers] == [200, 413, 400, 400, 400]
    assert answers[1].json()["error"]["code"] == "request_too_large"
    assert answers[2].json()["error"]["code"] == "invalid_json"


def test_gzip_data_of_several_members_is_read() -> None:
    assert decompress(gzip.compress(b"ab") + gzip.compress(b"cd"), 4) == b"abcd"


async def test_what_is_no_batch_is_refused(sqlite_plane: Running) -> None:
    async def post(content: bytes, **headers: str) -> tuple[int, str]:
        given = {"content-type": "application/json", **headers}
        answer = await sqlite_plane.router.post("/usage", content=content, headers=given)
        return answer.status_code, answer.json()["error"]["code"]

    zipped = zlib.compress(b"{}")
    assert await post(b"{") == (400, "invalid_json")
    assert await post(b"[]") == (422, "validation_error")
    assert await post(b'{"records": {}}') == (422, "validation_error")
    assert await post(b'{"records": []}') == (422, "validation_error")
    assert await post(json.dumps({"records": [0] * 1001}).encode()) == (422, "validation_error")
    assert await post(b" " * (1024 * 1024 + 1)) == (413, "request_too_large")
    assert await post(zipped, **{"content-encoding": "deflate"}) == (415, "unsupported_media_type")
    assert await post(b"{}", **{"content-type": "text/plain"}) == (415, "unsupported_media_type")


async def test_only_a_service_token_may_send(sqlite_plane: Running) -> None:
    body = {"records": [record()]}

    nobody = await sqlite_plane.client.post("/usage", json=body)
    manager = await sqlite_plane.admin.post("/usage", json=body)

    assert [nobody.status_code, manager.status_code] == [401, 401]
    assert nobody.json()["error"]["code"] == "invalid_api_key"


async def test_the_price_is_that_of_the_time_of_the_record(plane: Running) -> None:
    await plane.admin.post(
        "/api/v1/prices", json={"model": "llama-3-8b", "input": 0.2, "cached_input": 0.02, "output": 0.6}
    )
    plane.clock.advance(3600)
    await plane.admin.post("/api/v1/prices", json={"model": "llama-3-8b", "input": 1, "output": 2, "request": 0.5})
    wanted = {
        "a0000000": record(cost_nanos=None, at=NOON + 1000),
        "b0000000": record(cost_nanos=None, at=NOON + 3600_000),
        "c0000000": record(cost_nanos=None, at=NOON - 1),
        "d0000000": record(cost_nanos=None, at=NOON + 1000, output_tokens=None),
        "e0000000": record(cost_nanos=None, at=NOON + 1000, kind="shadow"),
        "f0000000": record(cost_nanos=5, at=NOON + 1000),
    }

    await taken(plane, *({**one, "id": id} for id, one in wanted.items()))

    assert [row.cost_nanos for row in await rows(plane)] == [142240, 501_052_000, None, None, None, 5]


async def test_back_pressure_is_a_refusal_at_once(sqlite_plane: Running) -> None:
    sqlite_plane.plane.usage.working = 8

    answer = await send(sqlite_plane, record())

    assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
    assert answer.json()["error"]["code"] == "storage_unavailable"


async def test_the_metrics_count_records(sqlite_plane: Running) -> None:
    one = record()
    await send(sqlite_plane, one, one, {})

    page = (await sqlite_plane.client.get("/metrics")).text

    for result in ("accepted", "duplicate", "refused"):
        assert f'control_plane_usage_records_total{{result="{result}"}} 1.0' in page


async def test_days_have_partitions(plane: Running) -> None:
    await taken(plane, record(), record(at=NOON - 2 * DAY))

    if plane.plane.database.dialect == "postgresql":
        async with plane.plane.database.usage.read() as connection:
            found = {name for name, _ in await listed(connection)}
        assert {"usage_20261128", "usage_20261126"} <= found
