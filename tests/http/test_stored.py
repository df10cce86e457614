"""Stored responses: each is asked for where it is, by those who may, and nowhere else. Real engines, a real router."""

from collections.abc import Callable
from typing import Any, NamedTuple

import httpx
import pytest

from inference_api.feature import Feature
from inference_api.http.head import RequestHead
from tests.conftest import Served
from tests.fakes import (
    LAST_CHUNK,
    SSE_HEAD,
    FakeEngine,
    Line,
    Received,
    chunk,
    json_response,
    raw,
    until,
)

pytestmark = pytest.mark.anyio
Start = Callable[..., Any]


def keeper(response: str) -> Any:
    """An engine that makes one response, whole or as a stream, and answers for it."""

    async def script(request: Received, line: Line) -> None:
        if b'"stream":true' in request.body:
            event = b'event: response.created\ndata: {"type":"response.created","response":{"id":"%b"}}\n\n'
            done = b'event: response.completed\ndata: {"type":"response.completed"}\n\n'
            await line.send(SSE_HEAD, chunk(event % response.encode()), chunk(done) + LAST_CHUNK)
        else:
            await line.send(json_response({"id": response, "object": "response", "method": request.method}))

    return script


async def start_two(start_engine: Start, start_router: Start, **more: Any) -> tuple[Served, list[FakeEngine]]:
    engines = [await start_engine(keeper(f"resp_{name}")) for name in "ab"]
    for engine, name in zip(engines, "ab", strict=True):
        engine.page = raw(json_response({"id": f"resp_{name}", "status": "completed"}))
    served = await start_router(*engines, entry={"balancing": "round_robin"}, **more)
    return served, engines


async def ask(served: Served, **more: Any) -> httpx.Response:
    return await served.client.post("/v1/responses", json={"model": "m", "input": "hello", **more})


def stored(engine: FakeEngine) -> list[str]:
    return [target for target in engine.asked if "/responses/" in target]


@pytest.mark.parametrize("stream", [False, True])
async def test_a_response_is_asked_for_where_it_is(start_engine: Start, start_router: Start, stream: bool) -> None:
    served, engines = await start_two(start_engine, start_router)
    for _ in engines:
        assert (await ask(served, stream=stream)).status_code == 200

    for engine, name in zip(engines, "ab", strict=True):
        for _ in range(3):
            answer = await served.client.get(f"/v1/responses/resp_{name}?include=x")
            assert (answer.status_code, answer.json()["id"]) == (200, f"resp_{name}")
        assert stored(engine) == [f"/v1/responses/resp_{name}?include=x"] * 3
    await until(lambda: len(served.lines) == 8)
    assert {(line["route"], line["model"], line["attempts"]) for line in served.lines[2:]} == {("response", "m", 1)}
    assert all(backend.in_flight == 0 for backend in served.router.core.fleet.models["m"].backends)


async def test_a_response_is_cancelled_and_deleted_where_it_is(start_engine: Start, start_router: Start) -> None:
    served, engines = await start_two(start_engine, start_router)
    await ask(served)
    await ask(served)

    answers = [
        await served.client.post("/v1/responses/resp_b/cancel", headers={"authorization": "Bearer mine"}),
        await served.client.delete("/v1/responses/resp_b"),
    ]

    assert [answer.json()["method"] for answer in answers] == ["POST", "DELETE"]
    assert [(one.method, one.target, one.body) for one in engines[1].requests[1:]] == [
        ("POST", "/v1/responses/resp_b/cancel", b""),
        ("DELETE", "/v1/responses/resp_b", b""),
    ]
    assert engines[1].requests[1].header("authorization") is None
    assert len(engines[0].requests) == 1


@pytest.mark.parametrize(
    ("method", "path"),
    [("GET", "/v1/responses/resp_x"), ("DELETE", "/v1/responses/resp_x"), ("POST", "/v1/responses/resp_x/cancel")],
)
async def test_one_that_is_not_known_is_not_found(
    start_engine: Start, start_router: Start, method: str, path: str
) -> None:
    served, engines = await start_two(start_engine, start_router)

    answer = await served.client.request(method, path)

    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "response_not_found")
    assert [stored(engine) for engine in engines] == [[], []]


async def test_one_that_is_not_to_be_stored_is_not_remembered(start_engine: Start, start_router: Start) -> None:
    served, _ = await start_two(start_engine, start_router)
    made = (await ask(served, store=False)).json()["id"]

    assert (await served.client.get(f"/v1/responses/{made}")).status_code == 404


async def test_a_backend_that_is_gone_is_told_as_others_are(start_engine: Start, start_router: Start) -> None:
    served, engines = await start_two(start_engine, start_router)
    made = (await ask(served)).json()["id"]
    await engines["ab".index(made[-1])].stop()

    answer = await served.client.get(f"/v1/responses/{made}")

    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "no_backend_available")


async def test_other_methods_are_told_the_right_ones(start_engine: Start, start_router: Start) -> None:
    served, _ = await start_two(start_engine, start_router)
    for method, path, allow in (
        ("PUT", "/v1/responses/resp_a", "DELETE, GET"),
        ("HEAD", "/v1/responses/resp_a", "DELETE, GET"),
        ("GET", "/v1/responses/resp_a/cancel", "POST"),
    ):
        answer = await served.client.request(method, path)
        assert (answer.status_code, set(answer.headers["allow"].split(", ")) - {"HEAD"}) == (
            405,
            set(allow.split(", ")),
        )


class Team(NamedTuple):
    """A caller who may use every model."""

    id: str

    def may_use(self, model: str) -> bool:
        return True


async def test_a_response_is_found_by_its_own_caller_only(start_engine: Start, start_router: Start) -> None:
    def identify(head: RequestHead) -> Team:
        return Team(dict(head.headers).get(b"x-team", b"none").decode())

    engine = await start_engine(keeper("resp_a"))
    engine.page = raw(json_response({"id": "resp_a"}))
    served: Served = await start_router(engine, features=[Feature("teams", identify=identify)])
    red, blue = {"x-team": "red"}, {"x-team": "blue"}
    url = "/v1/responses/resp_a"
    await served.client.post("/v1/responses", json={"model": "m", "input": "hello"}, headers=red)

    others = [await served.client.request(method, url, headers=blue) for method in ("GET", "DELETE")]
    others.append(await served.client.post(f"{url}/cancel", headers=blue))
    own = await served.client.get(url, headers=red)

    assert [answer.status_code for answer in others] == [404] * 3
    assert own.status_code == 200
    assert len(stored(engine)) == 1
