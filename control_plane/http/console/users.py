"""/console/users: who may log in; /console/users/{name}: roles, sessions and one-time links of one user."""

from typing import Any

from starlette.responses import Response

from control_plane.http.api.preconditions import etag_of
from control_plane.http.api.users import NewUser, UserFields
from control_plane.http.console import changes, lists, once
from control_plane.http.console.forms import Form, body, unchanged, unreadable
from control_plane.http.console.shell import MANAGE, Page, Visit
from control_plane.services import accounts, users

USERS = "/console/users"
ROLES = (
    ("", "none: roles in organisations only"),
    ("admin", "admin: everything"),
    ("operator", "operator: catalogue and backends"),
    ("viewer", "viewer: sees the platform"),
)
NOTICES = {
    "once": once.NOTICE,
    "changed": "The user is changed.",
    "disabled": "The user is disabled: all sessions have ended, and no login or token of theirs is accepted.",
    "enabled": "The user is enabled again.",
    "sessions": "All sessions of the user have ended.",
    "ended": "The user has ended: no login, token or role is left.",
}
# Sessions that are counted
_COUNTED = 100


async def listing(visit: Visit) -> Response:
    """The list, and the form of a new user."""
    sent = await visit.sent(lambda form: _create(visit, form))
    if sent.answer is not None:
        return sent.answer
    problem, given = sent.problem, {} if sent.form is None else sent.form.values
    after = lists.after(visit, str)
    found = lists.page(await users.page_of(visit.plane, lists.ROWS, after and after[0]), lambda one: [one["name"]])
    return visit.render(
        "users.html",
        status=problem.status if problem else 200,
        rows=found.rows,
        after=found.after,
        creates=visit.query.get("act") == "create",
        by_password=visit.plane.settings.password_login == "on",
        given=given,
        roles=ROLES,
        once=once.token(),
        problem=problem,
        notices=NOTICES,
    )


async def _create(visit: Visit, form: Form) -> Response:
    asked = body(NewUser, {"name": form.text("name"), **_fields(form)})

    async def make() -> once.Shown:
        made, url = await users.create(
            visit.plane, visit.act, asked.name, asked.email, asked.title, asked.platform_role
        )
        return _link(visit, made, url, "made")

    return await once.once(visit, form, make)


def _fields(form: Form) -> dict[str, Any]:
    return {
        "email": form.optional("email"),
        "title": form.optional("title"),
        "platform_role": form.optional("platform_role"),
    }


def _link(visit: Visit, user: dict[str, Any], url: str | None, verb: str) -> once.Shown:
    """The page that shows the one-time URL, this once. `url`: None: nobody has a password."""
    where = f"{USERS}/{user['name']}"
    page = visit.render(
        "setup-link.html", title=f"A link for {user['name']}", user=user, url=url, verb=verb, where=where
    )
    return once.Shown(page, where)


async def detail(visit: Visit) -> Response:
    """One user."""
    name = visit.path("name")
    sent = await visit.sent(lambda form: _do(visit, name, form))
    if sent.answer is not None:
        return sent.answer
    problem, given = sent.problem, None if sent.form is None else sent.form.values
    user = await users.one(visit.plane, name)
    return visit.render(
        "user.html",
        status=problem.status if problem else 200,
        title=user["title"] or name,
        user=user,
        sessions=len(await accounts.list_sessions(visit.plane, name, _COUNTED)),
        given=given or user,
        etag=etag_of(user),
        by_password=visit.plane.settings.password_login == "on",
        history=await changes.of(visit, "user", name),
        dialog=visit.query.get("act"),
        roles=ROLES,
        once=once.token(),
        problem=problem,
        notices=NOTICES,
    )


async def _do(visit: Visit, name: str, form: Form) -> Response:
    plane, act, where = visit.plane, visit.act, f"{USERS}/{name}"
    match form.text("do"):
        case "edit":
            check = unchanged(form.text("etag"))

            def decide(before: dict[str, Any]) -> dict[str, Any]:
                check(before)
                return body(UserFields, {**_fields(form), "disabled": before["disabled"]}).model_dump()

            await users.change(plane, act, name, decide)
            return visit.back("changed", to=where)
        case "disable" | "enable" as verb:
            await users.change(plane, act, name, lambda before: {**before, "disabled": verb == "disable"})
            return visit.back(f"{verb}d", to=where)
        case "sessions":
            await users.end_sessions(plane, act, name)
            return visit.back("sessions", to=where)
        case "link":

            async def make() -> once.Shown:
                url = await users.set_up_again(plane, act, name)
                return _link(visit, await users.one(plane, name), url, "again")

            return await once.once(visit, form, make)
        case "end":
            await users.end_user(plane, act, name, lambda found: None)
            return visit.back("ended", to=USERS)
        case _:
            raise unreadable()


PAGE = Page(USERS, "Users", listing, "organisations.write", MANAGE, posts="organisations.write")
DETAIL = Page(f"{USERS}/{{name}}", "User", detail, "organisations.write", posts="organisations.write")
