"""/console/prompts: stored prompts; /console/prompts/{name}: its labels, versions, what differs, and a new version."""

from collections.abc import Mapping
from typing import Any

from starlette.responses import RedirectResponse, Response

from control_plane.errors import Invalid, NotFound, Problem, Refused
from control_plane.http.api.preconditions import etag_of
from control_plane.http.api.prompts import LabelBody
from control_plane.http.console import changes, drafts, lists
from control_plane.http.console.forms import Form, body, unchanged
from control_plane.http.console.shell import USE, Page, Visit
from control_plane.pure import diff
from control_plane.pure.chat import Question
from control_plane.pure.roles import Scope
from control_plane.pure.samples import MODEL, ROUTER, codes
from control_plane.services import organisations, prompts
from control_plane.services.prompts import PromptBody, VersionBody

PROMPTS = "/console/prompts"
NOTICES = {
    "created": "The prompt is created. It needs a version before anybody can use it.",
    "version": "The version is added. Nobody uses it by a label before one is set to it.",
    "label": "The label is set. Routers use it within seconds.",
    "removed": "The label is removed. Routers answer requests that name it with 404 within seconds.",
    "ended": "The prompt has ended. Routers answer requests that name it with 404 within seconds.",
}
# Versions on the page of a prompt; organisations that a form offers
_VERSIONS, _OFFERED = 20, 200
_DIALOGS = ("label", "remove", "end")


async def listing(visit: Visit) -> Response:
    sent = await visit.sent(lambda form: _create(visit, form))
    if sent.answer is not None:
        return sent.answer
    problem = sent.problem
    after = lists.after(visit, str)
    found = lists.page(
        await prompts.listed(visit.plane, visit.act, lists.ROWS, after and after[0]), lambda one: [one["name"]]
    )
    drafts_somewhere = visit.may_somewhere("prompts.draft")
    return visit.render(
        "prompts.html",
        status=problem.status if problem else 200,
        rows=found.rows,
        changed=await prompts.latest_changes(visit.plane, [one["name"] for one in found.rows]),
        after=found.after,
        organisations=await _organisations(visit) if drafts_somewhere else (),
        creates=drafts_somewhere and visit.query.get("act") == "create",
        given={} if sent.form is None else sent.form.values,
        problem=problem,
        notices=NOTICES,
    )


async def _create(visit: Visit, form: Form) -> Response:
    fields = {"name": form.text("name"), "organisation": form.optional("organisation")}
    made = await prompts.create(visit.plane, visit.act, body(PromptBody, fields))
    return visit.back("created", to=f"{PROMPTS}/{made['name']}")


async def _organisations(visit: Visit) -> list[tuple[str, str]]:
    """Those whose prompts the visitor may make."""
    scope = visit.act.principal.scope("prompts.draft")
    if not scope.everything:
        return [(name, name) for name in sorted(scope.organisations)]
    found = await organisations.page_of(visit.plane, Scope(True), _OFFERED, None)
    return [("", "none: everybody may use it"), *((one["name"], one["name"]) for one in found)]


async def detail(visit: Visit) -> Response:
    found = await prompts.found(visit.plane, visit.act, visit.path("name"))
    action = visit.query.get("act")
    sent = await visit.sent(lambda form: _change(visit, found, form))
    if sent.answer is not None:
        return sent.answer
    if sent.form is not None and sent.problem is not None:
        if sent.problem.status == 404 and sent.form.text("do") != "label":
            raise sent.problem
        return await _rejected(visit, found, sent.form, sent.problem)
    if "from" in visit.query and "to" in visit.query and action is None:
        # What the form of two versions sends
        return RedirectResponse(visit.address(diff=f"{visit.query['from']}..{visit.query['to']}", **_CLEAN), 303)
    if action == "version" and visit.may("prompts.draft", found["organisation"]):
        return _draft(visit, found, await _first_draft(visit, found))
    return await _shown(visit, found)


_CLEAN: Mapping[str, None] = {"from": None, "to": None}


async def _rejected(visit: Visit, found: dict[str, Any], form: Form, problem: Refused) -> Response:
    """The same form again, with what was typed."""
    if form.text("do") in ("version", "message", "variable"):
        return _draft(visit, found, drafts.typed(form), problem)
    return await _shown(visit, found, problem, form.values)


async def _change(visit: Visit, found: dict[str, Any], form: Form) -> Response:
    """Raises Refused."""
    name, plane, act = found["name"], visit.plane, visit.act
    match form.text("do"):
        case "message" | "variable" as what:
            return _draft(visit, found, drafts.typed(form).longer(what))
        case "version":
            asked = body(VersionBody, drafts.typed(form).fields())
            await prompts.add_version(plane, act, name, asked)
            return visit.back("version")
        case "label":
            asked_label = body(LabelBody, {"version": form.number("version")})
            check = unchanged(form.text("etag")) if form.text("etag") else _new
            await prompts.put_label(plane, act, name, form.text("label"), asked_label.version, check)
            return visit.back("label")
        case "remove":
            await prompts.delete_label(plane, act, name, form.text("label"), unchanged(form.text("etag")))
            return visit.back("removed")
        case "end":
            await prompts.end(plane, act, name, unchanged(form.text("etag")))
            return visit.back("ended", to=PROMPTS)
        case other:
            raise Invalid(Problem("do", f"there is no {other[:40]!r} here"))


def _new(label: Mapping[str, Any] | None) -> None:
    if label is not None:
        message = f"There is a label {label['label']!r} already, at version {label['version']}. Move that one."
        raise Refused(409, "name_taken", message, param="label")


async def _first_draft(visit: Visit, found: dict[str, Any]) -> drafts.Draft:
    """The newest version, or the one that the URL names, to begin with."""
    number = _number(visit.query.get("version")) or found["latest"]
    before = None if number is None else await prompts.version(visit.plane, visit.act, found["name"], number)
    return drafts.of(before, as_json=visit.query.get("as") == "json")


def _draft(visit: Visit, found: dict[str, Any], draft: drafts.Draft, problem: Refused | None = None) -> Response:
    return visit.render(
        "prompt-version.html",
        title=f"New version of {found['name']}",
        status=problem.status if problem else 200,
        prompt=found,
        draft=draft,
        problem=problem,
        roles=drafts.ROLES,
        types=drafts.TYPES,
    )


async def _shown(
    visit: Visit, found: dict[str, Any], problem: Refused | None = None, given: Mapping[str, str] | None = None
) -> Response:
    name, plane, act = found["name"], visit.plane, visit.act
    labels = await prompts.labels(plane, act, name)
    before = _number(visit.query.get("after"))
    versions = await prompts.versions(plane, act, name, _VERSIONS, before)
    number = _number(visit.query.get("version")) or found["latest"]
    content = None if number is None else await prompts.version(plane, act, name, number)
    compared = await _compared(visit, name)
    return visit.render(
        "prompt.html",
        title=name,
        status=problem.status if problem else 200,
        prompt=found,
        labels=labels,
        versions=versions[:_VERSIONS],
        after=versions[_VERSIONS - 1]["version"] if len(versions) > _VERSIONS else None,
        content=content,
        compared=compared,
        codes=() if content is None else _codes(visit, found, content),
        unknown_router=None if plane.settings.router_public_url else ROUTER,
        unknown_model=MODEL,
        dialog=_dialog(visit, found, labels),
        history=await changes.of(visit, "prompt", name),
        problem=problem,
        given=given or {},
        notices=NOTICES,
    )


def _dialog(visit: Visit, found: dict[str, Any], labels: list[dict[str, Any]]) -> dict[str, Any] | None:
    """What the URL asks to do, if the visitor may; with the ETag of what it changes."""
    action = visit.query.get("act")
    if action not in _DIALOGS or not visit.may("prompts.write", found["organisation"]):
        return None
    if action == "end":
        return {"action": action, "etag": etag_of(found), "label": None}
    label = next((one for one in labels if one["label"] == visit.query.get("label")), None)
    if label is None and (action == "remove" or "label" in visit.query or found["latest"] is None):
        return None
    return {"action": action, "etag": "" if label is None else etag_of(label), "label": label}


async def _compared(visit: Visit, name: str) -> dict[str, Any] | None:
    """`?diff=7..8`. Raises NotFound."""
    given = visit.query.get("diff")
    if given is None:
        return None
    first, second = (_version(one) for one in (given.partition("..")[0], given.partition("..")[2]))
    before = await prompts.version(visit.plane, visit.act, name, first)
    after = await prompts.version(visit.plane, visit.act, name, second)
    found = diff.of_texts(drafts.as_text(before), drafts.as_text(after), context=None)
    return {"first": first, "second": second, "diff": found}


def _codes(visit: Visit, found: dict[str, Any], content: Mapping[str, Any]) -> Any:
    """That use the version by the label of it, if it has one; variables that must be given stand there by name."""
    label = next((label for label, number in found["labels"].items() if number == content["version"]), None)
    variables = {
        name: 0 if one.get("type") == "number" else next(iter(one.get("values") or ()), name.upper())
        for name, one in content.get("variables", {}).items()
        if one.get("required")
    }
    prompt = {"id": found["name"], "version": label or content["version"], "variables": variables}
    return codes(Question((), prompt), MODEL, visit.plane.settings.router_public_url)


def _number(text: str | None) -> int | None:
    """A version of a URL, if there is one. Raises NotFound."""
    return None if text is None else _version(text)


def _version(text: str) -> int:
    """Raises NotFound."""
    if not (text.isascii() and text.isdecimal() and len(text) < 10 and int(text)):
        raise NotFound("version", text)
    return int(text)


PAGE = Page(PROMPTS, "Prompts", listing, "prompts.see", USE, posts="prompts.draft")
DETAIL = Page(f"{PROMPTS}/{{name}}", "Prompt", detail, "prompts.see", posts="prompts.draft")
