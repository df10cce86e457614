"""/console/account: what people see and change of themselves."""

from typing import Any

from pydantic import BaseModel
from starlette.responses import Response

from control_plane.errors import Invalid, Problem
from control_plane.http.api.session import Title
from control_plane.http.console import lists
from control_plane.http.console.forms import Form, body, unreadable
from control_plane.http.console.shell import Page, Visit
from control_plane.http.identity import set_session
from control_plane.pure.passwords import LONGEST
from control_plane.services import accounts

ACCOUNT = "/console/account"
NOTICES = {
    "title": "Your name is changed.",
    "password": "Your password is changed. All other sessions of yours have ended.",
    "session": "The session has ended.",
    "others": "All other sessions of yours have ended.",
}


class _Titled(BaseModel):
    title: Title | None


async def account(visit: Visit) -> Response:
    sent = await visit.sent(lambda form: _do(visit, form))
    if sent.answer is not None:
        return sent.answer
    problem, form = sent.problem, sent.form
    given = {"title": form.text("title")} if form is not None and form.text("do") == "title" else {}
    me = await accounts.me(visit.plane, visit.act)
    after = lists.after(visit, str)
    found = lists.page(
        await accounts.list_sessions(visit.plane, me["name"], lists.ROWS, after and after[0]), lambda row: [row.id]
    )
    return visit.render(
        "account.html",
        status=problem.status if problem else 200,
        user=me,
        given={**me, **given},
        sessions=found.rows,
        after=found.after,
        by_password=visit.plane.settings.password_login == "on",
        problem=problem,
        notices=NOTICES,
    )


async def _do(visit: Visit, form: Form) -> Response:
    plane, act = visit.plane, visit.act
    match form.text("do"):
        case "title":
            await accounts.retitle(plane, act, body(_Titled, {"title": form.optional("title")}).title)
            return visit.back("title", to=ACCOUNT)
        case "password":
            current, new, again = (form.values.get(f"password.{name}", "") for name in ("current", "new", "confirm"))
            _check(current, new, again)
            secret = await accounts.change_password(plane, act, current, new)
            if secret is not None:
                set_session(visit.request, secret)
            return visit.back("password", to=ACCOUNT)
        case "session":
            await accounts.end_session(plane, act, form.text("id"))
            return visit.back("session", to=ACCOUNT)
        case "others":
            await accounts.end_other_sessions(plane, act)
            return visit.back("others", to=ACCOUNT)
        case _:
            raise unreadable()


def _check(current: str, new: str, again: str) -> None:
    """Raises Invalid, before anything is hashed."""
    wrong: list[Any] = [
        Problem(f"password.{name}", f"must have at most {LONGEST} characters")
        for name, value in (("current", current), ("new", new))
        if len(value) > LONGEST
    ]
    if new != again:
        wrong.append(Problem("password.confirm", "is not the same password"))
    if wrong:
        raise Invalid(*wrong)


PAGE = Page(ACCOUNT, "Your account", account, None, None, posts="self")
