"""Lines that say the same, as one: a template with masks for what differs, how often, when first and last.

Templates have neither secrets nor addresses, nor what stood in quotes or behind `prompt:`: they are stored, and a model
may read them. They are text of strangers all the same.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from control_plane.pure.causes import cause_of
from control_plane.pure.log_lines import LEVELS, Entry, Level, entries
from control_plane.pure.redaction import Placeholders

# log: lines of an engine; exit: how one ended; event: what the cluster says of it; request: our own records
Kind = Literal["log", "exit", "event", "request"]
# Characters of a line that are compared, and of a template; addresses that a group names
_COMPARED, LONGEST, _MOST_ADDRESSES = 600, 300, 5
EXAMPLES = 3

_MASKS: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern, flags), mask)
    for pattern, flags, mask in (
        (r"<(address|email)-\d+>", 0, r"<\1>"),
        (r"\b(?:https?|wss?|grpcs?|tcp|ipc|s3|gs|hf|file)://\S+", re.IGNORECASE, "<url>"),
        (r"\b(prompts?|messages?|inputs?|text|content)(?:=|: ?)(?=\S).+", re.IGNORECASE, r"\1: <text>"),
        (r"\b\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d(?:[.,]\d+)?(?:Z|[+-]\d\d:?\d\d)?", 0, "<time>"),
        (r"\b\d{1,2}:\d\d:\d\d(?:[.,]\d+)?\b", 0, "<time>"),
        (r"\b[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}\b", re.IGNORECASE, "<uuid>"),
        (r'(?<!\w)"(?:[^"\\]|\\.)*+"?', 0, "<text>"),
        (r"(?<!\w)'(?:[^'\\]|\\.)*+'", 0, "<text>"),
        (r"(?<!\w)`[^`]*+`", 0, "<text>"),
        (r"\b(?:chatcmpl|cmpl|embd|rerank|score|req|resp|msg|call|batch|run)[-_][A-Za-z0-9-]{6,}", 0, "<id>"),
        (r"\b(request[_ ]id|req[_ ]id|trace[_ ]id)([=: ]+)[^\s,;)]+", re.IGNORECASE, r"\1\2<id>"),
        (r"(?<![\w<>./-])(?:~|\.{1,2})?/[\w.@+-]+(?:/[\w.@+-]*)*", 0, "<path>"),
        (r"\b0x[0-9a-f]+\b", re.IGNORECASE, "<hex>"),
        (r"\b(?=[a-f]*\d)(?=\d*[a-f])[0-9a-f]{8,}\b", re.IGNORECASE, "<hex>"),
        (r"(?<![A-Za-z0-9])\d+(?:[.,:]\d+)*(?:e[+-]?\d+)?", 0, "<n>"),
        (r"(?:<n>, ?){2,}+<n>", 0, "<n>, ..."),
        (r"\s+", 0, " "),
    )
)
_ADDRESS = re.compile(r"<address-\d+>")


class Source(NamedTuple):
    """The log of an instance. `lines`: as its driver gives them."""

    instance: str
    lines: Sequence[str]
    previous: bool = False


class Example(NamedTuple):
    """`line`: its number in the log of `instance`, from 1; of other kinds None. `text`: without secrets."""

    text: str
    instance: str | None = None
    previous: bool = False
    line: int | None = None


class Said(NamedTuple):
    """Something that is no line of a log. `template`: as it is, if it is made of our own words."""

    kind: Kind
    text: str
    level: Level
    times: int = 1
    first: int | None = None
    last: int | None = None
    examples: tuple[Example, ...] = ()
    template: str | None = None
    runbook: str | None = None


@dataclass
class Group:
    """`first`, `last`: Unix milliseconds. `runbook`: file and anchor. `addresses`: placeholders, some of them."""

    kind: Kind
    template: str
    level: Level
    count: int = 0
    first: int | None = None
    last: int | None = None
    runbook: str | None = None
    examples: list[Example] = field(default_factory=list)
    addresses: list[str] = field(default_factory=list)

    def add(self, level: Level, count: int, first: int | None, last: int | None, examples: Iterable[Example]) -> None:
        """Examples are the first two and the last one."""
        self.level = min(self.level, level, key=LEVELS.index)
        self.count += count
        self.first = min((at for at in (self.first, first) if at is not None), default=None)
        self.last = max((at for at in (self.last, last) if at is not None), default=None)
        for example in examples:
            del self.examples[EXAMPLES - 1 :]
            self.examples.append(example)

    def name(self, text: str) -> None:
        for address in _ADDRESS.findall(text):
            if len(self.addresses) < _MOST_ADDRESSES and address not in self.addresses:
                self.addresses.append(address)


def template_of(text: str) -> str:
    """`text`: without secrets, with placeholders for addresses."""
    for pattern, mask in _MASKS:
        text = pattern.sub(mask, text)
    text = text.strip()
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 2]} …"


def groups(
    sources: Iterable[Source], said: Iterable[Said], now: int, start: int | None, placeholders: Placeholders
) -> list[Group]:
    """From the worst level, then the most, then the latest. `start`: what was before is left out; Unix milliseconds."""
    found: dict[tuple[Kind, str], Group] = {}
    for source in sources:
        for entry in entries(source.lines, now):
            if start is None or entry.at is None or entry.at >= start:
                example = Example(entry.text, source.instance, source.previous, entry.line)
                _add(found, placeholders, _of_line(entry), example)
    for one in said:
        _add(found, placeholders, one, *one.examples)
    return sorted(found.values(), key=lambda one: (LEVELS.index(one.level), -one.count, -(one.last or 0)))


def _of_line(entry: Entry) -> Said:
    template = entry.message if entry.is_template else None
    return Said("log", entry.message, entry.level, 1, entry.at, entry.at, template=template)


def _add(found: dict[tuple[Kind, str], Group], placeholders: Placeholders, one: Said, *examples: Example) -> None:
    hidden = placeholders.hide(one.text[:_COMPARED])
    template = one.template or template_of(hidden)
    group = found.get((one.kind, template))
    if group is None:
        cause = cause_of(hidden)
        runbook = one.runbook or (cause and cause.runbook)
        group = found[one.kind, template] = Group(one.kind, template, "error" if cause else one.level, runbook=runbook)
    group.add(one.level, one.times, one.first, one.last, examples)
    group.name(hidden)
