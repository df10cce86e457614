"""Which format and coding a scraper gets, by what it says it takes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inference_api.http.negotiation import takes_gzip, wants_openmetrics

OM = "application/openmetrics-text"
# What Prometheus 2.42 and 3.0 send.
PROMETHEUS_2 = f"{OM};version=1.0.0,{OM};version=0.0.1;q=0.75,text/plain;version=0.0.4;q=0.5,*/*;q=0.1"
PROMETHEUS_3 = (
    f"{OM};version=1.0.0;escaping=allow-utf-8;q=0.5,{OM};version=0.0.1;q=0.4,"
    "text/plain;version=1.0.0;escaping=allow-utf-8;q=0.3,text/plain;version=0.0.4;q=0.2,*/*;q=0.1"
)


@pytest.mark.parametrize(
    ("accept", "openmetrics"),
    [
        (PROMETHEUS_2, True),
        (PROMETHEUS_3, True),
        (OM, True),
        (f"{OM}; version=1.0.0; charset=utf-8", True),
        (f"text/plain;q=0.5, {OM};q=0.6", True),
        (f"{OM}, text/plain", True),
        (f"text/plain;q=0, {OM.upper()}", True),
        ("application/*", True),
        (f"{OM};q=0.001", True),
        ("", False),
        ("*/*", False),
        ("text/plain", False),
        ("text/plain;version=0.0.4", False),
        ("text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8", False),
        (f"{OM};q=0", False),
        (f"{OM};q=0.0, */*", False),
        (f"{OM};version=1.0.0;q=0,text/plain;q=0.1", False),
        (f"text/plain, {OM}", False),
        (f"text/plain;q=0.6, {OM};q=0.5", False),
        (f"{OM};version=0.0.1", False),
        (f"{OM};version=2.0.0, text/plain;q=0.1", False),
        ("application/json", False),
        (f"{OM};q=nan, text/plain;q=0.1", False),
        (f"{OM};q=2", False),
    ],
)
def test_the_preferred_format_is_given(accept: str, openmetrics: bool) -> None:
    assert wants_openmetrics(accept) == openmetrics


@pytest.mark.parametrize(
    ("accept_encoding", "gzip"),
    [
        ("gzip", True),
        ("GZip", True),
        ("gzip, deflate, br, zstd", True),
        ("gzip;q=0.5", True),
        ("*", True),
        ("identity;q=0, *", True),
        ("identity;q=0.5, gzip", True),
        ("", False),
        ("identity", False),
        ("deflate, br", False),
        ("gzip;q=0", False),
        ("gzip;q=0, *", False),
        ("gzip; q=0.000", False),
        ("*;q=0", False),
        ("identity, gzip;q=0.5", False),
        ("gzip;q=x", False),
    ],
)
def test_what_may_be_compressed_is(accept_encoding: str, gzip: bool) -> None:
    assert takes_gzip(accept_encoding) == gzip


@given(st.text(st.sampled_from('gzip*/;q=,.015 \t"application/openmetrics-text'), max_size=60))
def test_nothing_that_a_client_says_is_an_error(header: str) -> None:
    assert wants_openmetrics(header) in (True, False)
    assert takes_gzip(header) in (True, False)
