"""EndpointSlices, as pure data: whose they are, who takes requests, and on which port."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inference_api.discovery.slices import Located, Service, Slice, locate, port_of, read_slice, service_of
from tests.discovery.kube import document, endpoint

URL = "http://llama:8000"


def slices(*documents: dict[str, Any]) -> list[Slice]:
    return [read_slice(one)[1] for one in documents]


def located(*documents: dict[str, Any], url: str = URL) -> Located:
    return locate(url, slices(*documents))


@pytest.mark.parametrize(
    ("host", "service"),
    [
        ("llama", ("here", "llama")),
        ("llama.models", ("models", "llama")),
        ("llama.models.svc", ("models", "llama")),
        ("llama.models.svc.cluster.local", ("models", "llama")),
        ("llama.models.svc.cluster.local.", ("models", "llama")),
        ("localhost", None),
        # What has a dot at its end is not short for something.
        ("llama.", None),
        ("example.com.", None),
        # One pod of a Service, a named port of it, and hosts elsewhere.
        ("pod-0.llama.models.svc", None),
        ("_http._tcp.llama.models.svc", None),
        ("llm.example.com", None),
        # Nothing that would end the path or the selector that it goes into.
        ("a)..svc", None),
        ("a,b", None),
        ("", None),
        ("a" * 64, None),
    ],
)
def test_a_host_name_is_a_service_as_it_is_to_a_pod(host: str, service: tuple[str, str] | None) -> None:
    assert service_of(host, "here") == (service and Service(*service))


@pytest.mark.parametrize(
    ("conditions", "used"),
    [
        ({"ready": True, "serving": True, "terminating": False}, True),
        ({"ready": True}, True),
        ({}, True),
        ({"ready": None, "serving": None, "terminating": None}, True),
        ({"ready": False}, False),
        ({"ready": False, "serving": False}, False),
        # It still answers, and has been asked to stop.
        ({"ready": False, "serving": True, "terminating": True}, False),
        # publishNotReadyAddresses makes all of them ready.
        ({"ready": True, "serving": False}, False),
        ({"ready": True, "serving": True, "terminating": True}, False),
    ],
)
def test_who_serves_and_is_not_on_its_way_out_takes_requests(conditions: dict[str, Any], used: bool) -> None:
    one = {"addresses": ["10.0.0.1"], "conditions": conditions}

    (found,) = slices(document("s", "llama", one))

    assert (len(found.endpoints), found.others) == ((1, 0) if used else (0, 1))


def test_an_endpoint_without_conditions_takes_requests() -> None:
    assert located(document("s", "llama", {"addresses": ["10.0.0.1"]})).urls == (f"{URL}#10.0.0.1",)


@pytest.mark.parametrize(
    ("url", "ports", "port"),
    [
        ("http://llama:8000", [("http", 8000), ("metrics", 9090)], 8000),
        # The URL's is that of the Service, and the pods have another.
        ("http://llama", [("", 8000)], 8000),
        ("http://llama:80", [("web", 8000)], 8000),
        ("http://llama", [("metrics", 9090), ("http", 8000)], 8000),
        ("https://llama:443", [("http", 8000), ("https", 8443)], 8443),
        ("https://llama", [("http", 8000), ("other", 443)], 443),
        ("http://llama:80", [("web", 8000), ("metrics", 9090)], None),
        # None are listed: it is the URL's.
        ("http://llama:8000", [], 8000),
        ("http://llama", [], 80),
    ],
)
def test_the_port_is_the_urls_or_the_one_that_must_be_meant(
    url: str, ports: list[tuple[str, int]], port: int | None
) -> None:
    assert port_of(url, tuple(ports)) == port


def test_ports_that_are_not_tcp_are_none_and_one_without_a_number_is_any() -> None:
    raw = document("s", "llama", "10.0.0.1", ports=[("http", 8000)])
    raw["ports"].append({"name": "quic", "port": 443, "protocol": "UDP"})
    assert slices(raw)[0].ports == (("http", 8000),)

    raw["ports"].append({"name": "any"})
    assert slices(raw)[0].ports == ()
    assert slices(raw | {"ports": None})[0].ports == ()


def test_a_backend_is_a_url_with_its_port_and_address() -> None:
    found = located(document("s", "llama", "10.0.0.2", "10.0.0.1"), url="http://llama/base")

    assert found == Located(("http://llama:8000/base#10.0.0.1", "http://llama:8000/base#10.0.0.2"), (), False)


def test_pods_of_one_service_may_have_their_port_at_different_numbers() -> None:
    old = document("old", "llama", "10.0.0.1", ports=[("http", 8000), ("metrics", 9090)])
    new = document("new", "llama", "10.0.0.2", ports=[("http", 8080), ("metrics", 9090)])

    assert located(old, new, url="http://llama").urls == (
        "http://llama:8000#10.0.0.1",
        "http://llama:8080#10.0.0.2",
    )


def test_a_pod_with_both_families_is_one_backend_by_its_ipv4_address() -> None:
    six = document("a", "llama", endpoint("fd00::1", "one"), endpoint("fd00::2", "two"), family="IPv6")
    four = document("b", "llama", endpoint("10.0.0.1", "one"))

    assert located(six, four).urls == (f"{URL}#10.0.0.1", f"{URL}#fd00::2")


def test_a_pod_that_moves_between_slices_is_one_backend_and_there_if_one_of_them_says_so() -> None:
    ready, gone = endpoint("10.0.0.1", "one"), endpoint("10.0.0.1", "one", ready=False, serving=False)

    assert located(document("a", "llama", ready), document("b", "llama", ready)).urls == (f"{URL}#10.0.0.1",)
    assert located(document("a", "llama", gone), document("b", "llama", ready)).urls == (f"{URL}#10.0.0.1",)
    # By hand, without a pod behind it.
    assert len(located(document("a", "llama", "10.0.0.1"), document("b", "llama", "10.0.0.1")).urls) == 1


def test_addresses_that_no_backend_may_have_are_refused_alone() -> None:
    found = located(document("s", "llama", "10.0.0.1", "169.254.169.254", "0.0.0.0"))
    names = located(document("s", "llama", "evil.example.com", family="FQDN"))

    assert found == Located((f"{URL}#10.0.0.1",), ("0.0.0.0", "169.254.169.254"), False)
    assert names == Located((), ("evil.example.com",), False)


def test_a_port_that_cannot_be_told_is_said_to_be_so() -> None:
    two = document("s", "llama", "10.0.0.1", ports=[("a", 1), ("b", 2)])

    assert located(two) == Located((), (), True)
    # Nobody is missed where nobody is.
    assert located(document("s", "llama", ports=[("a", 1), ("b", 2)])).portless is False


@pytest.mark.parametrize(
    "change",
    [
        {"metadata": None},
        {"metadata": {"name": ""}},
        {"metadata": {"name": "s", "labels": 3}},
        {"addressType": "IPv5"},
        {"endpoints": 3},
        {"endpoints": [{"addresses": []}]},
        {"endpoints": [{}]},
        {"endpoints": [None]},
        {"ports": [{"port": 0}]},
        {"ports": [{"port": "http"}]},
    ],
)
def test_what_is_no_slice_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="validation error"):
        read_slice(document("s", "llama", "10.0.0.1") | change)


json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.sampled_from(["metadata", "addressType", "endpoints", "ports"]), json))
def test_nothing_but_a_value_error_comes_of_nonsense(change: dict[str, Any]) -> None:
    try:
        _, found = read_slice(document("s", "llama", "10.0.0.1") | change)
    except ValueError:
        return
    locate(URL, [found])
