"""Which models a caller may see: all on the platform, in organisations those that they may use."""

from collections.abc import Callable, Sequence

from sqlalchemy import select

from control_plane.data.tables import organisations
from control_plane.plane import Act, Plane
from control_plane.services import models
from inference_api.policy.rules import matcher
from inference_api.routing.references import members_of


async def visible_models(plane: Plane, act: Act) -> Callable[[str], bool]:
    """Whether a name of the catalogue is visible: a virtual model only with all its members."""
    scope = act.principal.scope("models.see")
    if scope.everything:
        return lambda name: True
    query = select(organisations.c.models).where(
        organisations.c.name.in_(scope.organisations), organisations.c.ended_at.is_(None)
    )
    async with plane.database.main.read() as connection:
        patterns = [None if found is None else tuple(found) for (found,) in await connection.execute(query)]
    return _among(plane, patterns)


async def usable_models(plane: Plane, organisation: str | None) -> list[str]:
    """What keys of an organisation may ask for, of none: everything; by name."""
    names = sorted(models.catalogue(plane).stored)
    if organisation is None:
        return names
    query = select(organisations.c.models).where(organisations.c.name == organisation)
    async with plane.database.main.read() as connection:
        patterns = [None if found is None else tuple(found) for (found,) in await connection.execute(query)]
    return list(filter(_among(plane, patterns), names))


def _among(plane: Plane, patterns: Sequence[tuple[str, ...] | None]) -> Callable[[str], bool]:
    stored = models.catalogue(plane).stored

    def allowed(name: str, match: Callable[[str], bool]) -> bool:
        entry = stored[name].entry if name in stored else None
        return match(name) and all(allowed(member, match) for member in (members_of(entry) if entry else ()))

    matches = [matcher(one) for one in patterns]
    return lambda name: any(allowed(name, match) for match in matches)
