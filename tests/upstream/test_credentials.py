"""Tokens of backends: from variables, which stay, and from files, which are read again."""

import logging
import os
from pathlib import Path
from typing import Any

import pytest

from inference_api.routing.catalogue import parse_catalogue
from inference_api.routing.entries import CatalogueEntry, Credentials
from inference_api.upstream.credentials import Tokens, with_token


def entries(*paths: Path) -> list[CatalogueEntry]:
    models = [{"name": f"m{number}", "credentials": {"file": str(path)}} for number, path in enumerate(paths)]
    catalogue = parse_catalogue({"models": [*models, {"name": "p", "credentials": "passthrough"}, {"name": "none"}]})
    assert not catalogue.problems
    return list(catalogue.values())


def settle(tokens: Tokens) -> None:
    """As many looks as a change needs to count."""
    for _ in range(2):
        tokens.poll(False)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "BACKEND_A").write_text("first\n")
    return tmp_path / "BACKEND_A"


def test_of_the_environment_only_what_a_catalogue_may_name_is_there() -> None:
    assert Tokens({"BACKEND_A": "a", "AWS_SECRET_ACCESS_KEY": "s", "XBACKEND_": "x"}) == {"BACKEND_A": "a"}


def test_a_file_is_read_before_it_is_needed_and_again_when_it_changes(file: Path) -> None:
    tokens = Tokens({"BACKEND_A": "variable"})
    tokens.prepare(entries(file))
    assert tokens[str(file)] == "first"
    file.write_text("second")
    settle(tokens)
    assert tokens[str(file)] == "second"
    # Long enough after it, what has the same size and time is another one too if it has another identity.
    new = file.with_name("new")
    new.write_text("third!")
    os.utime(new, ns=(file.stat().st_atime_ns, file.stat().st_mtime_ns))
    new.rename(file)
    settle(tokens)
    assert tokens == {"BACKEND_A": "variable", str(file): "third!"}


@pytest.mark.parametrize(
    "content", [b"", b" \n", b"two tokens", b"a\nb", b"a\r\nx-evil: 1", b"\xff\xfe", b"a\0b", None]
)
def test_a_file_without_a_token_keeps_the_last_one_and_is_told_once_without_its_content(
    content: bytes | None, file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "inference_api")
    tokens = Tokens({})
    tokens.prepare(entries(file))
    if content is None:
        file.unlink()
    else:
        file.write_bytes(content)
    settle(tokens)
    tokens.poll(True)

    assert tokens[str(file)] == "first"
    (message,) = caplog.messages
    assert str(file) in message
    assert "tokens" not in message.replace("it must hold one token", "")
    assert "evil" not in message
    file.write_text("next")
    settle(tokens)
    assert (tokens[str(file)], len(caplog.messages)) == ("next", 2)


def test_a_file_that_is_not_there_yet_is_read_when_it_comes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tokens, path = Tokens({}), tmp_path / "BACKEND_LATE"
    tokens.prepare(entries(path))
    assert tokens == {}
    assert len(caplog.messages) == 1
    path.write_text("here")
    settle(tokens)
    assert tokens == {str(path): "here"}


def test_a_variable_that_is_not_set_is_told_once_with_a_model(caplog: pytest.LogCaptureFixture) -> None:
    missing = CatalogueEntry(name="m", credentials=Credentials(env="BACKEND_MISSING"))
    empty = CatalogueEntry(name="n", credentials=Credentials(env="BACKEND_EMPTY"))
    there = CatalogueEntry(name="o", credentials=Credentials(env="BACKEND_A"))
    tokens = Tokens({"BACKEND_A": "a", "BACKEND_EMPTY": ""})
    tokens.prepare([missing, empty, there])
    tokens.retain([missing, empty, there])
    tokens.prepare([missing, empty, there])
    assert caplog.messages == [
        "the variable BACKEND_MISSING is not set; its models are asked without a token",
        "the variable BACKEND_EMPTY is not set; its models are asked without a token",
    ]
    assert caplog.records[0].fields == {"model": "m"}  # type: ignore[attr-defined]
    tokens.retain([there])
    tokens.prepare([missing])
    assert len(caplog.messages) == 3


def test_what_is_no_file_is_neither_read_nor_waited_for(tmp_path: Path) -> None:
    tokens = Tokens({})
    os.mkfifo(tmp_path / "BACKEND_PIPE")
    (tmp_path / "BACKEND_FOLDER").mkdir()
    tokens.prepare(entries(tmp_path / "BACKEND_PIPE", tmp_path / "BACKEND_FOLDER"))
    assert tokens == {}


def test_files_that_no_entry_names_any_more_are_forgotten(file: Path, tmp_path: Path) -> None:
    other = tmp_path / "BACKEND_B"
    other.write_text("b")
    tokens = Tokens({"BACKEND_X": "x"})
    tokens.prepare(entries(file, other))
    tokens.retain(entries(other))
    assert tokens == {"BACKEND_X": "x", str(other): "b"}
    tokens.poll(True)
    assert str(file) not in tokens


@pytest.mark.parametrize(
    ("more", "line"),
    [
        ({}, b"authorization: Bearer t\r\n"),
        ({"scheme": "Token"}, b"authorization: Token t\r\n"),
        ({"scheme": ""}, b"authorization: t\r\n"),
        ({"header": "x-api-key"}, b"x-api-key: t\r\n"),
        ({"header": "x-api-key", "scheme": "Key"}, b"x-api-key: Key t\r\n"),
    ],
)
def test_a_token_goes_out_under_its_header(more: dict[str, Any], line: bytes) -> None:
    credentials = Credentials(env="BACKEND_A", **more)
    head = b"content-length: 2\r\nx-api-keys: k\r\naccept: a\r\n"

    assert with_token(head, credentials, "t") == head + line
    assert with_token(head, credentials, "") == with_token(head, credentials, None) == head


def test_a_token_replaces_what_the_client_sent_there() -> None:
    credentials = Credentials(env="BACKEND_A", header="x-api-key")
    head = b"accept: a\r\nx-api-key: client's\r\nx-api-key: another\r\nx-b: b\r\n"

    assert with_token(head, credentials, "ours") == b"accept: a\r\nx-b: b\r\nx-api-key: ours\r\n"
