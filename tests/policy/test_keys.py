"""The form of keys: the example of the contract, and what is no key."""

import re
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inference_api.policy.keys import ALPHABET, checksum, digest, digests, id_of, is_well_formed, new_key
from tests.policies import EXAMPLE, PEPPER

KEY = EXAMPLE.key.encode()


def test_the_example_of_the_contract() -> None:
    assert zlib.crc32(KEY[:62]) == 28482791
    assert checksum(KEY[:62]) == "01vVfr"
    assert is_well_formed(KEY)
    assert id_of(KEY) == EXAMPLE.id
    assert digest(KEY) == EXAMPLE.digest
    assert digest(KEY, PEPPER) == EXAMPLE.peppered


@pytest.mark.parametrize("prefix", ["sk-ia-", "mt-ia-", "st-ia-"])
def test_a_new_key_has_the_form(prefix: str) -> None:
    made = new_key(prefix=prefix)

    assert re.fullmatch(prefix + r"[0-9A-Za-z]{12}-[0-9A-Za-z]{49}", made.key)
    assert made.id == made.key[6:18]
    assert made.digest == digest(made.key.encode())
    # No kind is valid for another's purpose.
    assert is_well_formed(made.key.encode()) == (prefix == "sk-ia-")
    assert is_well_formed(made.key.encode(), prefix.encode())


def test_no_two_keys_are_equal() -> None:
    made = [new_key() for _ in range(200)]

    assert len({one.key for one in made}) == len({one.id for one in made}) == 200


@given(st.integers(0, 67), st.sampled_from([*ALPHABET, "-", " ", "\0"]))
def test_a_typo_is_noticed(at: int, other: str) -> None:
    changed = KEY[:at] + other.encode() + KEY[at + 1 :]

    assert is_well_formed(changed) == (changed == KEY)


@given(st.binary(max_size=80))
def test_whatever_comes_is_judged(text: bytes) -> None:
    assert not is_well_formed(text)
    assert not is_well_formed(b"sk-ia-" + text)


def test_characters_beside_base62_are_refused_with_any_checksum() -> None:
    start = "sk-ia-" + "A" * 11 + "_-" + "A" * 43

    assert not is_well_formed((start + checksum(start.encode())).encode())


def test_only_the_kinds_of_a_policy_are_computed() -> None:
    peppers = [b"p" * 32, PEPPER.encode()]

    assert list(digests(KEY, [], peppers)) == []
    assert [one.hex() for one in digests(KEY, ["sha256"], peppers)] == [EXAMPLE.digest[7:]]
    assert [one.hex() for one in digests(KEY, ["hmac-sha256"], peppers)][1] == EXAMPLE.peppered[12:]
    assert len(list(digests(KEY, ["sha256", "hmac-sha256"], peppers))) == 3
