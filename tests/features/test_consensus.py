"""A vote: the answer of the majority, byte for byte, and what happens without one."""

import asyncio
from collections.abc import Callable
from typing import Any

import orjson
import pytest

from inference_api.app import ENTRY
from inference_api.errors import UpstreamProtocolError
from inference_api.features.voting.ballots import Compare
from inference_api.routing.catalogue import parse_catalogue
from tests.fakes import (
    CHAT,
    COMPLETION,
    USAGE,
    Line,
    Received,
    Script,
    hang,
    json_response,
    post,
    raw,
    raw_client,
    until,
)
from tests.faults.quiescence import quiet
from tests.features.several import Several, start_several

pytestmark = pytest.mark.anyio
Start = Callable[..., Any]
URL = "/v1/chat/completions"
METRIC = "inference_api_consensus_total"


def document(text: Any, **more: Any) -> dict[str, Any]:
    message = {"role": "assistant", "content": text, **more}
    return {**COMPLETION, "choices": [{"index": 0, "message": message, "finish_reason": "stop"}]}


def says(text: Any, **more: Any) -> Script:
    return raw(json_response(document(text, **more)))


def fails(status: str = "400 Bad Request") -> Script:
    return raw(json_response({"error": {"message": status}}, status))


@pytest.fixture
def start_vote(start_engine: Start, start_router: Start) -> Start:
    """`await start_vote(script, ...)` -> Several: a vote, `sure`, of as many members."""

    async def start(*scripts: Any, vote: Any = (), **more: Any) -> Several:
        return await start_several(start_engine, start_router, "sure", dict(vote), "consensus", scripts, **more)

    return start


@pytest.mark.parametrize(
    ("vote", "says"),
    [
        ({"members": ["a"]}, "consensus.members"),
        ({"members": ["a", "a"]}, "listed twice"),
        ({"members": ["a", "b"], "quorum": 1}, "consensus.quorum"),
        ({"members": ["a", "b"], "quorum": 3}, "a quorum of 3 is more than the 2 members"),
        ({"members": ["a", "b"], "compare": "meaning"}, "consensus.compare"),
        ({"members": ["a", "b"], "on_split": "first"}, "consensus.on_split"),
        ({"members": ["a", "nope"]}, "model 'v': consensus.members: there is no model 'nope'"),
        ({"members": ["a", "v"]}, "model 'v': a cycle: v -> v"),
    ],
)
def test_a_vote_that_is_none_is_refused_alone(vote: Any, says: str) -> None:
    models = [*({"name": name, "backends": [f"http://{name}:1"]} for name in "ab"), {"name": "v", "consensus": vote}]
    catalogue = parse_catalogue({"models": models}, ENTRY)

    [problem] = catalogue.problems
    assert says in problem
    assert set(catalogue) == {"a", "b"}


async def test_the_answer_of_the_majority_is_returned_unchanged(start_vote: Start) -> None:
    # Spaces and order of members that no parser would write again
    body = b'{ "id":"1",\n "choices":[{"message":{"content":" The  ANSWER"},"index":0}] }'
    head = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\nx-engine: b\r\ncontent-length: %d\r\n\r\n"
    vote: Several = await start_vote(says("no"), raw(head % len(body) + body), says("the answer"))

    async with quiet(vote.served):
        answer = await vote.ask()

    assert (answer.status_code, answer.content) == (200, body)
    assert answer.headers["x-engine"] == "b"
    assert (answer.headers["x-inference-model"], answer.headers["x-inference-votes"]) == ("b", "2/3")
    await until(lambda: vote.served.lines)
    [line] = vote.served.lines
    assert (line["model"], line["asked_model"], line["votes"], line["outcome"]) == ("b", "sure", "2/3", "ok")
    assert await vote.served.metric(METRIC, model_name="sure", result="quorum") == 1


async def test_the_vote_ends_at_the_quorum(start_vote: Start) -> None:
    vote: Several = await start_vote(hang, says("4"), says("4"))

    async with quiet(vote.served):
        answer = await vote.ask()

    assert (answer.headers["x-inference-model"], answer.headers["x-inference-votes"]) == ("b", "2/3")
    assert await vote.outcomes("a") == {"vote_lost": 1}
    assert await vote.outcomes("c") == {"ok": 1}
    legs = {leg.model_name: leg for leg in vote.legs}
    assert (legs["a"].outcome, legs["c"].outcome) == ("vote_lost", "ok")
    assert {leg.extra["kind"] for leg in vote.legs} == {"vote"}
    assert {leg.request_id for leg in vote.legs} == {vote.records[0].request_id}
    # What its engine reported, as it answered.
    assert legs["c"].tokens[::2] == (USAGE["prompt_tokens"], USAGE["completion_tokens"])
    assert vote.records[0].tokens[::2] == (USAGE["prompt_tokens"], USAGE["completion_tokens"])


async def test_the_earliest_listed_of_the_majority_is_returned(start_vote: Start) -> None:
    answered = asyncio.Event()

    async def last(request: Received, line: Line) -> None:
        await answered.wait()
        await line.send(json_response(document("4")))

    async def first(request: Received, line: Line) -> None:
        await line.send(json_response(document("4")))
        await until(lambda: vote.served.router.core.fleet.models["b"].in_flight == 0)
        answered.set()

    vote: Several = await start_vote(last, first, hang)

    answer = await vote.ask()

    assert answer.headers["x-inference-model"] == "a"


async def test_a_quorum_may_be_all(start_vote: Start) -> None:
    vote: Several = await start_vote(says("4"), says("4"), says("4"), vote={"quorum": 3})

    assert (await vote.ask()).headers["x-inference-votes"] == "3/3"


@pytest.mark.parametrize(
    ("compare", "texts", "model", "votes"),
    [
        ("exact", ["Yes", "yes", "yes"], "b", "2/3"),
        ("text", ["Yes", "no", " yes\n"], "a", "2/3"),
        ("json", ['{"a": 1}', "no", '{ "a":1.0}'], "a", "2/3"),
        ("json", ["no", "no", "{}"], "a", "1/3"),
        ("number", ["42", "43", "42.0"], "a", "2/3"),
    ],
)
async def test_members_vote_as_the_entry_says(
    compare: Compare, texts: list[str], model: str, votes: str, start_vote: Start
) -> None:
    vote: Several = await start_vote(*map(says, texts), vote={"compare": compare})

    answer = await vote.ask()

    assert (answer.headers["x-inference-model"], answer.headers["x-inference-votes"]) == (model, votes)


async def test_tool_calls_vote(start_vote: Start) -> None:
    def calls(arguments: str, id: str) -> Script:
        function = {"name": "weather", "arguments": arguments}
        return says(None, tool_calls=[{"id": id, "type": "function", "function": function}])

    vote: Several = await start_vote(calls('{"at": "x"}', "1"), calls("{}", "2"), calls('{ "at":"x" }', "3"))

    answer = await vote.ask()

    assert (answer.headers["x-inference-model"], answer.headers["x-inference-votes"]) == ("a", "2/3")


async def test_without_a_quorum_the_primary_answers(start_vote: Start) -> None:
    vote: Several = await start_vote(fails(), says("two"), says("three"))

    async with quiet(vote.served):
        answer = await vote.ask()

    assert (answer.status_code, answer.headers["x-inference-model"]) == (200, "b")
    assert answer.headers["x-inference-votes"] == "1/3"
    assert await vote.served.metric(METRIC, model_name="sure", result="primary") == 1


async def test_without_a_quorum_there_may_be_an_error(start_vote: Start) -> None:
    vote: Several = await start_vote(says("one"), says("two"), vote={"on_split": "error"})

    async with quiet(vote.served):
        answer = await vote.ask()

    assert (answer.status_code, answer.json()["error"]["code"]) == (502, "no_consensus")
    assert answer.headers["x-should-retry"] == "false"
    assert await vote.served.metric(METRIC, model_name="sure", result="none") == 1
    # No answer was returned: each member has a Record, and the request shows that backends were asked.
    assert [leg.model_name for leg in vote.legs] == ["a", "b"]
    assert (vote.records[0].attempts, vote.records[0].code) == (1, "no_consensus")


async def test_if_all_fail_the_answer_is_the_first_members(start_vote: Start) -> None:
    vote: Several = await start_vote(fails("403 Forbidden"), fails("400 Bad Request"), vote={"on_split": "error"})

    async with quiet(vote.served):
        answer = await vote.ask()

    assert (answer.status_code, answer.json()["error"]["message"]) == (403, "403 Forbidden")
    assert await vote.served.metric(METRIC, model_name="sure", result="none") == 1
    assert [leg.model_name for leg in vote.legs] == ["b"]


async def breaks(request: Received, line: Line) -> None:
    await line.send(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 99\r\n\r\n{")
    line.reset()


BAD: dict[str, Script] = {
    "no json": raw(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 3\r\n\r\noh!"),
    "dies in its body": breaks,
    "aborted": raw(json_response({"choices": [{"message": {"content": "4"}, "finish_reason": "abort"}]})),
    "an error": fails("500 Internal Server Error"),
}


@pytest.mark.parametrize("bad", BAD)
async def test_a_bad_answer_does_not_vote(bad: str, start_vote: Start) -> None:
    vote: Several = await start_vote(BAD[bad], says("4"), vote={"quorum": 2})

    async with quiet(vote.served):
        answer = await vote.ask()

    assert (answer.headers["x-inference-model"], answer.headers["x-inference-votes"]) == ("b", "1/2")


async def test_a_member_without_a_backend_does_not_vote(start_vote: Start) -> None:
    vote: Several = await start_vote(hang, says("4"), says("4"))
    await vote.engines[0].stop()

    answer = await vote.ask()

    assert answer.headers["x-inference-votes"] == "2/3"


async def test_an_answer_that_is_too_large_does_not_vote(start_vote: Start) -> None:
    large = json_response(document("x" * 300_000))

    async def never_ends(request: Received, line: Line) -> None:
        await line.send(large[:-1])
        await line.gone()

    vote: Several = await start_vote(never_ends, never_ends)
    async with quiet(vote.served):
        answer = await vote.ask()

    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (502, UpstreamProtocolError.code)
    assert "too large to vote" in error["message"]
    assert await vote.outcomes("a") == {"vote_lost": 1}


async def test_large_answers_vote(start_vote: Start) -> None:
    text = "word " * 40_000
    vote: Several = await start_vote(says(text), says(text + " "))

    answer = await vote.ask()

    assert answer.headers["x-inference-votes"] == "2/2"
    assert answer.json()["choices"][0]["message"]["content"] == text


@pytest.mark.parametrize(
    ("path", "more", "param", "message"),
    [
        (URL, {"stream": True}, "stream", "The model 'sure' does not stream: its members vote on whole answers."),
        (URL, {"n": 2}, "n", "The model 'sure' gives one answer: its members vote on one each. Leave `n` out."),
        ("/v1/embeddings", {"input": "x"}, "model", None),
        ("/v1/responses", {"input": "x", "store": False}, "model", None),
    ],
)
async def test_what_cannot_be_voted_on_is_refused(
    path: str, more: dict[str, Any], param: str, message: str | None, start_vote: Start
) -> None:
    vote: Several = await start_vote(hang, hang)

    answer = await vote.served.client.post(path, json={**CHAT, "model": "sure", **more})

    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (422, "validation_error", param)
    assert message is None or error["message"] == message
    assert not any(engine.requests for engine in vote.engines)


async def test_n_of_one_votes(start_vote: Start) -> None:
    vote: Several = await start_vote(says("4"), says("4"))

    assert (await vote.ask(n=1)).status_code == 200
    assert (await vote.ask(n=None)).status_code == 200


async def test_completions_vote(start_vote: Start) -> None:
    answers = [raw(json_response({"choices": [{"index": 0, "text": text}]})) for text in (" four", "Four", "five")]
    vote: Several = await start_vote(*answers)

    answer = await vote.served.client.post("/v1/completions", json={"model": "sure", "prompt": "x"})

    assert (answer.headers["x-inference-model"], answer.headers["x-inference-votes"]) == ("a", "2/3")


async def test_a_client_that_leaves_cancels_all(start_vote: Start) -> None:
    vote: Several = await start_vote(says("4"), hang, hang)
    async with quiet(vote.served), raw_client(vote.served.port) as client:
        await client.send(post(URL, {**CHAT, "model": "sure"}))
        await until(lambda: [engine.busy for engine in vote.engines] == [0, 1, 1])
        await until(lambda: vote.served.router.core.fleet.models["a"].in_flight == 0)

    await until(lambda: vote.served.lines)
    assert vote.served.lines[0]["outcome"] == "client_gone"
    # The one that had answered is known to the token.
    legs = {leg.model_name: leg for leg in vote.legs}
    assert {name: str(leg.outcome) for name, leg in legs.items()} == {"a": "ok", "b": "client_gone", "c": "client_gone"}
    assert legs["a"].tokens[2] == USAGE["completion_tokens"]


async def test_a_drain_ends_all(start_vote: Start) -> None:
    vote: Several = await start_vote(hang, hang)
    async with quiet(vote.served):
        asking = asyncio.create_task(vote.ask())
        await until(lambda: all(engine.busy for engine in vote.engines))
        [request] = [task for task in asyncio.all_tasks() if "Accounts.__call__" in repr(task.get_coro())]
        # What the server does at the end of DRAIN_TIMEOUT
        request.cancel()
        answer = await asking

    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "shutting_down")


async def test_a_race_may_vote(start_vote: Start) -> None:
    race = {"name": "quick", "race": {"members": ["a", "b"]}}
    outer = {"name": "outer", "consensus": {"members": ["quick", "c"]}}
    vote: Several = await start_vote(hang, says("4"), says("4"), more=[race, outer])

    async with quiet(vote.served):
        answer = await vote.ask("outer")

    assert (answer.headers["x-inference-model"], answer.headers["x-inference-votes"]) == ("b", "2/2")
    kinds = sorted((leg.extra["kind"], leg.model_name) for leg in vote.legs)
    assert kinds == [("race", "a"), ("vote", "c")]


async def test_a_vote_may_race(start_vote: Start, start_engine: Start) -> None:
    slow = await start_engine(hang)
    outer = {"name": "outer", "race": {"members": ["sure", "d"]}}
    vote: Several = await start_vote(says("4"), says("4"), more=[{"name": "d", "backends": [slow.url]}, outer])

    async with quiet(vote.served):
        answer = await vote.ask("outer")

    assert (answer.headers["x-inference-model"], answer.headers["x-inference-votes"]) == ("a", "2/2")
    assert vote.served.lines[0]["votes"] == "2/2"


async def test_it_is_not_in_the_way_of_others(start_vote: Start) -> None:
    vote: Several = await start_vote(says("4"), says("4"))

    answer = await vote.ask("a", n=2)

    assert answer.status_code == 200
    assert "x-inference-votes" not in answer.headers
    assert orjson.loads(vote.engines[0].requests[0].body)["n"] == 2
