"""The edits of a body with a stored prompt: the prompt is in its place, and every other byte is as it was."""

import json
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from inference_api.features.prompting.edits import edits, moved
from inference_api.policy.templates import MEMBERS
from inference_api.threads import at_once
from inference_api.upstream.places import find_places
from inference_api.upstream.rewrite import edited

SYSTEM = {"role": "system", "content": 'a "b"'}
RENDERED = orjson.dumps(SYSTEM) + b"," + orjson.dumps(SYSTEM)


def rewritten(label: str, body: bytes) -> bytes:
    member = MEMBERS[label]
    rendered = b'"text"' if label == "completions" else RENDERED
    changes = edits(label, body, at_once(find_places(body, {"prompt", member})), member, rendered)
    made = edited(body, changes)
    assert isinstance(made, bytes)
    return made


CASES: list[tuple[str, bytes, bytes]] = [
    ("chat_completions", b'{"prompt": {}, "messages": [1]}', b'{"messages": [%b,1]}'),
    ("chat_completions", b'{"messages":[ 1 ],\n "prompt":{}}', b'{"messages":[%b, 1 ]}'),
    ("chat_completions", b'{"messages":[ ] ,"prompt":{},"n":1}', b'{"messages":[%b ] ,"n":1}'),
    ("chat_completions", b'{"a":1, "prompt" : {}}', b'{"a":1, "messages":[%b]}'),
    ("chat_completions", b'{"messages":null,"prompt":{}}', b'{"messages":[%b]}'),
    ("chat_completions", b' { "prompt":{} } ', b' { "messages":[%b] } '),
    # Repeated members: the last one counts, in engines that take the first, too.
    ("chat_completions", b'{"messages":[1],"prompt":{},"messages":[2]}', b'{"messages":[%b,2]}'),
    ("chat_completions", b'{"prompt":"x","prompt":{},"a":1}', b'{"messages":[%b],"a":1}'),
    ("chat_completions", b'{"a":1,"prompt":"x","messages":[1],"prompt":{}}', b'{"a":1,"messages":[%b,1]}'),
    ("chat_completions", b'{"messages":[0],"prompt":1,"messages":[1],"prompt":{}}', b'{"messages":[%b,1]}'),
    ("responses", b'{"input":"h\\u00e9","prompt":{}}', b'{"input":[%b,{"role":"user","content":"h\\u00e9"}]}'),
    ("responses", b'{"input":[{"a":1}],"prompt":{}}', b'{"input":[%b,{"a":1}]}'),
    ("responses", b'{"prompt":{}}', b'{"input":[%b]}'),
    ("completions", b'{"model":"m", "prompt": {"id": "x"} ,"n":1}', b'{"model":"m", "prompt": "text" ,"n":1}'),
    ("completions", b'{"prompt":"a","prompt":{}}', b'{"prompt":"text"}'),
]


@pytest.mark.parametrize(("label", "body", "made"), CASES, ids=[str(body[:50]) for _, body, _ in CASES])
def test_where_the_prompt_goes(label: str, body: bytes, made: bytes) -> None:
    assert rewritten(label, body) == (made if label == "completions" else made % RENDERED)


others = st.dictionaries(
    st.text(max_size=4).filter(lambda name: name not in ("prompt", "messages")),
    st.none() | st.integers() | st.text(max_size=5) | st.lists(st.text(max_size=3), max_size=2),
    max_size=4,
)


@given(others, others, st.lists(st.fixed_dictionaries({"role": st.just("user"), "content": st.text()})) | st.none())
def test_all_else_stays(first: Any, second: Any, messages: Any) -> None:
    members = [
        *first.items(),
        ("prompt", {"id": "x"}),
        *[(name, one) for name, one in second.items() if name not in first],
    ]
    if messages is not None:
        members.insert(len(members) // 2, ("messages", messages))
    spelled = [(name, json.dumps(name).encode() + b" : " + json.dumps(value).encode()) for name, value in members]
    body = b"{ " + b" ,\n".join(text for _, text in spelled) + b" }"

    made = rewritten("chat_completions", body)

    wanted = {**dict(members), "messages": [SYSTEM, SYSTEM, *(messages or [])]}
    del wanted["prompt"]
    assert json.loads(made) == wanted
    assert all(text in made for name, text in spelled if name not in ("prompt", "messages"))


def test_offsets_after_the_edits() -> None:
    body = b'{"prompt":{"id":"x"},"messages":[],"model":"m"}'
    changes = edits("chat_completions", body, at_once(find_places(body, {"prompt", "messages"})), "messages", RENDERED)
    made = edited(body, changes)

    at = body.index(b'"m"')
    assert isinstance(made, bytes)
    assert made[moved(at, changes) : moved(at + 3, changes)] == b'"m"'
