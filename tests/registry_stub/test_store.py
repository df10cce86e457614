import json
import sqlite3
import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from inference_api.app import ENTRY
from inference_api.routing.catalogue import parse_catalogue
from inference_api.routing.entries import CatalogueEntry
from registry_stub.database import StoreError
from registry_stub.store import NameTaken, Store, Stored

EVERY_FIELD = {
    "name": "org/model@1",
    "version": 2,
    "owner": "team",
    "engine": "tgi",
    "backends": [{"url": "http://a:80/"}, {"url": "https://b/v1", "weight": 0.5}],
    "aliases": ["short"],
    "hardware": {"gpu": "nvidia-l4", "gpu_count": 2, "gpu_memory_gib": 22.5},
    "served_model_name": "tgi",
    "balancing": "round_robin",
    "timeouts": {"first_byte": 3, "idle": None},
    "max_in_flight": 9,
    "credentials": {"env": "BACKEND_TOKEN"},
    "created": 5,
}


def entry(name: str, **fields: Any) -> CatalogueEntry:
    return CatalogueEntry.model_validate({"name": name, **fields})


def listed(store: Store) -> list[str]:
    return [model["name"] for model in json.loads(store.snapshot.listing.body)["models"]]


@pytest.mark.parametrize("raw", [EVERY_FIELD, {"name": "bare"}, {"name": "a", "credentials": "passthrough"}])
def test_what_is_listed_parses_to_what_was_put(store: Store, raw: dict[str, Any]) -> None:
    put = CatalogueEntry.model_validate(raw)
    store.put(put, now=5)
    catalogue = parse_catalogue(json.loads(store.snapshot.listing.body))
    assert catalogue.problems == []
    assert catalogue[put.name] == put.model_copy(update={"created": 5})


def test_a_document_has_only_the_keys_that_were_set(store: Store) -> None:
    stored, _ = store.put(entry("a", balancing="two_choices"), now=7)
    assert json.loads(stored.body) == {"name": "a", "balancing": "two_choices", "created": 7}


@pytest.mark.parametrize(
    "price", [{"input": 0.2, "cached_input": 0.02, "output": 3, "request": 0}, {"input": 0.1, "output": 1e-9}]
)
def test_a_price_is_listed_as_it_was_put(store: Store, price: dict[str, float]) -> None:
    made = ENTRY.model_validate({"name": "a", "price": price})

    stored, _ = store.put(made, now=7)

    assert json.loads(stored.body)["price"] == price
    assert getattr(ENTRY.model_validate_json(stored.body), "price") == getattr(made, "price")  # noqa: B009


def test_models_keep_their_order_when_replaced_and_when_reopened(database: Path) -> None:
    with Store(database) as store:
        for name in "cab":
            store.put(entry(name), now=1)
        store.put(entry("c", version="2"), now=1)
        before = store.snapshot.listing
    with Store(database) as store:
        assert listed(store) == ["c", "a", "b"]
        assert store.snapshot.listing == before


def test_created_is_the_time_of_the_first_put_unless_the_entry_has_one(store: Store) -> None:
    created = [store.put(made, now)[0].entry.created for made, now in [(entry("a"), 10), (entry("a", version="2"), 20)]]
    created.append(store.put(entry("a", created=5), now=30)[0].entry.created)
    assert created == [10, 10, 5]


def test_put_says_whether_the_model_is_new(store: Store) -> None:
    assert [store.put(entry("a", version=v), now=1)[1] for v in "12"] == [True, False]


def test_an_equal_put_costs_no_write_and_no_rendering(store: Store) -> None:
    store.put(entry("a"), now=1)
    before = store.snapshot
    store.put(entry("a"), now=2)
    assert store.snapshot is before
    assert store.snapshot.listing is before.listing


@pytest.mark.parametrize(
    ("made", "param"),
    [
        (entry("llama3"), "name"),
        (entry("new", aliases=["llama-3-8b"]), "aliases"),
        (entry("new", aliases=["other", "llama3"]), "aliases"),
    ],
)
def test_a_name_or_alias_of_another_model_is_taken(store: Store, made: CatalogueEntry, param: str) -> None:
    store.put(entry("llama-3-8b", aliases=["llama3"]), now=1)
    with pytest.raises(NameTaken, match="taken by the model 'llama-3-8b'") as refused:
        store.put(made, now=1)
    assert refused.value.param == param
    assert listed(store) == ["llama-3-8b"]


def test_a_model_may_repeat_its_own_names(store: Store) -> None:
    store.put(entry("a", aliases=["a", "b", "b"]), now=1)
    store.put(entry("a", aliases=["b", "c"]), now=1)
    assert listed(store) == ["a"]


def test_an_alias_is_free_again_when_its_model_drops_it_or_goes(store: Store) -> None:
    store.put(entry("a", aliases=["x", "y"]), now=1)
    store.put(entry("a", aliases=["y"]), now=1)
    store.put(entry("x"), now=1)
    store.delete("a")
    store.put(entry("y"), now=1)
    assert listed(store) == ["x", "y"]


def test_a_check_that_refuses_leaves_everything_as_it_was(store: Store) -> None:
    def refuse(stored: Stored | None) -> None:
        raise LookupError(stored and stored.entry.version)

    store.put(entry("a"), now=1)
    with pytest.raises(LookupError, match="1"):
        store.put(entry("a", version="2"), 1, refuse)
    with pytest.raises(LookupError, match="1"):
        store.delete("a", refuse)
    assert store.snapshot.models["a"].entry.version == "1"


def test_of_many_writers_at_once_one_creates(store: Store) -> None:
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda version: store.put(entry("a", version=version), 1)[1], range(40)))
    assert results.count(True) == 1


def test_a_failed_write_changes_nothing_and_the_next_one_works(database: Path) -> None:
    with Store(database, busy_timeout=0.01) as store, closing(sqlite3.connect(database)) as other:
        store.put(entry("a", aliases=["x"]), now=1)
        before = store.snapshot
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(StoreError, match="locked"):
            store.put(entry("a"), now=1)
        with pytest.raises(StoreError, match="locked"):
            store.delete("a")
        assert store.snapshot is before
        other.rollback()
        store.delete("a")
        store.put(entry("x"), now=1)


def test_a_seed_is_stored_with_its_order_and_names(database: Path) -> None:
    with Store(database) as store:
        store.seed([entry("b", aliases=["x"]), entry("a", created=3)], now=8)
        assert [stored.entry.created for stored in store.snapshot.models.values()] == [8, 3]
        with pytest.raises(NameTaken):
            store.put(entry("x"), now=1)
    with Store(database) as store:
        assert listed(store) == ["b", "a"]


def test_a_row_that_no_longer_reads_is_refused_alone_and_can_be_replaced(database: Path) -> None:
    with Store(database) as store:
        store.seed([entry("good", aliases=["x"]), entry("odd"), entry("broken"), entry("clash")], now=1)
    with closing(sqlite3.connect(database)) as other, other:
        other.execute("""UPDATE models SET entry = '{"name": "odd", "later": 1}' WHERE name = 'odd'""")
        other.execute("UPDATE models SET entry = '{' WHERE name = 'broken'")
        other.execute("""UPDATE models SET entry = '{"name": "clash", "aliases": ["x"]}' WHERE name = 'clash'""")
    with Store(database) as store:
        assert listed(store) == ["good"]
        assert [problem.split(":")[0] for problem in store.problems] == [
            "model 'odd'",
            "model 'broken'",
            "model 'clash'",
        ]
        assert "later" in store.problems[0]
        store.put(entry("odd"), now=1)
    with Store(database) as store:
        assert listed(store) == ["good", "odd"]


def test_ten_thousand_models_are_rendered_once(store: Store) -> None:
    store.seed([entry(f"model-{n}", backends=[{"url": f"http://m{n}"}]) for n in range(10_000)], now=1)
    first = store.snapshot.listing
    assert store.snapshot.listing is first
    store.put(entry("model-5000", version="2"), now=1)
    assert store.snapshot.listing.etag != first.etag
    assert len(listed(store)) == 10_000


NAMES = st.sampled_from("abcd")
STEPS: st.SearchStrategy[tuple[str, str, list[str]]] = st.one_of(
    st.tuples(st.just("put"), NAMES, st.lists(NAMES, max_size=2)),
    st.tuples(st.just("delete"), NAMES, st.just([])),
    st.tuples(st.just("reopen"), NAMES, st.just([])),
)


@settings(max_examples=40, deadline=None)
@given(st.lists(STEPS, max_size=12))
def test_a_store_is_a_dictionary_without_clashes(steps: list[tuple[str, str, list[str]]]) -> None:
    expected: dict[str, set[str]] = {}
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "r.sqlite3"
        store = Store(path)
        for step, name, aliases in steps:
            if step == "reopen":
                store.close()
                store = Store(path)
            elif step == "delete":
                store.delete(name)
                expected.pop(name, None)
            elif any({name, *aliases} & ({other} | expected[other]) for other in expected if other != name):
                with pytest.raises(NameTaken):
                    store.put(entry(name, aliases=aliases), now=1)
            else:
                store.put(entry(name, aliases=aliases), now=1)
                expected[name] = set(aliases)
            assert listed(store) == list(expected)
        store.close()
