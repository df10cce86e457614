"""Tabs of a model's page: each is one module and one line of `model.TABS`, with a template in `web/templates/model`."""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from starlette.responses import Response

from control_plane.errors import Forbidden, Invalid, NotFound, Problem, Refused
from control_plane.http.console.forms import Form
from control_plane.http.console.shell import Visit
from control_plane.pure.fleet import ModelStanding
from control_plane.pure.roles import Permission
from control_plane.services.lifecycle import Looked
from control_plane.services.model_results import Result
from registry_stub.store import Stored

# What a form of a tab does; None: the page shows it.
Do = Callable[["Look", Form], Awaitable[Response | None]]
Acts = Mapping[str, tuple[Permission, Do]]


@dataclass(frozen=True)
class Tab:
    """`template`: its name in `model/`. `is_there`: for whom, and for which models. `show`: what the template gets,
    or an answer in place of the page.

    `acts`: forms by their button `do`, with the permission that each needs. `live`: made again every few seconds.
    """

    key: str
    title: str
    is_there: Callable[["Look"], bool]
    show: Callable[["Look"], Awaitable[dict[str, Any] | Response]]
    acts: Acts = field(default_factory=dict)
    live: bool = False
    # Template of its dialogs
    dialogs: str | None = None

    @property
    def template(self) -> str:
        return f"model/{self.key}.html"


class Look:
    """One model, as somebody looks at it. `stored` None: its entry is not served, for the reason in `problem`.

    `problem`, `given`: why a form was refused, and what it had. `results`: what forms of tabs leave for their page.
    `engine`: what its driver sees, if it has a deployment; `failed`: its last test, if that has.
    """

    def __init__(
        self, visit: Visit, name: str, stored: Stored | None, standing: ModelStanding | None, tabs: Sequence[Tab]
    ) -> None:
        self.visit = visit
        self.name = name
        self.stored = stored
        self.standing = standing
        self.problem: Refused | None = None
        self.given: dict[str, Any] = {}
        self.results: dict[str, Any] = {}
        self.engine: Looked | None = None
        self.failed: Result | None = None
        self._all = {tab.key: tab for tab in tabs}
        self.tabs = {tab.key: tab for tab in tabs if tab.is_there(self)}

    @property
    def is_virtual(self) -> bool:
        return self.standing is not None and self.standing.kind is not None

    @property
    def asked_by(self) -> str:
        """The dimension of usage that has its requests: others answer for a virtual one."""
        return "asked_model" if self.is_virtual else "model"

    @property
    def tab(self) -> Tab:
        """The first one, unless the URL names another."""
        chosen = self.visit.query.get("tab") or next(iter(self.tabs))
        if chosen not in self.tabs:
            raise (
                NotFound("tab", chosen) if chosen not in self._all else Forbidden(f"The tab {chosen!r} is not for you.")
            )
        return self.tabs[chosen]

    async def do(self, form: Form) -> Response | None:
        """Do what a form of any tab asks for; None: the page shows it. Raises Refused."""
        self.given = dict(form.values)
        acts = {name: act for tab in self._all.values() for name, act in tab.acts.items()}
        chosen = form.text("do")
        if chosen not in acts:
            raise Invalid(Problem("do", "must be a button of this page"))
        permission, do = acts[chosen]
        if not self.visit.may(permission):
            raise Forbidden(f"This needs the permission {permission}.")
        return await do(self, form)


def of_engine(permission: Permission) -> Callable[[Look], bool]:
    """For models with backends of their own, and who has the permission."""
    is_served = served(permission)
    return lambda look: is_served(look) and not look.is_virtual


def served(permission: Permission, somewhere: bool = False) -> Callable[[Look], bool]:
    """For models that routers get, and who has the permission (`somewhere`: in any organisation)."""

    def is_there(look: Look) -> bool:
        if look.standing is None:
            return False
        return look.visit.may_somewhere(permission) if somewhere else look.visit.may(permission)

    return is_there
