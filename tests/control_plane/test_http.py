"""What every request passes: ids, bounds of bodies, errors in one envelope, counts."""

from collections.abc import AsyncIterator

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
        (b'{"backend": "b", "action": "drain", "reason": "r", "more": 1}', 422, "validation_error", "more"),
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
