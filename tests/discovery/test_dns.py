"""Looking names up: what the fleet is told, and what a name server can do wrong."""

import asyncio
import logging
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inference_api.discovery.dns import Discovery
from inference_api.routing.addresses import addresses_of, place_of
from inference_api.routing.backend import Backend
from inference_api.routing.balance import make_balancer
from inference_api.routing.catalogue import parse_catalogue
from inference_api.routing.entries import BackendEntry
from inference_api.routing.fleet import Fleet
from inference_api.routing.urls import is_usable_address
from tests.discovery.names import Names
from tests.fakes import until

pytestmark = pytest.mark.anyio
Start = Callable[..., Any]


def dns(host: str, **more: Any) -> dict[str, Any]:
    return {"url": f"http://{host}:8000", "discovery": "dns", **more}


def fleet_of(*backends: dict[str, Any], **others: list[dict[str, Any]]) -> Fleet:
    """A fleet of the model `m` with these backends, and of `others`."""
    fleet = Fleet(make_balancer)
    tell(fleet, m=list(backends), **others)
    return fleet


def tell(fleet: Fleet, **models: list[dict[str, Any]]) -> None:
    catalogue = parse_catalogue({"models": [{"name": name, "backends": list} for name, list in models.items()]})
    assert not catalogue.problems
    fleet.update(catalogue)


def labels(fleet: Fleet, model: str = "m") -> list[str]:
    return [backend.label for backend in fleet.models[model].backends]


@contextmanager
def running(discovery: Discovery) -> Iterator[None]:
    task = asyncio.create_task(discovery.run())
    try:
        yield
    finally:
        task.cancel()


# What an entry stands for


def test_a_static_entry_is_one_backend_and_a_name_as_many_as_it_has_addresses() -> None:
    entries = [
        BackendEntry(url="http://name:8000/base", weight=3, discovery="dns"),
        BackendEntry(url="http://plain:8000", weight=2),
        BackendEntry(url="https://other", discovery="dns"),
        BackendEntry(url="http://unknown", discovery="dns"),
    ]
    addresses = {"name": ["10.0.0.7", "fd00::7"], "other": ["10.0.0.7", "fd00::8"], "plain": ["10.0.0.9"]}

    found = addresses_of(entries, addresses)

    assert [(place_of(backend.url), backend.weight) for backend in found] == [
        ("plain:8000", 2),
        ("10.0.0.7:8000/base", 3),
        ("[fd00::7]:8000/base", 3),
        ("10.0.0.7", 1),
        ("[fd00::8]", 1),
    ]


def test_what_two_names_lead_to_is_one_backend() -> None:
    entries = [
        BackendEntry(url="http://a:80", discovery="dns"),
        BackendEntry(url="http://b:80", discovery="dns"),
        BackendEntry(url="http://10.0.0.1:80"),
    ]

    found = addresses_of(entries, {"a": ["10.0.0.1", "10.0.0.2"], "b": ["10.0.0.2", "10.0.0.3"]})

    assert [place_of(backend.url) for backend in found] == ["10.0.0.1:80", "10.0.0.2:80", "10.0.0.3:80"]


def test_a_model_has_no_more_backends_by_name_than_it_may_list() -> None:
    addresses = [f"10.0.{i // 250}.{i % 250}" for i in range(5000)]

    assert len(addresses_of([BackendEntry(url="http://a", discovery="dns")], {"a": addresses})) == 4096


def test_a_backend_found_by_name_goes_by_its_address_and_speaks_of_the_name() -> None:
    backend = Backend("m", "https://llama.svc:8443/base#10.0.0.7")

    url, target = backend.address("/v1/models")
    assert backend.label == "10.0.0.7:8443/base"
    assert (backend.host, str(url), target) == (
        b"llama.svc:8443",
        "https://llama.svc:8443/base/v1/models",
        b"/base/v1/models",
    )


@given(st.one_of(st.ip_addresses().map(str), st.text(max_size=20)))
def test_an_address_is_usable_by_the_rule_for_literal_ones(address: str) -> None:
    usable = is_usable_address(address)
    try:
        BackendEntry(url=f"http://[{address}]" if ":" in address else f"http://{address}")
    except ValueError:
        assert not usable
    else:
        # A name is a host of a URL, and no address.
        assert usable == (address.replace(".", "").isdigit() or ":" in address)


# Looking


async def test_every_address_is_a_backend_once_the_first_look_is_done() -> None:
    fleet = fleet_of(dns("a", weight=2), {"url": "http://plain:1"})
    await Discovery(fleet, Names(a=["10.0.0.2", "10.0.0.1"])).start()

    assert labels(fleet) == ["plain:1", "10.0.0.1:8000", "10.0.0.2:8000"]
    assert [backend.weight for backend in fleet.models["m"].backends] == [1, 2, 2]
    assert fleet.models["m"].available is fleet.models["m"].backends


async def test_a_name_is_looked_up_once_for_all_models_that_use_it() -> None:
    names = Names(a=["10.0.0.1"], b=["10.0.0.2"])
    fleet = fleet_of(dns("a"), {"url": "http://A:9", "discovery": "dns"}, n=[dns("a"), dns("b")], static=[])
    await Discovery(fleet, names).poll()

    assert sorted(names.asked) == ["a", "b"]
    assert labels(fleet) == ["10.0.0.1:8000", "10.0.0.1:9"]
    assert labels(fleet, "n") == ["10.0.0.1:8000", "10.0.0.2:8000"]


async def test_addresses_come_and_go_and_those_that_stay_are_the_same_backends() -> None:
    names, left = Names(a=["10.0.0.1", "10.0.0.2"]), []
    fleet = fleet_of(dns("a"))
    discovery = Discovery(fleet, names, on_leave=lambda: left.append(labels(fleet)))
    await discovery.poll()
    first, second = fleet.models["m"].backends
    names.say("a", ["10.0.0.2", "10.0.0.3"])
    await discovery.poll()

    assert labels(fleet) == ["10.0.0.2:8000", "10.0.0.3:8000"]
    assert fleet.models["m"].backends[0] is second
    assert first not in fleet.models["m"].available
    # Nothing has left when addresses only come.
    assert left == [["10.0.0.2:8000", "10.0.0.3:8000"]]


async def test_an_answer_that_says_the_same_changes_nothing() -> None:
    names = Names(a=["10.0.0.1", "10.0.0.2"])
    fleet = fleet_of(dns("a"))
    discovery = Discovery(fleet, names)
    await discovery.poll()
    model = fleet.models["m"]
    before, balancing, model.max_model_len = model.backends, model.balancer, 4096
    names.say("a", ["10.0.0.2", "10.0.0.1", "10.0.0.1"])
    await discovery.poll()

    assert model.backends is before
    names.say("a", ["10.0.0.2"])
    await discovery.poll()
    assert (model.balancer is balancing, model.max_model_len) == (True, 4096)


async def test_a_backend_that_comes_back_still_has_what_it_had_in_flight() -> None:
    names = Names(a=["10.0.0.1", "10.0.0.2"])
    fleet = fleet_of(dns("a"))
    discovery = Discovery(fleet, names)
    await discovery.poll()
    model = fleet.models["m"]
    busy, idle = model.backends
    busy.in_flight = busy.origin.in_flight = 2
    for answer in (["10.0.0.3"], ["10.0.0.4"], ["10.0.0.1", "10.0.0.2"]):
        names.say("a", answer)
        await discovery.poll()

    assert model.backends[0] is busy
    assert model.backends[1] is not idle
    assert model.leaving == ()


async def test_a_new_catalogue_is_looked_up_at_once() -> None:
    names = Names(a=["10.0.0.1"], b=["10.0.0.2"])
    fleet = fleet_of(dns("a"))
    discovery = Discovery(fleet, names, every=3600)
    with running(discovery):
        tell(fleet, m=[dns("b")], n=[dns("a")])
        discovery.wake()
        await until(lambda: labels(fleet) == ["10.0.0.2:8000"])
        assert labels(fleet, "n") == ["10.0.0.1:8000"]

        # What is known is kept when the entry around it changes.
        tell(fleet, m=[dns("b", weight=5)], o=[])
        assert labels(fleet) == ["10.0.0.2:8000"]
        assert fleet.models["m"].backends[0].weight == 5
        discovery.wake()
        await until(lambda: set(fleet.addresses) == {"b"})


async def test_a_name_that_left_and_came_back_is_looked_up_anew() -> None:
    names = Names(a=["10.0.0.1"])
    fleet = fleet_of(dns("a"))
    discovery = Discovery(fleet, names)
    await discovery.poll()
    tell(fleet, m=[])
    await discovery.poll()
    names.say("a", OSError("gone"))
    tell(fleet, m=[dns("a")])
    await discovery.poll()

    assert labels(fleet) == []


async def test_a_thousand_addresses_are_told_in_milliseconds() -> None:
    addresses = [f"10.0.{i // 250}.{i % 250}" for i in range(1000)]
    names = Names(a=addresses)
    fleet = fleet_of(dns("a"))
    discovery = Discovery(fleet, names)
    await discovery.poll()
    took = []
    for gone in range(20):
        names.say("a", [address for address in addresses if address != addresses[gone]])
        began = time.process_time()
        await discovery.poll()
        took.append(time.process_time() - began)

    assert len(labels(fleet)) == 999
    # About 2 ms here; a busy machine may be much slower.
    assert min(took) < 0.1


# What can go wrong

NO_USE: dict[str, tuple[str, Iterable[str] | Exception]] = {
    "no such name": ("error", socket.gaierror(socket.EAI_NONAME, "Name or service not known")),
    "a bad name": ("error", UnicodeError("label too long")),
    "an error without a word": ("error", OSError()),
    "no address": ("empty", []),
    "only refused ones": ("empty", ["169.254.169.254", "fe80::1%eth0", "::ffff:169.254.169.254"]),
    "no addresses at all": ("empty", ["localhost", ""]),
}


@pytest.mark.parametrize("fault", NO_USE)
async def test_an_answer_of_no_use_leaves_the_last_good_addresses(fault: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "inference_api")
    reason, answer = NO_USE[fault]
    names = Names(a=["10.0.0.1"], b=["10.0.0.9"])
    fleet = fleet_of(dns("a"), dns("b"))
    discovery = Discovery(fleet, names, on_leave=lambda: pytest.fail("nothing has left"))
    await discovery.poll()
    names.say("a", answer)
    for _ in range(3):
        await discovery.poll()

    assert labels(fleet) == ["10.0.0.1:8000", "10.0.0.9:8000"]
    assert discovery.failures == {reason: 3}
    # Once it is known there is no news in it.
    (told,) = (message for message in caplog.messages if "cannot be looked up" in message)
    assert not told.endswith(": ")
    assert "the host 'a' resolves again" not in caplog.messages
    names.say("a", ["10.0.0.1", "10.0.0.2"])
    for _ in range(2):
        await discovery.poll()
    assert len(labels(fleet)) == 3
    assert caplog.messages.count("the host 'a' resolves again") == 1
    names.say("a", answer)
    await discovery.poll()
    assert caplog.messages.count(told) == 2


async def test_a_name_that_comes_back_and_still_cannot_be_looked_up_is_told_again(
    caplog: pytest.LogCaptureFixture,
) -> None:
    fleet = fleet_of(dns("a"))
    discovery = Discovery(fleet, Names(a=[], b=["10.0.0.1"]))
    for host in ("a", "b", "a"):
        tell(fleet, m=[dns(host)])
        await discovery.poll()

    assert sum("the host 'a' cannot be looked up" in message for message in caplog.messages) == 2


async def test_refused_addresses_are_refused_alone_and_told_once(caplog: pytest.LogCaptureFixture) -> None:
    refused = ["169.254.169.254", "0.0.0.0", "224.0.0.1", "::", "ff02::1", "fd00:ec2::254", "100.100.100.200"]
    names = Names(a=["10.0.0.1", *refused, "127.0.0.1"])
    fleet = fleet_of(dns("a"))
    discovery = Discovery(fleet, names)
    await discovery.poll()
    await discovery.poll()

    assert labels(fleet) == ["10.0.0.1:8000", "127.0.0.1:8000"]
    assert caplog.messages == ["7 addresses of the host 'a' are refused, first '0.0.0.0'"]
    names.say("a", ["10.0.0.1", "0.0.0.0"])
    await discovery.poll()
    assert len(caplog.messages) == 2


async def test_a_name_server_that_hangs_for_one_name_holds_up_no_other() -> None:
    names = Names(b=["10.0.0.2"], c=["10.0.0.3"])
    fleet = fleet_of(dns("a"), dns("b"), dns("c"))
    discovery = Discovery(fleet, names, timeout=0.05)
    await discovery.poll()
    names.say("b", ["10.0.0.4"])
    await discovery.poll()

    assert labels(fleet) == ["10.0.0.4:8000", "10.0.0.3:8000"]
    # It is not asked again before it has answered.
    assert (names.asked.count("a"), discovery.failures) == (1, {"timeout": 1})
    names.say("a", ["10.0.0.1"])
    await until(lambda: not names.under_way)
    await discovery.poll()
    assert labels(fleet) == ["10.0.0.1:8000", "10.0.0.4:8000", "10.0.0.3:8000"]


async def test_names_that_failed_come_last() -> None:
    names = Names(a=OSError("no"), b=["10.0.0.2"], c=["10.0.0.3"])
    discovery = Discovery(fleet_of(dns("a"), dns("b"), dns("c")), names)
    await discovery.poll()
    await discovery.poll()

    assert names.asked == ["a", "b", "c", "b", "c", "a"]


async def test_a_catalogue_that_changes_during_a_look_is_no_trouble() -> None:
    names = Names(b=["10.0.0.2"])
    fleet = fleet_of(dns("a"))
    discovery = Discovery(fleet, names)
    look = asyncio.create_task(discovery.poll())
    await until(lambda: names.under_way)
    tell(fleet, n=[dns("b")])
    names.say("a", ["10.0.0.1"])
    await look
    await discovery.poll()

    assert labels(fleet, "n") == ["10.0.0.2:8000"]
    assert set(fleet.addresses) == {"b"}


async def test_the_start_waits_for_names_only_so_long() -> None:
    names = Names(b=["10.0.0.2"])
    fleet = fleet_of(dns("a"), dns("b"))
    discovery = Discovery(fleet, names, every=0.01, cold_start=0.05)
    await asyncio.wait_for(discovery.start(), 20)
    assert labels(fleet) == ["10.0.0.2:8000"]

    names.say("a", ["10.0.0.1"])
    with running(discovery):
        await until(lambda: labels(fleet) == ["10.0.0.1:8000", "10.0.0.2:8000"])


async def test_the_end_leaves_no_look_up_behind() -> None:
    names = Names()
    discovery = Discovery(fleet_of(dns("a")), names, every=0.01)
    task = asyncio.create_task(discovery.run())
    await until(lambda: names.under_way)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task

    await until(lambda: not names.under_way)


async def test_a_fault_of_its_own_does_not_end_the_loop(caplog: pytest.LogCaptureFixture) -> None:
    fleet, wrong = fleet_of(dns("a")), [True]

    def on_leave() -> None:
        if wrong.pop():
            raise RuntimeError("a bug")

    names = Names(a=["10.0.0.1"])
    with running(Discovery(fleet, names, every=0.01, on_leave=on_leave)):
        await until(lambda: labels(fleet))
        names.say("a", ["10.0.0.2"])
        await until(lambda: not wrong)
        wrong.append(False)
        names.say("a", ["10.0.0.3"])
        await until(lambda: labels(fleet) == ["10.0.0.3:8000"])

    assert "looking up the hosts of the catalogue failed" in caplog.messages


# The machine's own


async def test_a_router_finds_backends_by_the_machines_resolver(start_engine: Start, start_router: Start) -> None:
    engine = await start_engine()
    entry = {"url": f"http://localhost:{engine.port}", "discovery": "dns"}
    served = await start_router(models=[{"name": "m", "backends": [entry]}])

    assert f"127.0.0.1:{engine.port}" in labels(served.router.core.fleet)
    assert (await served.chat()).status_code == 200
    assert engine.requests[0].header("host") == f"localhost:{engine.port}"
