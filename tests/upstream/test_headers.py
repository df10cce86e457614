"""What may go to a backend, and what may come back."""

from itertools import chain

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from inference_api.http.head import RequestHead, RequestHeaders
from inference_api.models import RawHeaders
from inference_api.relay.head import returned

# Written out, not imported: a name that is lost from the module's own list must fail here.
HOP_BY_HOP = (
    b"connection keep-alive proxy-authenticate proxy-authorization proxy-connection te trailer transfer-encoding "
    b"upgrade http2-settings"
).split()
NEVER_UP = [*HOP_BY_HOP, *b"host content-length expect cookie authorization x-request-id forwarded".split()]
NEVER_UP += b"x-api-key api-key x-forwarded-for x-forwarded-proto x-forwarded-host x-real-ip accept-encoding".split()
NEVER_DOWN = [*HOP_BY_HOP, *b"set-cookie server date alt-svc x-request-id access-control-allow-origin".split()]
PASS_UP = b"accept content-type traceparent tracestate user-agent x-session-id openai-beta anthropic-version".split()
PASS_UP += [b"endpoint-load-metrics-format"]
EXTRA = frozenset({b"x-vllm-priority", b"x-tenant"})

values = st.sampled_from([b"close", b"keep-alive", b"x-tenant", b"a, X-Session-Id ,openai-beta", b"1", b""])


def names(*groups: list[bytes]) -> st.SearchStrategy[RawHeaders]:
    other = st.from_regex(rb"[a-z][a-z0-9-]{0,11}", fullmatch=True)
    return st.lists(st.tuples(st.sampled_from([*chain(*groups)]) | other, values), max_size=12)


def read(headers: RawHeaders, extra: frozenset[bytes] = frozenset()) -> RequestHead:
    return RequestHeaders(extra)(headers)


def up(headers: RawHeaders, extra: frozenset[bytes] = frozenset()) -> RawHeaders:
    return read(headers, extra).forwarded


def tokens(headers: RawHeaders) -> set[bytes]:
    lines = b",".join(value for name, value in headers if name == b"connection")
    return {token.strip().lower() for token in lines.split(b",")}


@settings(max_examples=40, deadline=None)
@given(names(NEVER_UP, PASS_UP, list(EXTRA)))
def test_only_allowed_headers_go_up_whatever_comes(headers: RawHeaders) -> None:
    forwarded = up(headers, EXTRA)

    assert not {name for name, _ in forwarded} & set(NEVER_UP)
    for name, _ in forwarded:
        assert name in PASS_UP or name in EXTRA or name.startswith((b"openai-", b"anthropic-"))
        assert name not in tokens(headers) or name == b"content-type"


@settings(max_examples=40, deadline=None)
@given(names(NEVER_DOWN, PASS_UP), st.sampled_from([200, 400, 429, 500, 503]))
def test_no_forbidden_header_comes_down_whatever_comes(headers: RawHeaders, status: int) -> None:
    kept = returned(status, headers)

    assert not {name for name, _ in kept} & set(NEVER_DOWN)
    assert not {name for name, _ in kept} & (tokens(headers) - {b"content-type", b"content-length"})
    assert [pair for pair in headers if pair in kept] == kept


def test_the_allowed_headers_go_up_unchanged_and_in_order() -> None:
    headers = [(name, b"Value %d" % i) for i, name in enumerate(PASS_UP)]

    assert up(headers) == headers


def test_strangers_names_do_not_bend_what_is_known() -> None:
    read = RequestHeaders()
    names = [b"x-%d" % i for i in range(5000)] + [b"openai-" + b"y" * 10_000, b"z" * 10_000]

    for _ in range(2):
        inbound = read([(name, b"1") for name in [*names, b"accept"]])
        assert inbound.forwarded == [(names[-2], b"1"), (b"accept", b"1")]


def test_a_repeated_header_goes_up_repeated() -> None:
    headers = [(b"tracestate", b"a=1"), (b"tracestate", b"b=2")]

    assert up(headers) == headers


def test_forward_headers_adds_to_the_allow_list() -> None:
    headers = [(b"x-vllm-priority", b"1"), (b"x-other", b"2")]

    assert up(headers) == []
    assert up(headers, EXTRA) == [(b"x-vllm-priority", b"1")]


@pytest.mark.parametrize(
    "line", [b"x-session-id", b"keep-alive, X-Session-ID", b"close ,x-session-id,,", b"X-SESSION-ID"]
)
def test_what_connection_names_does_not_go_up(line: bytes) -> None:
    headers = [(b"x-session-id", b"s"), (b"accept", b"*/*"), (b"connection", line)]

    assert up(headers) == [(b"accept", b"*/*")]


def test_every_connection_line_counts_both_ways() -> None:
    headers = [(b"connection", b"keep-alive"), (b"connection", b"x-session-id"), (b"connection", b"close")]
    headers += [(b"x-session-id", b"s"), (b"accept", b"*/*")]

    assert up(headers) == [(b"accept", b"*/*")]
    assert returned(200, headers) == [(b"accept", b"*/*")]


def test_connection_cannot_name_what_frames_the_message() -> None:
    headers = [(b"content-type", b"text/plain"), (b"connection", b"content-type, content-length, x-a"), (b"x-a", b"1")]

    assert up(headers) == [(b"content-type", b"text/plain")]
    assert returned(200, [*headers, (b"content-length", b"5")]) == [
        (b"content-type", b"text/plain"),
        (b"content-length", b"5"),
    ]


@pytest.mark.parametrize("value", [b"a", b"A.b_c-9", b"x" * 128])
def test_a_valid_request_id_is_kept(value: bytes) -> None:
    headers = [(b"x-request-id", value), (b"x-correlation-id", b"other")]

    assert read(headers).request_id == value.decode()


@pytest.mark.parametrize("value", [b"", b"x" * 129, b"a b", b"a\n", b"\x1b[31m", "ü".encode(), b"a/b", b'"'])
def test_an_invalid_request_id_gives_way(value: bytes) -> None:
    def request_id(*headers: tuple[bytes, bytes]) -> str:
        return read(list(headers)).request_id

    assert request_id((b"x-request-id", value)) == ""
    assert request_id((b"x-request-id", value), (b"x-correlation-id", b"c-1")) == "c-1"
    assert request_id((b"x-request-id", value), (b"x-correlation-id", value)) == ""
    assert request_id((b"x-correlation-id", b"c-2")) == "c-2"


def test_the_first_of_a_repeated_header_is_the_one_that_is_read() -> None:
    pairs = [(b"x-request-id", b"one"), (b"x-request-id", b"two"), (b"authorization", b"Bearer a")]

    inbound = read([*pairs, (b"authorization", b"Bearer b")])

    assert (inbound.request_id, inbound.authorization) == ("one", b"Bearer a")


def test_what_the_router_reads_is_there() -> None:
    kind = b"Application/JSON; charset=utf-8"
    headers = [(b"content-type", kind), (b"content-length", b"2"), (b"content-encoding", b"gzip")]

    inbound = read([*headers, (b"x-session-id", b"s1")])

    assert inbound[1:5] == (kind, b"application/json", b"2", b"gzip")
    assert inbound.session_id == b"s1"
    assert read([]) == RequestHead("", b"", b"", None, None, None, None, [], b"", [], {})


def test_safe_headers_come_down_unchanged_and_in_order() -> None:
    headers = [(b"content-type", b"application/json"), (b"content-length", b"2"), (b"openai-processing-ms", b"7")]

    assert returned(200, [*headers, (b"connection", b"keep-alive")]) == headers
    assert returned(200, [(b"connection", b"Close"), *headers]) == headers


@pytest.mark.parametrize("status", [200, 400, 408, 409, 429, 500, 502, 503, 504])
def test_retry_hints_come_down_only_with_a_status_that_means_them(status: int) -> None:
    hints = [(b"retry-after", b"7"), (b"x-should-retry", b"true")]

    assert returned(status, hints) == (hints if status in (429, 503) else [])


def test_an_engines_load_is_asked_for_and_told() -> None:
    """ORCA, as vLLM has it and gateways ask for it."""
    asked, told = (
        (b"endpoint-load-metrics-format", b"TEXT"),
        (b"endpoint-load-metrics", b"TEXT kv_cache_usage_perc=0.1"),
    )

    assert up([asked]) == [asked]
    assert returned(200, [told]) == [told]
