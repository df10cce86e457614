"""What the overview says of models and routers: what nobody reports is unknown, and never fine."""

from typing import Any

import pytest

from control_plane.pure.fleet import ModelStanding
from control_plane.services.overview import Overview, overview
from tests.control_plane.acts import act_of
from tests.control_plane.conftest import NOON, Running
from tests.control_plane.teams import organisation
from tests.control_plane.test_fleet import backend, report, reports

pytestmark = pytest.mark.anyio


async def catalogue(plane: Running, **entries: dict[str, Any]) -> None:
    for name, entry in entries.items():
        answer = await plane.admin.put(f"/models/{name}", json={"name": name, **entry})
        assert answer.status_code in (200, 201), answer.text


def of(*addresses: str, **more: Any) -> dict[str, Any]:
    return {"backends": [f"http://{address}:8000" for address in addresses], **more}


def loads(*names: str) -> list[dict[str, Any]]:
    return [{"name": name, "in_flight": 2, "queued": 1, "requests": 10, "errors": 0} for name in names]


async def looked(plane: Running, role: str = "admin") -> Overview:
    return await overview(plane.plane, act_of(plane, platform_role=role))


def by_name(found: Overview) -> dict[str, ModelStanding]:
    return {one.name: one for one in found.models}


async def test_models_are_shown_from_the_worst_with_since_when_and_why(plane: Running) -> None:
    await catalogue(
        plane, a=of("10.0.0.1"), b=of("10.0.0.2", "10.0.0.3"), c=of("10.0.0.4", "10.0.0.5"), d=of("10.9.9.9")
    )
    error = {"outcome": "connect_failed", "request_id": None, "at": NOON - 5_000}
    rows = [
        backend("10.0.0.1:8000", model="a"),
        backend("10.0.0.2:8000", model="b"),
        backend("10.0.0.3:8000", "half_open", "b", since=NOON - 60_000),
        backend("10.0.0.4:8000", "open", "c", since=NOON - 90_000, last_error=error, retry_at=NOON + 9_000),
        backend("10.0.0.5:8000", "unhealthy", "c", since=NOON - 30_000),
    ]
    await reports(plane, r1=report(*rows, models=loads("a", "b", "c")), r2=report(*rows, models=loads("a", "b", "c")))

    found = await looked(plane)

    c, b, d, a = found.models
    assert [(one.name, one.state, one.ready, one.total) for one in found.models] == [
        ("c", "failing", 0, 2),
        ("b", "degraded", 1, 2),
        ("d", "unknown", 0, 1),
        ("a", "ok", 1, 1),
    ]
    # Failing since its last usable backend went away.
    assert [c.since, b.since, d.since, a.since] == [NOON - 30_000, NOON - 60_000, None, None]
    assert [(one.backend, one.state, one.agree, one.reason) for one in c.why] == [
        ("10.0.0.4:8000", "open", "2/2", "connect_failed"),
        ("10.0.0.5:8000", "unhealthy", "2/2", "connect_failed"),
    ]
    assert (c.why[0].last_error, c.why[0].retry_at) == (("connect_failed", None, NOON - 5_000), NOON + 9_000)
    assert c.why[0].sentence == "10.0.0.4:8000 has an open circuit (connect_failed)."
    assert (a.in_flight, a.queued) == (4, 2)
    assert found.counts == {"failing": 1, "degraded": 1, "unknown": 1, "ok": 1}


async def test_what_a_person_did_is_the_reason(plane: Running) -> None:
    await catalogue(plane, m=of("10.0.0.1", "10.0.0.2"))
    body = {"backend": "10.0.0.1:8000", "action": "drain", "reason": "driver", "expires_in": 600, "force": True}
    id = (await plane.admin.post("/api/v1/overrides", json=body)).json()["id"]
    row = backend("10.0.0.1:8000", "draining", reason="driver", override=id)
    await reports(plane, r1=report(row, backend("10.0.0.2:8000"), overrides=(id,)))

    (model,) = (await looked(plane)).models
    (why,) = model.why

    assert model.state == "degraded"
    assert why.override is not None
    assert why.override[:4] == (id, "drain", "ana", "driver")
    assert why.override.until == NOON + 600_000
    assert why.sentence == "ana drains it: driver."


async def test_without_a_router_that_reports_every_model_is_unknown(plane: Running) -> None:
    await catalogue(plane, m=of("10.0.0.1"), v=of("10.0.0.2"))
    rows = backend("10.0.0.1:8000"), backend("10.0.0.2:8000", model="v")
    await reports(plane, r1=report(*rows, models=loads("m", "v")))
    before = await looked(plane)
    plane.clock.advance(16)

    after = await looked(plane)

    assert [one.state for one in before.models] == ["ok", "ok"]
    assert [one.state for one in after.models] == ["unknown", "unknown"]
    assert (after.routers.total, after.routers.lost, after.routers.in_step) == (1, 1, 0)
    assert after.counts["ok"] == 0


@pytest.mark.parametrize(
    ("first", "second", "virtual"),
    [
        ("ready", "ready", {"split": "ok", "race": "ok", "vote": "ok"}),
        ("ready", "open", {"split": "degraded", "race": "degraded", "vote": "failing"}),
        ("open", "open", {"split": "failing", "race": "failing", "vote": "failing"}),
        ("ready", None, {"split": "unknown", "race": "unknown", "vote": "unknown"}),
        (None, None, {"split": "unknown", "race": "unknown", "vote": "unknown"}),
        ("open", None, {"split": "unknown", "race": "unknown", "vote": "failing"}),
    ],
)
async def test_a_virtual_model_is_as_its_members_are(
    sqlite_plane: Running, first: str | None, second: str | None, virtual: dict[str, str]
) -> None:
    plane = sqlite_plane
    await catalogue(plane, one=of("10.0.0.1"), two=of("10.0.0.2"))
    await catalogue(
        plane,
        split={"split": {"variants": {"one": 1, "two": 1}}},
        race={"race": {"members": ["one", "two"]}},
        vote={"consensus": {"members": ["one", "two"], "quorum": 2, "on_split": "error"}},
        outer={"split": {"variants": {"split": 1, "race": 1}}},
    )
    states = {"one": first, "two": second}
    rows = [backend(f"{name}:8000", state, name) for name, state in states.items() if state is not None]
    known = [name for name, state in states.items() if state is not None]
    await reports(plane, r1=report(*rows, models=loads(*known, "split", "race", "vote", "outer")))

    found = by_name(await looked(plane))

    assert {name: found[name].state for name in virtual} == virtual
    assert found["outer"].state == virtual["split"]
    assert [found[name].kind for name in ("split", "race", "vote")] == ["split", "race", "consensus"]


async def test_a_failing_model_may_be_covered_by_a_fallback(sqlite_plane: Running) -> None:
    await catalogue(sqlite_plane, other=of("10.0.0.2"), m=of("10.0.0.1", fallbacks=["other"]))
    rows = backend("10.0.0.1:8000", "open"), backend("10.0.0.2:8000", model="other")
    await reports(sqlite_plane, r1=report(*rows))

    found = by_name(await looked(sqlite_plane))

    assert (found["m"].state, found["m"].covered_by) == ("failing", "other")


async def test_a_model_whose_backends_no_router_finds_is_failing(sqlite_plane: Running) -> None:
    await catalogue(sqlite_plane, m=of("10.0.0.1"), empty={"backends": []})
    await reports(sqlite_plane, r1=report(models=loads("m", "empty")))

    found = by_name(await looked(sqlite_plane))

    assert {name: one.state for name, one in found.items()} == {"m": "failing", "empty": "failing"}


async def test_routers_are_in_step_by_what_they_have(plane: Running) -> None:
    answer = await plane.router.put("/routers/r0", json=report())
    now = answer.json()["etags"]
    held = {**now, "spend": None}
    old = {**held, "policy": '"old"'}
    usage = {"made": 10, "delivered": 5, "queued": 1, "spooled": 1, "dropped": 3}
    await reports(
        plane,
        r0=report(etags=held),
        r1=report(etags={**held, "policy": None}, usage=usage),
        r2=report(etags=old),
        r3=report(etags=held, draining=True),
    )

    found = (await looked(plane)).routers

    assert [(one.instance, one.state, one.behind) for one in found.each] == [
        ("r2", "behind", ("policy",)),
        ("r3", "draining", ()),
        ("r0", "in_step", ()),
        ("r1", "in_step", ()),
    ]
    assert (found.total, found.in_step, found.behind, found.draining, found.lost) == (4, 3, 1, 1, 0)
    assert (found.dropped, found.oldest) == (3, 0)
    assert (found.each[3].queued, found.each[3].lag_ms) == (2, 2.1)


async def test_a_router_that_was_draining_has_ended_and_is_not_missed(plane: Running) -> None:
    await reports(plane, gone=report(draining=True), lost=report())
    plane.clock.advance(60)

    found = (await looked(plane)).routers

    assert {one.instance: one.state for one in found.each} == {"gone": "ended", "lost": "lost"}
    assert (found.total, found.lost) == (1, 1)


async def test_an_organisation_sees_states_of_its_models_without_addresses_and_reasons(plane: Running) -> None:
    await catalogue(plane, m=of("10.0.0.1"), other=of("10.0.0.9"))
    await organisation(plane, "team-a", models=["m"])
    await reports(plane, r1=report(backend("10.0.0.1:8000", "open"), backend("10.0.0.9:8000", model="other")))

    found = await overview(plane.plane, act_of(plane, "max", team_a="member"))

    (model,) = found.models
    assert (model.name, model.state, model.why, model.in_flight) == ("m", "failing", (), None)
    (router,) = found.routers.each
    assert (router.version, router.lag_ms, router.at, found.routers.dropped) == (None, None, None, None)
    assert "10.0.0" not in repr(found)
    # What others did is none of a member's business, and a viewer sees no audit log at all.
    assert found.changes == ()
    assert (await overview(plane.plane, act_of(plane, "eve", team_a="viewer"))).changes is None


async def test_the_latest_changes_are_those_of_the_audit_log(plane: Running) -> None:
    for number in range(10):
        await catalogue(plane, **{f"m{number}": of("10.0.0.1")})

    changes = (await looked(plane)).changes

    assert changes == tuple((await plane.admin.get("/api/v1/audit", params={"limit": 8})).json()["data"])
