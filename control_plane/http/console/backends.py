"""/console/backends: what each backend does, as the routers see it; drain, take out, return, reset its circuit."""

from contextlib import suppress
from typing import Any

from starlette.responses import Response

from control_plane.errors import NotFound
from control_plane.http.api.fleet import NewOverride
from control_plane.http.console import lists
from control_plane.http.console.forms import Form, body
from control_plane.http.console.shell import OPERATE, Page, Visit
from control_plane.pure.reports import STATES, MergedBackend
from control_plane.services import overrides, reports
from control_plane.services.visibility import visible_models

NOTICES = {
    "drain": "The backend gets no new requests; those that run go on. Each router acknowledges it below.",
    "out": "The backend is out of use. Each router acknowledges it below.",
    "return": "The backend is back in use.",
    "reset_circuit": "The circuit is closed again on every router.",
    "ended": "The override has ended.",
}
ACTIONS = {
    "drain": ("Drain", "No new request goes there; those that run go on. For a restart or an update."),
    "out": ("Take out", "No new request goes there, and those that run are ended. For a backend that does harm."),
    "return": ("Return", "Ends what takes the backend out of use."),
    "reset_circuit": ("Reset the circuit of", "Requests go there at once, without waiting for the circuit's pause."),
}
_HOURS = (("3600", "1 hour"), ("14400", "4 hours"), ("86400", "1 day"), ("604800", "7 days"), ("", "it is returned"))


async def backends(visit: Visit) -> Response:
    sent = await visit.sent(lambda form: (_end if "end" in form.values else _change)(visit, form))
    if sent.answer is not None:
        return sent.answer
    problem = sent.problem
    wanted, only = visit.query.get("model"), visit.choice("show", "all", "bad")
    seen = await reports.seen(visit.plane)
    visible = await visible_models(visit.plane, visit.act)
    known = [one for one in seen.backends if visible(one.model)]
    rows = [one for one in known if wanted in (None, one.model) and (only == "all" or one.state != "ready")]
    rows.sort(key=_place)
    found = lists.part(visit, rows, _place, int, str, str)
    held = await overrides.listed(visit.plane, 200, None, None, True)
    return visit.render(
        "backends.html",
        status=problem.status if problem else 200,
        rows=[shown(one, held) for one in found.rows],
        after=found.after,
        models=sorted({one.model for one in known}),
        total=len(known),
        routers=len(seen.present),
        overrides=held,
        dialog=_dialog(visit),
        given={"expires_in": "3600"} if sent.form is None else sent.form.values,
        hours=_HOURS,
        problem=problem,
        notices=NOTICES,
        live=True,
    )


async def _end(visit: Visit, form: Form) -> Response:
    # It may have ended by itself meanwhile.
    with suppress(NotFound):
        await overrides.end(visit.plane, visit.act, form.text("end"))
    return visit.back("ended")


async def _change(visit: Visit, form: Form) -> Response:
    fields = {
        **form.values,
        "model": form.values.get("model") or None,
        "reason": form.values.get("reason") or None,
        "expires_in": form.number("expires_in"),
        "force": form.values.get("force") == "1",
    }
    asked = body(NewOverride, fields)
    if asked.action == "return":
        await overrides.end_all(visit.plane, visit.act, asked.backend, asked.model, asked.reason)
    else:
        await overrides.create(visit.plane, visit.act, asked.wanted())
    return visit.back(asked.action, model=visit.query.get("model"), show=visit.query.get("show"))


def shown(one: MergedBackend, held: list[dict[str, Any]]) -> dict[str, Any]:
    """A row: the worst of what routers say, and what people have said of the backend."""
    rows = list(one.by_router.values())
    worst = next(row for row in rows if row["state"] == one.state)
    errors = [row["last_error"] for row in rows if row.get("last_error")]
    return {
        "backend": one.backend,
        "model": one.model,
        "state": one.state,
        "agree": one.agree,
        "reason": worst.get("reason"),
        "since": worst.get("since"),
        "circuits": sorted({row["circuit"] for row in rows if row.get("circuit")}),
        "open": sum(row.get("circuit") == "open" for row in rows),
        "retry_at": max((row["retry_at"] for row in rows if row.get("retry_at")), default=None),
        "in_flight": one.in_flight,
        "waiting": one.waiting,
        "kv_usage": one.kv_usage,
        "last_error": max(errors, key=lambda error: int(error["at"]), default=None),
        "override": next(
            (
                o
                for o in held
                if o["backend"] == one.backend and o["model"] in (None, one.model) and o["action"] != "reset_circuit"
            ),
            None,
        ),
        "routers": one.by_router,
    }


def _place(one: MergedBackend) -> tuple[int, str, str]:
    """The worst first."""
    return STATES.index(one.state), one.model, one.backend


def _dialog(visit: Visit) -> dict[str, str] | None:
    action, backend = visit.query.get("act"), visit.query.get("backend")
    if action not in ACTIONS or backend is None:
        return None
    verb, meaning = ACTIONS[action]
    return {"action": action, "backend": backend, "verb": verb, "meaning": meaning, "of": visit.query.get("of", "")}


PAGE = Page("/console/backends", "Backends", backends, "backends.see", OPERATE, posts="backends.operate")
