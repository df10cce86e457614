"""The watch of EndpointSlices: what the fleet is told, and what an API server can do wrong."""

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from inference_api.discovery.cluster import ApiLimits
from inference_api.discovery.dns import Discovery
from inference_api.discovery.endpointslices import EndpointSlices, watched_in
from inference_api.discovery.watch import Rhythm, Timing
from inference_api.routing.balance import make_balancer
from inference_api.routing.catalogue import parse_catalogue
from inference_api.routing.fleet import Fleet
from tests.discovery.kube import WATCH_HEAD, FakeApi, document, endpoint, event, status
from tests.fakes import LAST_CHUNK, Line, Received, Script, chunk, hang, json_response, raw, until

pytestmark = pytest.mark.anyio
Start = Callable[..., Any]
NEVER = 3600.0


@pytest.fixture
async def api(tmp_path: Path) -> AsyncIterator[FakeApi]:
    async with FakeApi(tmp_path) as server:
        yield server


def backend(host: str, port: int = 8000, **more: Any) -> dict[str, Any]:
    return {"url": f"http://{host}:{port}", "discovery": "dns", **more}


def fleet_of(**models: list[dict[str, Any]]) -> Fleet:
    fleet = Fleet(make_balancer)
    tell(fleet, **models)
    return fleet


def tell(fleet: Fleet, **models: list[dict[str, Any]]) -> None:
    catalogue = parse_catalogue({"models": [{"name": name, "backends": list} for name, list in models.items()]})
    assert not catalogue.problems
    fleet.update(catalogue)


def labels(fleet: Fleet, model: str = "m") -> list[str]:
    return [backend.label for backend in fleet.models[model].backends]


def said(caplog: pytest.LogCaptureFixture, text: str) -> int:
    return sum(text in message for message in caplog.messages)


LIMITS = ApiLimits(line=4096)
# Of a server that hangs: on a busy machine a sound one takes its time, too.
IMPATIENT = LIMITS._replace(head=1.0, list=1.0)
# Answers of a server that cannot, and of one that has ended a watch
BROKEN = raw(json_response(status(500, "etcd is away"), "500 Internal Server Error"))
ENDED = raw(WATCH_HEAD, LAST_CHUNK)


@asynccontextmanager
async def watching(
    fleet: Fleet, api: FakeApi, relist: float = NEVER, limits: ApiLimits = LIMITS, **more: Any
) -> AsyncIterator[tuple[EndpointSlices, Counter[str]]]:
    """The watch, after its start, and what it counts as failures."""
    failures: Counter[str] = Counter()
    found = EndpointSlices(fleet, api.cluster._replace(limits=limits), failures, relist, **more)
    await found.start()
    task = asyncio.create_task(found.run())
    try:
        yield found, failures
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


# What the fleet is told


async def test_the_pods_of_a_service_are_backends_when_the_start_is_over(api: FakeApi) -> None:
    api.put(document("llama-1", "llama", "10.0.0.2", endpoint("10.0.0.9", ready=False)))
    api.put(document("llama-2", "llama", "10.0.0.1"))
    api.put(document("other-1", "other", "10.0.0.3"))
    fleet = fleet_of(m=[backend("llama", weight=2), {"url": "http://plain:1"}])
    async with watching(fleet, api):
        assert labels(fleet) == ["plain:1", "10.0.0.1:8000", "10.0.0.2:8000"]

    assert [one.weight for one in fleet.models["m"].backends] == [1, 2, 2]
    assert fleet.models["m"].backends[1].host == b"llama:8000"


async def test_pods_come_and_go_as_the_watch_says_and_those_that_stay_are_the_same_backends(api: FakeApi) -> None:
    api.put(document("s", "llama", "10.0.0.1", "10.0.0.2"))
    fleet, left = fleet_of(m=[backend("llama")]), list[list[str]]()
    async with watching(fleet, api, on_leave=lambda: left.append(labels(fleet))):
        second = fleet.models["m"].backends[1]
        api.put(document("s", "llama", "10.0.0.2", "10.0.0.3"))
        await until(lambda: labels(fleet) == ["10.0.0.2:8000", "10.0.0.3:8000"])
        assert fleet.models["m"].backends[0] is second

        api.put(document("t", "llama", "10.0.0.4"))
        await until(lambda: len(labels(fleet)) == 3)
        api.remove("s")
        await until(lambda: labels(fleet) == ["10.0.0.4:8000"])

    # Nothing has left when backends only come.
    assert left == [["10.0.0.2:8000", "10.0.0.3:8000"], ["10.0.0.4:8000"]]
    assert (api.lists, api.watches) == (1, 1)


async def test_a_service_without_a_pod_has_none(api: FakeApi, caplog: pytest.LogCaptureFixture) -> None:
    """The server knows, other than a name server: an address that it does not list may be another pod's by now."""
    api.put(document("s", "llama", "10.0.0.1"))
    fleet = fleet_of(m=[backend("llama")])
    async with watching(fleet, api):
        api.remove("s")
        await until(lambda: labels(fleet) == [])

    assert [record.levelname for record in caplog.records if "changed" in record.message] == ["WARNING"]


async def test_a_list_that_says_the_same_is_no_news(api: FakeApi, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "inference_api")
    api.put(document("s", "llama", "10.0.0.1"))
    async with watching(fleet_of(m=[backend("llama")]), api, relist=0.05):
        await until(lambda: api.lists > 3)

    assert said(caplog, "changed") == 1


async def test_each_url_of_a_service_gets_its_own_port(api: FakeApi) -> None:
    ports = [("http", 8000), ("metrics", 9090)]
    api.put(document("s", "llama", "10.0.0.1", ports=ports))
    fleet = fleet_of(m=[backend("llama.models", 80)], n=[backend("llama.models.svc", 9090), backend("llama")])
    async with watching(fleet, api):
        assert labels(fleet) == ["10.0.0.1:8000"]
        assert labels(fleet, "n") == ["10.0.0.1:9090", "10.0.0.1:8000"]

    assert api.lists == 1


async def test_namespaces_are_watched_one_by_one_and_names_of_no_service_are_left_to_dns(api: FakeApi) -> None:
    api.put(document("s", "llama", "10.0.0.1"))
    api.put(document("s", "llama", "10.0.0.2", namespace="other"))
    asked: list[str] = []

    async def resolve(host: str) -> list[str]:
        asked.append(host)
        return ["10.0.0.3"]

    fleet = fleet_of(m=[backend("llama"), backend("llama.other"), backend("llm.example.com"), backend("localhost")])
    async with watching(fleet, api):
        await Discovery(fleet, resolve, watched=watched_in(api.cluster)).poll()
        assert sorted(asked) == ["llm.example.com", "localhost"]
        assert labels(fleet) == ["10.0.0.1:8000", "10.0.0.2:8000", "10.0.0.3:8000"]

    assert (api.lists, api.watches) == (2, 2)


async def test_nobody_is_asked_about_a_backend_that_is_not_to_be_discovered(api: FakeApi) -> None:
    api.put(document("s", "llama", "10.0.0.1"))
    fleet = fleet_of(m=[{"url": "http://llama:8000"}])
    async with watching(fleet, api):
        assert labels(fleet) == ["llama:8000"]

    assert not api.requests


async def test_a_new_catalogue_is_followed_at_once(api: FakeApi) -> None:
    api.put(document("a", "a", "10.0.0.1"))
    api.put(document("b", "b", "10.0.0.2"))
    api.put(document("c", "c", "10.0.0.3", namespace="other"))
    fleet = fleet_of(m=[backend("a")])
    async with watching(fleet, api) as (found, _):
        tell(fleet, m=[backend("b")], n=[backend("a"), backend("c.other")])
        found.wake()
        await until(lambda: labels(fleet) == ["10.0.0.2:8000"])
        assert "10.0.0.1:8000" in labels(fleet, "n")
        await until(lambda: labels(fleet, "n") == ["10.0.0.1:8000", "10.0.0.3:8000"])

        # A URL may be new where its Service is not; what is known needs no question.
        lists = api.lists
        tell(fleet, m=[backend("b", 9000), backend("b")], n=[backend("a"), backend("c.other")])
        found.wake()
        await until(lambda: labels(fleet) == ["10.0.0.2:8000"] and "http://b:9000" in fleet.addresses)
        assert api.lists == lists

        tell(fleet, m=[backend("b")])
        found.wake()
        await until(lambda: set(fleet.addresses) == {"http://b:8000"})
        await until(lambda: api.open == 1)

    await until(lambda: api.open == 0)


async def test_more_services_than_a_selector_should_name_are_picked_here(
    api: FakeApi, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("a", "b", "c", "stranger", "unknown"):
        api.put(document(f"{name}-1", name, f"10.0.0.{ord(name[0])}"))
    fleet = fleet_of(m=[backend("a"), backend("b"), backend("c")])
    async with watching(fleet, api, limits=ApiLimits(names=2)):
        assert len(labels(fleet)) == 3
        api.put(document("stranger-1", "stranger", "10.0.1.1"))
        # A slice may change hands.
        api.put(document("c-1", "stranger", "10.0.1.2"))
        await until(lambda: len(labels(fleet)) == 2)
        api.put(document("stranger-1", "a", "10.0.1.3"))
        await until(lambda: len(labels(fleet)) == 3)
        await api.stop()
        await until(lambda: said(caplog, "cannot be watched"))

    # Of what others have, nothing is kept: in a large cluster that is nearly all.
    [fields] = [record.fields for record in caplog.records if "cannot be watched" in record.message]  # type: ignore[attr-defined]
    assert fields == {"serving": 3}


async def test_a_list_comes_in_pages(api: FakeApi) -> None:
    for number in range(7):
        api.put(document(f"s-{number}", "llama", f"10.0.0.{number + 1}"))
    api.page_size = 3
    fleet = fleet_of(m=[backend("llama")])
    async with watching(fleet, api):
        assert len(labels(fleet)) == 7

    assert api.lists == 3


async def test_addresses_and_ports_of_no_use_are_told_once(api: FakeApi, caplog: pytest.LogCaptureFixture) -> None:
    ports = [("a", 1), ("b", 2)]
    api.put(document("s", "llama", "10.0.0.1", "169.254.169.254"))
    api.put(document("t", "odd", "10.0.0.2", ports=ports))
    fleet = fleet_of(m=[backend("llama"), backend("odd")])
    async with watching(fleet, api) as (_, failures):
        api.put(document("s", "llama", "10.0.0.3", "169.254.169.254"))
        api.put(document("t", "odd", "10.0.0.4", ports=ports))
        await until(lambda: labels(fleet) == ["10.0.0.3:8000"])

    assert failures == {"port": 1}
    assert sum("are refused, first '169.254.169.254'" in message for message in caplog.messages) == 1
    assert sum("several ports" in message for message in caplog.messages) == 1


async def test_what_is_wrong_is_told_again_when_it_is_something_else(
    api: FakeApi, caplog: pytest.LogCaptureFixture
) -> None:
    api.put(document("s", "llama", "10.0.0.1", "169.254.169.254"))
    fleet = fleet_of(m=[backend("llama")])
    async with watching(fleet, api) as (found, _):
        api.put(document("s", "llama", "10.0.0.2", "169.254.0.1"))
        await until(lambda: labels(fleet) == ["10.0.0.2:8000"])
        # Or when the catalogue had done without the Service.
        for host in ("other", "llama"):
            tell(fleet, m=[backend(host)])
            found.wake()
            await until(lambda host=host: set(fleet.addresses) == {f"http://{host}:8000"})  # type: ignore[misc]

    refused = [message.rpartition(" ")[2] for message in caplog.messages if "are refused" in message]
    assert refused == ["'169.254.169.254'", "'169.254.0.1'", "'169.254.0.1'"]


# When it does what again


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """After how many failures in a row each pause would have been; none is made."""
    counts: list[int] = []

    def pause(rhythm: Rhythm, failed_in_a_row: int) -> float:
        counts.append(failed_in_a_row)
        return 0.0

    monkeypatch.setattr(Rhythm, "pause", pause)
    return counts


class Clock:
    """`now`, and scripts that first let it go on."""

    def __init__(self) -> None:
        self.now = 0.0

    def after(self, seconds: float, script: Script) -> Script:
        async def later(request: Received, line: Line) -> None:
            self.now += seconds
            await script(request, line)

        return later


async def test_a_failure_after_a_long_time_is_none_of_several_in_a_row(api: FakeApi, pauses: list[int]) -> None:
    api.put(document("s", "llama", "10.0.0.1"))
    clock = Clock()
    api.on_list.extend([BROKEN] * 3)
    api.on_watch.extend([clock.after(29, BROKEN), clock.after(31, BROKEN)])
    async with watching(fleet_of(m=[backend("llama")]), api, now=lambda: clock.now):
        await until(lambda: api.watches == 1)

    assert pauses == [1, 2, 3, 4, 1]


async def test_a_watch_that_lasted_is_gone_on_with_at_once(api: FakeApi, pauses: list[int]) -> None:
    api.put(document("s", "llama", "10.0.0.1"))
    clock = Clock()
    api.on_watch.extend([ENDED, ENDED, clock.after(2, ENDED), ENDED])
    async with watching(fleet_of(m=[backend("llama")]), api, now=lambda: clock.now):
        await until(lambda: api.watches == 1)

    assert pauses == [1, 2, 1]


# When the router may be ready


HURRY = Timing(ready_within=0.1, poll=0.002)


@pytest.mark.parametrize(
    "backends",
    [[backend("llama.secret"), {"url": "http://plain:1"}], [backend("llama.secret"), backend("llama.models")]],
    ids=["a backend that needs no list", "a namespace that was listed, though it has nobody"],
)
async def test_what_can_be_served_is_not_held_up_for_ever(
    backends: list[dict[str, Any]], api: FakeApi, caplog: pytest.LogCaptureFixture
) -> None:
    api.forbidden.add("secret")
    async with watching(fleet_of(m=backends), api, rand=lambda: 0.01, timing=HURRY) as (found, _):
        await asyncio.wait_for(found.known(), 15)

    assert said(caplog, "ready, although the Services of ['secret'] have never been listed") == 1


async def test_with_nobody_to_send_to_it_waits_and_says_so_once(api: FakeApi, caplog: pytest.LogCaptureFixture) -> None:
    api.forbidden.add("models")
    async with watching(fleet_of(m=[backend("llama")]), api, rand=lambda: 0.01, timing=HURRY) as (found, _):
        known = asyncio.create_task(found.known())
        await until(lambda: said(caplog, "not ready: the Services of ['models']"))
        await asyncio.sleep(0.1)
        assert not known.done()
        assert said(caplog, "not ready") == 1

        api.forbidden.clear()
        await asyncio.wait_for(known, 15)


# How it keeps up


async def test_a_watch_that_ends_goes_on_from_where_it_was(api: FakeApi) -> None:
    api.put(document("s", "llama", "10.0.0.1"))
    fleet = fleet_of(m=[backend("llama")])
    async with watching(fleet, api, rand=lambda: 0.01) as (_, failures):
        for number in range(2, 4):
            await until(lambda number=number: api.watches == number - 1)  # type: ignore[misc]
            api.close_watches()
            api.put(document("s", "llama", f"10.0.0.{number}"))
            await until(lambda number=number: labels(fleet) == [f"10.0.0.{number}:8000"])  # type: ignore[misc]

    assert (api.lists, failures) == (1, {})


async def test_a_bookmark_saves_a_list_after_old_versions_are_gone(api: FakeApi) -> None:
    api.put(document("s", "llama", "10.0.0.1"))
    fleet = fleet_of(m=[backend("llama")])
    async with watching(fleet, api) as (_, failures):
        await until(lambda: api.watches == 1)
        api.forget()
        api.bookmark()
        # Told in order: what comes after the bookmark is known after it.
        api.put(document("s", "llama", "10.0.0.2"))
        await until(lambda: labels(fleet) == ["10.0.0.2:8000"])
        api.close_watches()
        await until(lambda: api.watches == 2)

    assert (api.lists, failures) == (1, {})


GONE: dict[str, Script] = {
    "as a status": raw(json_response(status(410), "410 Gone")),
    "as an event": raw(WATCH_HEAD, chunk(event("ERROR", status(410)))),
}


@pytest.mark.parametrize("how", GONE)
async def test_what_the_server_does_not_remember_is_listed(
    how: str, api: FakeApi, caplog: pytest.LogCaptureFixture
) -> None:
    api.put(document("s", "llama", "10.0.0.1"))
    api.on_watch.append(GONE[how])
    fleet = fleet_of(m=[backend("llama")])
    async with watching(fleet, api, rand=lambda: 0.1) as (_, failures):
        api.put(document("s", "llama", "10.0.0.2"))
        await until(lambda: labels(fleet) == ["10.0.0.2:8000"] and api.watches == 1)

    assert (api.lists, failures) == (2, {"gone": 1})
    # That is how it is meant to be, and no news.
    assert not any("cannot be watched" in message for message in caplog.messages)


async def test_the_token_is_read_anew_and_sent_nowhere_else(api: FakeApi) -> None:
    elsewhere = await asyncio.start_server(lambda reader, writer: pytest.fail("a redirect was followed"), "127.0.0.1")
    port = elsewhere.sockets[0].getsockname()[1]
    api.put(document("s", "llama", "10.0.0.1"))
    location = b"location: http://127.0.0.1:%d/\r\n" % port
    fleet = fleet_of(m=[backend("llama")])
    async with elsewhere, watching(fleet, api, relist=0.2, rand=lambda: 0.1) as (_, failures):
        await until(lambda: api.watches)
        api.token = "the-next-one"
        api.cluster.token.write_text(api.token)
        api.on_list.append(raw(json_response({}, "307 Temporary Redirect", location)))
        api.put(document("s", "llama", "10.0.0.2"))
        lists = api.lists
        await until(lambda: failures["status"] == 1 and api.lists > lists)

    assert labels(fleet) == ["10.0.0.2:8000"]


# What an API server can do wrong


async def cut(request: Received, line: Line) -> None:
    line.reset()


async def silent_watch(request: Received, line: Line) -> None:
    """It begins, and tells nothing."""
    await line.send(WATCH_HEAD)
    await hang(request, line)


LIST_FAULTS: dict[str, tuple[str, Script]] = {
    "hangs": ("timeout", hang),
    "hangs up": ("connect", cut),
    "is broken": ("status", BROKEN),
    "forbids it": ("status", raw(json_response(status(403, "forbidden"), "403 Forbidden"))),
    "forgets its place": ("gone", raw(json_response(status(410), "410 Gone"))),
    "says nothing": ("garbage", raw(json_response({}))),
    "is another server": ("garbage", raw(b"HTTP/1.1 200 OK\r\ncontent-length: 6\r\n\r\n<html>")),
    "lists no list": ("garbage", raw(json_response({"metadata": {"resourceVersion": "1"}, "items": {"a": 1}}))),
    "has no version": ("garbage", raw(json_response({"metadata": {}, "items": []}))),
    "stops in the middle": ("connect", raw(b"HTTP/1.1 200 OK\r\ncontent-length: 99\r\n\r\n{", close=True)),
    "speaks no HTTP": ("connect", raw(b"SSH-2.0-OpenSSH\r\n\r\n", close=True)),
}
WATCH_FAULTS: dict[str, tuple[str, Script]] = {
    "hangs": ("timeout", hang),
    "hangs up": ("connect", cut),
    "is broken": ("status", BROKEN),
    "forbids it": ("status", raw(b"HTTP/1.1 403 Forbidden\r\ncontent-length: 2\r\n\r\nno")),
    "forgets": ("gone", raw(json_response(status(410), "410 Gone"))),
    "ends with a fault": ("status", raw(WATCH_HEAD, chunk(event("ERROR", status(500))))),
    "ends with nonsense": ("status", raw(WATCH_HEAD, chunk(event("ERROR", 3)))),
    "says garbage": ("garbage", raw(WATCH_HEAD, chunk(b"<html>\n"))),
    "says no event": ("garbage", raw(WATCH_HEAD, chunk(b"[]\n{}\n"))),
    "has no version": ("garbage", raw(WATCH_HEAD, chunk(event("ADDED", document("x", "llama", "10.6.6.6"))))),
    "has an odd version": ("garbage", raw(WATCH_HEAD, chunk(event("BOOKMARK", {"metadata": {"resourceVersion": 7}})))),
    "breaks off in a line": (
        "closed",
        raw(WATCH_HEAD, chunk(event("ADDED", document("x", "llama", "10.6.6.6"))[:-30]), close=True),
    ),
    "never ends a line": ("garbage", raw(WATCH_HEAD, *[chunk(b"x" * 1024)] * 8)),
}


def limits_of(fault: str) -> ApiLimits:
    return IMPATIENT if fault == "hangs" else LIMITS


@pytest.mark.parametrize("fault", LIST_FAULTS)
async def test_a_list_of_no_use_leaves_the_last_good_backends(
    fault: str, api: FakeApi, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "inference_api")
    reason, script = LIST_FAULTS[fault]
    api.put(document("s", "llama", "10.0.0.1"))
    fleet = fleet_of(m=[backend("llama")])
    async with watching(fleet, api, 0.1, limits_of(fault), on_leave=lambda: pytest.fail("nothing has left")) as (
        _,
        failures,
    ):
        api.on_list.extend([script] * 3)
        await until(lambda: failures[reason] == 3)
        assert labels(fleet) == ["10.0.0.1:8000"]
        news = fault != "forgets its place"
        await until(lambda: any("are watched again" in message for message in caplog.messages) == news)

    # On a busy machine also an answer of use may come too late.
    assert failures.keys() == {reason}
    assert sum("cannot be watched" in message for message in caplog.messages) == news


@pytest.mark.parametrize("fault", WATCH_FAULTS)
async def test_after_a_watch_of_no_use_the_fleet_is_what_the_server_says(fault: str, api: FakeApi) -> None:
    reason, script = WATCH_FAULTS[fault]
    api.put(document("s", "llama", "10.0.0.1"))
    api.on_watch.extend([script] * 2)
    fleet = fleet_of(m=[backend("llama")])
    async with watching(fleet, api, limits=limits_of(fault), rand=lambda: 0.01, on_leave=lambda: None) as (_, failures):
        assert labels(fleet) == ["10.0.0.1:8000"]
        await until(lambda: not api.on_watch)
        api.put(document("s", "llama", "10.0.0.2"))
        await until(lambda: labels(fleet) == ["10.0.0.2:8000"])

    # On a busy machine also an answer of use may come too late.
    assert failures.keys() == {reason}
    assert failures[reason] >= 2
    # What broke off is gone on with; all else makes one doubt what is known.
    assert api.lists == 1 if reason == "closed" else api.lists >= 3


async def test_a_server_that_is_not_there_at_the_start_holds_nothing_up_for_long(api: FakeApi) -> None:
    api.on_list.append(hang)
    api.put(document("s", "llama", "10.0.0.1"))
    fleet = fleet_of(m=[backend("llama")])
    async with watching(fleet, api, limits=IMPATIENT, rand=lambda: 0.01, timing=Timing(cold_start=0.05)) as (found, _):
        # Not yet known is not the same as none, whatever the catalogue does meanwhile.
        tell(fleet, m=[backend("llama"), backend("llama", 9000)])
        found.wake()
        await asyncio.sleep(0)
        assert (labels(fleet), fleet.addresses) == ([], {})
        await until(lambda: labels(fleet) == ["10.0.0.1:8000"])


async def test_each_time_that_it_cannot_be_watched_and_can_again_is_told(
    api: FakeApi, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "inference_api")
    api.put(document("s", "llama", "10.0.0.1"))
    fleet = fleet_of(m=[backend("llama")])
    async with watching(fleet, api, relist=0.1):
        for number in (1, 2):
            api.on_list.extend([BROKEN] * 2)
            await until(lambda number=number: said(caplog, "are watched again") == number)  # type: ignore[misc]
        api.put(document("s", "llama", "10.0.0.2"))
        await until(lambda: labels(fleet) == ["10.0.0.2:8000"])

    assert (said(caplog, "cannot be watched"), said(caplog, "are watched again")) == (2, 2)


async def test_a_slice_that_makes_no_sense_stays_what_it_was_and_spoils_no_other(
    api: FakeApi, caplog: pytest.LogCaptureFixture
) -> None:
    api.put(document("s", "llama", "10.0.0.1"))
    api.put(document("t", "llama", "10.0.0.2"))
    fleet = fleet_of(m=[backend("llama")])
    async with watching(fleet, api, relist=0.2) as (_, failures):
        await until(lambda: api.watches)
        broken = document("s", "llama", "10.0.0.7") | {"endpoints": [{"addresses": "10.0.0.7"}]}
        for _ in range(2):
            api.put(broken)
        api.put(document("t", "llama", "10.0.0.3"))
        await until(lambda: labels(fleet) == ["10.0.0.1:8000", "10.0.0.3:8000"])
        lists = api.lists
        await until(lambda: api.lists > lists + 1)
        assert labels(fleet) == ["10.0.0.1:8000", "10.0.0.3:8000"]
        api.put(document("s", "llama", "10.0.0.4"))
        await until(lambda: labels(fleet) == ["10.0.0.3:8000", "10.0.0.4:8000"])

    assert failures["garbage"] > 2
    assert sum("is invalid: 's'" in message for message in caplog.messages) == 1


@pytest.mark.parametrize("token", ["", "  \n", "two words", "two\nlines", "höflich", None])
async def test_a_token_of_no_use_is_no_secret_to_tell(
    token: str | None, api: FakeApi, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    api.put(document("s", "llama", "10.0.0.1"))
    if token is None:
        api.cluster.token.unlink()
    else:
        api.cluster.token.write_text(token)
    fleet = fleet_of(m=[backend("llama")])
    async with watching(fleet, api, rand=lambda: 0.01) as (_, failures):
        assert failures == {"credentials": 1}
        api.cluster.token.write_text(api.token)
        await until(lambda: labels(fleet) == ["10.0.0.1:8000"])
        await until(lambda: api.watches)

    assert not any(word in caplog.text for word in ("words", "lines", "höflich", api.token))


async def test_a_fault_of_its_own_does_not_end_the_watch(api: FakeApi, caplog: pytest.LogCaptureFixture) -> None:
    api.put(document("s", "llama", "10.0.0.1"))
    fleet, wrong = fleet_of(m=[backend("llama")]), [True]

    def on_leave() -> None:
        if wrong.pop():
            raise RuntimeError("a bug")

    async with watching(fleet, api, relist=0.2, on_leave=on_leave) as (found, failures):
        api.put(document("s", "llama", "10.0.0.2"))
        await until(lambda: failures["internal"])
        wrong.append(False)
        api.put(document("s", "llama", "10.0.0.3"))
        await until(lambda: labels(fleet) == ["10.0.0.3:8000"])
        # And neither does one that comes of a catalogue.
        fleet.models["m"].entry = None  # type: ignore[assignment]
        fleet.version += 1
        found.wake()
        await until(lambda: "following the Services of the catalogue failed" in caplog.messages)
        fleet.models.clear()
        tell(fleet, m=[backend("other")])
        found.wake()
        await until(lambda: set(fleet.addresses) == {"http://other:8000"})

    assert "watching the Services of the namespace 'models' failed" in caplog.messages


# Whatever happens

SERVICES = ("a", "b")
STATES: tuple[dict[str, bool | None], ...] = (
    {},
    {"ready": False, "serving": False},
    {"ready": False, "serving": True, "terminating": True},
)
endpoints = st.lists(st.tuples(st.integers(1, 9), st.sampled_from(STATES)), max_size=4, unique_by=lambda one: one[0])
puts = st.tuples(st.just("put"), st.integers(0, 3), st.sampled_from(SERVICES), endpoints)
faults = st.tuples(st.sampled_from(["list", "watch"]), st.sampled_from([*LIST_FAULTS.values(), *WATCH_FAULTS.values()]))
others = st.tuples(st.sampled_from(["remove", "forget", "close", "lose", "bookmark", "silence", "look", "wait"]))


def usable(api: FakeApi, service: str) -> set[str]:
    """Who takes requests of a Service, by what Kubernetes says of conditions."""
    listed = [
        one
        for slice in api.slices.values()
        if slice["metadata"]["labels"]["kubernetes.io/service-name"] == service
        for one in slice["endpoints"]
    ]
    serving = [one for one in listed if one["conditions"]["serving"] and not one["conditions"].get("terminating")]
    return {f"{one['addresses'][0]}:8000" for one in serving}


async def happen(api: FakeApi, what: tuple[Any, ...]) -> None:
    match what:
        case ("put", number, service, listed):
            # A slice keeps its Service.
            service = SERVICES[number % 2]
            found = [endpoint(f"10.0.{number}.{last}", **state) for last, state in listed]
            api.put(document(f"s-{number}", service, *found))
        case ("remove",) if api.slices:
            api.remove(sorted(api.slices)[0][1])
        case ("list", (_, script)):
            api.on_list.append(script)
        case ("watch", (_, script)):
            api.on_watch.append(script)
        case ("silence",):
            api.on_watch.append(silent_watch)
        case ("forget",):
            api.forget()
        case ("close",):
            api.close_watches()
        case ("lose",):
            api.lost += 1
        case ("bookmark",):
            api.bookmark()
        case ("look",):
            await until(lambda: not api.on_list and not api.on_watch, 20)
        case _:
            await asyncio.sleep(0.02)


# Not made smaller: each try may take seconds until it has failed.
@settings(max_examples=12, phases=[Phase.explicit, Phase.reuse, Phase.generate])
@given(st.lists(st.one_of(puts, faults, others), max_size=12))
def test_after_any_faults_the_fleet_becomes_what_the_server_says(
    tmp_path_factory: pytest.TempPathFactory, events: list[tuple[Any, ...]]
) -> None:
    async def run() -> None:
        fleet = fleet_of(m=[backend(name) for name in SERVICES])
        async with FakeApi(tmp_path_factory.mktemp("account")) as api, watching(fleet, api, 0.1, IMPATIENT):
            for what in events:
                await happen(api, what)
            api.on_list.clear()
            api.on_watch.clear()
            api.lost = 0
            wanted = set[str]().union(*(usable(api, name) for name in SERVICES))
            await until(lambda: set(labels(fleet)) == wanted, 10)

    asyncio.run(run())
