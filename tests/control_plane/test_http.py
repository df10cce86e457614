"""What every request passes: ids, bounds of bodies, errors in one envelope, counts."""

import base64
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest

from tests.control_plane.conftest import Running

pytestmark = pytest.mark.anyio
LARGE = 1024 * 1024 + 1


async def chunks(size: int) -> AsyncIterator[bytes]:
    for start in range(0, size, 65536):
        yield b" " * min(65536, size - start)


@pytest.mark.parametrize("url", ["/models/gpt2", "/api/v1/models/gpt2"])
async def test_a_body_that_is_too_large_is_refused(sqlite_plane: Running, url: str) -> None:
    headers = {"content-type": "application/json"}
    declared = await sqlite_plane.admin.put(url, content=b" " * LARGE, headers=headers)
    chunked = await sqlite_plane.admin.put(url, content=chunks(LARGE), headers=headers)

    for answer in (declared, chunked):
        assert [answer.status_code, answer.json()["error"]["code"]] == [413, "request_too_large"]
        assert answer.headers["connection"] == "close"


async def test_a_body_of_fastapi_that_is_too_large_is_refused(sqlite_plane: Running) -> None:
    headers = {"content-type": "application/json"}
    answer = await sqlite_plane.admin.post("/api/v1/overrides", content=chunks(LARGE), headers=headers)

    assert [answer.status_code, answer.json()["error"]["code"]] == [413, "request_too_large"]


async def test_an_id_of_the_client_is_kept_if_it_is_one(sqlite_plane: Running) -> None:
    kept = await sqlite_plane.client.get("/api/v1/models", headers={"x-request-id": "abc-1"})
    made = await sqlite_plane.client.get("/api/v1/models", headers={"x-request-id": "a b"})

    assert kept.headers["x-request-id"] == kept.json()["request_id"] == "abc-1"
    assert len(made.headers["x-request-id"]) == 16


@pytest.mark.parametrize(
    ("method", "url", "status", "code"),
    [
        ("GET", "/nowhere", 404, "unknown_url"),
        ("GET", "/api/v1/nowhere", 404, "unknown_url"),
        ("POST", "/models", 405, "method_not_allowed"),
        ("POST", "/api/v1/backends", 405, "method_not_allowed"),
        ("GET", "/models/x", 404, "model_not_found"),
        ("GET", "/api/v1/models/x", 404, "not_found"),
        ("GET", "/api/v1/overrides?limit=0", 422, "validation_error"),
        ("GET", "/api/v1/overrides?after=x", 422, "validation_error"),
    ],
)
async def test_errors_have_one_envelope(sqlite_plane: Running, method: str, url: str, status: int, code: str) -> None:
    answer = await sqlite_plane.admin.request(method, url)

    assert answer.status_code == status
    body = answer.json()
    assert list(body["error"])[:4] == ["message", "type", "param", "code"]
    assert [body["error"]["code"], body["request_id"]] == [code, answer.headers["x-request-id"]]


@pytest.mark.parametrize(
    ("body", "status", "code", "param"),
    [
        (b"{", 400, "invalid_json", None),
        (b"[]", 422, "validation_error", "body"),
        (b'{"backend": "b", "action": "x", "reason": "r"}', 422, "validation_error", "action"),
        (b'{"backend": "b", "action": "drain", "reason": ""}', 422, "validation_error", "reason"),
        (
            b'{"backend": "b", "action": "drain", "reason": "r", "force": 3}',
            422,
            "validation_error",
            "force",
        ),
        (b'{"backend": "b", "action": "drain", "reason": "r", "force": "yes"}', 422, "validation_error", "force"),
        (b'{"backend": "b", "action": "drain", "reason": "a\\u0000"}', 422, "validation_error", "reason"),
        (b'{"backend": "b", "x": [{"y": 9223372036854775808}]}', 422, "validation_error", "x.0.y"),
        (b'{"backend": "b", "action": "drain"}', 422, "validation_error", "reason"),
    ],
)
async def test_a_body_that_is_not_valid_names_the_value(
    sqlite_plane: Running, body: bytes, status: int, code: str, param: str | None
) -> None:
    headers = {"content-type": "application/json"}
    answer = await sqlite_plane.admin.post("/api/v1/overrides", content=body, headers=headers)

    error = answer.json()["error"]
    assert [answer.status_code, error["code"], error["param"]] == [status, code, param]
    if status == 422:
        assert error["errors"][0]["param"] == param


async def test_requests_are_counted_by_pattern(sqlite_plane: Running) -> None:
    for path in ("/api/v1/overrides/ovr_1", "/api/v1/overrides/ovr_2", "/models/a", "/models/b", "/nowhere"):
        await sqlite_plane.admin.get(path)

    text = (await sqlite_plane.client.get("/metrics")).text
    for route, code in (("/api/v1/overrides/{id}", 404), ("/models/{name:path}", 404), ("other", 404)):
        assert f'control_plane_http_requests_total{{code="{code}",method="GET",route="{route}"}}' in text
    assert "ovr_1" not in text


@pytest.mark.parametrize(
    ("url", "allowed"),
    [
        ("/api/v1/keys", "GET, POST"),
        ("/api/v1/keys/x", "DELETE, GET, PATCH"),
        ("/api/v1/models/a/b", "DELETE, GET, PUT"),
        ("/api/v1/session", "DELETE, POST"),
        ("/routers/r-1", "PUT"),
        ("/models/a", "DELETE, GET, HEAD, PUT"),
    ],
)
async def test_a_405_names_all_methods_of_the_url(sqlite_plane: Running, url: str, allowed: str) -> None:
    answer = await sqlite_plane.admin.request("TRACE", url)

    assert [answer.status_code, answer.headers["allow"]] == [405, allowed]


LISTS = (
    "keys",
    "tokens",
    "organisations",
    "users",
    "audit",
    "models",
    "limits",
    "budgets",
    "prices",
    "prompts",
    "backends",
    "routers",
    "overrides",
    "requests",
    "settings",
    "me/sessions",
)


@pytest.mark.parametrize("after", [[], [1.5], ["a", "b", "c", "d"], [[1]], [None], {"a": 1}, "x"])
async def test_a_cursor_that_no_page_had_is_refused(sqlite_plane: Running, after: Any) -> None:
    cursor = base64.urlsafe_b64encode(json.dumps(after).encode()).decode()
    for name in LISTS:
        answer = await sqlite_plane.admin.get(f"/api/v1/{name}", params={"after": cursor})
        assert [name, answer.status_code, answer.json()["error"]["param"]] == [name, 422, "after"]


@pytest.mark.parametrize(
    ("url", "body"),
    [
        ("organisations", {"name": "team-x"}),
        ("users", {"name": "zoe", "email": "zoe@example.org"}),
        ("tokens", {"name": "ci"}),
        ("keys", {"name": "batch"}),
        ("prices", {"model": "gpt2", "input": 1, "output": 2}),
        ("limits", {"scope": "user", "requests": 1, "per": 60}),
        ("budgets", {"scope": "user", "name": "ana", "tokens": 1, "per": "day"}),
        ("prompts", {"name": "support"}),
        ("overrides", {"backend": "b", "action": "drain", "reason": "r"}),
    ],
)
async def test_members_that_are_not_known_are_ignored(sqlite_plane: Running, url: str, body: Any) -> None:
    """And set nothing: who has made it, and its state, are no members of a body."""
    more = {"created_by": "eve", "created_at": "2020-01-01T00:00:00Z", "state": "ended", "digest": "x", "new": 1}
    answer = await sqlite_plane.admin.post(f"/api/v1/{url}", json={**more, **body})

    assert answer.status_code == 201
    made = answer.json()
    assert not {"new", "digest"} & made.keys()
    assert (made.get("created_by", "ana"), made.get("state", "ok")) == ("ana", "ok")


@pytest.mark.parametrize("value", ["yes", "true", 0, 1, "off"])
async def test_a_flag_is_true_or_false(sqlite_plane: Running, value: Any) -> None:
    key = await sqlite_plane.admin.post("/api/v1/keys", json={"name": "batch"})
    token = await sqlite_plane.admin.post("/api/v1/tokens", json={"name": "ci"})
    team = await sqlite_plane.admin.post("/api/v1/organisations", json={"name": "team-x"})
    user = await sqlite_plane.admin.post("/api/v1/users", json={"name": "zoe", "email": "zoe@example.org"})
    for made in (key, token, team, user):
        headers = {"if-match": made.headers["etag"]}
        answer = await sqlite_plane.admin.patch(made.headers["location"], json={"disabled": value}, headers=headers)
        assert [answer.status_code, answer.json()["error"]["param"]] == [422, "disabled"]
