import json
import logging
import sqlite3
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.types import ASGIApp

from inference_api.routing.catalogue import parse_catalogue
from inference_api.routing.entries import CatalogueEntry
from registry_stub.app import create_app
from registry_stub.store import Store

Mount = Callable[[ASGIApp], httpx.Client]


def put(client: httpx.Client, name: str, headers: dict[str, str] | None = None, **fields: Any) -> httpx.Response:
    return client.put(f"/models/{name}", json={"name": name, **fields}, headers=headers)


def code(response: httpx.Response) -> tuple[int, str]:
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return response.status_code, error["code"]


def test_a_model_is_created_replaced_read_and_deleted(client: httpx.Client) -> None:
    created = put(client, "gpt2")
    replaced = put(client, "gpt2", version="2")
    assert (created.status_code, created.headers["location"], replaced.status_code) == (201, "/models/gpt2", 200)
    assert client.get("/models/gpt2").json() == {"name": "gpt2", "version": "2", "created": 1_700_000_000}
    deleted = client.delete("/models/gpt2")
    assert (deleted.status_code, deleted.content) == (204, b"")
    assert code(client.get("/models/gpt2")) == (404, "model_not_found")
    assert code(client.delete("/models/gpt2")) == (404, "model_not_found")


@pytest.mark.parametrize("path", ["meta/llama-3", "meta%2Fllama-3", "meta%2fllama%2D3"])
def test_a_name_with_a_slash_is_found_in_every_spelling(client: httpx.Client, path: str) -> None:
    assert client.put(f"/models/{path}", json={"name": "meta/llama-3"}).status_code == 201
    for spelling in ("meta/llama-3", "meta%2Fllama-3"):
        assert client.get(f"/models/{spelling}").json()["name"] == "meta/llama-3"
    assert client.delete(f"/models/{path}").status_code == 204


def test_the_list_is_a_catalogue_in_the_order_of_creation(client: httpx.Client) -> None:
    for name in ("b", "a"):
        put(client, name, backends=[{"url": f"http://{name}:8000/"}])
    catalogue = parse_catalogue(client.get("/models").json())
    assert list(catalogue) == ["b", "a"]
    assert catalogue["a"].backends[0].url == "http://a:8000"
    assert client.get("/models/").content == client.get("/models").content


def test_an_empty_registry_lists_no_models(client: httpx.Client) -> None:
    assert client.get("/models").json() == {"models": []}


@pytest.mark.parametrize("path", ["/models", "/models/a"])
@pytest.mark.parametrize("field", ["{}", "W/{}", '"old", {}', "*"])
def test_an_unchanged_document_is_not_sent_again(client: httpx.Client, path: str, field: str) -> None:
    put(client, "a")
    etag = client.get(path).headers["etag"]
    again = client.get(path, headers={"If-None-Match": field.format(etag)})
    assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", etag)


def test_any_write_gives_the_list_a_new_etag_and_a_return_to_the_old_content_the_old_one(client: httpx.Client) -> None:
    etags = [client.get("/models").headers["etag"]]
    for version in ("1", "2", "1"):
        put(client, "a", version=version)
        etags.append(client.get("/models", headers={"If-None-Match": etags[-1]}).headers["etag"])
    client.delete("/models/a")
    etags.append(client.get("/models").headers["etag"])
    assert len(set(etags)) == 3
    assert (etags[1], etags[0]) == (etags[3], etags[4])


def test_the_etag_of_a_put_is_the_etag_of_the_next_get(client: httpx.Client) -> None:
    stored = put(client, "a")
    read = client.get("/models/a")
    assert (stored.headers["etag"], stored.content) == (read.headers["etag"], read.content)
    assert read.headers["cache-control"] == "no-cache"


def test_head_is_a_get_without_the_body(client: httpx.Client) -> None:
    put(client, "a")
    head, get = client.head("/models/a"), client.get("/models/a")
    assert (head.status_code, head.content, head.headers["etag"]) == (200, b"", get.headers["etag"])


@pytest.mark.parametrize(("name", "fields"), [("llama3", {}), ("new", {"aliases": ["llama"]})])
def test_a_taken_name_is_a_conflict_that_names_the_owner(client: httpx.Client, name: str, fields: Any) -> None:
    put(client, "llama", aliases=["llama3"])
    refused = put(client, name, **fields)
    assert code(refused) == (409, "name_taken")
    assert "taken by the model 'llama'" in refused.json()["error"]["message"]
    assert refused.json()["error"]["param"] == ("aliases" if fields else "name")


@pytest.mark.parametrize(
    ("method", "path", "allow"),
    [
        ("POST", "/models", "GET, HEAD"),
        ("POST", "/models/", "GET, HEAD"),
        ("POST", "/models/a", "DELETE, GET, HEAD, PUT"),
        ("PUT", "/healthz", "GET, HEAD"),
    ],
)
def test_a_wrong_method_is_told_the_right_ones(client: httpx.Client, method: str, path: str, allow: str) -> None:
    refused = client.request(method, path)
    assert code(refused) == (405, "method_not_allowed")
    assert refused.headers["allow"] == allow
    assert allow in refused.json()["error"]["message"]


@pytest.mark.parametrize("path", ["/", "/v1/models", "/healthz/", "/model%0As"])
def test_an_unknown_url_is_told_the_known_ones(client: httpx.Client, path: str) -> None:
    refused = client.get(path, headers={"Host": "[nonsense"})
    assert code(refused) == (404, "unknown_url")
    assert "/models" in refused.json()["error"]["message"]


def test_the_process_says_that_it_lives(client: httpx.Client) -> None:
    assert client.get("/healthz").json() == {"status": "ok"}


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "Bearer "])
def test_the_token_opens_writes(mount: Mount, store: Store, scheme: str) -> None:
    client = mount(create_app(store, token="tök-en"))
    headers = [(b"Authorization", f"{scheme} tök-en".encode())]
    assert client.put("/models/a", json={"name": "a"}, headers=headers).status_code == 201
    assert client.delete("/models/a", headers=headers).status_code == 204


@pytest.mark.parametrize(
    "given", ["", "Bearer", "Bearer secre", "Bearer secret2", "Basic secret", "secret", "Bearer \xff"]
)
def test_without_the_right_token_nothing_is_written_or_told(mount: Mount, store: Store, given: str) -> None:
    client = mount(create_app(store, token="secret"))
    for refused in (
        client.put("/models/a", json={"name": "a"}, headers=[(b"Authorization", given.encode("latin-1"))]),
        client.delete("/models/a", headers=[(b"Authorization", given.encode("latin-1"))]),
        client.delete("/models/a"),
    ):
        assert code(refused) == (401, "invalid_api_key")
        assert refused.headers["www-authenticate"].startswith("Bearer")
        assert "secret" not in refused.text
    assert client.get("/models").json() == {"models": []}


def test_a_slow_disk_holds_up_the_writer_and_nobody_else(client: httpx.Client, database: Path) -> None:
    with closing(sqlite3.connect(database)) as other, ThreadPoolExecutor(1) as pool:
        other.execute("BEGIN IMMEDIATE")
        writing = pool.submit(put, client, "a")
        for path in ("/healthz", "/models") * 10:
            assert client.get(path).status_code == 200
        assert not writing.done()
        other.rollback()
        assert writing.result().status_code == 201


def test_a_failed_write_is_unavailable_and_only_the_log_has_the_reason(
    mount: Mount, database: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with Store(database, busy_timeout=0.01) as store, closing(sqlite3.connect(database)) as other:
        client = mount(create_app(store))
        other.execute("BEGIN IMMEDIATE")
        refused = put(client, "a")
    assert code(refused) == (503, "storage_unavailable")
    assert refused.headers["retry-after"] == "5"
    assert str(database) not in refused.text
    assert f"PUT '/models/a' failed: database {str(database)!r} failed: database is locked" in caplog.text


def test_a_fault_of_ours_is_an_answer_without_a_traceback(
    mount: Mount, store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    def broken() -> float:
        raise RuntimeError("the clock is broken")

    refused = put(mount(create_app(store, clock=broken)), "a")
    assert code(refused) == (500, "internal_error")
    assert "clock" not in refused.text
    # The server logs it after the answer is out.
    deadline = time.monotonic() + 20
    while "the clock is broken" not in caplog.text and time.monotonic() < deadline:
        time.sleep(0.01)
    assert "the clock is broken" in caplog.text


def test_one_of_two_creators_at_once_wins(client: httpx.Client) -> None:
    barrier = threading.Barrier(6)

    def create(version: int) -> int:
        barrier.wait(10)
        return put(client, "a", {"If-None-Match": "*"}, version=version).status_code

    with ThreadPoolExecutor(6) as pool:
        assert sorted(pool.map(create, range(6))) == [201, 412, 412, 412, 412, 412]


def test_writes_are_logged_by_name_without_the_token(
    mount: Mount, store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    client = mount(create_app(store, token="s3cret"))
    put(client, "a", {"Authorization": "Bearer s3cret"})
    put(client, "a", {"Authorization": "Bearer wr0ng"})
    client.delete("/models/a", headers={"Authorization": "Bearer s3cret"})
    ours = [record.getMessage() for record in caplog.records if record.name == "registry_stub"]
    assert ours == ["model a created", "model a deleted"]
    assert "s3cret" not in caplog.text
    assert "wr0ng" not in caplog.text


def test_ten_thousand_models_come_in_one_answer_and_cost_nothing_when_known(client: httpx.Client, store: Store) -> None:
    entries = parse_catalogue({"models": [{"name": f"m{n}", "aliases": [f"alias{n}"]} for n in range(10_000)]})
    store.seed(entries.values(), now=1)
    listing = client.get("/models")
    assert len(json.loads(listing.content)["models"]) == 10_000
    again = client.get("/models", headers={"If-None-Match": listing.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")


def test_a_registry_that_takes_no_changes_says_so(mount: Mount, store: Store) -> None:
    store.seed([CatalogueEntry(name="a")], now=1)
    client = mount(create_app(store, read_only=True))
    for refused in (put(client, "a", version="2"), put(client, "b"), client.delete("/models/a")):
        assert code(refused) == (403, "read_only")
    assert [model["name"] for model in client.get("/models").json()["models"]] == ["a"]
