"""What a model says about the groups of a triage: optional, asked through a router, shown as text and never obeyed."""

import secrets
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import orjson

from control_plane.clients.router import RouterAway
from control_plane.errors import Refused
from control_plane.plane import Act, Plane
from control_plane.pure import summary
from control_plane.pure.log_lines import unseen
from control_plane.pure.log_templates import Group
from control_plane.pure.redaction import without_secrets
from control_plane.pure.roles import SYSTEM
from control_plane.pure.summary import Summary, Unreadable
from control_plane.services import lending, models, overview, reports
from control_plane.services.lending import Borrower
from inference_api.features.fallback import FALLBACKS
from inference_api.routing.references import members_of
from registry_stub.store import Stored

# Some dozens of summaries a day, of the largest that there are
BORROWER = Borrower("system:triage", daily_tokens=200_000)
# Seconds for an answer, and bytes of it
PATIENCE, _MOST = 30.0, 64 * 1024
# What engines and clusters write, who may have got it from anybody
OF_ENGINES = ("log", "event")


class Summarised(NamedTuple):
    """`model`: that was asked. `why`: there is no summary, a sentence."""

    model: str | None
    summary: Summary | None
    why: str | None = None


async def summarise(
    plane: Plane, act: Act, model: str, groups: Sequence[tuple[str, Group]], patience: float = PATIENCE
) -> Summarised:
    """`groups`: with their ids. Whatever goes wrong is the reason that there is none. `patience`: seconds."""
    chosen = plane.settings.triage_model
    if chosen is None:
        return Summarised(None, None, "No model is set to summarise: CONTROL_PLANE_TRIAGE_MODEL names one.")
    sent = [(id, group) for id, group in groups if plane.settings.triage_engine_logs == "on" or _is_ours(group)]
    why = await _unfit(plane, chosen, model)
    if why is None and not sent:
        why = "There is nothing to summarise"
        why += ": no line of an engine is sent." if groups else "."
        if groups:
            why += " CONTROL_PLANE_TRIAGE_ENGINE_LOGS=on allows it, for a model in your cluster."
    if why is not None:
        return Summarised(chosen, None, why)
    try:
        return Summarised(chosen, await _asked(plane, act, chosen, sent, patience))
    except Refused as exc:
        return Summarised(chosen, None, exc.message)
    except RouterAway as exc:
        return Summarised(chosen, None, f"No answer: {exc}.")
    except Unreadable as exc:
        return Summarised(chosen, None, f"The answer of {chosen} {exc}.")


def _is_ours(group: Group) -> bool:
    return group.kind not in OF_ENGINES


async def _unfit(plane: Plane, chosen: str, model: str) -> str | None:
    """Why a model may not be asked about another one: it has a part in that, or does not work itself."""
    stored = models.catalogue(plane).stored
    name = models.catalogue(plane).owners.get(chosen)
    if name is None:
        return f"The model {chosen} of CONTROL_PLANE_TRIAGE_MODEL is not in the catalogue."
    if _parts(stored, [name]) & _parts(stored, [model]):
        return f"{chosen} is not asked: it is part of what is looked at."
    standings = await overview.standing_models(plane, await reports.seen(plane))
    standing = next((one for one in standings if one.name == name), None)
    if standing is None or standing.state != "ok":
        return f"{chosen} is not asked: its state is {'unknown' if standing is None else standing.state}."
    return None


def _parts(stored: Mapping[str, Stored], names: Iterable[str]) -> set[str]:
    """Names and backends of models, and of all that may answer for them."""
    found: set[str] = set()
    waiting = list(names)
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        found.add(name)
        # An adapter is on the backends of its model.
        waiting += [owner for owner, one in stored.items() if name in (one.entry.adapters or ())]
        if name in stored:
            entry = stored[name].entry
            waiting += [*members_of(entry), *(FALLBACKS.of(entry) or ())]
            found |= {backend.url for backend in entry.backends}
    return found


async def _asked(plane: Plane, act: Act, chosen: str, groups: Sequence[tuple[str, Group]], patience: float) -> Summary:
    """Raises Refused, RouterAway, Unreadable."""
    # The key is the system's, whoever asks: it has one budget.
    system = Act(SYSTEM, act.at, act.address, act.request_id)
    question = summary.question(groups, secrets.token_hex(16))
    body = summary.body(chosen, question.text)
    content = b""
    async with lending.asked(plane, system, plane.connections.router, BORROWER, body, patience) as answer:
        async for part in answer.body:
            content += part
            if len(content) > _MOST:
                raise Unreadable("is too long")
        status = answer.status
    if status != 200:
        raise Refused(502, "summary_failed", _reason(status, content))
    return summary.read(summary.answered(content), question.ids)


def _reason(status: int, content: bytes) -> str:
    try:
        words = str(orjson.loads(content)["error"]["message"])
    except (orjson.JSONDecodeError, KeyError, TypeError):
        return f"The router answers {status}."
    return f"The router answers {status}: {unseen(without_secrets(words[:400]))[:200]}"
