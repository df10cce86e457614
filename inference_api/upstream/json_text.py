"""Finds strings and brackets in JSON text without building values; and the parser that validates it."""

import gc
import json
import re
from typing import Any

import orjson

SPACE = b" \t\n\r"
DIGITS = b"0123456789"
_NOT_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
# Where a document may be cut: behind a bracket, or before a comma.
_CUTS = (b",", b"[", b"]", b"{", b"}")
# A valid document has at most two strings between two of these.
_PARTS_LOOKED_AT = 8
# Rounds after which the remaining pairs are deep, and runs of openers and closers few.
_ROUNDS = 8
_RUN = re.compile(rb"[\[{]+|[\]}]+")
# Quotes after a backslash that are checked one by one
_TRIES = 300
_BACKSLASH = ord("\\")

# Possessive: a long string (an image in base64) must not store a backtracking state per character.
_TOKEN = re.compile(rb'"(?:[^"\\]++|\\.)*+"|[{}\[\],]', re.DOTALL)
_COLON = re.compile(rb"\s*+:\s*+")
_STRING_VALUE = re.compile(rb'\s*+:\s*+("(?:[^"\\]++|\\.)*+")', re.DOTALL)


class NotJSON(ValueError):
    """The reason for which text is not JSON, without quoting it; `at`: the offset in bytes, if known."""

    def __init__(self, why: str, at: int | None = None) -> None:
        super().__init__(why)
        self.why = why
        self.at = at

    def __str__(self) -> str:
        return self.why if self.at is None else f"{self.why} at byte {self.at}"


def judge(document: bytes) -> Any:
    """The value, as json.loads returns it, long numbers aside. Raises NotJSON, or RecursionError if nested too deep."""
    # A parser leaves no garbage, and collecting among so many new objects takes longer than parsing.
    collects = gc.isenabled()
    gc.disable()
    try:
        return orjson.loads(document)
    except orjson.JSONDecodeError:
        return _judge_as_python(document)
    finally:
        if collects:
            gc.enable()


def _judge_as_python(document: bytes) -> Any:
    try:
        text = document.decode("utf-8", "surrogatepass")
    except UnicodeDecodeError as exc:
        raise NotJSON("invalid UTF-8", exc.start) from None
    try:
        try:
            return json.loads(text)
        except json.JSONDecodeError:
            raise
        except ValueError:
            # Python reads no integer of more than 4300 digits.
            return json.loads(text, parse_int=_integer)
    except json.JSONDecodeError as exc:
        at = len(text[: exc.pos].encode("utf-8", "surrogatepass"))
        raise NotJSON(exc.msg.rstrip(": ").removesuffix(" at"), at) from None


def _integer(digits: str) -> int | float:
    return int(digits) if len(digits) < 4000 else float(digits)


def mask(text: bytes) -> bytes:
    """The text with escapes masked that could be taken for the end of a string."""
    if text.find(b"\\") < 0:
        return text
    return text.replace(b"\\\\", b"__").replace(b'\\"', b"__")


def last_cut(parts: list[bytes], size: int) -> tuple[int, bytes] | None:
    """The last offset at which masked text of `size` bytes can be cut, and the brackets before it.

    `parts`: the text, split at its quotes, beginning outside of a string. None: it can be cut only at its beginning.
    """
    end, last = size, len(parts) - 1
    if last % 2:
        end -= len(parts[last]) + 1
        last -= 1
    for number in range(last, max(last - _PARTS_LOOKED_AT, -1), -2):
        part = parts[number]
        at = max([part.rfind(cut) for cut in _CUTS])
        if at >= 0:
            at += part[at] != 0x2C
            brackets = b"".join([*parts[:number:2], part[:at]]).translate(None, _NOT_BRACKETS)
            end += at - len(part)
            return (end, brackets) if end else None
        if number:
            end -= len(part) + len(parts[number - 1]) + 2
    return None


def collapse(brackets: bytes) -> tuple[int, str]:
    """The number of earlier containers that the brackets close, and the openers that they leave open.

    Does not check that opener and closer match: the parser does.
    """
    for _ in range(_ROUNDS):
        size = len(brackets)
        brackets = brackets.replace(b"[]", b"").replace(b"{}", b"")
        if len(brackets) == size:
            break
    closed, opened = 0, [b""]
    for run in _RUN.findall(brackets):
        if run[0] in b"[{":
            opened.append(run)
            continue
        left = len(run)
        while left and len(opened) > 1:
            last = opened.pop()
            if len(last) > left:
                opened.append(last[:-left])
            left = max(left - len(last), 0)
        closed += left
    return closed, b"".join(opened).decode()


def end_of_string(window: bytes) -> int:
    """The offset at which the string ends in which `window` begins, or -1."""
    end = window.find(b'"')
    for _ in range(_TRIES):
        if end <= 0 or window[end - 1] != _BACKSLASH:
            return end
        if end == 1 or window[end - 2] != _BACKSLASH:
            end = window.find(b'"', end + 1)
        else:
            break
    return mask(window).find(b'"')


def safe_end(data: bytes, start: int, end: int) -> int:
    """The last offset up to `end` at which the string around `start` can be cut: not within a character or escape."""
    for _ in range(3):
        if end < len(data) and data[end] & 0xC0 == 0x80:
            end -= 1
    last = data.rfind(b"\\", max(start, end - 5), end)
    if last < 0:
        return end
    before = data[start : last + 1]
    run = len(before) - len(before.rstrip(b"\\"))
    return last if run % 2 else end


def find_string(document: bytes, name: str) -> tuple[int, int] | None:
    """The span of the top-level member `name`, if it is a string; the last of several counts."""
    span = None
    depth, at_key, position = 0, False, 0
    while match := _TOKEN.search(document, position):
        token, position = match.group(), match.end()
        if token in (b"{", b"["):
            depth += 1
            at_key = depth == 1
        elif token in (b"}", b"]"):
            depth -= 1
        elif token == b",":
            at_key = depth == 1
        elif at_key:
            at_key = False
            if judge(token) == name:
                value = _STRING_VALUE.match(document, position)
                span = value and value.span(1)
    return span


def find_only_string(document: bytes, name: str) -> tuple[int, int] | None:
    """The same for a member that exists, if that is certain without reading every token."""
    key = b'"%b"' % name.encode()
    if document.count(key) != 1 or document.find(b"\\u") >= 0:
        return None
    value = _STRING_VALUE.match(document, document.find(key) + len(key))
    return value and value.span(1)


def find_member(text: bytes, name: str) -> tuple[tuple[int, int] | None, int]:
    """Of an object at the beginning of a valid text: the span of its member `name`, and the offset of its end.

    The last of several counts. The span is None without such a member; the end is 0 if the object continues.
    """
    span: tuple[int, int] | None = None
    depth, at_key, position, begun = 0, False, 0, -1
    while match := _TOKEN.search(text, position):
        token, position = match.group(), match.end()
        if depth == 1 and begun >= 0 and token in (b",", b"}"):
            span, begun = (begun, begun + len(text[begun : match.start()].rstrip(SPACE))), -1
        if token in (b"{", b"["):
            depth += 1
            at_key = depth == 1
        elif token in (b"}", b"]"):
            depth -= 1
            if not depth:
                return span, position
        elif token == b",":
            at_key = depth == 1
        elif at_key:
            at_key = False
            if judge(token) == name and (colon := _COLON.match(text, position)):
                begun = position = colon.end()
    return span, 0
