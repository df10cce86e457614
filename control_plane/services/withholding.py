"""Backends of processes that do not run are drained at the routers, so that requests are held rather than refused.

A pod has an address only while it is ready; a process has one always, and an only backend is always tried.
"""

from collections.abc import Iterable, Sequence

from control_plane.plane import Act, Plane
from control_plane.pure.records import DAY
from control_plane.pure.roles import SYSTEM
from control_plane.services import models, overrides
from control_plane.services.lifecycle import Looked
from inference_api.routing.addresses import place_of

_REASON = "it does not run; requests for it start it"
# Milliseconds: a control plane that is gone does not keep a backend out for ever; what is left when it is made anew
_HOLDS, _LEFT = DAY, DAY // 2
_LOOPBACK = ("localhost", "127.0.0.1", "[::1]")
Place = tuple[str, str]


class Withholding:
    """`closing`: models that are about to be stopped: they get no new requests."""

    def __init__(self, plane: Plane) -> None:
        self._plane = plane
        self.closing: set[str] = set()
        # Ids of the overrides that hold, by model
        self._ids: dict[str, set[str]] = {}

    async def sync(self, looked: Sequence[Looked]) -> None:
        """Drain what does not run, and return what does. Raises StorageUnavailable."""
        known = [one for one in looked if one.problem is None]
        wanted = {place for one in known for place in self._away(one)}
        unknown = {one.deployment.model for one in looked if one.problem is not None}
        async with self._plane.database.main.read() as connection:
            rows = await overrides.holding(connection, self._plane.clock())
        ours = [row for row in rows if row.created_by is None and row.reason == _REASON and row.model not in unknown]
        act = Act(SYSTEM, self._plane.clock())
        lasting = [row for row in ours if row.expires_at > act.at + _LEFT]
        fresh = {(row.model, row.backend) for row in lasting}
        self._ids = {model: {row.id for row in lasting if row.model == model} for model, _ in fresh}
        for model, backend in sorted(wanted - fresh):
            order = overrides.Wanted(backend, model, "drain", _REASON, _HOLDS // 1000, force=True)
            made = await overrides.create(self._plane, act, order)
            self._ids.setdefault(model, set()).add(made["id"])
        for row in ours:
            if row not in lasting or (row.model, row.backend) not in wanted:
                await overrides.end(self._plane, act, row.id)

    def ids(self, model: str) -> set[str]:
        return self._ids.get(model, set())

    def _away(self, one: Looked) -> Iterable[Place]:
        model = one.deployment.model
        stored = models.catalogue(self._plane).stored.get(model)
        places = () if stored is None else [place_of(backend.url) for backend in stored.entry.backends]
        for instance in one.observed.instances:
            if instance.state != "ready" or model in self.closing:
                yield from ((model, place) for place in places if _is_same(place, instance.address or ""))


def _is_same(place: str, other: str) -> bool:
    """Whether two `host:port` are one: this machine has several names."""
    (host, _, port), (there, _, that) = place.rpartition(":"), other.rpartition(":")
    return place == other or (port == that and host in _LOOPBACK and there in _LOOPBACK)
