"""The compiled policy: who is who, what holds for whom, and what it costs."""

import gc
from typing import Any

from inference_api.policy.reading import read, run
from inference_api.policy.rules import matcher
from inference_api.policy.snapshot import KeyCaller, Policy
from inference_api.policy.warnings import has_precise_limits, warnings
from tests.policies import EXAMPLE, entry, new_key, policy_of

RAW = bytes.fromhex(EXAMPLE.digest[7:])


def made(document: dict[str, Any]) -> Policy:
    return run(read(document, peppered=False))


def caller_of(document: dict[str, Any]) -> KeyCaller:
    found = made(document).find(RAW)
    assert found is not None
    return found[0]


def test_a_caller_has_the_limits_of_all_its_holders() -> None:
    document = {
        "organisations": [{"name": "team-a", "limits": [{"requests": 600, "per": 60}]}],
        "keys": [entry(organisation="team-a", user="ana", limits=[{"requests": 60, "per": 60, "precise": True}])],
        "limits": [
            {"scope": "all", "requests": 9000, "per": 60},
            {"scope": "user", "requests": 120, "per": 60},
            {"scope": "user", "name": "bob", "requests": 1, "per": 60},
            {"scope": "key", "requests": 50, "per": 60},
            {"scope": "organisation", "name": "team-a", "streams": 3},
            {"scope": "model", "requests": 1, "per": 60},
            {"scope": "address", "requests": 1, "per": 60},
        ],
    }

    caller = caller_of(document)

    assert sorted((one.scope, one.holder, one.amount, one.precise) for one in caller.limits) == [
        ("all", "", 9000, False),
        # Equal but for the amount: the smallest holds.
        ("key", EXAMPLE.id, 50, True),
        ("organisation", "team-a", 3, False),
        ("organisation", "team-a", 600, False),
        ("user", "ana", 120, False),
    ]
    assert {one.shown for one in caller.limits} == {
        "all callers",
        "key 'batch'",
        "organisation 'team-a'",
        "user 'ana'",
    }


def test_a_caller_has_the_budgets_of_all_its_holders() -> None:
    caller = caller_of(
        {
            "organisations": [{"name": "team-a", "budget": {"cost": 0.5, "per": "month"}}],
            "keys": [entry(organisation="team-a", user="ana", budget={"tokens": 10, "per": "day"})],
            "budgets": [
                {"scope": "user", "requests": 7, "per": "week"},
                {"scope": "all", "cost": 100, "per": "day"},
                {"scope": "key", "tokens": 3, "per": "day"},
            ],
        }
    )

    assert sorted((one.id, one.amount) for one in caller.budgets) == [
        ("all::cost:day", 100 * 10**9),
        (f"key:{EXAMPLE.id}:tokens:day", 3),
        ("organisation:team-a:cost:month", 500_000_000),
        ("user:ana:requests:week", 7),
    ]


def test_a_replaced_secret_is_the_same_key() -> None:
    old = new_key()
    policy = made(policy_of(entry(previous={"digest": old.digest, "until": "2026-12-01T00:00:00Z"})))

    now, before = policy.find(RAW), policy.find(bytes.fromhex(old.digest[7:]))
    assert now is not None
    assert before is not None

    assert (now[1], before[1]) == (False, True)
    assert now[0] is before[0]


def test_patterns_match_whole_names() -> None:
    assert [matcher(("a*c",))(name) for name in ("ac", "abc", "abcd", "xac", "a.c")] == [True, True, False, False, True]
    assert not matcher(("a.c",))("abc")
    assert not matcher(())("a")
    assert matcher(None)("a")


def test_a_key_leaves_nothing_to_the_garbage_collector() -> None:
    """Else each collection would look at 100,000 of them."""
    gc.collect()
    before = len(gc.get_objects())
    policy = made(policy_of(*(entry(new_key(), name=str(number)) for number in range(3000))))
    gc.collect()

    assert len(gc.get_objects()) - before < 500
    assert policy.keys == 3000


def test_it_is_taken_apart_in_slices() -> None:
    policy = made(policy_of(*(entry(new_key()) for _ in range(3000))))

    steps = sum(1 for _ in policy.dismantle())

    assert len(policy.digests) == 0
    assert steps > 10
    assert policy.keys == 3000


def test_neither_a_policy_nor_a_caller_shows_more_than_it_must() -> None:
    document = policy_of(entry(name="secret-name"))

    assert repr(caller_of(document)) == f"<Caller {EXAMPLE.id}>"
    assert repr(made(document)).endswith(": 1 keys>")


def test_warnings() -> None:
    document = {
        "organisations": [{"name": "team-a", "models": ["llama-*", "gone-*"]}, {"name": "team-b"}],
        "keys": [
            entry(organisation="team-a", user="ana", models=["gone-*", "chat"], expires="2026-01-31T00:00:00Z"),
            entry(new_key(), limits=[{"requests": 1, "per": 1, "models": ["other"]}]),
        ],
        "limits": [
            {"scope": "user", "name": "bob", "requests": 1, "per": 60},
            {"scope": "organisation", "name": "team-b", "requests": 1, "per": 60},
            {"scope": "model", "name": "nope", "requests": 1, "per": 60},
            {"scope": "model", "requests": 1, "per": 60},
        ],
        "budgets": [{"scope": "user", "name": "carl", "tokens": 1, "per": "day"}],
    }
    policy = made(document)

    of_names = [
        "organisation 'team-a': no model matches 'gone-*'",
        "key 'batch': no model matches 'other'",
    ]
    of_nobody = [
        "limits.0: no key has the user 'bob'",
        "limits.1: no key has the organisation 'team-b'",
        "limits.2: there is no model 'nope'",
        "budgets.0: no key has the user 'carl'",
    ]
    expired = "the key 'batch' (k3v9Qm2XbT7a) expired at 2026-01-31T00:00:00Z"
    assert list(warnings(policy, ["llama-3", "chat"], 1.8e9)) == [expired, *of_names, *of_nobody]
    # The names of a registry are not known, and it is earlier.
    assert list(warnings(policy, None, 1.0)) == [of_nobody[0], of_nobody[1], of_nobody[3]]


def test_many_warnings_are_counted() -> None:
    keys = (entry(new_key(), expires="2026-01-31T00:00:00Z") for _ in range(25))

    found = list(warnings(made(policy_of(*keys)), [], 1.8e9))

    assert len(found) == 21
    assert found[-1] == "and 5 more keys that have expired"


def test_precise_limits_are_found_wherever_they_are() -> None:
    precise = {"requests": 1, "per": 1, "precise": True}

    assert not has_precise_limits(made(policy_of(entry(limits=[{"requests": 1, "per": 1}]))))
    for document in (
        policy_of(entry(limits=[precise])),
        {"organisations": [{"name": "a", "limits": [precise]}]},
        {"anonymous": {"limits": [precise]}},
        {"limits": [{"scope": "user", **precise}]},
        {"limits": [{"scope": "model", **precise}]},
    ):
        assert has_precise_limits(made(document))
