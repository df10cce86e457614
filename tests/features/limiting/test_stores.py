"""What every store of counters keeps to."""

from inference_api.features.limiting.windows import Window
from inference_api.features.stores.memory import Counters, MemoryStore

NOW = 1_795_862_415_000


def test_a_name_has_one_counter() -> None:
    store = MemoryStore()

    assert store.window("a", 1000) is store.window("a", 1000)
    assert store.window("a", 1000) is not store.window("b", 1000)
    assert store.streams("a") is store.streams("a")


def test_counters_are_bounded_and_the_empty_ones_go_first() -> None:
    told: list[int] = []
    counters: Counters[Window] = Counters(100, lambda: told.append(len(counters)))

    def get(name: str) -> Window:
        return counters.get(name, lambda: Window(name, 60_000))

    for number in range(100):
        get(str(number)).roll(NOW - (3_600_000 if number % 2 else 0))
    for number in range(100, 150):
        get(str(number)).roll(NOW)

    assert len(counters) == 100
    assert len(told) == 50
    left = {counter.name for counter in counters.all()}
    assert {str(number) for number in range(0, 100, 2)} <= left
    assert {str(number) for number in range(100, 150)} <= left


def test_open_streams_are_not_forgotten() -> None:
    store = MemoryStore(size=10)
    store.streams("open").own = 1
    opened = store.streams("open")

    for number in range(50):
        store.streams(str(number))

    assert store.streams("open") is opened
