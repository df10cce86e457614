"""/console/keys: API keys and tokens; /console/keys/{id}: one key, and all that can be done with it."""

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, get_args

from starlette.responses import Response

from control_plane.errors import Forbidden, NotFound, Refused, StorageUnavailable
from control_plane.http.api.keys import Rotation
from control_plane.http.api.preconditions import etag_of
from control_plane.http.console import allowances, changes, lists, once, tokens
from control_plane.http.console.forms import SECRET, Form, body, unchanged, unreadable
from control_plane.http.console.shell import USE, Page, Visit
from control_plane.pure import diff, samples
from control_plane.pure.roles import Scope
from control_plane.services import key_use, keys, models, organisations, reports
from control_plane.services.key_use import KeyUse
from control_plane.services.keys import Filters, Found, KeyBody, State
from control_plane.services.spend import BudgetUse
from control_plane.services.visibility import visible_models
from inference_api.policy.rules import matcher

KEYS = "/console/keys"
STATES = get_args(State)
NOTICES = {
    "once": once.NOTICE,
    "changed": "The key is changed. Routers follow within seconds.",
    "disabled": "The key is disabled: routers refuse it within seconds, until it is enabled again.",
    "enabled": "The key is enabled again.",
    "ended": "The key has ended. Below is which routers refuse it already, and what it was used for.",
}
_ID = re.compile(r"[0-9A-Za-z]{12}")
# Names that a form suggests
_SUGGESTED = 200


async def listing(visit: Visit) -> Response:
    """The list, and the forms that make and find keys."""
    sees = visit.may_somewhere("keys.see")
    tab = visit.choice("tab", "keys" if sees else "tokens", "tokens" if sees else "keys")
    if tab == "tokens":
        return await tokens.tab(visit, sees)
    if not sees:
        raise Forbidden("Keys of organisations need the permission keys.see there. Your own tokens are the other tab.")
    sent = await visit.sent(lambda form: (_find if form.text("do") == "find" else _create)(visit, form))
    if sent.answer is not None:
        return sent.answer
    if sent.form is None:
        given = allowances.shown({})
    else:
        given = {} if sent.form.text("do") == "find" else allowances.typed(sent.form)
    return await _list(visit, sent.problem, given)


async def _list(visit: Visit, problem: Refused | None, given: Mapping[str, Any]) -> Response:
    plane, act = visit.plane, visit.act
    state: Any = visit.choice("state", "", *STATES)
    filters = Filters(
        visit.query.get("organisation"), visit.query.get("user"), state or None, name=visit.query.get("name")
    )
    found = lists.page(
        await keys.listed(plane, act, lists.ROWS, lists.after(visit, int, str), filters),
        lambda key: [key.row.created_at, key.row.id],
    )
    uses, budgets = await _used(visit, found.rows)
    creates = visit.query.get("act") == "create" and visit.may_somewhere("keys.write")
    return visit.render(
        "keys.html",
        status=problem.status if problem else 200,
        rows=[_row(visit, key, uses, budgets) for key in found.rows],
        after=found.after,
        states=STATES,
        away=uses is None,
        organisations=await organisations_of(visit) if creates else (),
        users=await _users(visit) if creates else (),
        creates=creates,
        ranks=visit.may_somewhere("limits.write"),
        given=given,
        once=once.token(),
        problem=problem,
        notices=NOTICES,
    )


async def _used(visit: Visit, found: Sequence[Found]) -> tuple[dict[str, KeyUse] | None, dict[str, BudgetUse]]:
    """None: the database of usage is away, which must not keep anybody from ending a key."""
    shown = [key.shown() for key in found if keys.is_shown(visit.act, key)]
    with suppress(StorageUnavailable):
        uses = await key_use.last_day(visit.plane, visit.act, [key["id"] for key in shown])
        return uses, await key_use.budgets(visit.plane, shown)
    return None, {}


def _row(
    visit: Visit, key: Found, uses: Mapping[str, KeyUse] | None, budgets: Mapping[str, BudgetUse]
) -> dict[str, Any]:
    if not keys.is_shown(visit.act, key):
        return {"id": key.row.id, "whole": False}
    return {**key.shown(), "whole": True, "use": (uses or {}).get(key.row.id), "used": budgets.get(key.row.id)}


async def _find(visit: Visit, form: Form) -> Response:
    """By name, by id, or by a leaked secret, of which nothing but the id is in the URL that it leads to."""
    text = form.text("find")[:256]
    secret = SECRET.search(text)
    if secret is not None:
        kind, id = secret.groups()
        if kind != "sk":
            return visit.back("", to=KEYS, tab="tokens", act="end", id=id)
        return visit.back("", to=f"{KEYS}/{(await keys.found(visit.plane, visit.act, id)).row.id}", act="end")
    if _ID.fullmatch(text):
        with suppress(NotFound):
            return visit.back("", to=f"{KEYS}/{(await keys.found(visit.plane, visit.act, text)).row.id}")
    kept = {name: visit.query.get(name) for name in ("organisation", "user", "state")}
    # What begins like a secret, and is none, is in no URL either.
    return visit.back("", to=KEYS, **kept, name="" if "-ia-" in text else text)


async def _create(visit: Visit, form: Form) -> Response:
    asked = body(KeyBody, _fields(form))

    async def make() -> once.Shown:
        key, secret = await keys.create(visit.plane, visit.act, asked)
        return await _secret(visit, key, secret, "create")

    return await once.once(visit, form, make)


def _fields(form: Form, before: str | None = None) -> dict[str, Any]:
    """What people say of a key, as the API takes it. Raises Invalid."""
    fields: dict[str, Any] = {
        "name": form.text("name"),
        "organisation": form.optional("organisation"),
        "user": form.optional("user"),
        "models": allowances.models(form),
        "limits": allowances.limits(form),
        "budget": allowances.budget(form),
        "expires": allowances.expires(form, before),
    }
    if "priority" in form.values:
        fields |= {"priority": form.number("priority") or 0}
        fields |= {"weight": 1.0 if (weight := form.decimal("weight")) is None else weight}
    return fields


async def _secret(visit: Visit, key: Found, secret: str, verb: str) -> once.Shown:
    """The page that shows the secret, this once."""
    where = f"{KEYS}/{key.row.id}"
    page = visit.render(
        "secret.html",
        title=f"The secret of {key.row.name}",
        secret=secret,
        key=key.shown(),
        verb=verb,
        where=where,
        samples=await _samples(visit, key, secret),
    )
    return once.Shown(page, where)


async def _samples(visit: Visit, key: Found, secret: str | None = None) -> samples.Samples:
    """With a model that the key may use."""
    matches = matcher(None if key.row.models is None else tuple(key.row.models))
    own: Callable[[str], bool] = matcher(None)
    if key.row.organisation is not None:
        with suppress(NotFound):
            allowed = (await organisations.one(visit.plane, key.row.organisation))["models"]
            own = matcher(None if allowed is None else tuple(allowed))
    visible = await visible_models(visit.plane, visit.act)
    stored = models.catalogue(visit.plane).stored
    model = next((name for name in stored if matches(name) and own(name) and visible(name)), None)
    return samples.samples(visit.plane.settings.router_public_url, model, secret)


async def organisations_of(visit: Visit) -> list[str]:
    """Names to choose from for a key, of those where the visitor may make one."""
    scope = visit.act.principal.scope("keys.write")
    if not scope.everything:
        return sorted(scope.organisations | scope.own)
    return [one["name"] for one in await organisations.page_of(visit.plane, Scope(True), _SUGGESTED, None)]


async def _users(visit: Visit) -> list[str]:
    """Names to suggest for whose key it is: of the organisations of an owner or admin."""
    found: set[str] = set()
    for name in sorted(visit.act.principal.scope("members.write").organisations)[:5]:
        with suppress(NotFound):
            found |= {one["user"] for one in await organisations.members(visit.plane, name, _SUGGESTED, None)}
    return sorted(found)


async def detail(visit: Visit) -> Response:
    """One key."""
    id = visit.path("id")
    sent = await visit.sent(lambda form: _do(visit, id, form))
    if sent.answer is not None:
        return sent.answer
    problem, form = sent.problem, sent.form
    given = None if form is None else allowances.typed(form)
    key = await keys.found(visit.plane, visit.act, id)
    shown, whole = key.shown(), keys.is_shown(visit.act, key)
    uses, budgets = await _used(visit, [key])
    dialog = visit.query.get("act") if whole and key.state != "ended" else None
    if form is not None and problem is not None and problem.status == 412:
        # To be sent again, by who knows now what that replaces
        after = _fields(form, shown["expires"])
        replaced = diff.of_values({name: shown[name] for name in after}, after)
    else:
        replaced = None
    return visit.render(
        "key.html",
        status=problem.status if problem else 200,
        title=key.row.name if whole else key.row.id,
        key=shown,
        whole=whole,
        use=(uses or {}).get(id),
        hour=await _last_hour(visit, id) if dialog == "end" else None,
        used=budgets.get(id),
        routers=await reports.followers(visit.plane, "policy"),
        samples=await _samples(visit, key) if whole else None,
        history=await changes.of(visit, "key", id) if whole else None,
        dialog=dialog if dialog in ("edit", "rotate", "end") else None,
        given=given if given is not None else {**shown, **allowances.shown(shown)},
        etag=etag_of(keys.tag_of(shown)),
        replaced=replaced,
        organisations=await organisations_of(visit) if dialog == "edit" else (),
        users=await _users(visit) if dialog == "edit" else (),
        ranks=visit.may("limits.write", key.row.organisation),
        overlaps=once.OVERLAPS,
        once=once.token(),
        problem=problem,
        notices=NOTICES,
        live=True,
    )


async def _last_hour(visit: Visit, id: str) -> KeyUse | None:
    with suppress(StorageUnavailable):
        return (await key_use.last_hour(visit.plane, visit.act, [id]))[id]
    return None


async def _do(visit: Visit, id: str, form: Form) -> Response:
    plane, act, where = visit.plane, visit.act, f"{KEYS}/{id}"
    match form.text("do"):
        case "edit":
            before = await keys.found(plane, act, id)
            fields = _fields(form, before.shown()["expires"])
            patch = {**fields, "budget": allowances.as_patch(fields["budget"])}
            await keys.change(plane, act, id, patch, unchanged(form.text("etag"), keys.tag_of))
            return visit.back("changed", to=where)
        case "disable" | "enable" as verb:
            # Whatever else has changed meanwhile: it is one flag, and people say which value.
            await keys.change(plane, act, id, {"disabled": verb == "disable"}, lambda shown: None)
            return visit.back(f"{verb}d", to=where)
        case "end":
            await keys.end(plane, act, id, lambda shown: None, form.text("reason")[:500] or None)
            return visit.back("ended", to=where)
        case "rotate":
            asked = body(Rotation, {"overlap": form.number("overlap")})

            async def make() -> once.Shown:
                key, secret = await keys.rotate(plane, act, id, asked.overlap)
                return await _secret(visit, key, secret, "rotate")

            return await once.once(visit, form, make)
        case _:
            raise unreadable()


PAGE = Page(KEYS, "Keys", listing, None, USE, posts="self")
DETAIL = Page(f"{KEYS}/{{id}}", "Key", detail, "keys.see", posts="keys.write")
