"""/console/organisations: the organisations; /console/organisations/{name}: members, limits and budget of one."""

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from starlette.responses import Response

from control_plane.errors import Forbidden, NotFound, Refused, StorageUnavailable
from control_plane.http.api.organisations import NewOrganisation, NewRole, OrganisationFields, allowed, visible
from control_plane.http.api.preconditions import etag_of
from control_plane.http.console import allowances, changes, lists
from control_plane.http.console.forms import Form, body, unchanged, unreadable
from control_plane.http.console.shell import MANAGE, Page, Visit
from control_plane.pure import diff
from control_plane.pure.roles import ORGANISATION_ROLES
from control_plane.services import organisations, spend, users
from control_plane.services.spend import BudgetUse

ORGANISATIONS = "/console/organisations"
NOTICES = {
    "changed": "The organisation is changed. Routers follow within seconds.",
    "disabled": "The organisation is disabled: routers refuse its keys within seconds.",
    "enabled": "The organisation is enabled again.",
    "ended": "The organisation has ended, with its keys and tokens.",
    "member": "The role is set.",
    "removed": "That user is no longer a member.",
}
_MEANINGS = {
    "owner": "all in the organisation, members and limits too",
    "admin": "as an owner, but changes no owner",
    "member": "own keys, playground, prompts",
    "viewer": "sees models, sums of usage, prompts",
}
_SUGGESTED = 200


async def listing(visit: Visit) -> Response:
    """The list, and the form of a new one."""
    sent = await visit.sent(lambda form: _create(visit, form))
    if sent.answer is not None:
        return sent.answer
    problem = sent.problem
    given = allowances.shown({}) if sent.form is None else allowances.typed(sent.form)
    scope = visit.act.principal.scope("organisations.see")
    after = lists.after(visit, str)
    found = lists.page(
        await organisations.page_of(visit.plane, scope, lists.ROWS, after and after[0]), lambda one: [one["name"]]
    )
    sizes = await organisations.sizes(visit.plane, [one["name"] for one in found.rows])
    used = await _used(visit, found.rows)
    return visit.render(
        "organisations.html",
        status=problem.status if problem else 200,
        rows=[
            {**one, "size": sizes[one["name"]], "used": (used or {}).get(one["name"]), "may": _may(visit, one["name"])}
            for one in found.rows
        ],
        after=found.after,
        creates=visit.query.get("act") == "create" and visit.may("organisations.write"),
        given=given,
        problem=problem,
        notices=NOTICES,
    )


def _may(visit: Visit, name: str) -> dict[str, bool]:
    """What of an organisation is shown."""
    scope = visit.act.principal.scope("keys.see")
    return {
        "members": visit.may("members.see", name),
        "keys": scope.everything or name in scope.organisations,
        "usage": visit.may("usage.see", name),
    }


async def _used(visit: Visit, rows: Any) -> dict[str, BudgetUse] | None:
    """None: the database of usage is away."""
    with suppress(StorageUnavailable):
        seen = {one["name"]: one["budget"] for one in rows if visit.may("usage.see", one["name"])}
        return await spend.uses(visit.plane, "organisation", seen)
    return None


async def _create(visit: Visit, form: Form) -> Response:
    if not visit.may("organisations.write"):
        raise Forbidden("A new organisation needs the role admin on the platform.")
    asked = body(NewOrganisation, {"name": form.text("name"), **_fields(form)})
    await organisations.create(visit.plane, visit.act, asked.name, asked.written)
    return visit.back("changed", to=f"{ORGANISATIONS}/{asked.name}")


def _fields(form: Form) -> dict[str, Any]:
    """Raises Invalid."""
    return {
        "title": form.optional("title"),
        "models": allowances.models(form),
        "limits": allowances.limits(form),
        "budget": allowances.budget(form),
    }


async def detail(visit: Visit) -> Response:
    """One organisation."""
    name = visit.path("name")
    sent = await visit.sent(lambda form: _do(visit, name, form))
    if sent.answer is not None:
        return sent.answer
    problem, form = sent.problem, sent.form
    shown = await visible(visit.plane, visit.act, name)
    given = {**shown, **allowances.shown(shown)} if form is None else allowances.typed(form)
    replaced = None
    if form is not None and problem is not None and problem.status == 412 and "limit_unit" in form.values:
        after = _changed(visit, shown, form)
        replaced = diff.of_values({field: shown[field] for field in after}, after)
    used = await _used(visit, [shown])
    return visit.render(
        "organisation.html",
        status=problem.status if problem else 200,
        title=shown["title"] or name,
        one=shown,
        size=(await organisations.sizes(visit.plane, [name]))[name],
        used=(used or {}).get(name),
        sees=_may(visit, name),
        given=given,
        etag=etag_of(shown),
        replaced=replaced,
        history=await changes.of(visit, "organisation", name),
        dialog=visit.query.get("act"),
        problem=problem,
        notices=NOTICES,
        **await _members(visit, name),
    )


async def _members(visit: Visit, name: str) -> dict[str, Any]:
    """What the tab of members shows, or the other one for who may not see them."""
    sees = visit.may("members.see", name)
    tab = visit.choice("tab", "members" if sees else "limits", "limits" if sees else "members")
    found = lists.Rows((), None)
    if tab == "members":
        await allowed(visit.plane, visit.act, "members.see", name)
        after = lists.after(visit, str)
        rows = await organisations.members(visit.plane, name, lists.ROWS, after and after[0])
        found = lists.page(rows, lambda one: [one["user"]])
    makes_owners = visit.may("organisations.write") or visit.act.principal.roles.get(name) == "owner"
    suggested = visit.query.get("act") == "add" and visit.may("organisations.write")
    return {
        "tab": tab,
        "members": [{**one, "etag": etag_of(one)} for one in found.rows],
        "after": found.after,
        "roles": [
            (role, f"{role}: {_MEANINGS[role]}") for role in ORGANISATION_ROLES if role != "owner" or makes_owners
        ],
        "makes_owners": makes_owners,
        "users": [one["name"] for one in await users.page_of(visit.plane, _SUGGESTED, None)] if suggested else (),
    }


async def _do(visit: Visit, name: str, form: Form) -> Response:
    plane, act, where, tab = visit.plane, visit.act, f"{ORGANISATIONS}/{name}", visit.query.get("tab")
    await visible(plane, act, name)
    match form.text("do"):
        case "edit":
            check = unchanged(form.text("etag"))

            def decide(before: dict[str, Any]) -> dict[str, Any]:
                check(before)
                return body(OrganisationFields, _changed(visit, before, form)).written

            await organisations.change(plane, act, name, decide)
            return visit.back("changed", to=where, tab=tab)
        case "disable" | "enable" as verb:
            await organisations.change(plane, act, name, lambda before: {**before, "disabled": verb == "disable"})
            return visit.back(f"{verb}d", to=where, tab=tab)
        case "end":
            await allowed(plane, act, "organisations.write", name)
            await organisations.end(plane, act, name, lambda found: None)
            return visit.back("ended", to=ORGANISATIONS)
        case "role" | "add" | "remove" as verb:
            await allowed(plane, act, "members.write", name)
            return await _change_member(visit, name, verb, form)
        case _:
            raise unreadable()


def _changed(visit: Visit, before: Mapping[str, Any], form: Form) -> dict[str, Any]:
    """The fields that the visitor may change, in place of those that are. Raises Invalid."""
    fields, name = _fields(form), before["name"]
    kept = {field: before[field] for field in organisations.FIELDS}
    may = {field: visit.may(organisations.NEEDS[field], name) for field in fields}
    return {**kept, **{field: value for field, value in fields.items() if may[field]}}


async def _change_member(visit: Visit, name: str, verb: str, form: Form) -> Response:
    plane, act, user, etag = visit.plane, visit.act, form.text("user"), form.text("etag")

    def check(found: dict[str, Any] | None) -> None:
        if verb == "add" and found is not None:
            message = f"{user!r} is a member already, with the role {found['role']}. Set the role in the list."
            raise Refused(409, "name_taken", message, param="user")
        if verb == "role" and found is None:
            raise NotFound("member", user)
        if verb != "add":
            unchanged(etag)(found)

    if verb == "remove":
        await organisations.end_member(plane, act, name, user, check)
        return visit.back("removed", to=f"{ORGANISATIONS}/{name}")
    role = body(NewRole, {"role": form.text("role")}).role
    await organisations.set_member(plane, act, name, user, role, check)
    return visit.back("member", to=f"{ORGANISATIONS}/{name}")


PAGE = Page(ORGANISATIONS, "Organisations", listing, "organisations.see", MANAGE, posts="organisations.write")
DETAIL = Page(f"{ORGANISATIONS}/{{name}}", "Organisation", detail, "organisations.see", posts="limits.write")
