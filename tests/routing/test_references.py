"""Models that name others: what is refused, by name, and what is left out."""

from typing import Any

import pytest

from inference_api.app import ENTRY
from inference_api.routing.catalogue import Catalogue, parse_catalogue

A, B = {"name": "a", "backends": ["http://a:1"]}, {"name": "b", "backends": ["http://b:1"]}


def split(name: str, *variants: str, **more: Any) -> dict[str, Any]:
    return {"name": name, "split": {"variants": dict.fromkeys(variants, 1)}, **more}


def catalogue(*models: dict[str, Any], lenient: bool = False) -> Catalogue:
    return parse_catalogue({"models": list(models)}, ENTRY, lenient=lenient)


def test_members_that_exist_are_taken() -> None:
    found = catalogue(split("chat", "a", "b"), A, B)

    assert [*found] == ["chat", "a", "b"]
    assert found.problems == found.warnings == []


def test_a_member_that_does_not_exist_refuses_the_virtual_model_alone() -> None:
    found = catalogue(split("chat", "a", "x"), A, B)

    assert [*found] == ["a", "b"]
    assert found.problems == ["model 'chat': split.variants: there is no model 'x'"]


def test_an_adapter_that_is_listed_is_a_member() -> None:
    assert catalogue(split("chat", "a", "lora"), A | {"adapters": ["lora"]}).problems == []


def test_a_member_that_is_refused_itself_does_not_exist() -> None:
    found = catalogue(split("outer", "chat", "a"), split("chat", "a", "x"), A)

    assert [*found] == ["a"]
    assert found.problems == [
        "model 'chat': split.variants: there is no model 'x'",
        "model 'outer': split.variants: there is no model 'chat'",
    ]


@pytest.mark.parametrize(
    ("models", "ways"),
    [
        ([split("chat", "best", "a"), split("best", "chat", "a"), A], ["chat -> best -> chat", "best -> chat -> best"]),
        ([split("chat", "chat", "a"), A], ["chat -> chat"]),
    ],
)
def test_a_cycle_is_refused_by_name(models: list[dict[str, Any]], ways: list[str]) -> None:
    found = catalogue(*models)

    assert [*found] == ["a"]
    assert [problem.partition(": ")[2] for problem in found.problems] == [f"a cycle: {way}" for way in ways]


def test_three_virtual_models_in_a_chain_are_the_most() -> None:
    chain = [split("one", "two", "a"), split("two", "three", "a"), split("three", "b", "a")]

    assert catalogue(*chain, A, B).problems == []
    assert catalogue(split("zero", "one", "a"), *chain, A, B).problems == [
        "model 'zero': a chain of more than three virtual models: zero -> one -> two -> three"
    ]


def test_two_models_may_be_each_others_fallback() -> None:
    assert catalogue(A | {"fallbacks": ["b"]}, B | {"fallbacks": ["a"]}).problems == []


def test_a_fallback_that_does_not_exist_is_warned_of() -> None:
    found = catalogue(A | {"fallbacks": ["x", "b"], "context_fallbacks": ["y"]}, B)

    assert [*found] == ["a", "b"]
    assert found.problems == []
    assert found.warnings == [
        "model 'a': fallbacks: there is no model 'x'; it is left out",
        "model 'a': context_fallbacks: there is no model 'y'; it is left out",
    ]


@pytest.mark.parametrize(
    "more",
    [{"backends": ["http://a:1"]}, {"max_in_flight": 1}, {"engine": "vllm"}, {"price": {"input": 1, "output": 1}}],
)
def test_a_virtual_model_has_few_keys(more: dict[str, Any]) -> None:
    [problem] = catalogue(split("chat", "a", "b", **more), A, B).problems

    assert f"the key {next(iter(more))!r} does not go with `split`" in problem


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ({"variants": {"a": 0, "b": 0}}, "all 0"),
        ({"variants": {"a": 1}}, "split.variants"),
        ({"variants": {"a": -1, "b": 2}}, "split.variants"),
        ({"variants": {"a": 1, "b": 1}, "sticky": "ip"}, "split.sticky"),
    ],
)
def test_a_split_that_cannot_work_is_refused(value: dict[str, Any], says: str) -> None:
    [problem] = catalogue({"name": "chat", "split": value}, A, B).problems

    assert says in problem


@pytest.mark.parametrize("names", [[], ["b", "b"], ["b", "c", "d", "e"]])
def test_fallbacks_are_one_to_three_names(names: list[str]) -> None:
    [problem] = catalogue(A | {"fallbacks": names}, B).problems

    assert "fallbacks" in problem
