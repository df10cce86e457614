"""/models as every registry serves it: reads, ETags, and writes by name."""

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from inference_api.routing.catalogue import parse_catalogue
from tests.registry.conftest import error_of, put


def test_a_model_is_created_replaced_read_and_deleted(client: httpx.Client) -> None:
    created = put(client, "gpt2")
    replaced = put(client, "gpt2", version="2")
    assert (created.status_code, created.headers["location"], replaced.status_code) == (201, "/models/gpt2", 200)
    assert client.get("/models/gpt2").json() == {"name": "gpt2", "version": "2", "created": 1_700_000_000}
    deleted = client.delete("/models/gpt2")
    assert (deleted.status_code, deleted.content) == (204, b"")
    assert error_of(client.get("/models/gpt2")) == (404, "model_not_found")
    assert error_of(client.delete("/models/gpt2")) == (404, "model_not_found")


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
    assert error_of(refused) == (409, "name_taken")
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
    assert error_of(refused) == (405, "method_not_allowed")
    assert refused.headers["allow"] == allow
    assert allow in refused.json()["error"]["message"]


@pytest.mark.parametrize("path", ["/", "/v1/models", "/healthz/", "/model%0As"])
def test_an_unknown_url_is_told_the_known_ones(client: httpx.Client, path: str) -> None:
    refused = client.get(path, headers={"Host": "[nonsense"})
    assert error_of(refused) == (404, "unknown_url")


def test_the_process_says_that_it_lives(client: httpx.Client) -> None:
    assert client.get("/healthz").json() == {"status": "ok"}


def test_one_of_two_creators_at_once_wins(client: httpx.Client) -> None:
    barrier = threading.Barrier(6)

    def create(version: int) -> int:
        barrier.wait(10)
        return put(client, "a", {"If-None-Match": "*"}, version=version).status_code

    with ThreadPoolExecutor(6) as pool:
        assert sorted(pool.map(create, range(6))) == [201, 412, 412, 412, 412, 412]
