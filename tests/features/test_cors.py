"""CORS: websites of the listed origins may use the router, and get its headers with every answer, errors too."""

import asyncio
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import orjson
import pytest

from inference_api.features.cors import EXPOSED
from inference_api.server.cycle import Cycle
from tests.conftest import Served
from tests.fakes import (
    CHAT,
    COMPLETION,
    DONE,
    LAST_CHUNK,
    SSE_HEAD,
    FakeEngine,
    Line,
    Received,
    ScriptedServer,
    chunk,
    event,
    json_response,
    post,
    raw,
    raw_client,
    read_answer,
    until,
)
from tests.policies import bearer, entry, policy_of, write

pytestmark = pytest.mark.anyio
Start = Callable[..., Any]
APP, OTHER = "https://app.example", "https://other.example"
URL = "/v1/chat/completions"
CHROMIUM = shutil.which("chromium")
ON_ANSWERS = {
    "access-control-allow-origin": APP,
    "access-control-expose-headers": ", ".join(EXPOSED),
    "vary": "Origin",
}
PREFLIGHT = {
    "origin": APP,
    "access-control-request-method": "POST",
    "access-control-request-headers": "authorization,content-type,x-stainless-os",
}


def cors(answer: httpx.Response) -> dict[str, str]:
    """Its headers of CORS, none of them twice."""
    names = [name for name, _ in answer.headers.multi_items() if name.startswith("access-control-") or name == "vary"]
    assert len(names) == len(set(names))
    return {name: answer.headers[name] for name in names}


def test_headers_that_scripts_may_read_have_full_names() -> None:
    assert list(EXPOSED) == [
        *("x-request-id", "retry-after", "retry-after-ms"),
        *("x-ratelimit-limit-requests", "x-ratelimit-remaining-requests", "x-ratelimit-reset-requests"),
        *("x-ratelimit-limit-tokens", "x-ratelimit-remaining-tokens", "x-ratelimit-reset-tokens"),
        *("x-inference-model", "x-inference-fallback", "x-inference-variant", "x-inference-votes"),
        *("x-inference-cache", "x-inference-prompt", "x-inference-budget-remaining"),
    ]


@pytest.mark.parametrize("path", [URL, "/v1/models", "/v1/responses/resp_1", "/nowhere"])
async def test_a_preflight_is_answered_without_a_key(path: str, start_router: Start, tmp_path: Path) -> None:
    policy = write(tmp_path / "policy.json", policy_of(entry()))
    served: Served = await start_router(cors_origins=f"http://localhost:3000,{APP}", auth="keys", policy=str(policy))

    answer = await served.client.options(path, headers=PREFLIGHT)

    assert (answer.status_code, answer.content) == (204, b"")
    assert cors(answer) == {
        "access-control-allow-origin": APP,
        "access-control-allow-methods": "GET, POST, DELETE",
        "access-control-allow-headers": PREFLIGHT["access-control-request-headers"],
        "access-control-max-age": "600",
        "vary": "Origin",
    }
    assert answer.headers["x-request-id"]
    await until(lambda: served.lines)
    assert (served.lines[0]["status"], served.lines[0]["outcome"]) == (204, "ok")


async def test_what_is_no_preflight_of_an_origin_is_no_preflight(start_router: Start) -> None:
    served: Served = await start_router(cors_origins=APP)

    other = await served.client.options(URL, headers=PREFLIGHT | {"origin": OTHER})
    plain = await served.client.options(URL, headers={"origin": APP})
    nobody = await served.client.options(URL, headers={"access-control-request-method": "POST"})
    bare = await served.client.options(URL, headers={"origin": APP, "access-control-request-method": "GET"})

    assert [one.status_code for one in (other, plain, nobody, bare)] == [405, 405, 405, 204]
    assert [cors(one) for one in (other, plain, nobody)] == [{}, ON_ANSWERS, {}]
    assert "access-control-allow-headers" not in bare.headers


async def test_every_answer_has_the_headers(start_engine: Start, start_router: Start, tmp_path: Path) -> None:
    policy = write(tmp_path / "policy.json", policy_of(entry(limits=[{"requests": 4, "per": 60}])))
    engine: FakeEngine = await start_engine()
    settings = {"cors_origins": APP, "auth": "keys", "policy": str(policy), "max_body_bytes": 1000}
    served: Served = await start_router(engine, **settings)
    origins = (APP, OTHER, None)

    async def ask(origin: str | None, method: str, path: str, body: Any = None, key: bool = True) -> httpx.Response:
        headers = (bearer() if key else {}) | ({"origin": origin} if origin else {})
        return await served.client.request(method, path, json=body, headers=headers)

    stream = raw(SSE_HEAD, chunk(event()), chunk(DONE) + LAST_CHUNK)
    for origin in origins:
        expected = ON_ANSWERS if origin == APP else {}
        engine.script = raw(json_response(COMPLETION))
        answers = {200: [await ask(origin, "POST", URL, CHAT), await ask(origin, "GET", "/v1/models")]}
        answers[200].append(await ask(origin, "GET", "/healthz", key=False))
        answers[404] = [await ask(origin, "POST", URL, CHAT | {"model": "nope"}), await ask(origin, "GET", "/nope")]
        answers[401] = [await ask(origin, "POST", URL, CHAT, key=False)]
        answers[405] = [await ask(origin, "GET", URL)]
        answers[413] = [await ask(origin, "POST", URL, CHAT | {"x": "y" * 2000})]
        answers[422] = [await ask(origin, "POST", URL, {"model": "m"})]
        if origin == APP:
            engine.script = stream
            answers[200].append(await ask(origin, "POST", URL, CHAT | {"stream": True}))
            engine.script = raw(json_response({}, "400 Bad Request", b"access-control-allow-origin: *\r\n"))
            answers[400] = [await ask(origin, "POST", URL, CHAT)]
            engine.script = _breaks
            answers[502] = [await ask(origin, "POST", URL, CHAT)]
        for status, found in answers.items():
            for answer in found:
                assert answer.status_code in (status, 429), (origin, answer.request.url, answer.text)
                assert cors(answer) == expected, (origin, answer.request.url)
    limited = await ask(APP, "POST", URL, CHAT)
    assert (limited.status_code, cors(limited)) == (429, ON_ANSWERS)


async def _breaks(request: Received, line: Line) -> None:
    line.reset()


async def test_a_head_that_is_repeated_has_them_again_and_an_answer_is_still_one_write(
    start_engine: Start, start_router: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    served: Served = await start_router(await start_engine(), cors_origins=APP)
    short_cuts = []
    respond = Cycle.respond

    def spied(self: Cycle, *args: Any) -> bool:
        short_cuts.append(respond(self, *args))
        return short_cuts[-1]

    monkeypatch.setattr(Cycle, "respond", spied)
    found = []
    async with raw_client(served.port) as client:
        for origin in (APP, APP, OTHER, APP):
            await client.send(post(URL, CHAT, b"origin: %b\r\n" % origin.encode()))
            found.append((await read_answer(client.reader)).headers.get("access-control-allow-origin"))

    assert found == [APP, APP, None, APP]
    assert short_cuts == [True] * 4


async def test_every_origin_may_use_it_with_a_star_and_never_with_credentials(
    start_engine: Start, start_router: Start
) -> None:
    served: Served = await start_router(await start_engine(), cors_origins="*")

    answers = [
        await served.client.post(URL, json=CHAT, headers={"origin": origin, "cookie": "a=b"})
        for origin in (APP, OTHER, "null")
    ]
    preflight = await served.client.options(URL, headers=PREFLIGHT)

    assert [cors(answer) for answer in answers] == [ON_ANSWERS | {"access-control-allow-origin": "*"}] * 3
    assert preflight.headers["access-control-allow-origin"] == "*"
    assert "access-control-allow-credentials" not in preflight.headers


async def test_an_origin_that_is_given_twice_is_none(start_engine: Start, start_router: Start) -> None:
    served: Served = await start_router(await start_engine(), cors_origins=APP)

    async with raw_client(served.port) as client:
        await client.send(post(URL, CHAT, f"origin: {APP}\r\norigin: {OTHER}\r\n".encode()))
        answer = await read_answer(client.reader)

    assert (answer.status, answer.headers.get("access-control-allow-origin")) == (200, None)


async def test_the_example_is_as_the_page_says(start_router: Start) -> None:
    page = (Path(__file__).parents[2] / "docs" / "cors.md").read_text()
    shown = page[page.rindex("OPTIONS /v1") :].partition("```")[0]
    asked, _, answered = shown.partition("\n\n")
    first, *lines = asked.splitlines()
    served: Served = await start_router(cors_origins=APP)

    answer = await served.client.options(first.split(" ")[1], headers=dict(line.split(": ", 1) for line in lines))

    status, *expected = answered.strip().splitlines()
    assert status == f"HTTP/1.1 {answer.status_code} No Content"
    assert dict(line.split(": ", 1) for line in expected) == cors(answer)


async def test_it_is_off_by_default(start_engine: Start, start_router: Start) -> None:
    served: Served = await start_router(await start_engine())

    answer = await served.client.post(URL, json=CHAT, headers={"origin": APP})

    assert cors(answer) == {}
    assert (await served.client.options(URL, headers=PREFLIGHT)).status_code == 405


PAGE = """<!doctype html><script type="module">
const result = {};
const url = new URLSearchParams(location.search).get("router");
const headers = {"content-type": "application/json", "authorization": "Bearer x"};
const ask = (more) => fetch(url + "/v1/chat/completions",
  {method: "POST", headers, body: JSON.stringify({model: "m", messages: [{role: "user", content: "hi"}], ...more})});
try {
  const answer = await ask({stream: true});
  const reader = answer.body.getReader();
  const first = await reader.read();
  result.first = new TextDecoder().decode(first.value);
  result.id = answer.headers.get("x-request-id");
  result.rest = "";
  await fetch("/go", {method: "POST", body: "{}"});
  for (let part = await reader.read(); !part.done; part = await reader.read())
    result.rest += new TextDecoder().decode(part.value);
  const refused = await ask({model: "nope"});
  result.code = (await refused.json()).error.code;
} catch (error) { result.error = String(error); }
await fetch("/result", {method: "POST", body: JSON.stringify(result)});
</script>"""


class Website(ScriptedServer):
    """A page that asks the router, and what it found. `go`: it has read the first event."""

    def __init__(self) -> None:
        super().__init__(self._serve)
        self.result: dict[str, str] | None = None
        self.go = asyncio.Event()

    async def _serve(self, request: Received, line: Line) -> None:
        if request.target == "/go":
            self.go.set()
        elif request.target == "/result":
            self.result = orjson.loads(request.body)
        page = PAGE.encode()
        head = b"HTTP/1.1 200 OK\r\ncontent-type: text/html\r\ncontent-length: %d\r\n\r\n" % len(page)
        await line.send(head + page)


@pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium here (apt-get install chromium)")
@pytest.mark.parametrize("is_listed", [True, False])
async def test_a_browser_reads_a_stream_of_another_origin(
    is_listed: bool, start_engine: Start, start_router: Start, tmp_path: Path
) -> None:
    assert CHROMIUM is not None
    async with Website() as site:

        async def script(request: Received, line: Line) -> None:
            await line.send(SSE_HEAD, chunk(event("first")))
            # The rest comes when the browser has read that: it is not held back.
            await site.go.wait()
            await line.send(chunk(event("second")), chunk(DONE), LAST_CHUNK)

        served: Served = await start_router(
            await start_engine(script), cors_origins=site.url if is_listed else "http://other.example"
        )
        options = ("--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/profile")
        browser = await asyncio.create_subprocess_exec(
            *(CHROMIUM, *options, f"{site.url}/?router={served.url}"),
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.DEVNULL,
        )
        try:
            await until(lambda: site.result is not None or browser.returncode is not None, seconds=40)
        finally:
            with suppress(ProcessLookupError):
                browser.kill()
            await browser.wait()

    assert site.result is not None
    if not is_listed:
        assert site.result == {"error": "TypeError: Failed to fetch"}
        return
    assert "first" in site.result["first"]
    assert site.result["rest"].endswith("[DONE]\n\n")
    assert site.result["code"] == "model_not_found"
    assert site.result["id"] in {line["request_id"] for line in served.lines}
