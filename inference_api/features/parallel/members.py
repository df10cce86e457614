"""The members of a virtual model, as runs of one request to it."""

from collections.abc import Iterable

import httpx

from inference_api.core import Core
from inference_api.errors import NoBackend
from inference_api.features.parallel.runs import Run, Runs, Work
from inference_api.members import leg_of
from inference_api.models import Call, Outcome, Reply
from inference_api.relay.relay import unusable
from inference_api.routing.fleet import Model
from inference_api.upstream.failures import outcome_of


class MemberRuns(Runs):
    """Runs of members of the virtual model `model`, within the deadline of the request."""

    def __init__(self, core: Core, kind: str, lost: Outcome, call: Call, model: Model, work: Work) -> None:
        super().__init__(core, kind, lost, call, work)
        self.model = model
        self._deadline = call.deadline or core.prepare.deadline(call, model)

    def start_member(self, member: Model) -> Run:
        leg = leg_of(self.call)._replace(deadline=0.0)
        leg = leg._replace(deadline=min(self._deadline, self.core.prepare.deadline(leg, member)))
        return self.start(member, leg, lambda leg: self.core.members.send(leg, member))

    async def keep(self, run: Run) -> Reply:
        """As in Runs; a broken body is an error of the router."""
        try:
            return await super().keep(run)
        except httpx.TransportError as exc:
            raise unusable(outcome_of(exc)) from exc


def present(core: Core, names: Iterable[str], model: Model) -> list[Model]:
    """The members of these names. Raises NoBackend if there is none: the catalogue may have changed."""
    found = [member for name in names if (member := core.fleet.by_name.get(name)) is not None]
    if not found:
        raise NoBackend(model.name, none=True)
    return found
