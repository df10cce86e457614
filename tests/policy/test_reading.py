"""Reading a policy: the same from every form and cut, and refused as a whole with the place of what is wrong."""

import json
from pathlib import Path
from typing import Any

import jsonschema
import orjson
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from inference_api.policy.json_items import Walk
from inference_api.policy.reading import PolicyError, read, run
from inference_api.policy.snapshot import Policy
from tests.policies import EXAMPLE, entry, new_key

LISTS = ("keys", "limits")
FULL: dict[str, Any] = {
    "organisations": [
        {
            "name": "team-a",
            "models": ["llama-*", "chat"],
            "limits": [{"requests": 600, "per": 60}, {"tokens": 200000, "per": 60}, {"streams": 50}],
            "budget": {"cost": 500, "per": "month", "soft": 0.8},
        }
    ],
    "keys": [
        {
            **entry(),
            "organisation": "team-a",
            "user": "ana",
            "models": ["llama-*", "chat"],
            "limits": [
                {"requests": 60, "per": 60, "precise": True},
                {"output_tokens": 10000, "per": 60, "models": ["llama-3-70b"]},
            ],
            "priority": 10,
            "weight": 1,
            "expires": "2027-01-31T00:00:00Z",
            "previous": {"digest": "sha256:" + "0" * 64, "until": "2026-12-01T00:00:00Z"},
        }
    ],
    "anonymous": {"limits": [{"requests": 10, "per": 60}]},
    "limits": [
        {"scope": "user", "requests": 120, "per": 60},
        {"scope": "model", "name": "llama-3-70b", "tokens": 1000000, "per": 60},
    ],
    "budgets": [{"scope": "user", "name": "ana", "tokens": 5000000, "per": "day"}],
    "prompts": [
        {
            "name": "support",
            "organisation": "team-a",
            "labels": {"production": 2},
            "versions": [
                {
                    "version": 2,
                    "messages": [{"role": "system", "content": "You help with {{product}}."}],
                    "variables": {
                        "product": {
                            "type": "enum",
                            "values": ["router", "console"],
                            "required": True,
                            "trusted": True,
                        }
                    },
                }
            ],
        }
    ],
}


def shown(policy: Policy) -> Any:
    """All that requests read of it."""
    caller = policy.find(bytes.fromhex(EXAMPLE.digest[7:]))
    replaced = policy.find(bytes(32))
    assert caller is not None
    assert replaced is not None
    return (
        [(c.id, c.limits, c.budgets, c.fields, c.models, c.expires, c.until, old) for c, old in (caller, replaced)],
        (policy.anonymous, policy.by_model, policy.by_address, policy.of_everyone, policy.prompts, policy.kinds),
    )


def test_every_form_is_read_alike() -> None:
    text = json.dumps(FULL, indent=1)
    expected = shown(run(read(FULL, peppered=False)))

    assert shown(run(read(text, peppered=False))) == expected
    for size in (1, 7, 64, 1000):
        pieces = [text[at : at + size] for at in range(0, len(text), size)]
        assert shown(run(read(pieces, peppered=False))) == expected
    for flow in (True, False):
        written = yaml.safe_dump(FULL, default_flow_style=flow)
        pieces = [written[at : at + 50] for at in range(0, len(written), 50)]
        assert shown(run(read(pieces, peppered=False, is_yaml=True))) == expected


def test_times_of_yaml_need_no_quotes() -> None:
    text = f"""
keys:
- {{id: k3v9Qm2XbT7a, name: a, digest: "{EXAMPLE.digest}", expires: 2027-01-31T00:00:00Z}}
- &other {{id: k3v9Qm2XbT7b, name: b, digest: "sha256:{"1" * 64}", expires: "2027-01-31T00:00:00Z"}}
- {{<<: *other, id: k3v9Qm2XbT7c, digest: "sha256:{"2" * 64}"}}
"""
    policy = run(read(text, peppered=False, is_yaml=True))

    assert sorted((row.id[-1], row.name, row.expires) for row in policy.rows()) == [
        ("a", "a", 1801353600.0),
        ("b", "b", 1801353600.0),
        ("c", "b", 1801353600.0),
    ]


def changed(path: str, value: Any) -> dict[str, Any]:
    """The full policy with another value at a path; None: without it."""
    made: dict[str, Any] = json.loads(json.dumps(FULL))
    *parents, last = [int(part) if part.isdigit() else part for part in path.split(".")]
    node: Any = made
    for part in parents:
        node = node[part]
    if isinstance(node, list) and last == len(node):
        node.append(value)
    else:
        node[last] = value
    return made


ORGANISATION = {"name": "team-a"}
REFUSED: list[tuple[str, Any, str]] = [
    ("keys.0.organisation", "team-b", "keys.0.organisation: 'team-b' is not in organisations"),
    ("prompts.0.organisation", "team-b", "prompts.0.organisation: 'team-b' is not in organisations"),
    (
        "limits.0",
        {"scope": "organisation", "name": "x", "requests": 1, "per": 1},
        "limits.0.name: 'x' is not in organisations",
    ),
    (
        "budgets.0",
        {"scope": "organisation", "name": "x", "tokens": 1, "per": "day"},
        "budgets.0.name: 'x' is not in organisations",
    ),
    ("limits.0", {"scope": "key", "name": "x", "requests": 1, "per": 1}, "limits.0.name: 'x' is not the id of one of"),
    ("keys.1", {**entry(new_key()), "id": EXAMPLE.id}, "keys.1.id: 'k3v9Qm2XbT7a' is given twice"),
    ("keys.1", {**entry(new_key()), "digest": EXAMPLE.digest}, "keys.1.digest: the digest is given twice"),
    ("keys.1", {**entry(new_key()), "digest": "sha256:" + "0" * 64}, "keys.1.digest: the digest is given twice"),
    ("keys.0.previous.digest", EXAMPLE.digest, "keys.0.previous.digest: the digest is given twice"),
    ("organisations.1", ORGANISATION, "organisations.1.name: 'team-a' is given twice"),
    ("prompts.1", FULL["prompts"][0], "prompts.1.name: 'support' is given twice"),
    (
        "prompts.0.versions.1",
        FULL["prompts"][0]["versions"][0],
        "prompts.0.versions.1.version: 2 is given twice",
    ),
    ("budgets.1", FULL["budgets"][0], "budgets.1: a budget of user 'ana' in tokens per day is given twice"),
    (
        "budgets.1",
        {"scope": "organisation", "name": "team-a", "cost": 1, "per": "month"},
        "budgets.1: a budget of organisation 'team-a' in cost per month is given twice",
    ),
    ("prompts.0.labels.production", 3, "prompts.0.labels.production: there is no version 3"),
    (
        "prompts.0.versions.0.messages.0.content",
        "{{ other }}",
        "prompts.0.versions.0.messages.0: the variable 'other' is used and not declared",
    ),
    (
        "prompts.0.versions.0.variables.product.trusted",
        False,
        "prompts.0.versions.0.messages.0: the variable 'product' is not trusted, and stands in a system message",
    ),
    ("keys.0.digest", EXAMPLE.peppered, "keys.0.digest: 'hmac-sha256' needs INFERENCE_API_KEY_PEPPER"),
    ("keys.0.digest", "md5:" + "0" * 32, "keys.0.digest: "),
    ("keys.0.id", "short", "keys.0.id: "),
    ("keys.0.name", "", "keys.0.name: "),
    ("keys.0.expires", "tomorrow", "keys.0.expires: must be a time in UTC, such as 2027-01-31T00:00:00Z"),
    ("keys.0.expires", "2027-01-31T00:00:00+01:00", "keys.0.expires: must be a time in UTC"),
    ("keys.0.colour", "red", "keys.0.colour: there is no such key"),
    ("keys.0.limits.0.per", 3601, "keys.0.limits.0.per: must be less than or equal to 3600"),
    ("keys.0.limits.0", {"requests": 1}, "keys.0.limits.0: give `per`, in seconds"),
    ("keys.0.limits.0", {"streams": 1, "per": 1}, "keys.0.limits.0: a limit of streams has no `per`"),
    ("keys.0.limits.0", {"per": 1}, "keys.0.limits.0: give one of requests, tokens, input_tokens, output_tokens, "),
    ("keys.0.limits.0", {"requests": 1, "tokens": 1, "per": 1}, "keys.0.limits.0: give one of requests, tokens, "),
    ("keys.0.limits.0.requests", 0, "keys.0.limits.0.requests: must be greater than or equal to 1"),
    ("keys.0.models", ["a b"], "keys.0.models.0: "),
    ("limits.0.scope", "team", "limits.0.scope: "),
    ("limits.0", {"scope": "all", "name": "x", "requests": 1, "per": 1}, "limits.0: a limit of the scope 'all' has no"),
    ("organisations.0.budget.cost", 0.0000000001, "organisations.0.budget: must have at most 9 digits after the point"),
    ("keys", {}, "keys: must be a list"),
    ("keys.0", None, "keys.0: "),
    ("keys.0", "sk-ia-secret", "keys.0: "),
]


@pytest.mark.parametrize(("path", "value", "reason"), REFUSED)
def test_what_is_wrong_is_refused_with_its_place(path: str, value: Any, reason: str) -> None:
    document = changed(path, value)

    for form in (document, json.dumps(document)):
        with pytest.raises(PolicyError) as caught:
            run(read(form, peppered=False))
        assert str(caught.value).startswith(reason)
        # A value may be a secret.
        assert "sk-ia-" not in str(caught.value)


def test_the_schema_of_the_contract_takes_what_is_read() -> None:
    """The schema is a copy of the contract's: tests/policy/policy.json."""
    schema = orjson.loads((Path(__file__).parent / "policy.json").read_bytes())
    judge = jsonschema.Draft202012Validator(schema)

    assert list(judge.iter_errors(FULL)) == []
    # What is wrong in itself is refused by both; what is wrong beside another value, by the reader alone.
    for path, value, reason in REFUSED:
        wrong_alone = not any(mark in reason for mark in ("is not in", "twice", "no version", "needs", "not the id"))
        if not judge.is_valid(changed(path, value)):
            assert wrong_alone, path


def test_an_unknown_key_is_collected_for_a_registry() -> None:
    newer = changed("keys.0.colour", "red")
    newer["webhooks"] = [1]
    newer["organisations"][0]["limits"][0]["burst"] = 3
    ignored: set[str] = set()

    policy = run(read(newer, peppered=False, ignored=ignored))

    assert policy.keys == 1
    assert ignored == {"colour", "webhooks", "limits.burst"}


def test_there_is_a_most_of_keys() -> None:
    def pieces() -> Any:
        yield '{"keys": ['
        for number in range(101):
            yield f'{{"id": "{number:012}", "name": "a", "digest": "sha256:{number:064x}"}},'

    with pytest.raises(PolicyError, match=r"^keys\.100: there are more than 100 keys"):
        run(read(pieces(), peppered=False, most_keys=100))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=10), inner, max_size=5),
    max_leaves=20,
)
DOCUMENTS = st.dictionaries(st.sampled_from([*LISTS, "other", "ünï", 'q"\\']) | st.text(max_size=5), JSON, max_size=5)


@given(DOCUMENTS, st.integers(1, 20), st.booleans(), st.sampled_from([None, 2, "\t"]))
def test_a_walk_finds_what_the_parser_finds(document: dict[str, Any], size: int, ascii_only: bool, indent: Any) -> None:
    text = json.dumps(document, ensure_ascii=ascii_only, indent=indent)
    pieces = [text[at : at + size] for at in range(0, len(text), size)]
    found: dict[str, Any] = {}

    for name, index, value in Walk(pieces).items(LISTS):
        if index >= 0:
            assert len(found.setdefault(name, [])) == index
            found[name].append(value)
        else:
            found.setdefault(name, value)

    assert found == json.loads(text)


@given(DOCUMENTS, st.integers(1, 20), st.data())
def test_a_walk_refuses_what_is_cut(document: dict[str, Any], size: int, data: st.DataObject) -> None:
    text = json.dumps(document)
    text = text[: data.draw(st.integers(0, len(text) - 1))]
    pieces = [text[at : at + size] for at in range(0, len(text), size)]

    with pytest.raises(ValueError, match=r"in line 1$"):
        list(Walk(pieces).items(LISTS))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "'{' is expected in line 1"),
        ("[]", "'{' is expected in line 1"),
        ('{"a": 1}\n}', "the end is expected in line 2"),
        ('{"a": 1,\n\n"a": 2}', "the key 'a' is given twice"),
        ('{"keys": [{"a": 1, "a": 2}]}', "the key 'a' is given twice"),
        ('{"keys": [1 2]}', "']' is expected in line 1"),
        ('{"keys": [1,]}', "a value is expected in line 1"),
        ('{"keys"\n 1}', "':' is expected in line 2"),
        ("{'a': 1}", "a name is expected in line 1"),
        ('{"a": ' + "[" * 5000, "it is nested too deeply"),
    ],
)
def test_what_is_no_json_is_refused(text: str, reason: str) -> None:
    with pytest.raises(ValueError, match=r"^") as caught:
        list(Walk([text]).items(LISTS))

    assert str(caught.value) == reason
