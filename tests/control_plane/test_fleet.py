"""Reports of routers, the backends that follow from them, and overrides of those."""

from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Text, cast, delete, insert, select

from control_plane.data.tables import memberships, organisations, routers
from control_plane.services import reports as reporting
from tests.control_plane.conftest import NOON, Running, management_token

pytestmark = pytest.mark.anyio
SCHEMAS = Path(__file__).parents[1] / "policy"


def report(*backends: dict[str, Any], overrides: tuple[str, ...] = (), **more: Any) -> dict[str, Any]:
    return {
        "boot": "9f3c5a1e77b04d21",
        "version": "0.9.0",
        "started_at": NOON - 60_000,
        "at": NOON,
        "draining": False,
        "in_flight": 1,
        "lag_ms": 2.1,
        "currency": "USD",
        "usage": {"made": 10, "delivered": 9, "queued": 1, "spooled": 0, "dropped": 0},
        "etags": {"models": None, "policy": None, "overrides": None, "spend": None},
        "overrides": list(overrides),
        "models": [{"name": "m", "in_flight": 1, "queued": 0, "requests": 10, "errors": 0}],
        "backends": list(backends),
        **more,
    }


def backend(label: str = "10.0.0.1:8000", state: str = "ready", model: str = "m", **more: Any) -> dict[str, Any]:
    row: dict[str, Any] = {"model": model, "backend": label, "state": state, "in_flight": 1}
    if state != "ready":
        row |= {"circuit": "open" if state == "open" else "closed", "reason": "connect_failed", "since": NOON}
    return row | more


async def reports(plane: Running, **routers: dict[str, Any]) -> None:
    for name, body in routers.items():
        answer = await plane.router.put(f"/routers/{name}", json=body)
        assert answer.status_code == 200, answer.text


async def test_the_answer_to_a_report_has_the_etags_of_the_documents(plane: Running) -> None:
    answer = await plane.router.put("/routers/router-1-8000", json=report())

    etag = (await plane.client.get("/models")).headers["etag"]
    assert answer.json()["etags"]["models"] == etag
    assert set(answer.json()["etags"]) == {"models", "policy", "overrides"}


@pytest.mark.parametrize(
    ("change", "status", "param"),
    [
        ({"boot": "x"}, 422, "boot"),
        ({"backends": [{"model": "m"}]}, 422, "backends.0.backend"),
        ({"overrides": ["x"]}, 422, "overrides.0"),
        ({"new": 1}, 200, None),
    ],
)
async def test_a_report_that_is_not_valid_names_the_value(
    sqlite_plane: Running, change: dict[str, Any], status: int, param: str | None
) -> None:
    answer = await sqlite_plane.router.put("/routers/r-1", json=report(**change))

    assert answer.status_code == status
    assert answer.json().get("error", {}).get("param") == param


async def test_a_report_needs_a_service_token(sqlite_plane: Running) -> None:
    without = await sqlite_plane.client.put("/routers/r-1", json=report())
    management = await sqlite_plane.admin.put("/routers/r-1", json=report())

    assert [without.status_code, management.status_code] == [401, 401]


async def test_the_worst_state_over_the_routers_counts(plane: Running) -> None:
    await reports(
        plane, r1=report(backend()), r2=report(backend(state="open")), r3=report(backend(), backend("10.0.0.2:8000"))
    )

    first, second = (await plane.admin.get("/api/v1/backends")).json()["data"]

    assert [first["state"], first["agree"], first["in_flight"]] == ["open", "1/3", 3]
    assert [row["router"] for row in first["routers"]] == ["r1", "r2", "r3"]
    assert [second["state"], second["agree"]] == ["ready", "1/1"]


async def test_a_router_is_lost_after_three_intervals(plane: Running) -> None:
    await reports(plane, r1=report(backend()))
    plane.clock.advance(10)
    await reports(plane, r1=report(backend()))
    plane.clock.advance(29)
    before = (await plane.admin.get("/api/v1/routers")).json()["data"]
    plane.clock.advance(2)
    after = (await plane.admin.get("/api/v1/routers")).json()["data"]

    assert [before[0]["lost"], after[0]["lost"]] == [False, True]
    assert (await plane.admin.get("/api/v1/backends")).json()["data"] == []


async def test_a_drain_is_listed_until_its_end(plane: Running) -> None:
    await reports(plane, r1=report(backend(), backend("10.0.0.2:8000")))
    body = {"backend": "10.0.0.1:8000", "action": "drain", "reason": "driver", "expires_in": 600}

    made = await plane.admin.post("/api/v1/overrides", json=body)
    listed = (await plane.router.get("/overrides")).json()["overrides"]
    plane.clock.advance(601)
    await plane.plane.documents.follow()
    after = (await plane.router.get("/overrides")).json()["overrides"]

    assert made.status_code == 201
    shown = made.json()
    assert shown["acknowledged"] == {"routers": 0, "of": 1, "missing": ["r1"]}
    assert [shown["created_at"], shown["expires_at"]] == ["2026-11-28T12:00:00Z", "2026-11-28T12:10:00Z"]
    assert listed == [{name: value for name, value in shown.items() if name not in ("acknowledged", "ended_at")}]
    assert after == []


async def test_overrides_are_acknowledged_by_reports(plane: Running) -> None:
    body = {"backend": "10.0.0.1:8000", "action": "out", "reason": "driver"}
    made = (await plane.admin.post("/api/v1/overrides", json=body)).json()
    await reports(plane, r1=report(overrides=(made["id"],)), r2=report())

    half = (await plane.admin.get(f"/api/v1/overrides/{made['id']}")).json()["acknowledged"]
    await reports(plane, r2=report(overrides=(made["id"],)))
    whole = (await plane.admin.get(f"/api/v1/overrides/{made['id']}")).json()["acknowledged"]

    assert half == {"routers": 1, "of": 2, "missing": ["r2"]}
    assert whole == {"routers": 2, "of": 2, "missing": []}


async def test_the_last_usable_backend_stays_unless_forced(plane: Running) -> None:
    await reports(plane, r1=report(backend(), backend("10.0.0.2:8000", "open")))
    body = {"backend": "10.0.0.1:8000", "action": "drain", "reason": "driver"}

    refused = await plane.admin.post("/api/v1/overrides", json=body)
    failing = await plane.admin.post("/api/v1/overrides", json=body | {"backend": "10.0.0.2:8000"})
    forced = await plane.admin.post("/api/v1/overrides", json=body | {"force": True})

    assert [refused.status_code, failing.status_code, forced.status_code] == [409, 201, 201]
    assert refused.json()["error"]["code"] == "last_backend"


async def test_the_second_of_two_backends_is_the_last_one_once_the_first_is_drained(sqlite_plane: Running) -> None:
    await reports(sqlite_plane, r1=report(backend(), backend("10.0.0.2:8000")))
    body = {"backend": "10.0.0.1:8000", "action": "drain", "reason": "driver"}

    first = await sqlite_plane.admin.post("/api/v1/overrides", json=body)
    second = await sqlite_plane.admin.post("/api/v1/overrides", json=body | {"backend": "10.0.0.2:8000"})

    assert [first.status_code, second.status_code] == [201, 409]


async def test_a_backend_of_the_catalogue_that_no_router_knows_is_counted(sqlite_plane: Running) -> None:
    await sqlite_plane.admin.put("/models/m", json={"name": "m", "backends": ["http://10.0.0.1:8000"]})

    body = {"backend": "10.0.0.1:8000", "action": "drain", "reason": "driver"}
    refused = await sqlite_plane.admin.post("/api/v1/overrides", json=body)

    assert refused.status_code == 409


async def test_a_return_ends_what_takes_the_backend_out(plane: Running) -> None:
    body = {"backend": "10.0.0.1:8000", "action": "drain", "reason": "driver"}
    made = [
        (await plane.admin.post("/api/v1/overrides", json=body | {"action": one})).json() for one in ("drain", "out")
    ]
    await plane.admin.post("/api/v1/overrides", json=body | {"action": "reset_circuit"})

    ended = await plane.admin.post("/api/v1/overrides", json={"backend": "10.0.0.1:8000", "action": "return"})

    assert ended.status_code == 200
    assert ended.json() == {"ended": [one["id"] for one in made]}
    left = (await plane.router.get("/overrides")).json()["overrides"]
    assert [one["action"] for one in left] == ["reset_circuit"]


async def test_an_override_is_ended_with_its_version(plane: Running) -> None:
    body = {"backend": "10.0.0.1:8000", "action": "drain", "reason": "driver"}
    made = await plane.admin.post("/api/v1/overrides", json=body)
    url = made.headers["location"]
    await reports(plane, r1=report())

    without = await plane.admin.delete(url)
    # A router's acknowledgement is no new version.
    ended = await plane.admin.delete(url, headers={"if-match": made.headers["etag"]})

    assert [without.status_code, ended.status_code] == [428, 204]
    assert (await plane.admin.get(url)).json()["ended_at"] == "2026-11-28T12:00:00Z"
    assert (await plane.router.get("/overrides")).json() == {"overrides": []}


async def test_a_change_of_overrides_ends_the_long_poll_of_another_replica(start_plane: Any, database_url: str) -> None:
    if database_url.startswith("sqlite"):
        pytest.skip("one process per SQLite file")
    one, two = await start_plane(), await start_plane()
    etag = (await two.router.get("/overrides")).headers["etag"]

    body = {"backend": "10.0.0.1:8000", "action": "drain", "reason": "driver"}
    made = (await one.admin.post("/api/v1/overrides", json=body)).json()
    answer = await two.router.get("/overrides", headers={"if-none-match": etag, "prefer": "wait=20"})

    assert answer.status_code == 200
    assert [one["id"] for one in answer.json()["overrides"]] == [made["id"]]


@pytest.mark.parametrize("scope", ["snapshots"])
async def test_overrides_need_a_service_token(sqlite_plane: Running, scope: str) -> None:
    answer = await sqlite_plane.client.get("/overrides")

    assert [answer.status_code, answer.json()["error"]["code"]] == [401, "invalid_api_key"]


async def test_an_organisation_sees_the_state_of_its_models_only(plane: Running) -> None:
    await plane.admin.put("/models/m", json={"name": "m", "backends": ["http://10.0.0.1:8000"]})
    await plane.admin.put("/models/other", json={"name": "other", "backends": ["http://10.0.0.9:8000"]})
    await reports(plane, r1=report(backend(), backend("10.0.0.9:8000", model="other")))
    token = await management_token(plane.plane.database, "max", None)
    async with plane.plane.database.main.write() as connection:
        await connection.execute(
            insert(organisations).values(name="team-a", models=["m"], limits=[], disabled=False, created_at=NOON)
        )
        await connection.execute(
            insert(memberships).values(organisation="team-a", user="max", role="member", created_at=NOON)
        )
    member = {"authorization": f"Bearer {token}"}

    backends = (await plane.client.get("/api/v1/backends", headers=member)).json()["data"]
    models = (await plane.client.get("/api/v1/models", headers=member)).json()["data"]
    drain = await plane.client.post(
        "/api/v1/overrides", headers=member, json={"backend": "x", "action": "drain", "reason": "y"}
    )

    assert backends == [{"model": "m", "backend": None, "state": "ready", "agree": "1/1"}]
    assert [one["name"] for one in models] == ["m"]
    assert "backends" not in models[0]
    assert (await plane.client.get("/api/v1/models/other", headers=member)).status_code == 404
    assert drain.status_code == 403


async def test_every_change_has_an_audit_row(plane: Running) -> None:
    from control_plane.data.tables import audit

    body = {"backend": "10.0.0.1:8000", "action": "drain", "reason": "driver"}
    await plane.admin.post("/api/v1/overrides", json=body)
    await plane.admin.post("/api/v1/overrides", json={"backend": "10.0.0.1:8000", "action": "return", "reason": "done"})

    async with plane.plane.database.main.read() as connection:
        rows = (await connection.execute(audit.select().order_by(audit.c.id))).all()
    assert [(row.action, row.actor, row.reason) for row in rows] == [
        ("override.create", "ana", "driver"),
        ("override.end", "ana", "done"),
    ]


async def test_a_model_with_a_backend_needs_no_start(plane: Running) -> None:
    await plane.admin.put("/models/m", json={"name": "m", "backends": ["http://10.0.0.1:8000"]})
    body = {"router": "r1", "reason": "hold", "waiting": 3}

    unknown = await plane.router.post("/activations/x", json=body)
    nothing = await plane.router.post("/activations/m", json=body)
    await reports(plane, r1=report(backend()))
    ready = await plane.router.post("/activations/m", json=body)

    assert [unknown.status_code, nothing.status_code, ready.status_code] == [404, 409, 200]
    assert [answer.json()["error"]["code"] for answer in (unknown, nothing)] == [
        "model_not_found",
        "activation_disabled",
    ]
    assert ready.json() == {"model": "m", "state": "ready"}


async def test_reports_of_routers_that_are_gone_are_not_in_memory(sqlite_plane: Running) -> None:
    """Each roll-out gives routers new names."""
    await reports(sqlite_plane, old=report(), new=report())
    kept, texts, made = sqlite_plane.plane.kept, {}, []

    async def make() -> None:
        made.append(1)

    await reporting.seen(sqlite_plane.plane)
    async with sqlite_plane.plane.database.main.write() as connection:
        rows = await connection.execute(select(routers.c.instance, cast(routers.c.report, Text).label("text")))
        texts = {row.instance: row.text for row in rows}
        await connection.execute(delete(routers).where(routers.c.instance == "old"))
    seen = await reporting.seen(sqlite_plane.plane)
    await kept.made_of(("report", "new"), texts["new"], make)

    assert [one.instance for one in seen.reported] == ["new"]
    assert made == []
    await kept.made_of(("report", "old"), texts["old"], make)
    assert made == [1]
