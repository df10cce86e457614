"""/console/keys?tab=tokens: management tokens, which act for their maker, and service tokens of routers."""

from collections.abc import Mapping
from typing import Any, get_args

from starlette.responses import Response

from control_plane.errors import Invalid, Problem
from control_plane.http.api.preconditions import etag_of
from control_plane.http.api.tokens import NewToken, TokenRotation
from control_plane.http.console import allowances, lists, once
from control_plane.http.console.forms import Form, body, unchanged, unreadable
from control_plane.http.console.shell import Visit
from control_plane.pure.roles import ORGANISATION_ROLES, PLATFORM_ROLES
from control_plane.pure.times import read
from control_plane.services import issuing

SCOPES = get_args(issuing.TokenScope)
STATES = get_args(issuing.State)
_DIALOGS = ("create", "edit", "rotate", "end")
NOTICES = {
    "once": once.NOTICE,
    "changed": "The token is changed.",
    "disabled": "The token is disabled, until it is enabled again.",
    "enabled": "The token is enabled again.",
    "ended": "The token has ended, for ever.",
}


async def tab(visit: Visit, sees_keys: bool) -> Response:
    sent = await visit.sent(lambda form: _do(visit, form))
    if sent.answer is not None:
        return sent.answer
    problem, form = sent.problem, sent.form
    given = None if form is None else {**form.values, "scopes": form.several("scopes")}
    state: Any = visit.choice("state", "", *STATES)
    found = lists.page(
        await issuing.listed(
            visit.plane,
            visit.act,
            lists.ROWS,
            lists.after(visit, int, str),
            issuing.Filters(visit.query.get("organisation"), visit.query.get("user"), state or None),
        ),
        lambda one: [read(one["created_at"]), one["id"]],
    )
    dialog = visit.query.get("act")
    token = None
    if dialog in _DIALOGS[1:] and "id" in visit.query:
        token = await issuing.one(visit.plane, visit.act, visit.query["id"])
    return visit.render(
        "tokens.html",
        status=problem.status if problem else 200,
        rows=found.rows,
        after=found.after,
        sees_keys=sees_keys,
        states=STATES,
        dialog=dialog if dialog == "create" or token is not None else None,
        token=token,
        etag=None if token is None else etag_of(issuing.tag_of(token)),
        given=given if given is not None else _given(token),
        scopes=SCOPES,
        roles=_roles(visit),
        services=visit.may("settings.write"),
        overlaps=once.OVERLAPS,
        once=once.token(),
        problem=problem,
        notices=NOTICES,
    )


def _given(token: Mapping[str, Any] | None) -> dict[str, Any]:
    if token is None:
        return {"scopes": ()}
    return {**token, "scopes": token["scopes"] or (), "expires": (token["expires"] or "")[:10]}


def _roles(visit: Visit) -> list[tuple[str, str]]:
    """Those that a token can have: at most the visitor's own, as the service checks."""
    names = [*(PLATFORM_ROLES if visit.act.principal.platform_role else ()), *ORGANISATION_ROLES]
    return [("", "as yours"), *((name, name) for name in dict.fromkeys(names))]


async def _do(visit: Visit, form: Form) -> Response:
    plane, act, id, where = visit.plane, visit.act, form.text("id"), visit.address(act=None, id=None)
    match form.text("do"):
        case "create":
            return await _create(visit, form)
        case "rotate":
            overlap = body(TokenRotation, {"overlap": form.number("overlap")}).overlap

            async def make() -> once.Shown:
                made, secret = await issuing.rotate(plane, act, id, overlap)
                return _secret(visit, made, secret, "rotate")

            return await once.once(visit, form, make)
        case "edit":
            check = unchanged(form.text("etag"), issuing.tag_of)

            def decide(before: dict[str, Any]) -> issuing.TokenFields:
                check(before)
                fields = _fields(form, before["kind"], before["expires"])
                return body(issuing.TokenFields, {**fields, "disabled": before["disabled"]})

            await issuing.change(plane, act, id, decide)
            return visit.back("changed", to=where)
        case "disable" | "enable" as verb:

            def flagged(before: dict[str, Any]) -> issuing.TokenFields:
                fields = {name: before[name] for name in issuing.FIELDS}
                return body(issuing.TokenFields, {**fields, "disabled": verb == "disable"})

            await issuing.change(plane, act, id, flagged)
            return visit.back(f"{verb}d", to=where)
        case "end":
            await issuing.end(plane, act, id, lambda found: None)
            return visit.back("ended", to=where)
        case _:
            raise unreadable()


async def _create(visit: Visit, form: Form) -> Response:
    kind = form.text("kind") or "management"
    asked = body(NewToken, {**_fields(form, kind), "kind": kind})

    async def make() -> once.Shown:
        made, secret = await issuing.create(visit.plane, visit.act, asked.kind, asked)
        return _secret(visit, made, secret, "create")

    return await once.once(visit, form, make)


def _fields(form: Form, kind: str, before: str | None = None) -> dict[str, Any]:
    """Raises Invalid."""
    service, organisation, role = kind == "service", form.optional("organisation"), form.optional("role")
    if service and (organisation or role):
        raise Invalid(Problem("organisation", "and role are of management tokens; a service token has scopes"))
    return {
        "name": form.text("name"),
        "scopes": form.several("scopes") or None,
        "organisation": organisation,
        "role": role,
        "expires": allowances.expires(form, before),
    }


def _secret(visit: Visit, token: Mapping[str, Any], secret: str, verb: str) -> once.Shown:
    where = "/console/keys?tab=tokens"
    page = visit.render(
        "secret.html",
        title=f"The secret of {token['name']}",
        secret=secret,
        key=token,
        verb=verb,
        where=where,
        samples=None,
    )
    return once.Shown(page, where)
