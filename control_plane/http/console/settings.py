"""/console/settings: limits and budgets of the platform, what can be changed while it runs, and its variables."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from starlette.responses import Response

from control_plane.errors import Forbidden, Invalid, NotFound, Problem
from control_plane.http.api.limits import BudgetBody, LimitBody, with_spent
from control_plane.http.api.preconditions import etag_of
from control_plane.http.console import allowances, lists
from control_plane.http.console.forms import Form, body, unchanged, unreadable
from control_plane.http.console.shell import MANAGE, Page, Visit
from control_plane.services import config, limits
from control_plane.services.policy import ANONYMOUS
from control_plane.settings import PREFIX

SETTINGS = "/console/settings"
SCOPES: Mapping[str, tuple[tuple[str, str], ...]] = {
    "limit": (
        ("all", "all requests together"),
        ("organisation", "organisation"),
        ("user", "user"),
        ("key", "key"),
        ("address", "address of a client"),
        ("model", "model"),
    ),
    "budget": (
        ("all", "all requests together"),
        ("organisation", "organisation"),
        ("user", "user"),
        ("key", "key"),
    ),
}
NOTICES = {
    "made": "It holds from now on. Routers follow within seconds.",
    "changed": "It is changed. Routers follow within seconds.",
    "deleted": "It no longer holds. Routers follow within seconds.",
    "set": "The setting is changed.",
    "reset": "The setting has its default again.",
}
MEANINGS = {
    config.RECORD_DAYS: ("Records of requests", "Days that each request can be looked up."),
    config.HOURLY_DAYS: ("Sums of hours", "Days that usage is known by the hour; sums of days stay for ever."),
    ANONYMOUS: ("Limits without a key", "Of each client address, where routers take requests without a key."),
}
_DIALOGS = ("create", "edit", "delete", "set")


class Fact(NamedTuple):
    """What a variable of the process says. `value`: None: it is not set."""

    label: str
    value: str | None
    variable: str


async def page(visit: Visit) -> Response:
    sent = await visit.sent(lambda form: _do(visit, form))
    if sent.answer is not None:
        return sent.answer
    problem, form = sent.problem, sent.form
    tab = visit.choice("tab", "limits", "running", "process")
    return visit.render(
        "settings.html",
        status=problem.status if problem else 200,
        tab=tab,
        writes=visit.may("settings.write"),
        facts=_facts(visit) if tab == "process" else (),
        problem=problem,
        notices=NOTICES,
        scopes=SCOPES,
        **(await _running(visit, form) if tab == "running" else _NOTHING_RUNNING),
        **(await _of_platform(visit, form) if tab == "limits" else _NO_LIMITS),
    )


_NOTHING_RUNNING: Mapping[str, Any] = {"values": (), "value": None}
_NO_LIMITS: Mapping[str, Any] = {"limits": (), "budgets": (), "kind": None, "after": None}


async def _of_platform(visit: Visit, form: Form | None) -> dict[str, Any]:
    """What the tab of limits and budgets shows, with its dialog."""
    after = lists.after(visit, str)
    place = after and after[0]
    found = lists.page(await limits.listed(visit.plane, "limit", lists.ROWS, place), lambda one: [one["id"]])
    budgets = await with_spent(visit.plane, await limits.listed(visit.plane, "budget", 500, None))
    kind, act = visit.query.get("kind"), visit.query.get("act")
    item, given = None, {"scope": "all", "name": "", **allowances.shown({}), "limits": [dict(allowances.EMPTY)]}
    if act in ("edit", "delete") and kind in SCOPES:
        item = await limits.found(visit.plane, _kind(kind), visit.query.get("id", ""))
        shown = allowances.shown({"limits": [item]} if kind == "limit" else {"budget": item})
        given = {**given, **item, **shown, "limits": shown["limits"][:1]}
    etag = None if item is None else etag_of(item)
    if form is not None:
        typed = allowances.typed(form)
        given = {**given, **typed, "limits": typed["limits"][:1]}
    return {
        "limits": found.rows,
        "after": found.after,
        "budgets": [{**one, "shown": allowances.stored_budget(one)} for one in budgets],
        "kind": kind if kind in SCOPES and act in _DIALOGS[:3] and (act == "create" or item is not None) else None,
        "act": act,
        "item": item,
        "given": given,
        "etag": etag,
    }


def _kind(text: str | None) -> limits.Kind:
    match text:
        case "limit":
            return "limit"
        case "budget":
            return "budget"
        case _:
            raise unreadable()


async def _running(visit: Visit, form: Form | None) -> dict[str, Any]:
    """What can be changed while it runs, with its dialog."""
    values = [_value(one) for one in await config.listed(visit.plane)]
    chosen = next(
        (one for one in values if one["key"] == visit.query.get("key") and visit.query.get("act") == "set"), None
    )
    rows = chosen["value"] if chosen is not None and chosen["is_limits"] else []
    given: dict[str, Any] = {"value": "" if chosen is None or chosen["is_limits"] else chosen["value"]}
    given |= allowances.shown({"limits": rows}) if form is None else allowances.typed(form)
    return {"values": values, "value": chosen, "given": given}


def _value(one: config.Value) -> dict[str, Any]:
    known = config.KEYS[one.key]
    title, meaning = MEANINGS.get(one.key, (one.key, ""))
    return {
        **one.shown(),
        "title": title,
        "meaning": meaning,
        "is_limits": one.key == ANONYMOUS,
        "variable": None if known.variable is None else f"{PREFIX}{known.variable.upper()}",
        "etag": etag_of(one.shown()),
    }


def _facts(visit: Visit) -> list[Fact]:
    """Of the process, without secrets."""
    settings = visit.plane.settings
    roles = ", ".join(f"{group}: {role}" for group, role in settings.oidc_roles.items())
    return [
        Fact("Console", settings.public, "PUBLIC_URL"),
        Fact("Routers, as applications reach them", settings.router_public_url, "ROUTER_PUBLIC_URL"),
        Fact("Router of the playground", settings.router_url, "ROUTER_URL"),
        Fact("Database", {"sqlite": "SQLite"}.get(settings.url.get_backend_name(), "PostgreSQL"), "DATABASE_URL"),
        Fact("Currency", settings.currency, "CURRENCY"),
        Fact("Pepper of keys", "set" if settings.peppers else None, "KEY_PEPPER"),
        Fact("Trusted proxies", ", ".join(map(str, settings.trusted_proxies)) or None, "TRUSTED_PROXIES"),
        Fact("Login by password", settings.password_login, "PASSWORD_LOGIN"),
        Fact("OpenID provider", settings.oidc_issuer, "OIDC_ISSUER"),
        Fact("OpenID client", settings.oidc_client_id, "OIDC_CLIENT_ID"),
        Fact("Claim with groups", settings.oidc_groups_claim, "OIDC_GROUPS_CLAIM"),
        Fact("Roles by group", roles or None, "OIDC_ROLES"),
    ]


async def _do(visit: Visit, form: Form) -> Response:
    if not visit.may("settings.write"):
        raise Forbidden("Changing settings needs the role admin on the platform.")
    plane, act = visit.plane, visit.act
    match form.text("do"):
        case "create":
            await limits.create(plane, act, _item(form))
            return visit.back("made", to=SETTINGS)
        case "edit":
            await limits.replace(plane, act, form.text("id"), _item(form), unchanged(form.text("etag")))
            return visit.back("changed", to=SETTINGS)
        case "delete":
            await limits.remove(plane, act, _kind(form.text("kind")), form.text("id"), lambda old: None)
            return visit.back("deleted", to=SETTINGS)
        case "set" | "reset" as verb:
            key = form.text("key")
            if key not in config.KEYS:
                raise NotFound("setting", key)
            check = unchanged(form.text("etag"), config.Value.shown)
            if verb == "reset":
                await config.reset(plane, act, key, check)
            else:
                value = allowances.limits(form) if key == ANONYMOUS else form.number("value")
                await config.put(plane, act, key, value, check)
            return visit.back(verb, to=SETTINGS, tab="running")
        case _:
            raise unreadable()


def _item(form: Form) -> LimitBody | BudgetBody:
    """Raises Refused."""
    holder = {"scope": form.text("scope"), "name": form.optional("name")}
    if _kind(form.text("kind")) == "budget":
        budget = allowances.budget(form)
        if budget is None:
            raise Invalid(Problem("budget", "needs an amount, and of what"))
        return body(BudgetBody, {**holder, **budget})
    found = allowances.limits(form)
    if len(found) != 1:
        raise Invalid(Problem("limits", "needs a number"))
    return body(LimitBody, {**holder, **found[0]})


PAGE = Page(SETTINGS, "Settings", page, "settings.see", MANAGE, posts="settings.write")
