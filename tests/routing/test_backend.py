"""The fleet keeps what is alive while the catalogue under it changes."""

from random import Random
from typing import Any

import httpx
import pytest

from inference_api.routing.backend import Backend
from inference_api.routing.balance import make_balancer
from inference_api.routing.catalogue import parse_catalogue
from inference_api.routing.fleet import Fleet, Model


@pytest.fixture
def fleet() -> Fleet:
    return Fleet(lambda name: make_balancer(name, Random(1).random))


def update(fleet: Fleet, *entries: dict[str, Any]) -> None:
    catalogue = parse_catalogue({"models": list(entries)})
    assert not catalogue.problems
    fleet.update(catalogue)


def entry(*hosts: str, name: str = "m", **more: Any) -> dict[str, Any]:
    return {"name": name, "backends": [{"url": f"http://{host}"} for host in hosts], **more}


def urls(model: Model) -> list[str]:
    return [backend.url for backend in model.backends]


# Fleet


def test_a_model_answers_to_its_name_and_its_aliases(fleet: Fleet) -> None:
    update(fleet, entry("a", aliases=["x", "y"]), entry("b", name="n"))

    assert list(fleet.models) == ["m", "n"]
    assert fleet.by_name["m"] is fleet.by_name["x"] is fleet.by_name["y"] is fleet.models["m"]
    assert set(fleet.by_name) == {"m", "x", "y", "n"}


def test_an_alias_can_move_to_another_model_and_can_go(fleet: Fleet) -> None:
    update(fleet, entry("a", aliases=["x", "y"]), entry("b", name="n"))
    update(fleet, entry("a"), entry("b", name="n", aliases=["x"]))

    assert fleet.by_name["x"] is fleet.models["n"]
    assert "y" not in fleet.by_name


def test_what_is_in_flight_stays_counted_when_the_catalogue_changes(fleet: Fleet) -> None:
    update(fleet, entry("a", "b"))
    model = fleet.models["m"]
    a, b = model.backends
    model.in_flight, a.in_flight, b.in_flight = 3, 2, 1

    update(fleet, entry("c", "b", "a", version="2"))

    assert fleet.models["m"] is model
    assert model.in_flight == 3
    assert [(backend.label, backend.in_flight) for backend in model.backends] == [("c", 0), ("b", 1), ("a", 2)]


def test_a_backend_that_left_ends_what_it_has_and_gets_no_more(fleet: Fleet) -> None:
    update(fleet, entry("a", "b"))
    model = fleet.models["m"]
    gone = model.backends[0]
    gone.in_flight = 1

    update(fleet, entry("b"))
    gone.in_flight -= 1

    assert urls(model) == ["http://b"]
    assert gone not in model.available
    assert gone.in_flight == 0


def test_the_same_url_under_two_models_is_two_backends_of_one_origin(fleet: Fleet) -> None:
    update(fleet, entry("a", "b"), entry("a", name="n"))
    one, two = fleet.models["m"].backends[0], fleet.models["n"].backends[0]

    assert one is not two
    assert [model.backends[0].model for model in fleet.models.values()] == ["m", "n"]
    assert one.origin is two.origin
    assert list(one.origin.backends) == [one, two]
    assert set(fleet.origins) == {"http://a", "http://b"}


@pytest.mark.parametrize("balancing", ["two_choices", "least_in_flight"])
def test_what_one_model_has_at_an_address_counts_in_the_choices_of_the_others(fleet: Fleet, balancing: str) -> None:
    update(fleet, entry("a", "b", balancing=balancing), entry("a", name="n"))
    fleet.models["n"].backends[0].origin.in_flight = 1

    assert {fleet.models["m"].choose("") for _ in range(50)} == {fleet.models["m"].backends[1]}


def test_an_origin_lasts_as_long_as_it_serves_a_model_or_has_something_in_flight(fleet: Fleet) -> None:
    update(fleet, entry("a"), entry("a", name="n"))
    origin = fleet.origins["http://a"]
    update(fleet, entry("b"), entry("a", name="n"))
    assert fleet.origins["http://a"] is origin
    assert [backend.model for backend in origin.backends] == ["n"]

    origin.in_flight = 1
    update(fleet, entry("b"))
    assert fleet.origins["http://a"] is origin
    update(fleet, entry("b"), entry("a", name="n"))
    assert fleet.models["n"].backends[0].origin is origin
    update(fleet, entry("b"))
    origin.in_flight = 0
    update(fleet, entry("b"))

    assert set(fleet.origins) == {"http://b"}


def test_an_origin_that_moves_from_one_model_to_another_is_the_same(fleet: Fleet) -> None:
    update(fleet, entry("a", "b"), entry("c", name="n"))
    origin = fleet.origins["http://a"]

    update(fleet, entry("b"), entry("c", "a", name="n"))

    assert fleet.models["n"].backends[1].origin is origin
    assert list(origin.backends) == [fleet.models["n"].backends[1]]


def test_a_backend_that_comes_back_shares_its_origin_with_those_that_came_meanwhile(fleet: Fleet) -> None:
    update(fleet, entry("a"), entry("b", name="n"))
    left = fleet.models["m"].backends[0]
    left.in_flight = left.origin.in_flight = 1
    update(fleet, entry("b"), entry("b", name="n"))
    left.in_flight = left.origin.in_flight = 0
    update(fleet, entry("b"), entry("b", name="n"))
    update(fleet, entry("b"), entry("a", name="n"))

    update(fleet, entry("a"), entry("a", name="n"))

    assert fleet.models["m"].backends[0].origin is fleet.models["n"].backends[0].origin is fleet.origins["http://a"]


def test_a_model_that_is_gone_is_unknown_and_comes_back_new(fleet: Fleet) -> None:
    update(fleet, entry("a", aliases=["x"]))
    old = fleet.models["m"]
    old.in_flight = 1
    update(fleet)

    assert fleet.models == fleet.by_name == {}
    update(fleet, entry("a"))
    assert fleet.models["m"] is not old
    assert fleet.models["m"].in_flight == 0


def test_an_entry_that_says_the_same_changes_nothing(fleet: Fleet) -> None:
    update(fleet, entry("a", "b"))
    model = fleet.models["m"]
    before = (model.entry, model.balancer, model.backends, model.available)
    model.max_model_len = 4096

    update(fleet, entry("a", "b"))

    assert fleet.models["m"] is model
    assert all(
        old is new
        for old, new in zip(before, (model.entry, model.balancer, model.backends, model.available), strict=True)
    )
    assert model.max_model_len == 4096


def test_another_policy_is_a_new_policy_over_the_same_backends(fleet: Fleet) -> None:
    update(fleet, entry("a", "b", balancing="round_robin"))
    model = fleet.models["m"]
    backends, balancing = model.backends, model.balancer

    update(fleet, entry("a", "b", balancing="least_in_flight"))

    assert type(model.balancer) is not type(balancing)
    assert model.backends is backends
    assert model.choose("") in backends


def test_a_model_chooses_by_its_policy_what_has_not_been_tried(fleet: Fleet) -> None:
    update(fleet, entry("a", "b", balancing="round_robin"))
    model = fleet.models["m"]
    a, b = model.backends

    assert {model.choose(""), model.choose("")} == {a, b}
    assert model.choose("", [a]) is b
    assert model.choose("", [a, b]) is None
    assert a.origin.failures == 0


def test_each_model_has_a_policy_of_its_own(fleet: Fleet) -> None:
    update(fleet, entry("a", balancing="round_robin"), entry("a", name="n", balancing="round_robin"))

    assert fleet.models["m"].balancer is not fleet.models["n"].balancer


def test_a_new_version_of_an_entry_forgets_what_the_engine_told(fleet: Fleet) -> None:
    update(fleet, entry("a"))
    fleet.models["m"].max_model_len = 4096

    update(fleet, entry("a", version="2"))

    assert fleet.models["m"].entry.version == "2"
    assert fleet.models["m"].max_model_len is None


def test_the_available_backends_are_another_tuple_only_when_the_set_changes(fleet: Fleet) -> None:
    update(fleet, entry("a", "b"))
    model = fleet.models["m"]
    backends = model.available

    update(fleet, entry("a", "b", owner="somebody else"))
    assert model.available is model.backends is backends

    update(fleet, entry("a", "c"))
    assert model.available == model.backends != backends
    assert urls(model) == ["http://a", "http://c"]


def test_a_new_weight_counts_from_the_next_choice(fleet: Fleet) -> None:
    update(fleet, {"name": "m", "balancing": "round_robin", "backends": [{"url": "http://a"}, {"url": "http://b"}]})
    model = fleet.models["m"]
    model.balancer.choose(model.available, "")
    heavier = [{"url": "http://a", "weight": 9}, {"url": "http://b"}]
    update(fleet, {"name": "m", "balancing": "round_robin", "backends": heavier})

    chosen = [model.balancer.choose(model.available, "") for _ in range(100)]

    assert sum(backend is model.backends[0] for backend in chosen) == 90


def test_the_version_grows_with_every_update(fleet: Fleet) -> None:
    versions = [fleet.version]
    for owner in ("one", "two"):
        update(fleet, entry("a", owner=owner))
        versions.append(fleet.version)
    update(fleet)
    versions.append(fleet.version)

    assert versions == sorted(set(versions))


def test_a_model_without_backends_can_be_named(fleet: Fleet) -> None:
    update(fleet, {"name": "m"})
    model = fleet.models["m"]

    assert model.balancer.choose(model.available, "") is None


# Backend


@pytest.mark.parametrize(
    ("url", "host", "base_path"),
    [("http://a:8000", b"a:8000", ""), ("https://a/base/v", b"a", "/base/v"), ("http://[::1]:80", b"[::1]:80", "")],
)
def test_a_backend_knows_its_host_header_and_base_path(url: str, host: bytes, base_path: str) -> None:
    backend = Backend("m", url)

    assert (backend.host, backend.origin.base_path) == (host, base_path)
    assert backend.address("/v1/models") == (httpx.URL(url + "/v1/models"), f"{base_path}/v1/models".encode())
    assert backend.address("/v1/models") is backend.address("/v1/models")


def test_two_backends_behind_one_host_have_labels_of_their_own() -> None:
    assert Backend("m", "http://gateway/a").label != Backend("m", "http://gateway/b").label


def test_operators_see_what_is_in_flight(fleet: Fleet) -> None:
    update(fleet, entry("a", "b:8000"))
    model = fleet.models["m"]
    model.in_flight = model.backends[1].in_flight = 2

    assert repr(model) == "<Model m: 2/2 backends, 2 in flight>"
    assert repr(model.backends[1]) == "<Backend b:8000 of m: 2 in flight>"
