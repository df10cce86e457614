"""Stored prompts: what goes to the engine, who may use them, and what is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import openai
import orjson
import pytest

from inference_api.app import ENTRY
from inference_api.feature import Feature
from inference_api.features.delivery.records import METERED
from inference_api.observe.account import Record
from inference_api.policy.source import Policies
from inference_api.routing.catalogue import parse_catalogue
from tests.conftest import Served
from tests.fakes import (
    COMPLETION,
    DONE,
    LAST_CHUNK,
    SSE_HEAD,
    FakeEngine,
    Line,
    Received,
    chunk,
    event,
    hang,
    json_response,
    post,
    raw,
    raw_client,
    until,
)
from tests.faults.quiescence import quiet
from tests.policies import EXAMPLE, bearer, entry, new_key, policy_of, write

pytestmark = pytest.mark.anyio
Start = Callable[..., Any]
CHAT, RESPONSES, COMPLETIONS = "/v1/chat/completions", "/v1/responses", "/v1/completions"
SYSTEM = {"role": "system", "content": "You help with {{product}}."}
PRODUCT = {"type": "enum", "values": ["router", "console"], "required": True, "trusted": True}
SUPPORT = {
    "name": "support",
    "labels": {"production": 2, "next": 3},
    "versions": [
        {"version": 2, "messages": [SYSTEM], "variables": {"product": PRODUCT}},
        {"version": 3, "messages": [{"role": "developer", "content": "New."}]},
        {"version": 4, "text": "Say {{what}}.", "variables": {"what": {}}},
    ],
}
ASKED = {"id": "support", "variables": {"product": "router"}}
HELLO = {"role": "user", "content": "Hello"}
FILLED = {"role": "system", "content": "You help with router."}
RESPONSE = {"id": "resp_1", "object": "response", "status": "completed", "output": []}
Serve = Callable[..., Any]


@pytest.fixture
async def engine(start_engine: Start) -> FakeEngine:
    found: FakeEngine = await start_engine(raw(json_response(COMPLETION)))
    return found


@pytest.fixture
def serve(engine: FakeEngine, start_router: Start, tmp_path: Path) -> Serve:
    async def serve(*prompts: dict[str, Any], policy: dict[str, Any] | None = None, **more: Any) -> Served:
        document = {"prompts": list(prompts or [SUPPORT])} if policy is None else policy
        served: Served = await start_router(engine, policy=str(write(tmp_path / "policy.json", document)), **more)
        return served

    return serve


async def ask(served: Served, url: str = CHAT, headers: dict[str, str] | None = None, **body: Any) -> httpx.Response:
    return await served.client.post(url, json={"model": "m", **body}, headers=headers)


def sent(engine: FakeEngine) -> Any:
    return orjson.loads(engine.requests[-1].body)


def error(answer: httpx.Response) -> tuple[int, str, str | None, str]:
    found = answer.json()["error"]
    return answer.status_code, found["code"], found["param"], found["message"]


# What goes to the engine


@pytest.mark.parametrize(
    ("url", "body", "made"),
    [
        (CHAT, {"prompt": ASKED, "messages": [HELLO]}, {"messages": [FILLED, HELLO]}),
        (CHAT, {"prompt": ASKED, "messages": []}, {"messages": [FILLED]}),
        (CHAT, {"prompt": ASKED}, {"messages": [FILLED]}),
        (CHAT, {"prompt": ASKED, "n": 1, "stream": False}, {"messages": [FILLED], "n": 1, "stream": False}),
        (RESPONSES, {"prompt": ASKED, "input": "Hello"}, {"input": [FILLED, HELLO]}),
        (RESPONSES, {"prompt": ASKED, "input": [HELLO]}, {"input": [FILLED, HELLO]}),
        (RESPONSES, {"prompt": ASKED}, {"input": [FILLED]}),
        (COMPLETIONS, {"prompt": {"id": "support", "version": 4, "variables": {"what": "a"}}}, {"prompt": "Say a."}),
        (
            CHAT,
            {"prompt": {"id": "support", "version": "next"}},
            {"messages": [{"role": "developer", "content": "New."}]},
        ),
        (CHAT, {"prompt": {"id": "support", "version": "3"}}, {"messages": [{"role": "developer", "content": "New."}]}),
        (CHAT, {"prompt": {**ASKED, "version": None}}, {"messages": [FILLED]}),
    ],
)
async def test_a_prompt_becomes_a_part_of_the_body(
    url: str, body: dict[str, Any], made: dict[str, Any], engine: FakeEngine, serve: Serve
) -> None:
    served: Served = await serve()

    answer = await ask(served, url, **body)

    assert answer.status_code == 200, answer.text
    assert sent(engine) == {"model": "m", **made}
    used = answer.headers["x-inference-prompt"]
    assert used.startswith("support@")
    assert [line["prompt"] for line in served.lines] == [used]
    assert await served.metric("inference_api_prompt_requests_total", result="ok") == 1


async def test_all_other_bytes_stay(engine: FakeEngine, serve: Serve) -> None:
    """Also with the name that the backend knows, and the question for the tokens of a stream."""
    served: Served = await serve(entry={"served_model_name": "served"})
    prompt = b'{"variables":{"product":"router"}, "id":"support"}'
    body = b'{ "model" : "m",  "prompt":%b,\n"messages":[ {"role":"user","content":"h\\u00e9"} ], "x": 1.50 ,'
    body += b'"stream":true}'

    await served.client.post(CHAT, content=body % prompt, headers={"content-type": "application/json"})

    assert engine.requests[-1].body == (
        b'{"stream_options":{"include_usage":true}, "model" : "served",  '
        b'"messages":[%b, {"role":"user","content":"h\\u00e9"} ], "x": 1.50 ,"stream":true}' % orjson.dumps(FILLED)
    )


@pytest.mark.parametrize("size", [100, 200_000, 3_000_000])
async def test_a_body_of_any_size(size: int, engine: FakeEngine, serve: Serve) -> None:
    served: Served = await serve(entry={"served_model_name": "served"})
    long = {"role": "user", "content": "ä" * size}

    first = await ask(served, messages=[long], prompt=ASKED)
    assert sent(engine) == {"model": "served", "messages": [FILLED, long]}
    second = await ask(served, RESPONSES, prompt=ASKED, user="u" * size)

    assert sent(engine) == {"model": "served", "input": [FILLED], "user": "u" * size}
    assert [first.status_code, second.status_code] == [200, 200]


async def test_large_variables(engine: FakeEngine, serve: Serve) -> None:
    variables = {"what": {"max_length": 1_048_576}}
    served: Served = await serve(
        {"name": "p", "versions": [{"version": 1, "text": "{{what}}", "variables": variables}]}
    )

    answer = await ask(served, COMPLETIONS, prompt={"id": "p", "version": 1, "variables": {"what": "é" * 1_048_576}})
    over = await ask(served, COMPLETIONS, prompt={"id": "p", "version": 1, "variables": {"what": "é" * 1_048_577}})

    assert (answer.status_code, sent(engine)["prompt"]) == (200, "é" * 1_048_576)
    assert error(over)[:3] == (400, "prompt_variable_invalid", "prompt.variables.what")


async def test_the_client_gets_the_engines_stream(engine: FakeEngine, serve: Serve) -> None:
    engine.script = raw(SSE_HEAD, chunk(event("a")), chunk(DONE) + LAST_CHUNK)
    served: Served = await serve()

    answer = await ask(served, prompt=ASKED, stream=True)

    assert answer.content == event("a") + DONE
    assert answer.headers["x-inference-prompt"] == "support@2"
    assert sent(engine)["messages"] == [FILLED]


async def test_limits_see_the_prompt(engine: FakeEngine, serve: Serve) -> None:
    """A short request for a long prompt reserves what the prompt takes."""
    long = {"name": "p", "labels": {"production": 1}, "versions": [{"version": 1, "text": "word " * 800}]}
    anonymous = {"limits": [{"input_tokens": 5000, "per": 3600}]}
    served: Served = await serve(policy={"prompts": [long], "anonymous": anonymous})

    answer = await ask(served, COMPLETIONS, prompt={"id": "p"})

    assert int(answer.headers["x-ratelimit-remaining-tokens"]) == pytest.approx(5000 - 800 * 5 / 4, abs=20)


async def test_equal_prompts_have_one_cached_answer(engine: FakeEngine, serve: Serve) -> None:
    served: Served = await serve(entry={"cache": {"ttl": 60}})
    console = {"id": "support", "variables": {"product": "console"}}

    found = [await ask(served, prompt=prompt, temperature=0) for prompt in (ASKED, ASKED, console)]
    plain = await ask(served, messages=[FILLED], temperature=0)

    # The key is the body that the engine gets, so that the written messages are the same request.
    assert [one.headers["x-inference-cache"] for one in (*found, plain)] == ["miss", "hit", "miss", "hit"]
    assert found[1].headers["x-inference-prompt"] == "support@2"


async def test_the_policy_is_used_as_soon_as_it_changes(engine: FakeEngine, serve: Serve, tmp_path: Path) -> None:
    served: Served = await serve()
    policies = served.router.core.provided(Policies)
    assert policies is not None
    before = policies.current
    assert (await ask(served, prompt={"id": "support"})).status_code == 400

    write(tmp_path / "policy.json", {"prompts": [{**SUPPORT, "labels": {"production": 3}}]})
    served.router.reload()
    await until(lambda: policies.current is not before)

    assert (await ask(served, prompt={"id": "support"})).status_code == 200
    assert sent(engine)["messages"][0]["content"] == "New."


# What is refused


@pytest.mark.parametrize(
    ("prompt", "refusal"),
    [
        ({"id": "x"}, (404, "prompt_not_found", "prompt.id", "The prompt 'x' does not exist.")),
        (
            {"id": "support", "version": "beta"},
            (404, "prompt_not_found", "prompt.version", "The prompt 'support' has no version or label 'beta'."),
        ),
        (
            {"id": "support", "version": 9},
            (404, "prompt_not_found", "prompt.version", "The prompt 'support' has no version or label '9'."),
        ),
        (
            {"id": "support"},
            (
                *(400, "prompt_variable_missing", "prompt.variables.product"),
                "The prompt 'support' needs the variable 'product'.",
            ),
        ),
        (
            {"id": "support", "variables": {"product": "router", "x": "1"}},
            (400, "prompt_variable_unknown", "prompt.variables.x", "The prompt 'support' has no variable 'x'."),
        ),
        (
            {"id": "support", "variables": {"product": "all"}},
            (
                *(400, "prompt_variable_invalid", "prompt.variables.product"),
                "The variable 'product' of the prompt 'support' must be one of router, console.",
            ),
        ),
        ({}, (422, "validation_error", "prompt.id", "The field 'prompt.id' must be the name of a prompt.")),
        ({"id": 5}, (422, "validation_error", "prompt.id", "The field 'prompt.id' must be the name of a prompt.")),
        (
            {"id": "support", "version": True},
            (422, "validation_error", "prompt.version", "The field 'prompt.version' must be a number or a label."),
        ),
        (
            {"id": "support", "version": 2.5},
            (422, "validation_error", "prompt.version", "The field 'prompt.version' must be a number or a label."),
        ),
        (
            {"id": "support", "variables": ["product"]},
            (422, "validation_error", "prompt.variables", "The field 'prompt.variables' must be an object."),
        ),
        (
            {"id": "support", "variables": {str(n): "" for n in range(20_000)}},
            (422, "validation_error", "prompt", "The field 'prompt' is too large."),
        ),
    ],
    ids=lambda value: str(value)[:40],
)
async def test_what_is_refused(prompt: Any, refusal: Any, engine: FakeEngine, serve: Serve) -> None:
    served: Served = await serve()

    answer = await ask(served, prompt=prompt, messages=[HELLO])

    assert error(answer) == refusal
    assert engine.requests == []
    assert "x-inference-prompt" not in answer.headers
    result = {"4": "not_found"}.get(str(refusal[0])[2], "variable") if refusal[0] != 422 else None
    if result is not None:
        assert await served.metric("inference_api_prompt_requests_total", result=result) == 1
        assert await served.metric("inference_api_rejected_requests_total", model_name="m", reason="prompt") == 1


async def test_a_version_of_another_route(engine: FakeEngine, serve: Serve) -> None:
    served: Served = await serve()

    text = await ask(served, prompt={"id": "support", "version": 4, "variables": {"what": "a"}})
    messages = await ask(served, COMPLETIONS, prompt=ASKED)

    assert [error(one)[:3] for one in (text, messages)] == [(404, "prompt_not_found", "prompt.version")] * 2


@pytest.mark.parametrize(
    ("url", "body", "status"),
    [
        (CHAT, {"prompt": "Hello"}, 422),
        (CHAT, {"prompt": None}, 422),
        (RESPONSES, {"prompt": []}, 422),
        (COMPLETIONS, {"prompt": 5}, 422),
        (CHAT, {"prompt": ASKED, "messages": "Hello"}, 422),
        (CHAT, {"prompt": ASKED, "stream": "maybe"}, 422),
        ("/v1/messages", {"prompt": ASKED, "max_tokens": 5}, 422),
        ("/v1/embeddings", {"prompt": ASKED}, 422),
        # As before: another field of an engine's own
        (CHAT, {"prompt": "Hello", "messages": [HELLO]}, 200),
        (CHAT, {"prompt": None, "messages": [HELLO]}, 200),
        (COMPLETIONS, {"prompt": "Hello"}, 200),
        (COMPLETIONS, {"prompt": [1, 2]}, 200),
        ("/v1/messages", {"prompt": ASKED, "messages": [HELLO], "max_tokens": 5}, 200),
    ],
)
async def test_what_is_no_stored_prompt(
    url: str, body: dict[str, Any], status: int, engine: FakeEngine, serve: Serve
) -> None:
    served: Served = await serve()

    answer = await ask(served, url, **body)

    assert answer.status_code == status
    if status == 200:
        assert sent(engine) == {"model": "m", **body}


async def test_without_a_policy_nothing_is_read(engine: FakeEngine, start_router: Start) -> None:
    served: Served = await start_router(engine)

    passed = await ask(served, prompt=ASKED, messages=[HELLO])
    refused = [await ask(served, url, prompt=ASKED) for url in (CHAT, RESPONSES, COMPLETIONS)]

    assert (passed.status_code, sent(engine)["prompt"]) == (200, ASKED)
    assert [one.status_code for one in refused] == [422] * 3
    assert "prompts" not in served.router.features


async def test_the_order_of_refusals(engine: FakeEngine, serve: Serve) -> None:
    """After the name of the model, and before limits: a refused prompt takes nothing from them."""
    served: Served = await serve(policy={"prompts": [SUPPORT], "anonymous": {"limits": [{"requests": 1, "per": 3600}]}})

    unknown = await served.client.post(CHAT, json={"model": "x", "prompt": {"id": "x"}})
    refused = [await ask(served, prompt={"id": "x"}) for _ in range(3)]
    served_one, limited = [await ask(served, prompt=ASKED) for _ in range(2)]

    assert error(unknown)[1] == "model_not_found"
    assert [one.status_code for one in refused] == [404] * 3
    assert [served_one.status_code, limited.status_code] == [200, 429]
    assert not any(name.startswith("x-ratelimit") for name in refused[0].headers)


# Who may use a prompt


async def test_a_prompt_of_another_organisation_is_not_found(engine: FakeEngine, serve: Serve) -> None:
    other = new_key(None)
    policy = policy_of(
        entry(EXAMPLE, organisation="team-a"),
        entry(other, organisation="team-b"),
        prompts=[{**SUPPORT, "organisation": "team-a"}],
    )
    served: Served = await serve(policy=policy, auth="keys")

    mine = await ask(served, headers=bearer(), prompt=ASKED)
    theirs = await ask(served, headers=bearer(other.key), prompt=ASKED)
    version = await ask(served, headers=bearer(other.key), prompt={**ASKED, "version": "beta"})

    assert mine.status_code == 200
    assert [error(one) for one in (theirs, version)] == [
        (404, "prompt_not_found", "prompt.id", "The prompt 'support' does not exist.")
    ] * 2


async def test_nobody_uses_the_prompt_of_an_organisation(engine: FakeEngine, serve: Serve) -> None:
    policy = {"organisations": [{"name": "team-a"}], "prompts": [{**SUPPORT, "organisation": "team-a"}]}
    served: Served = await serve(policy=policy)

    assert error(await ask(served, prompt=ASKED))[:2] == (404, "prompt_not_found")


async def test_a_prompt_of_the_provider_passes_unchanged(engine: FakeEngine, serve: Serve) -> None:
    served: Served = await serve(entry={"engine": "openai"})
    body: dict[str, Any] = {"prompt": {"id": "pmpt_1", "version": "5", "variables": {"a": {"type": "input_image"}}}}

    passed = await ask(served, RESPONSES, **body)
    with_input = await ask(served, RESPONSES, **body, input="Hello")
    chat = await ask(served, CHAT, **body, messages=[HELLO])
    own = await ask(served, RESPONSES, prompt=ASKED)

    assert [json.loads(one.body) for one in engine.requests[:2]] == [
        {"model": "m", **body},
        {"model": "m", **body, "input": "Hello"},
    ]
    assert "x-inference-prompt" not in passed.headers
    assert (with_input.status_code, chat.status_code, own.status_code) == (200, 404, 200)
    assert sent(engine) == {"model": "m", "input": [FILLED]}


async def test_members_of_a_catalogue_that_was_read_again_decide(engine: FakeEngine, serve: Serve) -> None:
    served: Served = await serve()
    entry = {"backends": [engine.url], "engine": "openai"}
    variants = {"split": {"variants": {"one": 1, "two": 0}}}
    models = [{"name": "m", **variants}, {"name": "one", **entry}, {"name": "two", **entry}]
    served.router.core.fleet.update(parse_catalogue({"models": models}, ENTRY))

    assert (await ask(served, RESPONSES, prompt={"id": "pmpt_1"})).status_code == 200


async def test_the_sdk_of_openai(engine: FakeEngine, serve: Serve) -> None:
    engine.script = raw(json_response(RESPONSE))
    served: Served = await serve()
    async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="x", max_retries=0) as sdk:
        await sdk.responses.create(
            model="m", prompt={"id": "support", "version": "production", "variables": {"product": "router"}}
        )
        with pytest.raises(openai.NotFoundError) as caught:
            await sdk.responses.create(model="m", prompt={"id": "nope"})

    assert sent(engine)["input"] == [FILLED]
    assert (caught.value.code, caught.value.param) == ("prompt_not_found", "prompt.id")


# With other features


async def test_models_that_stand_for_others(start_engine: Start, start_router: Start, tmp_path: Path) -> None:
    engines = [await start_engine(raw(json_response(COMPLETION))) for _ in range(2)]
    models = [
        *({"name": name, "backends": [engine.url]} for name, engine in zip("ab", engines, strict=True)),
        {"name": "split", "split": {"variants": {"a": 1, "b": 1}}},
        {"name": "consensus", "consensus": {"members": ["a", "b"]}},
        {"name": "aliased", "backends": [engines[0].url], "served_model_name": "x", "fallbacks": ["b"]},
    ]
    policy = write(tmp_path / "policy.json", {"prompts": [SUPPORT]})
    served: Served = await start_router(models=models, policy=str(policy))

    for model in ("split", "consensus", "aliased"):
        answer = await served.client.post(CHAT, json={"model": model, "prompt": ASKED, "messages": [HELLO]})
        assert (answer.status_code, answer.headers["x-inference-prompt"]) == (200, "support@2")

    sent_all = [orjson.loads(request.body) for engine in engines for request in engine.requests]
    assert len(sent_all) == 4
    assert [one["messages"] for one in sent_all] == [[FILLED, HELLO]] * 4
    assert await served.metric("inference_api_prompt_requests_total", result="ok") == 3


async def test_an_aborted_stream_is_counted_with_its_prompt(engine: FakeEngine, serve: Serve) -> None:
    engine.script = one_event
    records: list[Record] = []
    long = {"name": "p", "labels": {"production": 1}, "versions": [{"version": 1, "text": "word " * 800}]}
    served: Served = await serve(long, features=[Feature("records", record=records.append)])

    async with raw_client(served.port) as client:
        await client.send(post(COMPLETIONS, {"model": "m", "prompt": {"id": "p"}, "stream": True}))
        await client.reader.readuntil(b"data: ")
    await until(lambda: records)

    tokens = records[0].state[METERED]
    assert (tokens[0], tokens[4]) == (pytest.approx(1000, abs=20), "counted")


# What happens when


async def one_event(request: Received, line: Line) -> None:
    await line.send(SSE_HEAD, chunk(event()))
    await line.gone()


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_leaves_leaves_nothing(stream: bool, engine: FakeEngine, serve: Serve) -> None:
    engine.script = one_event if stream else hang
    served: Served = await serve()

    async with quiet(served):
        async with raw_client(served.port) as client:
            await client.send(post(CHAT, {"model": "m", "prompt": ASKED, "stream": stream}))
            await until(lambda: engine.busy)
        await until(lambda: served.lines and not engine.busy)

    [line] = served.lines
    assert (line["outcome"], line["prompt"]) == ("client_gone", "support@2")


async def test_a_retry_has_the_same_body(start_engine: Start, start_router: Start, tmp_path: Path) -> None:
    bodies: list[bytes] = []

    async def script(request: Received, line: Line) -> None:
        bodies.append(request.body)
        status = "503 Service Unavailable" if len(bodies) == 1 else "200 OK"
        await line.send(json_response(COMPLETION, status))

    engines = [await start_engine(script) for _ in range(2)]
    policy = write(tmp_path / "policy.json", {"prompts": [SUPPORT]})
    served: Served = await start_router(*engines, policy=str(policy))

    answer = await ask(served, prompt=ASKED)

    assert answer.status_code == 200
    assert [orjson.loads(body)["messages"] for body in bodies] == [[FILLED]] * 2
