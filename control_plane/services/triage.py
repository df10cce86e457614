"""What went wrong with a model: lines of its engines' logs, how engines and requests ended, grouped by what they say.

The groups are stored, without a line of any log: examples are in the first answer alone.
"""

import asyncio
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from sqlalchemy import Row, insert, select

from control_plane.data.tables import triages
from control_plane.errors import NotFound, Refused
from control_plane.plane import Act, Plane
from control_plane.pure.ids import new_id
from control_plane.pure.lifecycle import MOST_LINES, Instance
from control_plane.pure.log_lines import unseen
from control_plane.pure.log_templates import Example, Group, Said, Source, groups
from control_plane.pure.outcomes import CODES, OUTCOMES, state_of
from control_plane.pure.records import MINUTE
from control_plane.pure.redaction import Placeholders, without_secrets
from control_plane.pure.times import shown
from control_plane.services import audit, lifecycle, logs, models, requests, summaries
from control_plane.services.lifecycle import Looked
from control_plane.services.requests import Ended
from control_plane.services.summaries import Summarised
from control_plane.services.turns import turn

# Groups that are kept, logs that are read by one, and triages at once: hostile lines take a CPU for seconds
MOST_GROUPS, MOST_LOGS, AT_ONCE = 100, 6, 2
_FINE = (None, "Completed")


class Asked(NamedTuple):
    """`instance`: a pod or process; None: all, and of those that fail the log before, too. `previous`: only that."""

    model: str
    instance: str | None = None
    previous: bool = False
    minutes: int = 30
    summary: bool = False


class Read(NamedTuple):
    """A log. `why`: it was not read, a sentence."""

    source: Source
    why: str | None = None

    def shown(self) -> dict[str, Any]:
        source = self.source
        return {"pod": source.instance, "previous": source.previous, "lines": len(source.lines), "why": self.why}


async def create(plane: Plane, act: Act, asked: Asked) -> dict[str, Any]:
    """The triage with examples, and with addresses where placeholders are stored. Raises Refused."""
    with turn(plane, "triages", AT_ONCE):
        return await _created(plane, act, asked)


async def _created(plane: Plane, act: Act, asked: Asked) -> dict[str, Any]:
    model = models.catalogue(plane).owners.get(asked.model)
    if model is None:
        raise NotFound("model", asked.model)
    start = act.at - asked.minutes * MINUTE
    looked = await _looked(plane, model)
    read = await _read(plane, looked, asked)
    ended = await requests.failures(plane, act, model, start, act.at + 1)
    said = [*(_of_engines(looked, start) if looked else ()), *map(_of_requests, ended)]
    placeholders = Placeholders()
    sources = [one.source for one in read]
    # Reading megabytes of text takes a CPU for seconds: routers are answered all the same.
    found = await asyncio.to_thread(groups, sources, said, act.at, start, placeholders)
    kept = [(f"g{number}", group) for number, group in enumerate(found[:MOST_GROUPS], 1)]
    summarised = await summaries.summarise(plane, act, model, kept) if asked.summary else None
    id = new_id("tri", act.at)
    result = {
        "start": shown(start),
        "end": shown(act.at),
        "logs": [*(one.shown() for one in read), *_missing(looked)],
        "groups": [_shown_group(id, group) for id, group in kept],
        "more": len(found) - len(kept),
        "summary": None if summarised is None else _shown_summary(summarised),
    }
    what = {"id": id, "groups": len(found), "summary": summarised.model if summarised else None}
    async with plane.database.main.write() as connection:
        values = {"id": id, "model": model, "at": act.at, "by": act.principal.user, "result": result}
        await connection.execute(insert(triages).values(**values))
        await audit.record(connection, act, "triage.create", audit.Object("model", model), None, what)
    examples = {id: [_shown_example(one) for one in group.examples] for id, group in kept}
    head = {"id": id, "model": model, "at": shown(act.at), "by": act.principal.user}
    return {**head, **_restored(result, placeholders), "examples": examples}


async def one(plane: Plane, id: str) -> dict[str, Any]:
    """Without examples. Raises NotFound."""
    async with plane.database.main.read() as connection:
        row = (await connection.execute(select(triages).where(triages.c.id == id))).one_or_none()
    if row is None:
        raise NotFound("triage", id)
    return {**_head(row), **row.result, "examples": None}


async def listed(plane: Plane, model: str | None, limit: int, before: str | None = None) -> Sequence[dict[str, Any]]:
    """What they found in short, the newest first: one more than `limit`."""
    query = select(triages).order_by(triages.c.id.desc()).limit(limit + 1)
    if model is not None:
        query = query.where(triages.c.model == model)
    if before is not None:
        query = query.where(triages.c.id < before)
    async with plane.database.main.read() as connection:
        return [_short(row) for row in await connection.execute(query)]


def _head(row: Row[Any]) -> dict[str, Any]:
    return {"id": row.id, "model": row.model, "at": shown(row.at), "by": row.by}


def _short(row: Row[Any]) -> dict[str, Any]:
    found = row.result["groups"]
    first = found[0]["template"] if found else None
    summary = row.result["summary"]
    headline = summary["headline"] if summary else None
    return {**_head(row), "groups": len(found) + row.result["more"], "first": first, "headline": headline}


async def _looked(plane: Plane, model: str) -> Looked | None:
    try:
        return await lifecycle.look(plane, model)
    except NotFound:
        return None


def _missing(looked: Looked | None) -> Iterator[dict[str, Any]]:
    why = "Nothing is known that runs the engines of this model: it has no deployment." if looked is None else None
    why = why or (looked and looked.problem)
    if why is not None:
        yield {"pod": None, "previous": False, "lines": 0, "why": why}


async def _read(plane: Plane, looked: Looked | None, asked: Asked) -> list[Read]:
    """The logs, which have MOST_LINES lines together at most. Raises NotFound."""
    instances = looked.observed.instances if looked else ()
    if asked.instance is not None and asked.instance not in [one.name for one in instances]:
        raise NotFound("pod or process", asked.instance)
    chosen = list(_chosen(instances, asked))[:MOST_LOGS]

    async def read(name: str, previous: bool) -> Read:
        wanted = logs.Wanted(name, looked and looked.deployment.model, None, MOST_LINES // len(chosen), previous)
        try:
            return Read(Source(name, (await logs.read(plane, wanted)).lines, previous))
        except Refused as exc:
            return Read(Source(name, (), previous), exc.message)

    return list(await asyncio.gather(*(read(*one) for one in chosen)))


def _chosen(instances: Sequence[Instance], asked: Asked) -> Iterator[tuple[str, bool]]:
    """Names, and whether it is the log before; those that fail first."""
    for one in sorted(instances, key=lambda one: one.state != "failing"):
        if asked.instance not in (None, one.name):
            continue
        if asked.previous or (asked.instance is None and (one.state == "failing" or one.restarts)):
            yield one.name, True
        if not asked.previous:
            yield one.name, False


def _of_engines(looked: Looked, start: int) -> Iterator[Said]:
    """How engines ended, why they do not run, and what is said of them beside their logs."""
    for one in looked.observed.instances:
        example = Example(f"{one.state}, {one.restarts} restarts", one.name)
        last = one.last_exit
        if last is not None and not (last.code in (0, None) and last.reason in _FINE) and (last.at or start) >= start:
            # Of a reason only a word: it is no text of an engine.
            reason = f" {last.reason}" if last.reason and re.fullmatch(r"[A-Za-z]{1,40}", last.reason) else ""
            code = "unknown" if last.code is None else last.code
            text = f"exit {code}{reason}"
            yield Said("exit", text, "error", 1, last.at, last.at, (example,), text)
        if one.state == "failing" and one.reason:
            reason = without_secrets(unseen(one.reason))
            yield Said("event", reason, "error", 1, one.since, one.since, (example._replace(text=reason),))
    for event in looked.observed.events:
        if event.warns and event.at >= start:
            text = without_secrets(unseen(f"{event.reason}: {event.message}"))
            example = Example(text, event.of)
            yield Said("event", text, "warning", event.times, None, event.at, (example,))


def _of_requests(ended: Ended) -> Said:
    known = CODES.get(ended.code or "") or OUTCOMES.get(ended.outcome)
    words = f"{known.headline} ({ended.outcome}" if known else f"({ended.outcome}"
    template = f"{words}, {ended.code})" if ended.code else f"{words})"
    level = {"failed": "error", "refused": "warning"}.get(state_of(ended.outcome), "info")
    examples = tuple(Example(id) for id in ended.request_ids)
    runbook = known and known.runbook
    times = ended.times, ended.first, ended.last
    return Said("request", template, level, *times, examples, template, runbook)  # type: ignore[arg-type]


def _shown_group(id: str, group: Group) -> dict[str, Any]:
    return {
        "id": id,
        "kind": group.kind,
        "level": group.level,
        "template": group.template,
        "count": group.count,
        "first": shown(group.first),
        "last": shown(group.last),
        "runbook": group.runbook,
    }


def _shown_example(example: Example) -> dict[str, Any]:
    return {"text": example.text, "pod": example.instance, "previous": example.previous, "line": example.line}


def _shown_summary(found: Summarised) -> dict[str, Any]:
    summary = found.summary
    return {
        "model": found.model,
        "why": found.why,
        "headline": summary and summary.headline,
        "findings": [one._asdict() for one in summary.findings] if summary else [],
        "unknowns": list(summary.unknowns) if summary else [],
    }


def _restored(result: dict[str, Any], placeholders: Placeholders) -> dict[str, Any]:
    """With the addresses in the words of the model: they are not stored."""
    summary = result["summary"]
    if summary is None or summary["headline"] is None:
        return result
    restore = placeholders.restore
    findings = [{**one, "text": restore(one["text"])} for one in summary["findings"]]
    unknowns = [restore(one) for one in summary["unknowns"]]
    restored = {**summary, "headline": restore(summary["headline"]), "findings": findings, "unknowns": unknowns}
    return {**result, "summary": restored}
