"""PUT and DELETE of /models/{name} as every registry takes them: bodies, and preconditions."""

import json
import socket
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from registry_stub.wire import MAX_BODY_BYTES
from tests.registry.conftest import detail_of, error_of

JSON = {"Content-Type": "application/json"}


def connect(client: httpx.Client) -> socket.socket:
    return socket.create_connection((client.base_url.host, client.base_url.port or 0), timeout=20)


@pytest.mark.parametrize("body", [b"", b"{", b"name: a", b'{"name": "\xff"}', b'{"created": NaN}', b"[" * 100_000])
def test_a_body_that_is_not_json_is_a_bad_request(client: httpx.Client, body: bytes) -> None:
    refused = client.put("/models/a", content=body, headers=JSON)
    assert (refused.status_code, error_of(refused)[1]) == (400, "invalid_json")


@pytest.mark.parametrize(
    ("fields", "param", "reason"),
    [
        ({"balancing": "random"}, "balancing", "balancing 'random': must be round_robin"),
        ({"backends": [{"url": "ftp://x"}]}, "backends.0.url", "must start with http:// or https://"),
        ({"backends": [{"url": "http://169.254.169.254"}]}, "backends.0.url", "link-local"),
        ({"backend": []}, "backend", "unknown key 'backend'; did you mean 'backends'?"),
        ({"name": "b"}, "name", "has the name 'b' but the URL has 'a'"),
        ({"name": "-"}, "name", "name '-': no spaces"),
        ({"name": None}, "name", "name: must be a valid string"),
    ],
)
def test_an_invalid_entry_is_told_the_field_and_the_reason(
    client: httpx.Client, fields: dict[str, Any], param: str, reason: str
) -> None:
    refused = client.put("/models/a", json={"name": "a", **fields})
    assert (refused.status_code, error_of(refused)[1]) == (422, "validation_error")
    assert detail_of(refused)["param"] == param
    assert reason in detail_of(refused)["message"]
    assert client.get("/models").json() == {"models": []}


def test_json_that_is_not_an_object_is_an_invalid_entry(client: httpx.Client) -> None:
    refused = client.put("/models/a", content=b"[]", headers=JSON)
    assert (refused.status_code, detail_of(refused)["param"]) == (422, None)
    assert "object" in detail_of(refused)["message"]


@pytest.mark.parametrize("content_type", ["text/plain", "application/x-www-form-urlencoded", "application/jsonl", ""])
def test_another_content_type_is_unsupported(client: httpx.Client, content_type: str) -> None:
    refused = client.put("/models/a", content=b'{"name": "a"}', headers={"Content-Type": content_type})
    assert (refused.status_code, error_of(refused)[1]) == (415, "unsupported_media_type")
    assert "application/json" in detail_of(refused)["message"]


def test_the_content_type_may_have_parameters_and_capitals(client: httpx.Client) -> None:
    headers = {"Content-Type": "Application/JSON; charset=utf-8"}
    assert client.put("/models/a", content=b'{"name": "a"}', headers=headers).status_code == 201


def test_a_body_of_exactly_the_limit_is_read(client: httpx.Client) -> None:
    body = b'{"name": "a"}'.ljust(MAX_BODY_BYTES)
    assert client.put("/models/a", content=body, headers=JSON).status_code == 201
    assert client.put("/models/a", content=body + b" ", headers=JSON).status_code == 413


def test_a_declared_length_over_the_limit_is_refused_before_the_body_is_sent(client: httpx.Client) -> None:
    head = b"PUT /models/a HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    with connect(client) as connection, connection.makefile("rb") as answer:
        connection.sendall(head % (MAX_BODY_BYTES + 1))
        headers, _, body = answer.read().partition(b"\r\n\r\n")
    assert headers.startswith(b"HTTP/1.1 413")
    assert b"connection: close" in headers.lower()
    assert json.loads(body)["error"]["code"] == "request_too_large"


def test_a_body_without_a_length_is_cut_off_at_the_limit(client: httpx.Client) -> None:
    sent: list[int] = []

    def endless() -> Iterator[bytes]:
        while len(sent) < 2000:
            sent.append(1)
            yield b" " * 65536

    refused = client.put("/models/a", content=endless(), headers=JSON)
    assert (refused.status_code, error_of(refused)[1]) == (413, "request_too_large")
    assert len(sent) < 2000


def test_a_replacement_needs_the_etag_it_names(client: httpx.Client) -> None:
    etag = client.put("/models/a", json={"name": "a"}).headers["etag"]
    replaced = client.put("/models/a", json={"name": "a", "version": "2"}, headers={"If-Match": etag})
    late = client.put("/models/a", json={"name": "a", "version": "3"}, headers={"If-Match": etag})
    assert (replaced.status_code, late.status_code, error_of(late)[1]) == (200, 412, "precondition_failed")
    assert replaced.headers["etag"] in detail_of(late)["message"]
    assert client.get("/models/a").json()["version"] == "2"


def test_a_weak_etag_does_not_allow_a_write(client: httpx.Client) -> None:
    etag = client.put("/models/a", json={"name": "a"}).headers["etag"]
    assert client.delete("/models/a", headers={"If-Match": f"W/{etag}"}).status_code == 412
    assert client.delete("/models/a", headers={"If-Match": f'"x", {etag}'}).status_code == 204


@pytest.mark.parametrize("field", ["*", '"anything"'])
def test_a_replacement_does_not_create(client: httpx.Client, field: str) -> None:
    refused = client.put("/models/a", json={"name": "a"}, headers={"If-Match": field})
    assert refused.status_code == 412
    assert "it does not exist" in detail_of(refused)["message"]


def test_a_creation_does_not_replace(client: httpx.Client) -> None:
    codes = [client.put("/models/a", json={"name": "a"}, headers={"If-None-Match": "*"}).status_code for _ in "12"]
    assert codes == [201, 412]


def test_an_unknown_model_is_not_found_whatever_the_preconditions(client: httpx.Client) -> None:
    assert client.delete("/models/a", headers={"If-Match": "*"}).status_code == 404
