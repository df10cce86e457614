"""Files that are read again: when a change counts, what is kept when the new one is bad, and that nothing waits."""

import asyncio
import logging
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from inference_api.routing.catalogue import Catalogue
from inference_api.routing.files import CatalogueFile, Changes, Reloader
from tests.fakes import until

pytestmark = pytest.mark.anyio


def replace(path: Path, text: str) -> None:
    new = path.with_suffix(".new")
    new.write_text(text)
    new.rename(path)


# When a change counts


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "file").write_text("old")
    return tmp_path / "file"


def change_in_place(file: Path) -> None:
    file.write_text("newer")


def change_the_time(file: Path) -> None:
    os.utime(file, ns=(1, 1))


WAYS: dict[str, Callable[[Path], None]] = {
    "in place": change_in_place,
    "by another file": lambda file: replace(file, "new"),
    "its time alone": change_the_time,
    "it is gone": Path.unlink,
}


@pytest.mark.parametrize("way", WAYS)
def test_a_change_counts_once_it_has_been_seen_twice(way: str, file: Path) -> None:
    changes = Changes(file)
    assert not changes.settled()
    WAYS[way](file)

    assert [changes.settled() for _ in range(4)] == [False, True, False, False]


def test_a_file_that_is_being_written_has_not_changed_yet(file: Path) -> None:
    changes = Changes(file)
    for length in range(1, 6):
        file.write_text("x" * (10 + length))
        assert not changes.settled()

    assert changes.settled()


def test_a_file_that_is_wanted_now_is_read_now_and_not_again(file: Path) -> None:
    changes = Changes(file)
    file.write_text("newer")
    assert changes.settled(now=True)
    assert [changes.settled() for _ in range(3)] == [False] * 3
    assert changes.settled(now=True)


def test_a_file_of_a_configmap_changes_with_the_link_of_its_folder(tmp_path: Path) -> None:
    """As the kubelet writes it: file -> ..data/file, and ..data -> a folder that is replaced."""
    for version in ("one", "two"):
        (tmp_path / version).mkdir()
        (tmp_path / version / "file").write_text("same")
    (tmp_path / "..data").symlink_to("one")
    (tmp_path / "file").symlink_to("..data/file")
    changes = Changes(tmp_path / "file")
    assert not changes.settled()
    (tmp_path / "..tmp").symlink_to("two")
    (tmp_path / "..tmp").rename(tmp_path / "..data")

    assert [changes.settled() for _ in range(3)] == [False, True, False]


# The catalogue

GOOD = "models: [{name: a}]"
BAD = {
    "garbage": "models: [",
    "no catalogue": "{}",
    "empty": "",
    "an entry that is refused": "models: [{name: b}, {name: c, backends: [{url: 'ftp://x'}]}]",
}


class Shelf:
    """A catalogue file, and the models that were taken from it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.taken: list[list[str]] = []
        self.prepared: list[list[str]] = []
        self.file = CatalogueFile(path, lambda catalogue: self.prepared.append(list(catalogue)))
        self.file.take = self.take

    def take(self, catalogue: Catalogue) -> None:
        self.taken.append(list(catalogue))

    def poll(self, now: bool = True) -> None:
        if (take := self.file.poll(now)) is not None:
            take()


@pytest.fixture
def shelf(tmp_path: Path) -> Shelf:
    (tmp_path / "catalogue.yaml").write_text(GOOD)
    return Shelf(tmp_path / "catalogue.yaml")


@pytest.mark.parametrize("fault", [*BAD, "missing"])
def test_a_bad_file_changes_nothing_and_is_told_once(
    fault: str, shelf: Shelf, caplog: pytest.LogCaptureFixture
) -> None:
    assert list(shelf.file.load()) == ["a"]
    if fault == "missing":
        shelf.path.unlink()
    else:
        replace(shelf.path, BAD[fault])
    for now in (False, False, False, True, True):
        shelf.poll(now)

    assert shelf.taken == []
    (message,) = caplog.messages
    assert "the previous one stays" in message
    assert str(shelf.path) in message
    replace(shelf.path, "models: [{name: b}]")
    for _ in range(3):
        shelf.poll(now=False)
    assert shelf.taken == [["b"]]
    # What it names was read before.
    assert shelf.prepared[-1] == ["b"]
    # The same fault again is news.
    replace(shelf.path, BAD.get(fault, "models: ["))
    shelf.poll()
    assert len(caplog.messages) == 2


# Looking


class Look:
    """Something that is read from files: counts the looks, and does in each what it is told."""

    def __init__(self, does: Callable[[], Callable[[], None] | None] = lambda: None) -> None:
        self.does = does
        self.looks: list[bool] = []

    def poll(self, now: bool) -> Callable[[], None] | None:
        self.looks.append(now)
        return self.does()


@contextmanager
def running(reloader: Reloader) -> Iterator[None]:
    task = asyncio.create_task(reloader.run())
    try:
        yield
    finally:
        task.cancel()


async def test_looks_go_on_and_what_they_bring_is_taken_on_the_loop() -> None:
    main, taken = threading.current_thread(), []
    one = Look(lambda: lambda: taken.append(threading.current_thread() is main))
    with running(Reloader([one], every=0.01)):
        await until(lambda: len(taken) > 3)

    assert set(one.looks) == {False}
    assert all(taken)


async def test_who_is_told_does_not_wait() -> None:
    one, other = Look(), Look()
    reloader = Reloader([one, other], every=3600)
    with running(reloader):
        await asyncio.sleep(0)
        for _ in range(100):
            reloader.now()
        await until(lambda: one.looks and other.looks)
        reloader.now()
        await until(lambda: len(one.looks) == 2)

    assert set(one.looks) == {True}


async def test_a_look_that_hangs_holds_up_no_other_nor_the_end() -> None:
    release = threading.Event()

    def hang() -> None:
        release.wait(30)

    hanging, other = Look(hang), Look()
    try:
        with running(Reloader([hanging, other], every=0.01)):
            await until(lambda: len(other.looks) > 3)
            assert hanging.looks == [False]
    finally:
        release.set()


@pytest.mark.parametrize("late", [False, True])
async def test_a_fault_of_its_own_does_not_end_the_looks(late: bool, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR, "inference_api")

    def fail() -> None:
        raise RuntimeError("a bug")

    one = Look((lambda: fail) if late else fail)
    with running(Reloader([one], every=0.01)):
        await until(lambda: len(one.looks) > 3)

    assert "reloading a file failed" in caplog.messages
