import json
import logging
import sqlite3
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
