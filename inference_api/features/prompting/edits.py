"""The edits that put a rendered prompt into a body; all other bytes stay. Pure."""

import re
from collections.abc import Iterator, Sequence

from inference_api.models import Edit
from inference_api.upstream.places import MemberPlace

_EMPTY = re.compile(rb"[ \t\n\r]*+\]")
_USER, _END = b'{"role":"user","content":', b"}]"


def edits(label: str, body: bytes, places: Sequence[MemberPlace], member: str, rendered: bytes) -> list[Edit]:
    """`places`: of `prompt` and `member`, which holds the prompt on this route; `rendered`: see `Template.render`."""
    prompts = [place for place in places if place.name == "prompt"]
    if member == "prompt":
        last = prompts[-1]
        return [((last.start, last.end), rendered), *_removed(body, prompts[:-1])]
    given = [place for place in places if place.name == member]
    # Of a repeated member the last one counts, and an engine that takes the first must not get round the prompt.
    gone = [*prompts, *given[:-1]]
    if not given:
        added = prompts[-1]
        whole = b'"%b":[%b]' % (member.encode(), rendered)
        return [((added.key, added.end), whole), *_removed(body, [one for one in gone if one is not added])]
    return [*_filled(body, given[-1], rendered), *_removed(body, gone)]


def _filled(body: bytes, given: MemberPlace, rendered: bytes) -> Iterator[Edit]:
    """The prompt before what the client has given."""
    start, end = given.start, given.end
    kind = body[start : start + 1]
    if kind == b"[":
        comma = b"" if _EMPTY.match(body, start + 1) else b","
        yield (start + 1, start + 1), rendered + comma
    elif kind == b'"':
        yield (start, start), b"[%b,%b" % (rendered, _USER)
        yield (end, end), _END
    else:
        # null
        yield (start, end), b"[%b]" % rendered


def _removed(body: bytes, places: Sequence[MemberPlace]) -> Iterator[Edit]:
    """Take members out, with one of the commas around each."""
    runs: list[list[MemberPlace]] = []
    for place in sorted(places, key=lambda place: place.number):
        if runs and runs[-1][-1].number == place.number - 1:
            runs[-1].append(place)
        else:
            runs.append([place])
    for run in runs:
        first, last = run[0], run[-1]
        if last.after >= 0:
            yield (first.key, last.after), b""
        else:
            yield (first.before if first.before >= 0 else first.key, last.end), b""


def moved(at: int, edits: Sequence[Edit]) -> int:
    """Where an offset of the body is after the edits, none of which it is in."""
    return at + sum(len(value) - (end - start) for (start, end), value in edits if end <= at)
