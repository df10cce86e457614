"""Names from lists: what a fleet makes of them, also of lists that are wrong, huge or contradict each other."""

import logging
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inference_api.discovery.listing import Listing, is_name, listing_of
from inference_api.discovery.lists import Lists, place_of_list
from inference_api.routing.backend import Backend
from inference_api.routing.balance import make_balancer
from inference_api.routing.catalogue import parse_catalogue
from inference_api.routing.fleet import Adapter, Fleet
from tests.listed import card

EVERY, KNOWN = 10.0, 600.0


class World:
    """A fleet whose names come from lists, and a clock."""

    def __init__(self, *entries: dict[str, Any], most: int = 1000) -> None:
        self.now = 1000.0
        self.failures: dict[str, int] = {}
        self.fleet = Fleet(make_balancer)
        self.lists = Lists(EVERY, self.failures, lambda: self.now, KNOWN, most)
        self.fleet.discover(self.lists.find)
        self.update(*entries)

    def update(self, *entries: dict[str, Any]) -> None:
        catalogue = parse_catalogue({"models": [*entries]})
        assert not catalogue.problems
        self.fleet.update(catalogue)

    def backend(self, url: str, model: str | None = None) -> Backend:
        models = [self.fleet.models[model]] if model else self.fleet.models.values()
        return next(backend for one in models for backend in one.backends if backend.url == url)

    def says(self, url: str, *cards: Any, model: str | None = None) -> None:
        """A backend gives this list."""
        listing = listing_of({"data": [*cards]})
        assert listing is not None
        self.lists.answered(self.backend(url, model), listing)
        self.link()

    def link(self) -> None:
        """What the poller does four times a second."""
        places = {place_of_list(one) for model in self.fleet.models.values() for one in model.backends}
        self.lists.expire(places)
        if self.lists.changed:
            self.fleet.link()

    def later(self, seconds: float) -> None:
        self.now += seconds
        self.link()

    def holders(self, name: str) -> set[str] | None:
        """The backends of an adapter, None if it is unknown."""
        model = self.fleet.by_name.get(name)
        if model is None:
            return None
        assert isinstance(model, Adapter)
        return {backend.url for backend in model.backends}

    @property
    def names(self) -> set[str]:
        return {*self.fleet.by_name}


A, B, C = "http://a", "http://b", "http://c"


def entry(name: str = "m", *urls: str, **more: Any) -> dict[str, Any]:
    return {"name": name, "backends": [*urls], "discover": True, **more}


def loras(*names: str, parent: str = "m") -> list[dict[str, Any]]:
    return [card(name, parent) for name in names]


def test_the_union_is_what_exists_and_the_holders_are_who_gets_it() -> None:
    world = World(entry("m", A, B, C))
    world.says(A, card("m"), *loras("x", "y"))
    world.says(B, card("m"), *loras("y"))
    world.says(C, card("m"))

    assert world.names == {"m", "x", "y"}
    assert (world.holders("x"), world.holders("y")) == ({A}, {A, B})
    assert [backend.url for backend in world.fleet.models["m"].backends] == [A, B, C]
    x = world.fleet.by_name["x"]
    assert x.parent is world.fleet.by_name["m"]
    assert x.backends[0] is world.fleet.by_name["m"].backends[0]


def test_an_adapter_that_is_gone_is_known_for_ten_minutes() -> None:
    world = World(entry("m", A))
    world.says(A, card("m"), *loras("x"))
    world.later(5)
    world.says(A, card("m"))
    assert world.holders("x") == set()
    for _ in range(61):
        world.later(KNOWN / 61 - 0.1)
        world.says(A, card("m"))
        assert world.holders("x") == set()
    world.later(20)

    assert world.holders("x") is None


def test_one_that_comes_back_starts_anew() -> None:
    world = World(entry("m", A))
    for _ in range(3):
        world.says(A, card("m"), *loras("x"))
        world.later(5)
        world.says(A, card("m"))
        world.later(KNOWN - 5)
        world.says(A, card("m"))
        assert world.holders("x") == set()


def test_silence_leaves_what_was_said_for_three_intervals_and_never_takes_the_model() -> None:
    world = World(entry("m", A, B))
    world.says(A, card("m"), card("other"), *loras("x"))
    world.says(B, card("m"), *loras("x"))
    world.later(3 * EVERY - 1)
    world.says(B, card("m"), *loras("x"))
    assert world.holders("x") == {A, B}
    world.later(2)
    assert world.holders("x") == {B}
    world.later(3 * EVERY)
    assert world.holders("x") == set()

    assert len(world.fleet.models["m"].available) == 2
    # Names of the model stay as long: its backends may still serve.
    assert world.fleet.by_name["other"] is world.fleet.models["m"]
    world.later(KNOWN + 1)
    assert world.names == {"m"}


def test_the_catalogues_names_win() -> None:
    world = World(entry("m", A, aliases=["short"]), {"name": "x", "backends": [B]})
    world.says(A, card("m"), card("x"), *loras("x", "short", "y"))
    assert world.fleet.by_name["x"].parent is None
    assert world.fleet.by_name["short"] is world.fleet.models["m"]
    assert world.holders("y") == {A}

    # Also over one that is served already.
    world.update(entry("m", A), {"name": "y", "backends": [B]})
    assert world.fleet.by_name["y"].parent is None
    world.update(entry("m", A))
    assert world.holders("y") == {A}


def test_an_adapter_of_two_models_is_refused_told_once_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    world = World(entry("m", A), entry("n", B))
    world.says(A, card("m"), *loras("x", "y"))
    world.says(B, card("n"), *loras("x", parent="n"))
    world.later(1)
    world.says(B, card("n"), *loras("x", "z", parent="n"))

    assert world.names == {"m", "n", "y", "z"}
    assert caplog.messages == ["names that engines list are not served: they are of more than one model"]
    assert world.failures == {"refused": 1}
    world.says(B, card("n"))
    assert world.holders("x") == {A}


def test_models_at_one_address_have_the_adapters_that_are_theirs() -> None:
    """Two names of one engine: vLLM gives the first one as the parent of all adapters."""
    world = World(entry("m", A), entry("n", A))
    world.says(A, card("m"), card("n"), *loras("x"))

    assert world.fleet.by_name["x"].parent is world.fleet.models["m"]
    assert world.names == {"m", "n", "x"}


def test_a_model_with_another_name_of_the_engine_has_its_adapters() -> None:
    world = World(entry("mine", A, served_model_name="second"))
    world.says(A, card("first"), card("second"), card("elsewhere", root="/models/other"), *loras("x", parent="first"))

    assert world.fleet.by_name["x"].parent is world.fleet.models["mine"]
    assert world.fleet.by_name["x"].entry.served_model_name is None
    assert world.fleet.by_name["first"] is world.fleet.models["mine"]
    assert "elsewhere" not in world.names


def test_two_entries_with_one_name_at_one_engine_both_claim_its_adapters() -> None:
    world = World(entry("m", A, served_model_name="s"), entry("n", A, served_model_name="s"))
    world.says(A, card("s"), *loras("x", parent="s"))

    assert world.names == {"m", "n"}
    assert world.failures == {"refused": 1}


@pytest.mark.parametrize(
    "cards",
    [
        [card("x", "x")],
        [card("x", "y"), card("y", "x")],
        [card("m"), card("x", "y"), card("y", "x")],
        [card("m"), card("x", "y"), card("y", "m")],
        [card("m"), card("x", "nobody")],
        [card("x", "m")],
        [card("m", "x"), card("x", "m")],
    ],
    ids=["itself", "a ring", "a ring beside it", "an adapter of an adapter", "nobody", "not listed", "a ring with it"],
)
def test_wrong_parents_have_no_adapters(cards: list[Any]) -> None:
    world = World(entry("m", A))
    world.says(A, *cards)

    assert "x" not in world.names


@pytest.mark.parametrize(
    "name", ["", " ", "a b", "../x", "-x", "x" * 129, "ä", "x\n", 'x"', "\ud800", 5, None, ["x"], {"id": "x"}, True]
)
def test_names_that_no_model_can_have_are_not_served(name: Any) -> None:
    world = World(entry("m", A))
    world.says(A, card("m"), {"id": name, "parent": "m"}, {"id": name}, *loras("good"))

    assert world.names == {"m", "good"}


@pytest.mark.parametrize("document", [None, [], "m", 5, {}, {"data": None}, {"data": "m"}, {"data": {"id": "m"}}])
def test_what_is_no_list_is_no_answer(document: Any) -> None:
    assert listing_of(document) is None


def test_cards_of_any_shape_are_passed_over() -> None:
    cards: list[Any] = [
        None,
        5,
        "m",
        [],
        {},
        {"id": None},
        {"id": "x", "parent": 5},
        {"id": "y", "parent": []},
        card("m"),
        card("m", "y"),
    ]

    assert listing_of({"data": cards}) == Listing(("x", "y", "m"), (("m", "/models/base"),), (), 2)


def test_of_many_adapters_a_model_has_a_thousand_and_keeps_them(caplog: pytest.LogCaptureFixture) -> None:
    world = World(entry("m", A), most=10)
    world.says(A, card("m"), *loras(*(f"x{number:02}" for number in range(10, 20))))
    world.says(A, card("m"), *loras(*(f"x{number:02}" for number in range(20))))

    assert world.names == {"m", *(f"x{number:02}" for number in range(10, 20))}
    assert caplog.messages == ["names that engines list are not served: a model has at most 10 adapters"]
    assert world.failures == {"refused": 10}


def test_a_huge_list_is_cut() -> None:
    listing = listing_of({"data": [card("m"), *loras(*(f"x{number}" for number in range(10_000)))]})
    assert listing is not None
    assert len(listing.names) == 4096


def test_the_first_of_two_cards_with_one_name_counts() -> None:
    world = World(entry("m", A))
    world.says(A, card("m"), card("x", "m"), card("x"), card("m", "x"), card("x", "nobody"))

    assert world.holders("x") == {A}


def test_further_names_are_aliases_of_the_model_that_has_them() -> None:
    world = World(entry("m", A, B), {"name": "taken"})
    world.says(A, card("m"), card("second"), card("taken"), card("not a name"))
    world.says(B, card("wrong"), card("third"))

    assert world.names == {"m", "second", "taken"}
    assert world.fleet.by_name["second"] is world.fleet.models["m"]
    assert world.fleet.models["m"].further == ("second",)
    world.update(entry("m", A, B, discover=False))
    assert world.names == {"m"}
    assert not world.fleet.models["m"].further


@pytest.mark.parametrize("engine", ["openai", "llamacpp"])
def test_a_list_of_other_models_has_no_further_names(engine: str) -> None:
    world = World(entry("m", A, engine=engine))
    world.says(A, card("m"), card("second"))

    assert world.names == {"m"}


def test_a_further_name_of_two_models_is_of_none() -> None:
    world = World(entry("m", A), entry("n", B))
    world.says(A, card("m"), card("both"))
    world.says(B, card("n"), card("both"))

    assert world.names == {"m", "n"}


def test_a_list_of_adapters_admits_and_forgets() -> None:
    world = World(entry("m", A, adapters=["x"]))
    world.says(A, card("m"), *loras("x", "y"))
    assert world.names == {"m", "x"}
    world.update(entry("m", A, adapters=[]))
    assert world.names == {"m"}
    world.update(entry("m", A))
    assert world.names == {"m", "x", "y"}


def test_adapters_without_discover_are_on_all_backends() -> None:
    world = World(entry("m", A, B, discover=False, adapters=["x"]), entry("n", C, discover=False, adapters=["y", "z"]))
    assert world.holders("x") == {A, B}
    assert (world.holders("y"), world.holders("z")) == ({C}, {C})

    world.update(entry("m", B, discover=False, adapters=["x", "y"]), entry("n", C, discover=False, adapters=["y"]))
    assert world.holders("x") == {B}
    assert world.names == {"m", "n", "x"}


@pytest.mark.parametrize("discover", [True, False])
def test_a_backend_that_denies_is_left_out_until_its_next_list(discover: bool) -> None:
    world = World(entry("m", A, B, discover=discover, adapters=["x"]))
    if discover:
        world.says(A, card("m"), *loras("x"))
        world.says(B, card("m"), *loras("x"))
    x = world.fleet.by_name["x"]
    assert isinstance(x, Adapter)
    world.lists.deny(x, x.backends[0])
    # At once, and also after the names were made anew.
    assert world.holders("x") == {B}
    world.later(1)
    assert world.holders("x") == {B}

    if discover:
        world.says(A, card("m"), *loras("x"))
    else:
        world.later(EVERY)
    assert world.holders("x") == {A, B}


def test_backends_that_come_and_go_count_at_once() -> None:
    world = World({"name": "m", "backends": [{"url": "http://llama.test", "discovery": "dns"}], "discover": True})
    fleet = world.fleet
    one, two = (f"http://llama.test#10.0.0.{number}" for number in (1, 2))
    fleet.resolve("llama.test", ["10.0.0.1", "10.0.0.2"], ["m"])
    for url in (one, two):
        world.says(url, card("m"), *loras("x"))
    assert world.holders("x") == {one, two}
    fleet.resolve("llama.test", ["10.0.0.2"], ["m"])

    assert world.holders("x") == {two}
    assert [backend.url for backend in fleet.by_name["x"].available] == [two]
    fleet.resolve("llama.test", ["10.0.0.2", "10.0.0.1"], ["m"])
    # It has to say so again.
    world.later(1)
    fleet.resolve("llama.test", ["10.0.0.2"], ["m"])
    world.later(1)
    fleet.resolve("llama.test", ["10.0.0.2", "10.0.0.1"], ["m"])
    assert world.holders("x") == {two}


def test_the_state_of_a_backend_is_that_of_all_views() -> None:
    world = World(entry("m", A, B, C))
    for url, names in ((A, ["x", "y"]), (B, ["x", "y"]), (C, ["x"])):
        world.says(url, card("m"), *loras(*names))
    views = [world.fleet.by_name[name] for name in ("m", "x", "y")]
    assert all(view.available is view.backends for view in views)
    world.backend(A).origin.healthy = False
    world.fleet.models["m"].refresh()

    assert [[backend.url for backend in view.available] for view in views] == [[B, C], [B, C], [B]]
    world.backend(B).origin.asleep = True
    world.fleet.models["m"].refresh()
    assert [[backend.url for backend in view.awake] for view in views] == [[A, C], [A, C], [A]]
    assert [view.panic for view in views] == [False, False, False]
    world.backend(A).weigh(0.5)
    world.backend(A).origin.healthy = True
    before = [view.available for view in views]
    world.fleet.models["m"].refresh(reweighed=True)
    # Another tuple, so that balancers see the weight.
    assert all(view.available is not one for view, one in zip(views, before, strict=True))


def test_views_count_in_their_model() -> None:
    world = World(entry("m", A))
    model = world.fleet.models["m"]
    model.in_flight, model.max_model_len = 3, 77
    world.says(A, card("m"), *loras("x"))
    x = world.fleet.by_name["x"]
    assert (model.in_flight, x.in_flight, model.max_model_len, x.max_model_len) == (3, 3, 77, 77)
    x.in_flight += 1

    assert model.in_flight == 4


def test_a_name_that_is_unchanged_keeps_its_state() -> None:
    world = World(entry("m", A, B))
    world.says(A, card("m"), *loras("x"))
    x, version = world.fleet.by_name["x"], world.fleet.version
    world.says(A, card("m"), *loras("x"))
    world.later(1)
    assert world.fleet.version == version
    world.says(B, card("m"), *loras("x"))

    assert world.fleet.by_name["x"] is x
    assert world.fleet.version > version


def test_backends_that_differ_are_told_of_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    world = World(entry("m", A, B))
    world.says(A, card("m"), *loras("x"))
    assert caplog.messages == []
    for _ in range(3):
        world.says(B, card("m"), card("other"))
        world.says(B, card("m"))
    assert caplog.messages == ["some backends of a model lack adapters that others have"]
    assert getattr(caplog.records[0], "fields") == {"model": "m", "adapters": 1, "first": ["x"]}  # noqa: B009
    world.says(B, card("m"), *loras("x"))
    world.says(B, card("m"))
    assert len(caplog.messages) == 2


def test_a_model_that_leaves_takes_its_names_along() -> None:
    world = World(entry("m", A))
    world.says(A, card("m"), card("second"), *loras("x"))
    world.update(entry("n", A))

    assert world.names == {"n"}
    assert {*world.fleet.served} == {"n"}


CARDS = st.lists(
    st.one_of(
        st.none(),
        st.builds(
            card,
            st.sampled_from(["m", "n", "x", "y", "z", "a b", ""]),
            st.none() | st.sampled_from(["m", "n", "x", "y"]),
            st.none() | st.sampled_from(["/one", "/two"]),
        ),
    ),
    max_size=8,
)
STEPS = st.lists(st.tuples(st.sampled_from([A, B, C]), CARDS, st.sampled_from([0.0, 1.0, 31.0, 700.0])), max_size=12)


@given(steps=STEPS)
def test_whatever_engines_say_names_are_consistent(steps: Sequence[tuple[str, list[Any], float]]) -> None:
    world = World(entry("m", A, B), entry("n", B, C), {"name": "z", "backends": [C]})
    for url, cards, pause in steps:
        world.later(pause)
        world.says(url, *cards)
        fleet = world.fleet
        assert {"m", "n", "z"} <= world.names
        for name, model in fleet.by_name.items():
            assert is_name(name)
            if model.parent is None:
                assert fleet.models[model.name] is model
                continue
            assert isinstance(model, Adapter)
            assert model.name == name == model.entry.name
            assert model in fleet.models[model.parent.name].adapters
            assert {*model.backends} <= {*model.parent.backends}
            assert {*model.available} <= {*model.backends}
            told = [one.url for one in model.backends if name in dict(fleet_lists(world, one).adapters)]
            assert told == [one.url for one in model.backends]
        assert {*fleet.served} == {*fleet.models} | {name for name, one in fleet.by_name.items() if one.parent}
        listed = {view for model in fleet.models.values() for view in model.adapters}
        assert listed == {view for view in fleet.served.values() if view.parent}


def fleet_lists(world: World, backend: Backend) -> Listing:
    return world.lists._answers[place_of_list(backend)][0]


def test_adapters_with_the_same_backends_share_what_is_computed() -> None:
    world = World(entry("m", A, B, C))
    names = [f"x{number}" for number in range(50)]
    for url in (A, B):
        world.says(url, card("m"), *loras(*names))
    world.backend(A).weigh(0.5)
    world.fleet.models["m"].refresh(reweighed=True)
    views = [world.fleet.by_name[name] for name in names]

    assert len({id(view.backends) for view in views}) == len({id(view.available) for view in views}) == 1
    assert views[0].available is not views[0].backends


def test_requests_that_wait_are_woken_when_names_change() -> None:
    world = World(entry("m", A))
    woken: list[str] = []
    world.fleet.models["m"].subscribe(lambda: woken.append("m"))
    world.says(A, card("m"), *loras("x"))
    assert woken
    world.says(A, card("m"))
    world.later(KNOWN - 1)
    woken.clear()
    world.later(2)

    assert world.holders("x") is None
    assert woken


def test_names_of_a_backend_that_lists_others_each_time_do_not_add_up() -> None:
    world = World(entry("m", A), most=10)
    for round in range(30):
        world.says(A, card("m"), *loras(*(f"x{round}-{number}" for number in range(4))))
        world.later(1)

    assert len(world.names) == 11
    assert len(world.lists._lost) == 10
    assert {f"x{round}-0" for round in (28, 29)} <= world.names
    world.says(A, card("m"), *loras(*(f"y{number}" for number in range(10))))
    assert world.names == {"m", *(f"y{number}" for number in range(10))}
