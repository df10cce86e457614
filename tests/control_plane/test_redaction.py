"""What no model, database and page may have of a log: secrets; and addresses, which people see all the same."""

from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from control_plane.pure.redaction import SECRET, Placeholders, lines_without_secrets, without_secrets

# Made up, of every kind
SECRETS = {
    "key of a router": "sk-ia-k3v9Qm2XbT7a-AbCdEfGhIjKlMnOpQrStUvWxYz0123456789abcdefg01vVfr",
    "management token": "mt-ia-k3v9Qm2XbT7a-AbCdEfGhIjKlMnOpQrStUvWxYz0123456789abcdefg01vVfr",
    "service token": "st-ia-k3v9Qm2XbT7a-AbCdEfGhIjKlMnOpQrStUvWxYz0123456789abcdefg01vVfr",
    "key of a provider": "sk-proj-Zx81aQ0_bV9",
    "token of the hub": "hf_QwErTyUiOpAsDfGh",
    "token of a forge": "ghp_QwErTyUiOpAsDfGhJkLz",
    "JWT": "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiJhbmEifQ.c2lnbmF0dXJl",
    "key of a cloud": "AKIAIOSFODNN7EXAMPLE",
}
PLACES = (
    "{}",
    "key={}",
    "Authorization: Bearer {}",
    "({})",
    "'{}'",
    '{{"a":"{}"}}',
    "é{}é",
    "before {}, after",
    "\\n{}\\n",
)


@pytest.mark.parametrize("kind", SECRETS)
def test_a_secret_is_nowhere(kind: str) -> None:
    for place in PLACES:
        text = without_secrets(place.format(SECRETS[kind]))
        assert SECRETS[kind] not in text
        assert SECRETS[kind][-6:] not in text
        assert SECRET in text


def test_a_secret_is_known_by_its_name() -> None:
    names = (
        "password",
        "PASSWD",
        "db_password",
        "passphrase",
        "HF_TOKEN",
        "token",
        "api_key",
        "apiKey",
        "client-secret",
    )
    more = ("AWS_SECRET_ACCESS_KEY", "private_key", "credential", "x-api-key", "signature")
    ways = (
        "{}=hunter-2/x",
        "{}: hunter-2/x",
        "'{}': 'hunter-2/x'",
        '"{}":"hunter-2/x, y"',
        '\\"{}\\": \\"hunter-2/x\\"',
    )
    others = ('{} = "hunter-2/x y', "?{}=hunter-2/x&model=gpt2")
    for name, way in product(names + more, ways + others):
        text = without_secrets(f"start {way.format(name)} end")
        assert "hunter" not in text
        assert text.startswith("start ")


@pytest.mark.parametrize(
    "line",
    [
        "Avg generation throughput: 3.2 tokens/s, max_tokens=16, prompt_token_ids: [1, 2], num_tokens: 5",
        "tokenizer='gpt2', tokenizer_mode=auto, skip_tokenizer_init=False",
        "basic settings: none",
        "model='meta-llama/Meta-Llama-3-8B-Instruct', revision=None",
        "task-list of sk-learn",
    ],
)
def test_what_is_no_secret_stays(line: str) -> None:
    assert without_secrets(line) == line


def test_headers_and_addresses_with_a_password() -> None:
    assert without_secrets("{'Authorization': 'Basic YW5hOnB3', 'a': 1}") == f"{{'Authorization': {SECRET}"
    assert without_secrets("cookie: a=b; c=d") == f"cookie: {SECRET}"
    assert without_secrets("bearer abcdef.ghi-jkl x") == f"bearer {SECRET} x"
    assert without_secrets("redis://ana:p@ss@db:6379/0") == f"redis://{SECRET}@db:6379/0"


def test_a_private_key_is_gone_on_one_line_and_on_several() -> None:
    begin, end = "-----BEGIN RSA PRIVATE KEY-----", "-----END RSA PRIVATE KEY-----"
    body = ["Proc-Type: 4,ENCRYPTED", "", "M" * 64, "N" * 64, "fQ=="]
    prefix = "INFO 11-28 12:00:00 [x.py:1] "

    assert without_secrets(f"a {begin}\\nMIIE\\n{end} b {begin}\\nMIIE") == f"a {SECRET} b {SECRET}"
    for before, last in product(("", prefix), ([end], [])):
        lines = [*(f"{before}{line}" for line in ["first", begin, *body, *last]), "after", "last"]
        shown = list(lines_without_secrets(lines))
        assert [line for line in shown if "MMM" in line or "NNN" in line or "fQ" in line or "4,ENC" in line] == []
        assert (len(shown), shown[0], shown[-2:]) == (len(lines), f"{before}first", ["after", "last"])


def test_addresses_have_the_same_placeholder_each_time_and_come_back() -> None:
    placeholders = Placeholders()
    line = "10.0.0.11:8000 asks [::1]:80, ana@example.org, gpt2.models.svc:8000 and localhost:8000, then 10.0.0.11:8000"

    hidden = placeholders.hide(line)

    expected = "<address-1> asks <address-2>, <email-1>, <address-3> and <address-4>, then <address-1>"
    assert hidden == expected
    assert placeholders.hide("of 10.0.0.11:8000 again") == "of <address-1> again"
    assert placeholders.restore(hidden) == line
    assert placeholders.restore("<address-99> <b>") == "<address-99> <b>"


@pytest.mark.parametrize("line", ["17:55:01 core.py:58 std::cout c10::Error infer.rs:123:", "vllm 0.11.0, cuda 12.8"])
def test_what_is_no_address_stays(line: str) -> None:
    assert Placeholders().hide(line) == line


def test_placeholders_are_bounded() -> None:
    placeholders = Placeholders(most=2)

    assert placeholders.hide("10.0.0.1 10.0.0.2 10.0.0.3 10.0.0.1") == "<address-1> <address-2> <address> <address-1>"


@given(st.text(max_size=80), st.text(max_size=80), st.sampled_from(sorted(SECRETS.values())))
def test_whatever_stands_around_it_a_secret_is_gone(before: str, after: str, secret: str) -> None:
    # A letter or digit before it makes it another word.
    assert secret not in without_secrets(f"{before} {secret} {after}")


@given(st.text())
def test_any_text_is_restored(text: str) -> None:
    placeholders = Placeholders()

    if "<address-" not in text and "<email-" not in text:
        assert placeholders.restore(placeholders.hide(text)) == text
