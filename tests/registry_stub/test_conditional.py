import pytest
from hypothesis import given
from hypothesis import strategies as st

from registry_stub.conditional import etag_of, names

ETAG = etag_of(b"content")


@pytest.mark.parametrize(
    ("fields", "weak", "expected"),
    [
        ([ETAG], False, True),
        ([f"W/{ETAG}"], True, True),
        ([f"W/{ETAG}"], False, False),
        ([f'"other" , {ETAG}'], False, True),
        (['"a,b"', ETAG], False, True),
        (["*"], False, True),
        ([" * "], True, True),
        (['"other"'], True, False),
        ([ETAG.strip('"')], True, False),
        ([""], True, False),
        ([], True, False),
    ],
)
def test_a_field_names_the_etag_by_itself_in_a_list_or_by_a_star(fields: list[str], weak: bool, expected: bool) -> None:
    assert names(fields, ETAG, weak=weak) is expected


def test_not_even_a_star_names_what_does_not_exist() -> None:
    assert not names(["*", ETAG], None, weak=True)


@given(st.binary(), st.binary())
def test_equal_content_and_nothing_else_has_an_equal_etag(one: bytes, other: bytes) -> None:
    assert (etag_of(one) == etag_of(other)) == (one == other)


@given(st.lists(st.text(alphabet=st.characters(max_codepoint=255))))
def test_whatever_a_client_sends_is_no_match_rather_than_a_failure(fields: list[str]) -> None:
    assert names(fields, ETAG, weak=True) == any(field.strip() == "*" for field in fields)
