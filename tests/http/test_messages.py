"""What a newcomer's first mistakes are answered with, and what the log then says: a real router on a real port."""

import asyncio
import ssl
from collections.abc import Callable
from typing import Any

import pytest

from inference_api.http.suggestions import meant
from tests.conftest import Served
from tests.fakes import CHAT, raw_client, until
from tests.one_router import *  # noqa: F403
from tests.ports import free_port

pytestmark = pytest.mark.anyio
Start = Callable[..., Any]

ROUTES = ("/v1/chat/completions", "/v1/models", "/v1/models/{model:path}", "/rerank", "/health")


@pytest.mark.parametrize(
    ("path", "route"),
    [
        ("/v1/v1/chat/completions", "/v1/chat/completions"),
        ("/v1/v1/v1/chat/completions", "/v1/chat/completions"),
        ("/chat/completions", "/v1/chat/completions"),
        ("/models", "/v1/models"),
        ("/v1/rerank", "/rerank"),
        ("/v1/health", "/health"),
        ("/v1/chat/completion", "/v1/chat/completions"),
        ("/api/tags", None),
        ("/" + "a" * 10_000, None),
    ],
)
def test_a_slip_of_a_path_is_known(path: str, route: str | None) -> None:
    assert meant(path, ROUTES) == route


@pytest.mark.parametrize("path", ["/v1/v1/chat/completions", "/chat/completions"])
async def test_a_base_url_that_is_not_right_is_told_what_is(served: Served, path: str) -> None:
    answer = await served.client.post(path, json=CHAT)

    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "unknown_url")
    message = answer.json()["error"]["message"]
    assert f"POST {path}." in message
    assert " /v1/chat/completions?" in message
    await until(lambda: served.lines)
    assert (served.lines[0]["path"], served.lines[0]["client"]) == (path, "127.0.0.1")


async def test_a_form_is_told_the_header_that_curl_lacks(served: Served) -> None:
    answer = await served.client.post("/v1/chat/completions", data={"a": "b"})

    assert answer.status_code == 415
    assert "-H 'content-type: application/json'" in answer.json()["error"]["message"]


async def test_a_name_that_is_unknown_or_an_alias_is_in_the_log(start_engine: Start, start_router: Start) -> None:
    served: Served = await start_router(await start_engine(), entry={"aliases": ["other"]})
    for model in ("n\n" + "x" * 100, "other", "m"):
        await served.chat(model=model)
    await until(lambda: len(served.lines) == 3)

    assert [line.get("asked_model") for line in served.lines] == ["n?" + "x" * 62, "other", None]
    assert [line["model"] for line in served.lines] == ["unknown", "m", "m"]


async def test_the_reason_of_a_503_is_in_the_log_and_not_in_the_answer(start_router: Start) -> None:
    dead = f"127.0.0.1:{free_port()}"
    served: Served = await start_router(
        models=[{"name": "m", "backends": [f"http://{dead}"]}, {"name": "none"}], health_interval=0.05
    )
    [origin] = served.router.core.fleet.origins.values()
    await until(lambda: origin.cause)
    answers = [await served.chat(), await served.chat(model="none")]
    await until(lambda: len(served.lines) == 2)

    assert [line["why"] for line in served.lines] == [f"{dead}: connection refused", "it has no backends"]
    assert [answer.status_code for answer in answers] == [503, 503]
    assert dead not in answers[0].text


async def test_the_reason_is_known_before_the_first_health_check(start_router: Start) -> None:
    dead = f"127.0.0.1:{free_port()}"
    served: Served = await start_router(models=[{"name": "m", "backends": [f"http://{dead}"]}], health_interval=3600)
    await served.chat()
    await until(lambda: served.lines)

    assert served.lines[0]["why"] == f"{dead}: connection refused"


async def test_tls_on_the_plain_port_is_told_in_the_log(served: Served) -> None:
    context = ssl.create_default_context()
    with pytest.raises((ssl.SSLError, ConnectionError)):
        await asyncio.open_connection("127.0.0.1", served.port, ssl=context)
    await until(lambda: served.lines)

    assert (served.lines[0]["code"], served.lines[0]["why"], served.lines[0]["client"]) == (
        "bad_request",
        "this port speaks plain HTTP, not TLS",
        "127.0.0.1",
    )


async def test_http_2_is_told_what_the_port_speaks(served: Served) -> None:
    async with raw_client(served.port) as client:
        await client.send(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
        answer = await client.reader.read(-1)

    assert b"400 Bad Request" in answer
    assert b"This port speaks HTTP/1.1, not HTTP/2." in answer
