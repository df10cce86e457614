"""Every balancing keeps one contract; each one keeps its own promise on top; and a conversation keeps its key."""

import re
import string
from collections import Counter
from collections.abc import Sequence
from random import Random
from typing import Any, get_args

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from inference_api.routing.affinity import affinity_key
from inference_api.routing.backend import Backend
from inference_api.routing.balance import make_balancer
from inference_api.routing.balancer import Balancer
from inference_api.routing.entries import BalancingName

NAMES: tuple[BalancingName, ...] = get_args(BalancingName)
every_policy = pytest.mark.parametrize("name", NAMES)

Loads = list[tuple[float, int]]
loads: st.SearchStrategy[Loads] = st.lists(st.tuples(st.floats(0.001, 1000), st.integers(0, 50)), max_size=9)
keys = st.text(max_size=20)


def backends_of(*weights: float) -> tuple[Backend, ...]:
    return tuple(Backend("m", f"http://r{number}:8000", weight) for number, weight in enumerate(weights))


def loaded(load: Loads) -> tuple[Backend, ...]:
    backends = backends_of(*(weight for weight, _ in load))
    for backend, (_, in_flight) in zip(backends, load, strict=True):
        backend.origin.in_flight = in_flight
    return backends


def balancing(name: BalancingName, seed: int = 1) -> Balancer[Backend]:
    return make_balancer(name, Random(seed).random)


def pile(chooser: Balancer[Backend], backends: Sequence[Backend], requests: int) -> list[int]:
    """How many requests each backend has after `requests` that do not end, each with a key of its own."""
    for number in range(requests):
        chosen = chooser.choose(backends, f"key-{number}")
        assert chosen is not None
        chosen.origin.in_flight += 1
    return [backend.origin.in_flight for backend in backends]


# The contract


@settings(deadline=None, max_examples=50)
@given(name=st.sampled_from(NAMES), load=loads, key=keys, seed=st.integers(0, 99))
def test_each_choice_is_an_untried_backend_until_none_is_left(
    name: BalancingName, load: Loads, key: str, seed: int
) -> None:
    backends, chooser = loaded(load), balancing(name, seed)
    tried: list[Backend] = []
    while (chosen := chooser.choose(backends, key, tried)) is not None:
        assert chosen in backends
        assert chosen not in tried
        tried.append(chosen)
    assert set(tried) == set(backends)


@settings(deadline=None)
@given(name=st.sampled_from(NAMES), load=loads.filter(len), draws=st.lists(st.sampled_from([0.0, 1 - 2**-53])))
def test_the_extremes_of_randomness_are_harmless(name: BalancingName, load: Loads, draws: list[float]) -> None:
    backends, source = loaded(load), iter(draws)
    chooser: Balancer[Backend] = make_balancer(name, lambda: next(source, 0.5))
    for _ in range(5):
        assert chooser.choose(backends, "") in backends


@every_policy
def test_a_single_backend_is_always_chosen(name: BalancingName) -> None:
    (only,) = backends = backends_of(3)
    chooser = balancing(name)
    assert pile(chooser, backends, 20) == [20]
    assert chooser.choose(backends, "", [only]) is None


@every_policy
def test_no_backends_is_no_choice(name: BalancingName) -> None:
    chooser = balancing(name)
    assert chooser.choose((), "key") is None
    assert chooser.choose(backends_of(1), "key") is not None
    assert chooser.choose((), "key") is None


@every_policy
def test_a_new_set_takes_effect_at_once(name: BalancingName) -> None:
    backends, chooser = backends_of(1, 1, 1, 1), balancing(name)
    pile(chooser, backends, 10)
    fewer = backends[2:]
    assert {chooser.choose(fewer, f"key-{n}") for n in range(50)} <= set(fewer)
    for backend in backends:
        backend.origin.in_flight = 0
    assert {chooser.choose(backends, f"key-{n}") for n in range(50)} & set(backends[:2])


@every_policy
@pytest.mark.parametrize("weights", [(1, 1, 1), (1, 2, 5), (0.5, 0.25, 0.25, 1)])
def test_requests_in_flight_follow_the_weights(name: BalancingName, weights: tuple[float, ...]) -> None:
    shares = pile(balancing(name), backends_of(*weights), 4000)
    # Hashing is less even, and its bound lets a backend exceed its share by a quarter.
    tolerance = 0.35 if name == "prefix_affinity" else 0.02
    for share, weight in zip(shares, weights, strict=True):
        assert share == pytest.approx(4000 * weight / sum(weights), rel=tolerance)


@every_policy
def test_an_idle_fleet_is_used_as_a_whole(name: BalancingName) -> None:
    backends, chooser = backends_of(*[1] * 8), balancing(name)
    chosen = Counter(chooser.choose(backends, f"key-{number}") for number in range(4000))
    assert min(chosen[backend] for backend in backends) > 300
    assert max(chosen.values()) < 750


# round_robin


def test_round_robin_takes_each_in_turn() -> None:
    backends, chooser = backends_of(1, 1, 1), balancing("round_robin")
    order = [chooser.choose(backends, "") for _ in range(9)]
    assert order[:3] == order[3:6] == order[6:]
    assert set(order[:3]) == set(backends)


@settings(deadline=None)
@given(weights=st.lists(st.integers(1, 9), min_size=2, max_size=12), seed=st.integers(0, 99))
@example(weights=[1] * 30 + [30], seed=1)
def test_round_robin_is_smooth(weights: list[int], seed: int) -> None:
    """In any stretch of requests, a backend is less than three requests away from its share."""
    backends, chooser = backends_of(*weights), balancing("round_robin", seed)
    chosen: Counter[Backend | None] = Counter()
    ahead = {backend: [0.0] for backend in backends}
    for number in range(1, 301):
        chosen[chooser.choose(backends, "")] += 1
        for backend in backends:
            ahead[backend].append(chosen[backend] - number * backend.weight / sum(weights))
    assert max(max(drift) - min(drift) for drift in ahead.values()) < 3


def test_routers_that_start_together_do_not_go_round_in_step() -> None:
    backends = backends_of(*[1] * 8)
    assert len({balancing("round_robin", seed).choose(backends, "") for seed in range(30)}) > 4


# least_in_flight


def test_least_in_flight_takes_the_least_for_its_weight() -> None:
    backends = loaded([(1, 3), (4, 8), (2, 5)])
    assert balancing("least_in_flight").choose(backends, "") is backends[1]
    assert balancing("least_in_flight").choose(backends, "", [backends[1]]) is backends[2]


def test_least_in_flight_breaks_ties_by_weight() -> None:
    backends = backends_of(1, 3)
    chooser = balancing("least_in_flight")
    chosen = Counter(chooser.choose(backends, "") for _ in range(4000))
    assert chosen[backends[1]] == pytest.approx(3000, rel=0.05)


# two_choices


def test_two_choices_never_takes_the_most_loaded() -> None:
    for load in ([(1.0, 2), (1.0, 9), (1.0, 3)], [(1.0, 2), (2.0, 19), (1.5, 3)]):
        backends, chooser = loaded(load), balancing("two_choices")
        assert {chooser.choose(backends, "") for _ in range(200)} == {backends[0], backends[2]}


def test_two_choices_is_far_more_even_than_random() -> None:
    """100 backends, 10,000 requests: one random choice ends with about 130 on the fullest, two with about 103."""
    assert max(pile(balancing("two_choices"), backends_of(*[1] * 100), 10_000)) <= 105


def test_two_choices_draws_by_weight() -> None:
    backends, chooser = backends_of(1, 1, 6), balancing("two_choices")
    seen = Counter(chooser.choose(backends, "") for _ in range(4000))
    # The heavy one is in a pair unless both light ones are drawn: 2 * 1/8 * 1/7 = 3.6 %.
    assert 4000 - seen[backends[2]] == pytest.approx(4000 / 28, rel=0.25)


def test_two_choices_draws_the_second_by_weight_too() -> None:
    light, other, full = backends = backends_of(1, 1, 6)
    full.origin.in_flight = 1000
    chooser = balancing("two_choices")
    seen = Counter(chooser.choose(backends, "") for _ in range(4000))
    assert seen[full] == 0
    assert seen[light] == pytest.approx(seen[other], rel=0.15)


def test_two_choices_are_distinct_even_where_rounding_says_otherwise() -> None:
    """1000.003 - 1000 is a little more than 0.003, so that the second draw falls on the first backend again."""
    light, heavy = backends = backends_of(0.003, 1000)
    heavy.origin.in_flight = 10**7
    draws = iter([0.5, 1 - 2**-53])
    chooser: Balancer[Backend] = make_balancer("two_choices", lambda: next(draws))
    assert chooser.choose(backends, "") is light


# prefix_affinity


def test_prefix_affinity_spreads_requests_without_a_key() -> None:
    backends, chooser = backends_of(1, 1), balancing("prefix_affinity")
    for _ in range(8):
        chosen = chooser.choose(backends, "")
        assert chosen is not None
        chosen.origin.in_flight += 1
    assert [backend.origin.in_flight for backend in backends] == [4, 4]


def test_prefix_affinity_gives_a_retry_the_next_on_the_ring() -> None:
    backends, chooser = backends_of(*[1] * 8), balancing("prefix_affinity")
    home = chooser.choose(backends, "key")
    assert home is not None
    second = chooser.choose(backends, "key", [home])
    home.origin.in_flight = 2
    assert chooser.choose(backends, "key") is second, "a full home spills to where a retry goes"
    without = tuple(backend for backend in backends if backend is not home)
    assert chooser.choose(without, "key") is second, "and so does a home that left"


def test_prefix_affinity_uses_a_full_backend_when_all_others_were_tried() -> None:
    idle, busy = backends = loaded([(1, 0), (1, 50)])
    assert {balancing("prefix_affinity").choose(backends, f"key-{n}", [idle]) for n in range(20)} == {busy}


# The key


def chat(*turns: tuple[str, Any]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


turns = st.lists(st.tuples(st.sampled_from(["user", "assistant", "tool"]), st.text(max_size=30)), max_size=8)


@settings(deadline=None)
@given(system=st.text(), first=st.text(min_size=1), later=turns)
def test_every_turn_of_a_conversation_has_the_same_key(system: str, first: str, later: list[tuple[str, str]]) -> None:
    opening = [("system", system), ("user", first)]
    assert affinity_key("m", chat(*opening, *later), None) == affinity_key("m", chat(*opening), None)


@settings(deadline=None)
@given(one=st.tuples(st.text(), st.text(min_size=1)), other=st.tuples(st.text(), st.text(min_size=1)))
def test_conversations_that_differ_have_different_keys(one: tuple[str, str], other: tuple[str, str]) -> None:
    first, second = (affinity_key("m", chat(("system", said[0]), ("user", said[1])), None) for said in (one, other))
    assert (first == second) == (one == other)


def test_a_session_decides_alone() -> None:
    key = affinity_key("m", chat(("user", "one")), "session-1")
    assert key == affinity_key("m", chat(("user", "two")), "session-1")
    assert key != affinity_key("m", chat(("user", "one")), "session-2")
    assert key != affinity_key("m", {"prompt": "session-1"}, None)
    assert affinity_key("m", {"prompt": "x"}, "") == affinity_key("m", {"prompt": "x"}, None) != ""


def test_models_have_keys_of_their_own() -> None:
    assert affinity_key("a", {"prompt": "x"}, None) != affinity_key("b", {"prompt": "x"}, None)
    assert affinity_key("a", {}, "session") != affinity_key("b", {}, "session")


@pytest.mark.parametrize(
    ("short", "long"),
    [
        ({"prompt": "a" * 1024}, {"prompt": "a" * 5000}),
        ({"prompt": ["a", "b"]}, {"prompt": ["a", "c", "d"]}),
        ({"prompt": list(range(256))}, {"prompt": list(range(300))}),
        ({"prompt": [[1, 2], [3]]}, {"prompt": [[1, 2], [4]]}),
        ({"input": "a"}, {"prompt": None, "messages": [], "input": "a"}),
        ({"input": [{"role": "user", "content": "a"}]}, chat(("user", "a"), ("assistant", "b"))),
        (chat(("user", [{"type": "text", "text": "a"}])), chat(("user", "a"))),
        (chat(("user", [{"image_url": "data:a"}])), chat(("user", [{"image_url": {"url": "data:a"}}]))),
    ],
)
def test_the_same_beginning_is_the_same_key(short: dict[str, Any], long: dict[str, Any]) -> None:
    assert affinity_key("m", short, None) == affinity_key("m", long, None) != ""


@pytest.mark.parametrize("name", ["prompt", "input"])
def test_prompts_that_begin_differently_have_different_keys(name: str) -> None:
    prompts = ["a", "b", ["c", "a"], [1, 2], [1, 3], [[1], [2]], [10**5000]]
    assert len({affinity_key("m", {name: prompt}, None) for prompt in prompts}) == len(prompts)


@pytest.mark.parametrize("value", [None, "", 3, {}, [], [[]], [None], [""], [{}], [[[[]]]], [["a"]], [{"role": []}]])
@pytest.mark.parametrize("name", ["messages", "prompt", "input"])
def test_nothing_usable_is_no_key(name: str, value: Any) -> None:
    assert affinity_key("m", {name: value}, None) == ""


@pytest.mark.parametrize("content", [None, 7, {}, [], "", [None, 7, {}, {"text": None}, {"image_url": {"url": 1}}]])
def test_messages_without_text_are_no_key(content: Any) -> None:
    assert affinity_key("m", chat(("system", content), ("user", content)), None) == ""


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.just("\ud800"),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(["role", "content", "text", "image_url", "url"]), inner, max_size=4)
    ),
)


@settings(deadline=None)
@given(fields=st.dictionaries(st.sampled_from(["messages", "prompt", "input"]), json_values))
def test_a_key_is_a_digest_or_nothing_whatever_the_shape(fields: dict[str, Any]) -> None:
    assert re.fullmatch("([0-9a-f]{32})?", affinity_key("m", fields, None))


def test_a_key_does_not_grow_with_the_conversation() -> None:
    openings = [("system", text) for text in string.ascii_letters]
    assert affinity_key("m", chat(*openings, ("user", "a")), None) == affinity_key("m", chat(*openings), None)
