"""T76-T78: what must stay where it is: keys, prompts and completions, and request ids that are more than an id."""

import asyncio
import contextlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import orjson
import pytest

from inference_api.http.routes import INFERENCE_ROUTES
from tests.command import command, log_of, ready
from tests.fakes import CHAT, Line, Received, Script, answer, event, form, json_response, post, raw, raw_client, sse
from tests.faults.lab import URL, Lab, answers, refusal_of, talk

pytestmark = pytest.mark.anyio
Start = Callable[..., Any]

# T76

CLIENT_KEY, BACKEND_KEY, PROMPT, COMPLETION = "canary-client", "canary-backend", "canary-prompt", "canary-completion"
CARRIERS = ("authorization", "x-api-key", "api-key", "cookie", "proxy-authorization", "x-request-id", "user-agent")


MULTIPART = {"content-type": "multipart/form-data; boundary=B"}
GARBLED = [b"%s\r\n\r\n", b"GET / HTTP/1.1\r\nx: %s\x00\r\n\r\n", b"GET / HTTP/1.1\r\nhost: %s /\r\n\r\n"]
HTML = f"<{COMPLETION}>".encode().ljust(30)


async def faulty(request: Received, line: Line) -> None:
    """An engine that repeats what it should not, in every way to answer and to fail."""
    spoken = f"{COMPLETION} {BACKEND_KEY}"
    if b"reset" in request.body:
        await sse(event(spoken), then=Line.reset)(request, line)
    elif b"broken" in request.body:
        await line.send(json_response({"x": spoken})[:-5])
        line.close()
    elif b"garbage" in request.body:
        await line.send(f"{spoken}\r\n\r\n".encode())
    elif b"html" in request.body:
        await line.send(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 30\r\n\r\n", HTML)
    elif b"refuse" in request.body:
        await line.send(json_response({"error": {"message": "no"}}, "400 No"))
    elif b"moved" in request.body:
        await line.send(json_response({}, "302 Found", f"location: http://{BACKEND_KEY}/\r\n".encode()))
    else:
        await answer(request, line)


async def test_t76_keys_prompts_and_completions_are_nowhere_but_where_they_belong(
    tmp_path: Path, start_engine: Start
) -> None:
    engine = await start_engine(faulty)
    keys = {name: f"Bearer {CLIENT_KEY}" for name in CARRIERS}
    said = {"model": "m", "messages": [{"role": "user", "content": PROMPT}]}
    upload = form(f'content-disposition: form-data; name="file"; filename="{PROMPT}"\r\n\r\n{PROMPT}'.encode())

    async with command(
        tmp_path,
        engine,
        entry={"credentials": {"env": "BACKEND_TOKEN"}},
        environ={"BACKEND_TOKEN": BACKEND_KEY},
        log_level="debug",
    ) as router:
        await ready(router.client)
        router.client.headers.update(keys)
        ask = router.client.post
        answered = [await ask(URL, json=said), await ask(URL, json=said | {"stream": True})]
        with contextlib.suppress(httpx.RemoteProtocolError):
            await ask(URL, json=said | {"stream": True, "x": "reset"})
        own = [await ask(URL, json=said | {"x": way}) for way in ("broken", "garbage", "html", "moved")]
        own += [
            await ask(URL, json=said | {"x": "refuse"}),
            await ask(URL, json=said | {"stream": PROMPT}),
            await ask(URL, json={"model": "nope", "messages": PROMPT}),
            await ask(URL, json={"model": "nope", "messages": [PROMPT]}),
            await ask(URL, content=f'{{"model": {PROMPT}', headers={"content-type": "application/json"}),
            await ask("/v1/audio/translations", content=upload, headers=MULTIPART),
            await ask("/v1/audio/translations", content=upload[9:], headers=MULTIPART),
            await ask(f"/nope?key={CLIENT_KEY}", json=said),
            await router.client.get(f"/v1/models/nope?key={CLIENT_KEY}"),
        ]
        garbled = []
        for request in GARBLED:
            async with raw_client(router.port) as client:
                await client.send(request % CLIENT_KEY.encode())
                garbled.append(await client.reader.read(-1))
        metrics = await router.client.get("/metrics")
        code, out, err = await router.stop()

    assert [reply.status_code for reply in answered] == [200, 200]
    assert [reply.status_code for reply in own] == [502, 502, 502, 502, 400, 422, 422, 404, 400, 422, 400, 404, 404]
    assert (code, err) == (0, "")
    requests = [line for line in log_of(out) if line["event"] == "request"]
    assert len(requests) >= len(answered) + len(own) + len(garbled) + 1
    for text in (out, metrics.text, *(reply.text for reply in own), *(reply.decode() for reply in garbled)):
        assert "canary" not in text
    for reply in (*answered, *own):
        assert "canary" not in repr(reply.headers.raw)
    # The engine sees its own key, the prompt, and nothing of the client's keys, under no name.
    for received in engine.requests:
        assert received.header("authorization") == f"Bearer {BACKEND_KEY}"
        assert CLIENT_KEY not in repr([pair for pair in received.headers if pair[0] != "user-agent"])
        assert CLIENT_KEY.encode() not in received.body


# T77

KEYS = {"authorization": "Bearer theirs", "x-api-key": "theirs", "api-key": "theirs", "cookie": "sid=theirs"}
UPLOAD = form(b'content-disposition: form-data; name="model"\r\n\r\nm')


def request_of(multipart: bool) -> dict[str, Any]:
    if multipart:
        return {"content": UPLOAD, "headers": KEYS | MULTIPART}
    fields = {"messages": [], "prompt": "", "input": "", "tokens": [], "query": "", "documents": []}
    return {"json": {"model": "m", **fields}, "headers": KEYS}


@pytest.mark.parametrize(
    ("credentials", "token", "seen"),
    [
        (None, "ours", None),
        ({"env": "BACKEND_TOKEN"}, "ours", "Bearer ours"),
        ({"env": "BACKEND_TOKEN"}, None, None),
        ({"env": "BACKEND_TOKEN"}, "", None),
        ("passthrough", "ours", "Bearer theirs"),
    ],
)
async def test_t77_an_engine_sees_the_key_that_is_meant_for_it_or_none(
    credentials: Any, token: str | None, seen: str | None, lab: Lab
) -> None:
    tokens = {} if token is None else {"BACKEND_TOKEN": token}
    engine = await lab.engine()
    served = await lab.router(engine, entry={"credentials": credentials}, tokens=tokens)

    for route in INFERENCE_ROUTES:
        response = await served.client.post(route.path, **request_of(route.multipart))
        assert response.status_code == 200, route.path

    assert len(engine.requests) == len(INFERENCE_ROUTES)
    for received in engine.requests:
        assert received.header("authorization") == seen
        assert received.names.isdisjoint({"x-api-key", "api-key", "cookie", "proxy-authorization"})


async def test_t77_another_attempt_has_the_same_key(lab: Lab) -> None:
    async def reset(request: Received, line: Line) -> None:
        line.reset()

    entry = {"credentials": {"env": "BACKEND_TOKEN"}}
    served = await lab.router(*[answers(reset, answer)] * 2, entry=entry, tokens={"BACKEND_TOKEN": "ours"})

    assert (await served.client.post(URL, json=CHAT, headers=KEYS)).status_code == 200

    received = [request for engine in lab.engines for request in engine.requests]
    assert [request.header("authorization") for request in received] == ["Bearer ours"] * 2
    assert all(request.names.isdisjoint({"x-api-key", "api-key", "cookie"}) for request in received)


async def test_t77_cookies_of_an_engine_stay_with_it(lab: Lab) -> None:
    served = await lab.router(engine := await lab.engine(raw(json_response({}, headers=b"set-cookie: sid=alice\r\n"))))

    first, second = await served.chat(), await served.chat()

    assert "set-cookie" not in first.headers
    assert "set-cookie" not in second.headers
    assert all("cookie" not in request.names for request in engine.requests)


# T78

BAD_IDS = [b"", b"x" * 129, b"x" * 10_000, "é".encode(), b"a b", b"a,b", b"a\tb", b'"}', b"../x", b"{{x}}", b"\xff"]
# These do not even come through the parser.
INJECTED = [b"a\r\n\tb", b"a\rb", b"a\nb", b"a\x00b", b"\x1b[31mred", b"\x1b]0;x\x07", b"a\x7f"]
SOUND_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")


async def test_t78_a_request_id_that_is_none_is_replaced(lab: Lab) -> None:
    served = await lab.router(engine := await lab.engine())

    for given in BAD_IDS:
        said = await talk(served, post(URL, CHAT, b"connection: close\r\nx-request-id: " + given + b"\r\n"))
        assert given not in said.partition(b"\r\n\r\n")[0] or not given
    for given in INJECTED:
        said = await talk(served, post(URL, CHAT, b"x-request-id: " + given + b"\r\n"))
        assert refusal_of(said) == (400, "bad_request")

    assert len(engine.requests) == len(BAD_IDS)
    for request in engine.requests:
        assert SOUND_ID.fullmatch(request.header("x-request-id") or "")
    assert all(SOUND_ID.fullmatch(line["request_id"]) for line in served.lines)


async def test_t78_of_two_ids_the_first_counts(lab: Lab) -> None:
    served = await lab.router(engine := await lab.engine())

    said = await talk(served, post(URL, CHAT, b"connection: close\r\nx-request-id: a\r\nx-request-id: b c\r\n"))

    assert said.count(b"\r\nx-request-id: ") == said.count(b"\r\nx-request-id: a\r\n") == 1
    [sent] = [value for name, value in engine.requests[0].headers if name == "x-request-id"]
    assert sent.startswith("a-")


async def test_t78_two_requests_with_one_id_are_two_to_the_engines(lab: Lab) -> None:
    both = asyncio.Event()

    async def together(request: Received, line: Line) -> None:
        if len(engine.requests) == 2:
            both.set()
        await both.wait()
        await answer(request, line)

    engine = await lab.engine(together)
    served = await lab.router(engine)
    ask = served.client.post

    replies = await asyncio.gather(*(ask(URL, json=CHAT, headers={"x-request-id": "same"}) for _ in range(2)))

    assert [reply.status_code for reply in replies] == [200, 200]
    assert [reply.headers["x-request-id"] for reply in replies] == ["same", "same"]
    ids = {request.header("x-request-id") or "" for request in engine.requests}
    assert len(ids) == 2
    assert all(re.fullmatch(r"same-[0-9a-f]{8}", one) for one in ids)


async def test_t78_every_attempt_has_an_id_of_its_own(lab: Lab) -> None:
    async def reset(request: Received, line: Line) -> None:
        line.reset()

    script: Script = answers(reset, answer)
    served = await lab.router(script, script)

    await served.client.post(URL, json=CHAT, headers={"x-request-id": "mine"})

    ids = {request.header("x-request-id") for engine in lab.engines for request in engine.requests}
    assert len(ids) == 2


async def test_t78_the_log_is_one_json_object_per_line(tmp_path: Path, start_engine: Start) -> None:
    async with command(tmp_path, await start_engine()) as router:
        await ready(router.client)
        for given in [*BAD_IDS, *INJECTED, b"a\xe2\x80\xa8b"]:
            async with raw_client(router.port) as client:
                more = b"connection: close\r\nuser-agent: %b\r\nx-request-id: %b\r\n" % (given[:64], given)
                model = given.decode("latin-1") + '\n{"event":"forged"}\r'
                await client.send(post(URL, orjson.dumps({**CHAT, "model": model[:256]}), more))
                await client.reader.read(-1)
        code, out, err = await router.stop()

    assert (code, err) == (0, "")
    assert {line["event"] for line in log_of(out)} == {"serving", "request", "stopped"}
    # Whatever splits lines, at whatever character, finds the same ones.
    assert len(out.splitlines()) == out.count("\n") == len(log_of(out))
    assert all(line.isprintable() for line in out.splitlines())
