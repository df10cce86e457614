"""/console/playground: what people ask there is answered by a router, streamed or whole, and kept nowhere."""

import ast
import asyncio
import re
import time
from collections.abc import Callable
from html import unescape
from typing import Any

import httpx
import orjson
import pytest
from sqlalchemy import select, update

from control_plane.clients.router import AT_ONCE
from control_plane.data.tables import audit, keys, organisations
from control_plane.pure import figures
from tests.conftest import Served
from tests.control_plane.conftest import SERVICE_TOKEN, Clock, Running
from tests.control_plane.people import SAME_ORIGIN, changed, log_in, make_organisation, make_user
from tests.control_plane.test_together import eventually
from tests.fakes import (
    DONE,
    LAST_CHUNK,
    SSE_HEAD,
    USAGE,
    FakeEngine,
    Script,
    answer,
    chunk,
    event,
    hang,
    raw,
    sse,
    until,
)
from tests.ports import free_port

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(120)]
PAGE = "/console/playground"
STREAM = {**SAME_ORIGIN, "accept": "text/event-stream, application/json"}
TYPED = "what nobody else may read 0815"
FORM = {"role": "user", "content": TYPED}


class Console:
    """A control plane, a router that asks another one over the same database, and an engine. `bob` is signed in."""

    def __init__(self, plane: Running, registry: Running, router: Served, engine: FakeEngine) -> None:
        self.plane, self.registry, self.router, self.engine = plane, registry, router, engine
        self.client = plane.client

    async def ask(self, text: str = TYPED, query: str = "?model=m", **fields: Any) -> httpx.Response:
        """The form, as a browser without scripts sends it."""
        form = {"role": "user", "content": text, "do": "send", **fields}
        return await self.client.post(PAGE + query, data=form, headers=SAME_ORIGIN)

    async def stream(self, text: str = TYPED, query: str = "?model=m", **fields: Any) -> httpx.Response:
        form = {"role": "user", "content": text, **fields}
        return await self.client.post(PAGE + query, data=form, headers=STREAM)


@pytest.fixture
async def start_console(
    start_sqlite: Callable[..., Any], start_engine: Callable[..., Any], start_router: Callable[..., Any]
) -> Callable[..., Any]:
    async def start(script: Any = answer, models: Any = ({"name": "m"},), **roles: str) -> Console:
        clock = Clock(time.time_ns() // 1_000_000)
        registry = await start_sqlite(clock)
        engine = await start_engine(script)
        for model in models:
            entry = model if "split" in model else {"backends": [{"url": engine.url}], **model}
            made = await registry.admin.put(f"/models/{model['name']}", json=entry)
            assert made.status_code == 201, made.text
        await make_user(registry, "bob", None if roles else "operator")
        for organisation, role in roles.items():
            await make_organisation(registry, organisation.replace("_", "-"), bob=role)
        router = await start_router(
            models=[], registry_url=registry.url, registry_token=SERVICE_TOKEN, registry_refresh=0.5,
            usage="registry", policy="registry", auth="keys",
        )  # fmt: skip

        async def ready() -> bool:
            return bool((await router.client.get("/readyz")).status_code == 200)

        await eventually(ready)
        plane = await start_sqlite(clock, router_url=router.url)
        assert (await log_in(plane, "bob")).status_code == 200
        return Console(plane, registry, router, engine)

    return start


def lanes(page: httpx.Response) -> str:
    """Of a page: answers without the empty one that scripts copy."""
    return page.text.partition("<template")[0]


def shown(page: httpx.Response, name: str) -> list[str]:
    found = re.findall(rf'data-is="{name}"[^>]*>(.*?)</(?:p|div|dd|span)>', lanes(page), re.DOTALL)
    return [unescape(re.sub("<[^>]+>", "", one)) for one in found]


def offered(page: httpx.Response, name: str) -> list[str]:
    """What there is to choose from."""
    found = re.search(rf'<select id="{name}".*?</select>', page.text, re.DOTALL)
    return re.findall(r'value="([^"]*)"', found[0]) if found else []


def stream_of(*events: bytes) -> Script:
    return raw(SSE_HEAD, *map(chunk, events), LAST_CHUNK)


async def test_the_stream_is_the_routers_byte_for_byte(start_console: Callable[..., Any]) -> None:
    events = event("Grüße "), event("你好"), event(choices=[], usage=USAGE), DONE
    console = await start_console(stream_of(*events))

    found = await console.stream(temperature="0.5", max_tokens="7", stop="END\r\nSTOP", system="Be brief.")

    assert found.status_code == 200, found.text
    assert found.headers["content-type"].startswith("text/event-stream")
    assert found.content == b"".join(events)
    assert found.headers.get_list("x-request-id") == [console.router.lines[-1]["request_id"]]
    assert orjson.loads(console.engine.requests[0].body) == {
        "model": "m",
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": TYPED}],
        "temperature": 0.5,
        "max_tokens": 7,
        "stop": ["END", "STOP"],
        "stream": True,
        "stream_options": {"include_usage": True},
    }


async def test_nothing_that_was_typed_is_kept_and_no_key_is_shown(
    start_console: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG", "control_plane")
    console = await start_console()
    answers = [await console.stream(), await console.ask(), await console.ask(do="code")]
    async with console.plane.plane.database.main.read() as connection:
        rows = [dict(row._mapping) for row in await connection.execute(select(audit))]
        lent = [dict(row._mapping) for row in await connection.execute(select(keys))]

    assert {one.status_code for one in answers} == {200}
    assert [one["playground"] for one in lent] == [True]
    assert "key.create" in {row["action"] for row in rows}
    assert "sk-ia-" not in "".join(one.text for one in answers)
    assert TYPED in answers[1].text
    kept = repr([rows, lent, console.router.lines]) + caplog.text
    assert "sk-ia-" not in kept
    assert TYPED not in kept


async def test_without_a_script_the_whole_answers_come(start_console: Callable[..., Any]) -> None:
    models = {"name": "m", "price": {"input": 1, "output": 2}}, {"name": "n"}
    console = await start_console(models=models)

    page = await console.ask(query="?model=m&model2=n")

    assert page.status_code == 200
    assert shown(page, "text") == ["word0 word1 word2 word3 word4 "] * 2
    assert [shown(page, name) for name in ("state", "input", "output")] == [["done"] * 2, ["3"] * 2, ["5"] * 2]
    # 3 of input at 1, 5 of output at 2 a million
    assert shown(page, "cost") == [figures.money(13_000, "USD"), "unknown"]
    assert {line["request_id"] for line in console.router.lines} >= set(shown(page, "request"))
    assert len(set(shown(page, "request"))) == 2
    assert TYPED in lanes(page)


async def test_an_answer_is_continued(start_console: Callable[..., Any]) -> None:
    console = await start_console()

    more = await console.ask(do="turn", answer="Paris.\n")
    await console.client.post(
        f"{PAGE}?model=m",
        data={"role": ["user", "assistant", "user"], "content": ["Capital?", "Paris.", "Why?"], "do": "send"},
        headers=SAME_ORIGIN,
    )

    assert re.findall(r"<option selected>(\w+)<", lanes(more)) == ["user", "assistant", "user"]
    assert "Paris.\n</textarea>" in more.text
    assert [one["role"] for one in orjson.loads(console.engine.requests[-1].body)["messages"]] == [
        "user", "assistant", "user"
    ]  # fmt: skip


async def test_what_models_say_is_text(start_console: Callable[..., Any]) -> None:
    hostile = "<img src=x onerror=alert(1)></div><script>alert(2)</script>"
    console = await start_console(stream_of(event(hostile), DONE))

    page = await console.ask(hostile)

    assert shown(page, "text") == [hostile]
    assert "<img src=x" not in page.text
    assert "<script>" not in page.text


async def test_a_browser_that_leaves_ends_the_generation(start_console: Callable[..., Any]) -> None:
    console = await start_console(sse(event("first"), then=lambda line: line.gone()))

    async with console.client.stream("POST", f"{PAGE}?model=m", data=FORM, headers=STREAM) as found:
        assert found.status_code == 200
        async for data in found.aiter_bytes():
            assert b"first" in data
            break
        assert console.engine.busy == 1
    await until(lambda: console.engine.busy == 0)


async def test_a_browser_that_leaves_before_the_first_token_ends_it_too(start_console: Callable[..., Any]) -> None:
    console = await start_console(hang)

    asking = asyncio.create_task(console.stream())
    await until(lambda: console.engine.busy == 1)
    asking.cancel()

    await until(lambda: console.engine.busy == 0)
    with pytest.raises(asyncio.CancelledError):
        await asking


async def test_the_control_plane_ends_while_an_answer_is_open(start_console: Callable[..., Any]) -> None:
    console = await start_console(sse(event("first"), then=lambda line: line.gone()))

    async with console.client.stream("POST", f"{PAGE}?model=m", data=FORM, headers=STREAM) as found:
        parts = found.aiter_bytes()
        received = await anext(parts)
        console.plane.stop()
        async with asyncio.timeout(20):
            async for data in parts:
                received += data

    assert b"being stopped" in received
    assert b"router_away" in received
    await until(lambda: console.engine.busy == 0)


async def test_one_user_has_so_many_answers_at_once(start_console: Callable[..., Any]) -> None:
    console = await start_console(hang)
    asking = [asyncio.create_task(console.stream()) for _ in range(AT_ONCE)]
    await until(lambda: console.engine.busy == AT_ONCE)
    refused, page = await console.stream(), await console.ask()
    for one in asking:
        one.cancel()
    await asyncio.wait(asking)
    await until(lambda: console.engine.busy == 0)
    console.engine.script = answer

    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "too_many_answers")
    (problem,) = shown(page, "problem")
    assert problem.endswith(f" {refused.json()['error']['code']}")
    assert str(AT_ONCE) in problem
    assert (await console.stream()).status_code == 200


async def test_refusals_of_the_router_are_shown(start_console: Callable[..., Any]) -> None:
    console = await start_console(team_a="member")
    path, limits = "/api/v1/organisations/team-a", [{"requests": 1, "per": 3600}]
    assert (await changed(console.registry.admin, "PATCH", path, json={"limits": limits})).status_code == 200
    unknown = await console.stream(query="?model=nothing")

    async def limited() -> bool:
        return bool((await console.stream()).status_code == 429)

    await eventually(limited)
    refused, page = await console.stream(), await console.ask()

    assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "model_not_found")
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "rate_limit_exceeded")
    assert refused.headers["retry-after"]
    assert shown(page, "problem")[0].endswith(" rate_limit_exceeded")
    assert page.status_code == 200


async def test_a_backend_that_is_away_is_said(start_console: Callable[..., Any]) -> None:
    console = await start_console()
    await console.engine.stop()

    refused, page = await console.stream(), await console.ask()

    assert refused.status_code == 503
    assert shown(page, "problem")[0].endswith(refused.json()["error"]["code"])
    assert shown(page, "state") == ["failed"]


async def test_a_router_that_is_away_is_said(start_sqlite: Callable[..., Any]) -> None:
    plane = await start_sqlite(router_url=f"http://127.0.0.1:{free_port()}")
    await plane.admin.put("/models/m", json={"name": "m", "backends": ["http://127.0.0.1:1"]})
    await make_user(plane, "bob", "operator")
    await log_in(plane, "bob")

    refused = await plane.client.post(f"{PAGE}?model=m", data=FORM, headers=STREAM)
    page = await plane.client.post(f"{PAGE}?model=m", data=FORM, headers=SAME_ORIGIN)

    assert (refused.status_code, refused.json()["error"]["code"]) == (502, "router_away")
    assert "127.0.0.1" not in refused.text
    assert shown(page, "problem")[0].endswith(" router_away")


async def test_without_a_router_the_page_says_what_to_set(sqlite_plane: Running) -> None:
    await make_user(sqlite_plane, "bob", "operator")
    await log_in(sqlite_plane, "bob")

    page = await sqlite_plane.client.get(PAGE)
    refused = await sqlite_plane.client.post(f"{PAGE}?model=m", data=FORM, headers=STREAM)

    assert "CONTROL_PLANE_ROUTER_URL=" in page.text
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "no_router")


async def test_a_key_that_was_ended_is_lent_again(start_console: Callable[..., Any]) -> None:
    console = await start_console()
    assert (await console.stream()).status_code == 200
    async with console.plane.plane.database.main.read() as connection:
        id = (await connection.execute(select(keys.c.id).where(keys.c.playground))).scalar_one()
    found = await console.registry.admin.get(f"/api/v1/keys/{id}")
    ended = await console.registry.admin.delete(f"/api/v1/keys/{id}", headers={"if-match": found.headers["etag"]})
    assert ended.status_code == 204, ended.text

    async def is_refused() -> bool:
        headers = {"authorization": f"Bearer sk-ia-{id}-x"}
        return bool((await console.router.client.get("/v1/models", headers=headers)).status_code == 401)

    await eventually(is_refused)
    assert (await console.stream()).status_code == 200


async def test_the_cost_becomes_that_of_the_record(start_console: Callable[..., Any]) -> None:
    console = await start_console(models=[{"name": "m", "price": {"input": 1, "output": 2}}])
    id = (await console.stream()).headers["x-request-id"]
    query = {"answer": id, "model": "m", "by": "served-name", "input": 3, "output": 5}
    unknown = {"answer": "nothing", "model": "n", "input": 3, "output": 5}

    async def cost(query: Any) -> Any:
        return (await console.client.get(PAGE, params=query, headers={"accept": "application/json"})).json()

    before = await cost({**query, "answer": "nothing"})

    async def recorded() -> Any:
        found = await cost(query)
        return found if found["recorded"] else None

    assert before == {"cost": figures.money(13_000, "USD"), "recorded": False, "input": 3, "output": 5}
    assert await eventually(recorded) == {**before, "recorded": True}
    assert await cost(unknown) == {**before, "cost": "unknown"}


async def test_a_stored_prompt_has_its_variables(start_console: Callable[..., Any]) -> None:
    console = await start_console()
    admin = console.registry.admin
    await admin.post("/api/v1/prompts", json={"name": "support"})
    variables = {
        "product": {"type": "enum", "values": ["router", "console"], "required": True, "trusted": True},
        "days": {"type": "number"},
        "name": {"default": "not known"},
    }
    messages = [{"role": "system", "content": "You help with {{product}}, {{days}} <days>."}]
    messages[0]["content"] = "You help with {{product}} <now>."
    made = await admin.post("/api/v1/prompts/support/versions", json={"messages": messages, "variables": variables})
    assert made.status_code == 201, made.text
    await admin.put("/api/v1/prompts/support/labels/production", json={"version": 1}, headers={"if-none-match": "*"})
    query = "?model=m&prompt=support&version=production"

    page = await console.client.get(PAGE + query)
    fields = {"var.product": "router", "var.days": "7"}

    async def sent() -> httpx.Response | None:
        # Routers have the prompt within a second.
        found = await console.stream(query=query, **fields)
        return found if found.status_code == 200 else None

    await eventually(sent)
    missing = await console.stream(query=query)
    code = await console.ask(query=query, do="code", **fields)
    wrong = await console.ask(query=query, **{**fields, "var.days": "many"})

    assert re.findall(r'name="var\.(\w+)"', page.text) == ["product", "days", "name"]
    assert "You help with {{product}} &lt;now&gt;." in page.text
    assert orjson.loads(console.engine.requests[-1].body)["messages"] == [
        {"role": "system", "content": "You help with router <now>."}, {"role": "user", "content": TYPED}
    ]  # fmt: skip
    assert (missing.status_code, missing.json()["error"]["code"]) == (400, "prompt_variable_missing")
    assert '"version": "production"' in unescape(code.text)
    assert '"days": 7' in unescape(code.text)
    assert wrong.status_code == 422
    assert "must be a number, not &#39;many&#39;" in wrong.text


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"temperature": "3"}, "must be from 0 to 2"),
        ({"max_tokens": "0"}, "must be at least 1"),
        ({"max_tokens": "1.5"}, "must be a whole number"),
        ({"top_p": "nan"}, "must be from 0 to 1"),
        ({"seed": "9" * 30}, "must be a smaller number"),
        ({"stop": "a\nb\nc\nd\ne"}, "must be at most 4 lines"),
        ({"content": " "}, "write a message"),
        ({"role": "system"}, "must be user or assistant"),
    ],
)
async def test_what_was_typed_wrong_stays_with_a_word(
    sqlite_plane: Running, fields: dict[str, str], problem: str
) -> None:
    await make_user(sqlite_plane, "bob", "operator")
    await log_in(sqlite_plane, "bob")
    await sqlite_plane.admin.put("/models/m", json={"name": "m", "backends": ["http://127.0.0.1:1"]})
    given = {**FORM, **fields, "do": "send"}

    page = await sqlite_plane.client.post(f"{PAGE}?model=m", data=given, headers=SAME_ORIGIN)
    refused = await sqlite_plane.client.post(f"{PAGE}?model=m", data=given, headers=STREAM)

    assert page.status_code == 422
    assert problem in page.text
    assert (refused.status_code, refused.json()["error"]["code"]) == (422, "validation_error")
    assert problem in refused.json()["error"]["message"]


async def test_a_form_that_is_too_large_is_refused(sqlite_plane: Running) -> None:
    await make_user(sqlite_plane, "bob", "operator")
    await log_in(sqlite_plane, "bob")

    refused = await sqlite_plane.client.post(PAGE, data={**FORM, "content": "x" * 2**20}, headers=STREAM)

    assert (refused.status_code, refused.json()["error"]["code"]) == (413, "request_too_large")


async def test_models_and_keys_are_those_of_the_organisation(start_console: Callable[..., Any]) -> None:
    models = {"name": "m"}, {"name": "secret"}, {"name": "both", "split": {"variants": {"m": 1, "secret": 1}}}
    console = await start_console(models=models, team_a="member", team_b="member", team_c="viewer")
    async with console.registry.plane.change("policy") as connection:
        await connection.execute(
            update(organisations).where(organisations.c.name == "team-a").values(models=["m", "both"])
        )

    team_a = await console.client.get(PAGE)
    team_b = await console.client.get(f"{PAGE}?organisation=team-b")
    streamed = await console.stream(query="?organisation=team-b&model=m")

    assert offered(team_a, "organisation") == ["team-a", "team-b"]
    assert offered(team_a, "model") == ["m"]
    assert offered(team_b, "model") == ["both", "m", "secret"]
    assert "both (virtual)" in team_b.text
    assert streamed.status_code == 200
    assert console.router.lines[-1]["organisation"] == "team-b"
    for other in ("team-c", "team-d", ""):
        page = await console.client.get(f"{PAGE}?organisation={other or 'none'}")
        assert page.status_code == 404


async def test_prompts_are_those_of_the_chosen_organisation_and_of_none(start_sqlite: Callable[..., Any]) -> None:
    plane = await start_sqlite(router_url="http://127.0.0.1:1")
    await plane.admin.put("/models/m", json={"name": "m", "backends": ["http://127.0.0.1:1"]})
    await make_user(plane, "bob")
    for team in ("team-a", "team-b"):
        await make_organisation(plane, team, bob="member")
    for name, owner in (("all", None), ("of-a", "team-a"), ("of-b", "team-b")):
        made = await plane.admin.post("/api/v1/prompts", json={"name": name, "organisation": owner})
        assert made.status_code == 201, made.text
    await log_in(plane, "bob")

    pages = [await plane.client.get(f"{PAGE}?organisation={team}") for team in ("team-a", "team-b")]

    assert [offered(page, "prompt") for page in pages] == [["", "all", "of-a"], ["", "all", "of-b"]]


async def test_the_code_does_the_same(start_console: Callable[..., Any]) -> None:
    console = await start_console()
    text = 'it\'s "quoted" $HOME `x` \\ \nEOF\n</script>'

    page = await console.ask(text, do="code", temperature="0.5")
    codes = [unescape(one) for one in re.findall(r'<pre id="code-\d"[^>]*>(.*?)</pre>', page.text, re.DOTALL)]

    assert len(codes) == 3
    document = codes[0].split("<<'EOF'\n")[1].removesuffix("\nEOF\n")
    assert orjson.loads(document)["messages"] == [{"role": "user", "content": text}]
    ast.parse(codes[1])
    assert repr(text) in ast.unparse(ast.parse(codes[1]))
    checked = await asyncio.create_subprocess_exec("node", "--input-type=module", "--check", "-", stdin=-1, stderr=-1)
    _, problem = await checked.communicate(codes[2].encode())
    assert (checked.returncode, problem) == (0, b"")
