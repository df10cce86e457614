"""The demo model: tokens, text, vectors."""

import math

from hypothesis import given
from hypothesis import strategies as st

from inference_api.demo import model

text = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)


@given(text)
def test_the_tokens_of_a_text_join_to_the_text(text: str) -> None:
    assert "".join(model.tokenize(text)) == text


@given(text)
def test_a_token_is_read_back_from_its_id_without_a_vocabulary(text: str) -> None:
    ids = [model.token_id(token) for token in model.tokenize(text)]
    assert [model.token_text(number) for number in ids] == model.tokenize(text)
    assert all(0 <= number < 2**53 for number in ids)


def test_a_short_word_is_one_token_with_the_space_before_it() -> None:
    assert model.tokenize("so it goes") == ["so", " it", " goes"]


def test_a_long_word_is_several_tokens() -> None:
    assert model.tokenize("engineering") == ["engine", "ering"]


def test_the_id_of_another_tokenizer_is_shown_as_a_number() -> None:
    assert [model.token_text(number) for number in (-1, 0, 1234, 2**64)] == ["<-1>", "<0>", "<1234>", f"<{2**64}>"]


def test_the_reply_says_what_it_is_and_what_was_said() -> None:
    reply = model.reply("gpt2", "Are you clever?")
    assert reply.startswith("I am a demo model named gpt2, not a language model.")
    assert reply.endswith("You said: Are you clever?")


def test_the_first_stop_string_in_the_text_ends_it() -> None:
    generation = model.generate("one two three", 10, ["three", "two"])
    assert generation == model.Generation(["one", " "], "stop", "two")


def test_a_text_longer_than_the_limit_is_cut() -> None:
    assert model.generate("one two three", 2) == model.Generation(["one", " two"], "length")


def test_a_text_as_long_as_the_limit_is_whole() -> None:
    generation = model.generate("one two three", 3)
    assert (generation.text, generation.finish_reason) == ("one two three", "stop")


def test_a_vector_has_length_one_and_the_dimensions_asked_for() -> None:
    vector = model.embed("hello", 33)
    assert len(vector) == 33
    assert math.isclose(math.hypot(*vector), 1, rel_tol=1e-6)


def test_equal_texts_have_equal_vectors_and_others_do_not() -> None:
    assert model.embed("hello", 8) == model.embed("hello", 8) != model.embed("hello!", 8)
