"""Realtime: a session over a WebSocket passes like a request, and its frames pass unchanged."""

import asyncio
import base64
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, cast

import openai
import orjson
import pytest
from websockets.asyncio.client import connect
from websockets.asyncio.server import Server, ServerConnection, serve
from websockets.exceptions import ConnectionClosed, ConnectionClosedError, InvalidStatus
from websockets.http11 import Request, Response
from websockets.utils import accept_key

from inference_api.app import GROUPS, build
from inference_api.core import Outside
from inference_api.features.delivery.records import NOTHING
from inference_api.features.realtime import Realtime, SessionTokens
from inference_api.relay.tunnel import SessionLimits
from inference_api.routing.catalogue import parse_catalogue
from inference_api.settings import make_settings
from tests.conftest import Served, serving
from tests.fakes import Line, Received, ScriptedServer, json_response, raw, raw_client, read_answer, until
from tests.policies import EXAMPLE, bearer, entry, policy_of, write

pytestmark = pytest.mark.anyio
Start = Callable[..., Any]
Talk = Callable[[ServerConnection], Awaitable[None]]
USAGE = {
    "total_tokens": 30,
    "input_tokens": 20,
    "output_tokens": 10,
    "input_token_details": {"cached_tokens": 5, "text_tokens": 20},
}
KEY = base64.b64encode(b"0123456789abcdef").decode()
UPGRADE = f"connection: Upgrade\r\nupgrade: websocket\r\nsec-websocket-version: 13\r\nsec-websocket-key: {KEY}\r\n"
URL = "/v1/realtime?model=m"


def done(usage: Any = USAGE) -> str:
    response = {"object": "realtime.response", "id": "resp_1", "status": "completed", "output": [], "usage": usage}
    return orjson.dumps({"type": "response.done", "event_id": "event_2", "response": response}).decode()


async def talk(connection: ServerConnection) -> None:
    """As OpenAI: a session, and an answer to each request for one; other messages come back as they are."""
    await connection.send('{"type":"session.created","event_id":"event_1","session":{"type":"realtime"}}')
    async for message in connection:
        if isinstance(message, str) and '"response.create"' in message:
            await connection.send('{"type":"response.output_text.delta","event_id":"e","delta":"hello"}')
            await connection.send(done())
        else:
            await connection.send(message)


class RealtimeEngine:
    """An engine with a WebSocket. `offers`: the requests that it got; `refuses`: an answer instead of a session."""

    def __init__(self, talk: Talk = talk) -> None:
        self.talk = talk
        self.offers: list[Request] = []
        self.refuses: tuple[int, dict[str, str]] | None = None
        self.open: set[ServerConnection] = set()
        self.closes: list[int | None] = []
        self._server: Server | None = None

    async def start(self, tls: ssl.SSLContext | None = None) -> "RealtimeEngine":
        self._server = await serve(
            self._serve, "127.0.0.1", 0, process_request=self._process, select_subprotocol=_realtime,
            ping_interval=None, max_size=None, ssl=tls,
        )  # fmt: skip
        self._scheme = "http" if tls is None else "https"
        return self

    @property
    def url(self) -> str:
        assert self._server is not None
        return f"{self._scheme}://127.0.0.1:{next(iter(self._server.sockets)).getsockname()[1]}"

    async def stop(self) -> None:
        if self._server is not None:
            self._server.close()
            await self._server.wait_closed()

    def _process(self, connection: ServerConnection, request: Request) -> Response | None:
        if not request.path.startswith("/v1/realtime"):
            return connection.respond(404, "no such page")
        self.offers.append(request)
        if self.refuses is None:
            return None
        status, headers = self.refuses
        response = connection.respond(cast(Any, status), '{"error":{"message":"no"}}')
        for name, value in headers.items():
            response.headers[name] = value
        return response

    async def _serve(self, connection: ServerConnection) -> None:
        self.open.add(connection)
        try:
            await self.talk(connection)
        except ConnectionClosed:
            pass
        finally:
            await connection.wait_closed()
            self.open.discard(connection)
            self.closes.append(connection.close_code)


def _realtime(connection: ServerConnection, offered: Any) -> Any:
    return "realtime" if "realtime" in offered else None


@pytest.fixture
async def start_realtime() -> AsyncIterator[Start]:
    async with AsyncExitStack() as stack:

        async def start(talk: Talk = talk) -> RealtimeEngine:
            engine = await RealtimeEngine(talk).start()
            stack.push_async_callback(engine.stop)
            return engine

        yield start


async def routed(start_router: Start, *engines: RealtimeEngine, **settings: Any) -> Served:
    # A busy machine takes long for a connection.
    served: Served = await start_router(*cast(Any, engines), realtime="on", connect_timeout=10, **settings)
    return served


def address(served: Served, query: str = "?model=m") -> str:
    return f"ws://127.0.0.1:{served.port}/v1/realtime{query}"


async def record_of(served: Served) -> Any:
    await until(lambda: served.lines)
    return served.lines.pop()


def quiet(served: Served) -> bool:
    core = served.router.core
    counts = [core.admission.in_flight, *(origin.in_flight + origin.sessions for origin in core.fleet.origins.values())]
    return not any(counts) and not any(model.in_flight for model in core.fleet.models.values())


async def test_the_openai_client_talks_to_a_model(start_realtime: Start, start_router: Start) -> None:
    engine = await start_realtime()
    served = await routed(start_router, engine, entry={"served_model_name": "gpt-realtime/x"})
    client = openai.AsyncOpenAI(api_key="x", base_url=f"{served.url}/v1", max_retries=0)

    kinds = []
    async with client, client.realtime.connect(model="m") as connection:
        await connection.response.create()
        async for event in connection:
            kinds.append(event.type)
            if event.type == "response.done":
                break
        assert served.router.core.admission.in_flight == 1
        assert await served.metric("inference_api_realtime_sessions", model_name="m") == 1

    assert kinds == ["session.created", "response.output_text.delta", "response.done"]
    [offer] = engine.offers
    assert offer.path == "/v1/realtime?model=gpt-realtime%2Fx"
    assert "authorization" not in offer.headers
    line = await record_of(served)
    assert (line["route"], line["model"], line["status"], line["outcome"]) == ("realtime", "m", 101, "ok")
    assert (line["prompt_tokens"], line["completion_tokens"], line["cached_tokens"]) == (20, 10, 5)
    assert line["attempts"] == 1
    await until(lambda: quiet(served))
    assert await served.metric("inference_api_realtime_closed_total", model_name="m", reason="client") == 1
    assert await served.metric("inference_api_realtime_sessions", model_name="m") == 0
    assert await served.metric("inference_api_tokens_total", model_name="m", type="output") == 10


# The handshake


async def test_without_an_upgrade_it_is_426(start_realtime: Start, start_router: Start) -> None:
    served = await routed(start_router, await start_realtime())

    answer = await served.client.get(URL)
    old = await served.client.get(URL, headers={"connection": "upgrade", "upgrade": "websocket"})

    assert (answer.status_code, answer.json()["error"]["code"]) == (426, "upgrade_required")
    assert answer.headers["upgrade"] == "websocket"
    assert (old.status_code, old.headers["sec-websocket-version"]) == (426, "13")
    assert (await record_of(served))["route"] == "realtime"


async def test_it_is_off_by_default(start_router: Start) -> None:
    served: Served = await start_router()

    assert (await served.client.get(URL)).json()["error"]["code"] == "unknown_url"


@pytest.mark.parametrize(
    ("query", "headers", "status", "code"),
    [
        ("", "", 422, "validation_error"),
        ("?model=", "", 422, "validation_error"),
        ("?model=m&model=n", "", 422, "validation_error"),
        ("?model=nope", "", 404, "model_not_found"),
        ("?model=m", "sec-websocket-key: short\r\n", 400, "bad_request"),
    ],
)
async def test_a_wrong_offer_is_an_http_status(
    query: str, headers: str, status: int, code: str, start_realtime: Start, start_router: Start
) -> None:
    engine = await start_realtime()
    served = await routed(start_router, engine)

    async with raw_client(served.port) as client:
        head = f"GET /v1/realtime{query} HTTP/1.1\r\nhost: x\r\n{UPGRADE}{headers}\r\n"
        await client.send(head.encode())
        answer = await read_answer(client.reader)

    assert (answer.status, orjson.loads(answer.body)["error"]["code"]) == (status, code)
    assert engine.offers == []
    assert quiet(served)


@pytest.mark.parametrize("status", [400, 403, 404, 429, 500])
async def test_a_refusal_of_the_backend_passes(status: int, start_realtime: Start, start_router: Start) -> None:
    engine = await start_realtime()
    engine.refuses = status, {"retry-after": "7"}
    served = await routed(start_router, engine)

    with pytest.raises(InvalidStatus) as raised:
        await connect(address(served))

    assert raised.value.response.status_code == status
    assert (await record_of(served))["status"] == status
    assert quiet(served)
    assert await served.metric("inference_api_realtime_sessions", model_name="m") == 0


async def test_no_backend_is_503_and_refused_credentials_are_502(start_realtime: Start, start_router: Start) -> None:
    engine = await start_realtime()
    engine.refuses = 401, {}
    models = [
        {"name": "away", "backends": ["http://127.0.0.1:9"]},
        {"name": "provider", "backends": [engine.url], "credentials": {"env": "BACKEND_KEY"}},
    ]
    served = await routed(start_router, models=models, tokens={"BACKEND_KEY": "secret"})

    for name, status, code in (("away", 503, "no_backend_available"), ("provider", 502, "upstream_auth_failed")):
        with pytest.raises(InvalidStatus) as raised:
            await connect(address(served, f"?model={name}"))
        assert raised.value.response.status_code == status
        assert orjson.loads(raised.value.response.body)["error"]["code"] == code
    assert engine.offers[0].headers["authorization"] == "Bearer secret"
    assert quiet(served)


@pytest.mark.parametrize(
    "answer",
    [
        json_response({"hello": "there"}),
        b"HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: websocket\r\n"
        b"sec-websocket-accept: wrong\r\n\r\n",
    ],
)
async def test_an_engine_that_does_not_take_the_offer_is_502(answer: bytes, start_router: Start) -> None:
    async with ScriptedServer(raw(answer)) as engine:
        served = await routed(start_router, cast(Any, engine))
        with pytest.raises(InvalidStatus) as raised:
            await connect(address(served))

    assert raised.value.response.status_code == 502
    assert orjson.loads(raised.value.response.body)["error"]["code"] == "upstream_protocol_error"
    await until(lambda: quiet(served))


async def test_a_backend_that_is_away_gives_place_to_another(start_realtime: Start, start_router: Start) -> None:
    engine = await start_realtime()
    models = [{"name": "m", "backends": ["http://127.0.0.1:9", engine.url], "balancing": "round_robin"}]
    served = await routed(start_router, models=models)

    for _ in range(2):
        async with connect(address(served)) as connection:
            assert "session.created" in str(await connection.recv())

    assert len(engine.offers) == 2


async def test_what_a_provider_wants_goes_up(start_realtime: Start, start_router: Start) -> None:
    engine = await start_realtime()
    models = [
        {
            "name": "m",
            "backends": [engine.url],
            "served_model_name": "gpt realtime",
            "headers": {"openai-project": "p", "user-agent": "router"},
            "credentials": {"env": "BACKEND_KEY"},
        }
    ]
    served = await routed(start_router, models=models, tokens={"BACKEND_KEY": "secret"})
    protocols = ["realtime", f"openai-insecure-api-key.{EXAMPLE.key}", "openai-beta.realtime-v1"]

    headers = {"authorization": "Bearer client", "origin": "https://app.example", "cookie": "a=b"}
    offered = connect(
        address(served, "?intent=a%26b&model=m&x="), subprotocols=cast(Any, protocols), additional_headers=headers
    )
    async with offered as connection:
        assert connection.subprotocol == "realtime"

    [offer] = engine.offers
    assert offer.path == "/v1/realtime?model=gpt%20realtime&intent=a%26b&x="
    assert offer.headers["sec-websocket-protocol"] == "realtime, openai-beta.realtime-v1"
    sent = {name.lower(): value for name, value in offer.headers.raw_items()}
    assert (sent["authorization"], sent["openai-project"], sent["user-agent"]) == ("Bearer secret", "p", "router")
    assert not {"cookie", "origin", "sec-websocket-extensions", "content-length"} & sent.keys()
    assert EXAMPLE.key not in str(offer.headers) + str(served.lines)


# Keys, limits, admission


async def keyed(start_router: Start, tmp_path: Path, *engines: RealtimeEngine, **more: Any) -> Served:
    policy = write(tmp_path / "policy.json", policy_of(entry(**more)))
    return await routed(start_router, *engines, auth="keys", policy=str(policy), usage="log")


async def test_a_key_is_in_a_header_or_in_a_subprotocol(
    start_realtime: Start, start_router: Start, tmp_path: Path
) -> None:
    served = await keyed(start_router, tmp_path, await start_realtime(), models=["m"])
    insecure = f"openai-insecure-api-key.{EXAMPLE.key}"

    async with connect(address(served), additional_headers=bearer()) as connection:
        assert connection.subprotocol is None
    async with connect(address(served), subprotocols=cast(Any, ["realtime", insecure])) as connection:
        assert connection.subprotocol == "realtime"
    for protocols in (["realtime"], ["realtime", insecure[:-1] + "x"], ["realtime", insecure, insecure + "2"]):
        with pytest.raises(InvalidStatus) as raised:
            await connect(address(served), subprotocols=cast(Any, protocols))
        assert raised.value.response.status_code == 401
        assert raised.value.response.headers["www-authenticate"].startswith("Bearer")
    with pytest.raises(InvalidStatus) as raised:
        await connect(address(served, "?model=other"), additional_headers=bearer())
    assert raised.value.response.status_code == 403

    await until(lambda: len(served.lines) == 6)
    assert [line.get("key_id") for line in served.lines[:2]] == [EXAMPLE.id] * 2
    assert EXAMPLE.key not in str(served.lines)


async def test_a_session_is_one_request_and_one_stream(
    start_realtime: Start, start_router: Start, tmp_path: Path
) -> None:
    limits = [{"streams": 1}, {"requests": 3, "per": 3600}, {"tokens": 10_000, "per": 3600}]
    served = await keyed(start_router, tmp_path, await start_realtime(), limits=limits)

    def opened() -> Any:
        return connect(address(served), additional_headers=bearer())

    async with opened() as connection:
        assert connection.response is not None
        assert connection.response.headers["x-ratelimit-remaining-requests"] == "2"
        for _ in range(2):
            await connection.send('{"type":"response.create"}')
        while "response.done" not in str(await connection.recv()):
            pass
        while "response.done" not in str(await connection.recv()):
            pass
        with pytest.raises(InvalidStatus) as raised:
            await opened()
        assert raised.value.response.status_code == 429
    await until(lambda: quiet(served) and len(served.lines) == 2)

    async with opened() as connection:
        assert connection.response is not None
        # What both answers took was settled at the end; 939 are reserved for this session, the mean of those before it.
        assert connection.response.headers["x-ratelimit-remaining-tokens"] == str(10_000 - 60 - 939)


async def test_models_and_the_process_have_their_limits(start_realtime: Start, start_router: Start) -> None:
    engine = await start_realtime()
    models = [{"name": "m", "backends": [engine.url], "max_in_flight": 1}, {"name": "n", "backends": [engine.url]}]
    served = await routed(start_router, models=models, max_in_flight=2)

    async with connect(address(served)), connect(address(served, "?model=n")) as other:
        for name in "mn":
            with pytest.raises(InvalidStatus) as raised:
                await connect(address(served, f"?model={name}"))
            assert orjson.loads(raised.value.response.body)["error"]["code"] == "overloaded"
        await other.close()
        await until(lambda: served.router.core.admission.in_flight == 1)
        with pytest.raises(InvalidStatus) as raised:
            await connect(address(served))
        assert raised.value.response.status_code == 503
    await until(lambda: quiet(served))


async def test_sessions_that_are_silent_do_not_make_a_backend_stuck(start_realtime: Start, start_router: Start) -> None:
    served = await routed(start_router, await start_realtime())
    [origin] = served.router.core.fleet.origins.values()

    async with AsyncExitStack() as stack:
        for _ in range(4):
            await stack.enter_async_context(connect(address(served)))
        assert (origin.in_flight, origin.sessions) == (4, 4)
        served.router.core.health.poll()
        assert origin.crowded_since is None
    await until(lambda: quiet(served))


async def test_a_backend_that_dies_in_the_handshake_is_502(start_router: Start) -> None:
    async def script(request: Received, line: Line) -> None:
        if "realtime" in request.target:
            line.reset()
        else:
            await line.send(json_response({}))

    async with ScriptedServer(script) as engine:
        served = await routed(start_router, cast(Any, engine))
        with pytest.raises(InvalidStatus) as raised:
            await connect(address(served))

    assert orjson.loads(raised.value.response.body)["error"]["code"] == "upstream_reset"
    assert quiet(served)


async def test_the_example_is_as_the_page_says(
    start_realtime: Start, start_router: Start, capsys: pytest.CaptureFixture[str]
) -> None:
    page = (Path(__file__).parents[2] / "docs" / "realtime.md").read_text()
    code = page.partition("```python\n")[2].partition("asyncio.run(")[0]
    models = [{"name": "gpt-realtime", "backends": [(await start_realtime()).url]}]
    served = await routed(start_router, models=models)
    names: dict[str, Any] = {}

    exec(code, names)
    await names["main"](f"{served.url}/v1")

    assert capsys.readouterr().out.split() == ["session.created", "response.output_text.delta", "response.done"]


@pytest.mark.parametrize(
    ("asked", "status", "param"),
    [
        ({"race": {"members": ["a", "b"]}}, 422, "model"),
        ({"consensus": {"members": ["a", "b"]}}, 422, None),
    ],
)
async def test_several_models_cannot_hold_one_session(
    asked: dict[str, Any], status: int, param: str | None, start_realtime: Start, start_router: Start
) -> None:
    engine = await start_realtime()
    members = [{"name": name, "backends": [engine.url]} for name in "ab"]
    served = await routed(start_router, models=[*members, {"name": "m", **asked}])

    with pytest.raises(InvalidStatus) as raised:
        await connect(address(served))

    assert raised.value.response.status_code == status
    if param is not None:
        assert orjson.loads(raised.value.response.body)["error"]["param"] == param
    assert engine.offers == []
    assert quiet(served)


async def test_variants_and_fallbacks_hold_a_session(start_realtime: Start, start_router: Start) -> None:
    engine = await start_realtime()
    busy = await start_realtime()
    busy.refuses = 503, {}
    models = [
        {"name": "away", "backends": ["http://127.0.0.1:9"], "fallbacks": ["busy", "b"]},
        {"name": "busy", "backends": [busy.url]},
        {"name": "b", "backends": [engine.url], "served_model_name": "served b"},
        {"name": "m", "split": {"variants": {"away": 1, "b": 0}, "sticky": "none"}},
    ]
    served = await routed(start_router, models=models)

    async with connect(address(served)) as connection:
        assert connection.response is not None
        assert connection.response.headers["x-inference-model"] == "b"
        assert connection.response.headers["x-inference-fallback"] == "2"
        assert "session.created" in str(await connection.recv())
        await connection.send('{"type":"response.create"}')
        while "response.done" not in str(await connection.recv()):
            pass

    assert [offer.path for offer in engine.offers] == ["/v1/realtime?model=served%20b"]
    line = await record_of(served)
    assert (line["model"], line["asked_model"], line["completion_tokens"]) == ("b", "m", 10)
    await until(lambda: quiet(served))


async def test_what_other_features_do_with_answers_leaves_a_session_alone(
    start_realtime: Start, start_router: Start
) -> None:
    engine = await start_realtime()
    keys: dict[str, Any] = {
        "cache": {"ttl": 60, "temperature": 2},
        "hedge": {"after": 50},
        "queue": {"timeout": 5, "size": 5},
        "max_in_flight": 1,
        "hold": 5,
        "price": {"input": 1, "output": 2},
        "routes": ["realtime"],
    }
    served = await routed(start_router, engine, entry=keys)

    async with connect(address(served)) as connection:
        assert "session.created" in str(await connection.recv())
        await connection.send('{"type":"response.create"}')
        # Waits for the place of the first one.
        second = asyncio.create_task(connect(address(served)).__aenter__())
        await until(lambda: served.router.core.admission.in_flight == 2)
        while "response.done" not in str(await connection.recv()):
            pass
    other = await second
    await other.close()
    await until(lambda: len(served.lines) == 2 and quiet(served))

    assert len(engine.offers) == 2
    assert [line.get("cost_nanos") for line in served.lines] == [40_000, 0]


# Frames


@pytest.mark.parametrize("size", [0, 1, 125, 126, 65535, 65536, 300_000])
async def test_messages_pass_as_they_are(size: int, start_realtime: Start, start_router: Start) -> None:
    served = await routed(start_router, await start_realtime())

    async with connect(address(served), max_size=None) as connection:
        await connection.recv()
        await connection.send(b"\x00" * size)
        await connection.send(["frag", "men", "ted" * size])
        assert await connection.recv() == b"\x00" * size
        assert await connection.recv() == "fragmen" + "ted" * size
        # Pings go to the engine, whose pong comes back.
        await asyncio.wait_for(await connection.ping(b"x"), 10)


async def test_a_backend_behind_tls(certificate: Path, start_router: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(certificate)
    engine = await RealtimeEngine().start(tls)
    try:
        served = await routed(start_router, engine)
        async with connect(address(served), max_size=None) as connection:
            assert "session.created" in str(await connection.recv())
            for size in (1, 70_000, 1_000_000):
                await connection.send(b"x" * size)
                assert len(await connection.recv()) == size
        await until(lambda: engine.closes and quiet(served))
    finally:
        await engine.stop()
    assert engine.closes == [1000]


@pytest.mark.parametrize("code", [1000, 1001, 3000, 4999])
@pytest.mark.parametrize("who", ["client", "upstream"])
async def test_codes_of_a_close_pass(who: str, code: int, start_realtime: Start, start_router: Start) -> None:
    async def closing(connection: ServerConnection) -> None:
        if who == "upstream":
            await connection.close(code, "enough")
        await connection.wait_closed()

    engine = await start_realtime(closing)
    served = await routed(start_router, engine)

    async with connect(address(served)) as connection:
        if who == "client":
            await connection.close(code, "enough")
        await connection.wait_closed()
        assert (connection.close_code, connection.close_reason) == (code, "enough")
    await until(lambda: engine.closes)

    assert engine.closes == [code]
    assert (await record_of(served))["outcome"] == "ok"
    assert await served.metric("inference_api_realtime_closed_total", model_name="m", reason=who) == 1
    assert quiet(served)


async def test_a_message_that_is_too_large_ends_the_session(start_realtime: Start, start_router: Start) -> None:
    engine = await start_realtime()
    served = await routed(start_router, engine, max_body_bytes=100_000)

    async with connect(address(served)) as connection:
        await connection.recv()
        await connection.send(["x" * 60_000, "y" * 40_000])
        assert len(await connection.recv()) == 100_000
        await connection.send(["x" * 60_000, "y" * 40_001])
        with pytest.raises(ConnectionClosedError) as raised:
            await connection.recv()

    assert raised.value.rcvd is not None
    assert raised.value.rcvd.code == 1009
    line = await record_of(served)
    assert (line["status"], line["outcome"]) == (101, "refused")
    assert await served.metric("inference_api_realtime_closed_total", reason="error") == 1
    await until(lambda: quiet(served) and not engine.open)


async def test_a_client_that_does_not_read_stops_the_backend(start_realtime: Start, start_router: Start) -> None:
    sent = 0

    async def counted(connection: ServerConnection) -> None:
        nonlocal sent
        while True:
            await connection.send(b"x" * 60_000)
            sent += 60_000

    engine = await start_realtime(counted)
    served = await routed(start_router, engine)

    async with raw_client(served.port, receive_buffer=4096) as client:
        await client.send(f"GET {URL} HTTP/1.1\r\nhost: x\r\n{UPGRADE}\r\n".encode())
        await until(lambda: sent > 0)
        before = -1
        while sent != before:
            before = sent
            await asyncio.sleep(0.3)
        # Buffers of the kernel, on both ways, and the router's
        assert sent < 20_000_000
    await until(lambda: quiet(served) and not engine.open)


async def test_a_backend_that_does_not_read_stops_the_client(start_realtime: Start, start_router: Start) -> None:
    waiting, whole = asyncio.Event(), 40_000_000

    async def deaf(connection: ServerConnection) -> None:
        connection.transport.pause_reading()
        await waiting.wait()
        connection.transport.resume_reading()
        total = 0
        async for message in connection:
            total += len(message)
            if total == whole:
                await connection.send(str(total))

    served = await routed(start_router, await start_realtime(deaf))
    async with connect(address(served), max_size=None) as connection:
        progress: list[int] = []
        sending = asyncio.create_task(_send_all(connection, whole // 50_000, b"x" * 50_000, progress))
        before = -1
        while len(progress) != before:
            before = len(progress)
            await asyncio.sleep(0.3)
        # Buffers of the kernel, on both ways, and the router's
        assert 0 < len(progress) * 50_000 < whole / 2
        waiting.set()
        assert await connection.recv() == str(whole)
        await sending
    await until(lambda: quiet(served))


async def _send_all(connection: Any, times: int, data: bytes, progress: list[int]) -> None:
    for number in range(times):
        await connection.send(data)
        progress.append(number)


async def test_a_session_may_be_silent_beyond_the_timeouts_of_answers(
    start_realtime: Start, start_router: Start
) -> None:
    async def slow(connection: ServerConnection) -> None:
        await connection.send("one")
        await asyncio.sleep(1.0)
        await connection.send("two")
        await connection.wait_closed()

    timeouts = {"idle_timeout": 0.2, "first_byte_timeout": 0.6, "total_timeout": 0.6, "stream_timeout": 0.6}
    served = await routed(start_router, await start_realtime(slow), **timeouts)

    async with connect(address(served)) as connection:
        assert [await connection.recv(), await connection.recv()] == ["one", "two"]
    await until(lambda: quiet(served))


# Ends


async def test_a_client_that_leaves_ends_the_session_of_the_backend(start_realtime: Start, start_router: Start) -> None:
    engine = await start_realtime()
    served = await routed(start_router, engine)

    connection = await connect(address(served))
    await connection.recv()
    connection.transport.abort()
    await until(lambda: not engine.open and quiet(served))

    line = await record_of(served)
    assert (line["status"], line["outcome"]) == (499, "client_gone")
    assert await served.metric("inference_api_realtime_closed_total", reason="client") == 1


async def test_a_client_that_leaves_during_the_handshake_leaves_nothing(start_router: Start) -> None:
    offers = 0

    async def hang(request: Received, line: Line) -> None:
        nonlocal offers
        offers += 1
        await line.gone()

    async with ScriptedServer(hang) as engine:
        served = await routed(start_router, cast(Any, engine), health_interval=1000)
        async with raw_client(served.port) as client:
            await client.send(f"GET {URL} HTTP/1.1\r\nhost: x\r\n{UPGRADE}\r\n".encode())
            await until(lambda: served.router.core.admission.in_flight and offers)
        await until(lambda: quiet(served))
    assert (await record_of(served))["outcome"] == "client_gone"


async def test_a_client_that_does_not_wait_for_the_answer_gets_none(start_realtime: Start, start_router: Start) -> None:
    engine = await start_realtime()
    served = await routed(start_router, engine)

    async with raw_client(served.port) as client:
        early = b"\x81\x85\x00\x00\x00\x00early"
        await client.send(f"GET {URL} HTTP/1.1\r\nhost: x\r\n{UPGRADE}\r\n".encode() + early)
        assert await client.reader.read() == b""
    await until(lambda: quiet(served) and not engine.open)
    assert (await record_of(served))["outcome"] == "client_gone"


async def test_a_backend_that_is_lost_is_1011(start_realtime: Start, start_router: Start) -> None:
    async def dies(connection: ServerConnection) -> None:
        await connection.send("one")
        await connection.recv()
        connection.transport.abort()

    served = await routed(start_router, await start_realtime(dies))

    async with connect(address(served)) as connection:
        assert await connection.recv() == "one"
        await connection.send("two")
        with pytest.raises(ConnectionClosedError) as raised:
            await connection.recv()

    assert raised.value.rcvd is not None
    assert raised.value.rcvd.code == 1011
    assert (await record_of(served))["outcome"] == "reset"
    assert await served.metric("inference_api_realtime_closed_total", reason="upstream") == 1
    assert quiet(served)


async def test_a_backend_that_is_lost_in_a_frame_leaves_no_whole_message(start_router: Start) -> None:
    async def script(request: Received, line: Line) -> None:
        key = request.header("sec-websocket-key")
        if key is None:
            await line.send(json_response({}))
        else:
            await line.send(_accepted(key) + b"\x81\x0ahalf")
            line.reset()

    async with ScriptedServer(script) as engine:
        served = await routed(start_router, cast(Any, engine), health_interval=1000)
        async with connect(address(served)) as connection:
            with pytest.raises(ConnectionClosedError) as raised:
                await connection.recv()
        await until(lambda: quiet(served))

    assert raised.value.rcvd is None
    assert (await record_of(served))["outcome"] == "reset"


def _accepted(key: str) -> bytes:
    head = "HTTP/1.1 101 x\r\nupgrade: websocket\r\nconnection: upgrade\r\nsec-websocket-accept: {}\r\n\r\n"
    return head.format(accept_key(key)).encode()


async def test_a_session_has_an_end(start_realtime: Start, start_router: Start) -> None:
    engine = await start_realtime()
    served = await routed(start_router, engine)
    _page(served)._limits = SessionLimits(1000, session=0.2)

    async with connect(address(served)) as connection:
        await connection.recv()
        await connection.wait_closed()

    assert connection.close_code == 1000
    assert await served.metric("inference_api_realtime_closed_total", reason="time") == 1
    assert (await record_of(served))["outcome"] == "ok"
    await until(lambda: quiet(served) and not engine.open)


def _page(served: Served) -> Realtime:
    [page] = served.router.features["realtime"].pages
    return cast(Realtime, page.app)


async def test_a_router_that_stops_sends_its_clients_to_another(start_realtime: Start, start_router: Start) -> None:
    engine = await start_realtime()
    lines: list[Any] = []
    catalogue = parse_catalogue({"models": [{"name": "m", "backends": [engine.url]}]})
    settings = make_settings({"realtime": "on"}, GROUPS)
    router = build(settings, Outside(write_line=lines.append, catalogue=catalogue))
    async with serving(router, settings) as url:
        connection = await connect(url.replace("http", "ws") + URL)
        await connection.recv()
    await connection.wait_closed()

    assert connection.close_code == 1012
    [line] = [line for line in lines if line.get("route") == "realtime"]
    assert (line["status"], line["outcome"]) == (101, "drain_timeout")
    await until(lambda: not engine.open)


# SessionTokens


def test_tokens_are_summed() -> None:
    tokens = SessionTokens()
    for text in (done(), done(), '{"type":"x","text":"\\"response.done\\""}', '{"type":"response.done"', "[]"):
        tokens.message(text.encode())
    tokens.message(b'{"type":"transcription.done","usage":{"prompt_tokens":1,"completion_tokens":2}}')
    tokens.message(b'{"type":"other","x":"response.done", "y": {"response.done": 1}}')

    assert tokens.metered() == (41, 10, 22, None, "reported")


def test_tokens_that_are_not_reported_are_unknown_and_not_0() -> None:
    assert SessionTokens().metered() == NOTHING
    silent = SessionTokens()
    silent.message(done(None).encode())
    assert silent.metered() == (None, None, None, None, "none")
