"""The demo model: text from text, by rule. It has no weights and does not claim any."""

import hashlib
import math
import re
import struct
from collections.abc import Sequence
from typing import NamedTuple

# Six bytes and the mark in front of them stay below 2**53, the largest integer every JSON client reads exactly.
_TOKEN_BYTES = 6
_WORD = re.compile(r" ?\S+|\s")


class Generation(NamedTuple):
    """One generated answer, token by token, and why it ended; with a `tool`, the text is the arguments for it."""

    tokens: list[str]
    finish_reason: str
    stop_reason: str | None = None
    tool: str | None = None

    @property
    def text(self) -> str:
        return "".join(self.tokens)


def tokenize(text: str) -> list[str]:
    """A token is a word with the space before it, or a part of a long word; joined, they are `text` again."""
    return [piece for word in _WORD.findall(text) for piece in _pieces(word)]


def token_id(token: str) -> int:
    """The bytes of the token as a number, so that every engine reads it back without a vocabulary."""
    return int.from_bytes(b"\x01" + token.encode())


def token_text(number: int) -> str:
    """The token with this id; `<number>` for an id that another tokenizer made."""
    width = _TOKEN_BYTES + 1
    raw = number.to_bytes(width).lstrip(b"\0") if 0 <= number < 1 << 8 * width else b""
    return raw[1:].decode(errors="replace") if raw.startswith(b"\x01") else f"<{number}>"


def logprobs(token: str, count: int) -> list[tuple[str, float]]:
    """The `count` likeliest tokens in the place of `token`, itself first, with their log probabilities."""
    own = -round(hashlib.sha256(token.encode()).digest()[0] / 256, 4)
    return [(token, own), *((f" other{n}", own - n) for n in range(1, count))]


def reply(model: str, said: str) -> str:
    """The answer: the same to the same words, on every engine."""
    return (
        f"I am a demo model named {model}, not a language model. I run without a GPU, I understand nothing, "
        f"and I answer the same words with the same words. You said: {said}"
    )


def generate(text: str, limit: int, stop: Sequence[str] = ()) -> Generation:
    """Cut `text` before the first of the `stop` strings in it, and after `limit` tokens."""
    found = sorted((text.find(s), s) for s in stop if s and s in text)
    end, matched = found[0] if found else (len(text), None)
    tokens = tokenize(text[:end])
    if len(tokens) > limit:
        return Generation(tokens[:limit], "length")
    return Generation(tokens, "stop", matched)


def embed(text: str, dimensions: int) -> list[float]:
    """A unit vector from a hash: equal texts are equal, and no other likeness means anything."""
    digest = hashlib.shake_256(text.encode()).digest(dimensions * 2)
    # Odd numbers only: no vector is all zeros.
    raw = [2 * n + 1 for n in struct.unpack(f"<{dimensions}h", digest)]
    length = math.hypot(*raw)
    # Rounded to what 32 bits hold, so that the float and the base64 form of one vector are equal.
    return list(struct.unpack(f"<{dimensions}f", struct.pack(f"<{dimensions}f", *(n / length for n in raw))))


def words(text: str) -> set[str]:
    return set(re.findall(r"[^\W_]+", text.lower()))


def likeness(one: str, other: str) -> float:
    """The share of words that two texts have in common, from 0 to 1."""
    return len(words(one) & words(other)) / max(1, len(words(one) | words(other)))


def _pieces(word: str) -> list[str]:
    pieces, size = [""], 0
    for character in word:
        width = len(character.encode())
        if size + width > _TOKEN_BYTES:
            pieces.append("")
            size = 0
        pieces[-1] += character
        size += width
    return pieces
