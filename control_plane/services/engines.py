"""The state of all engines, for pages that many look at: one task asks the drivers, and no page waits long for it."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

from control_plane.plane import Plane, Task
from control_plane.services import lifecycle
from control_plane.services.lifecycle import Looked

# Seconds: that a look may be old, that a page waits for a new one, and after which nothing is known any more
FRESH, PATIENCE, LOST = 2.0, 0.5, 30.0


class Engines(NamedTuple):
    """`each`: by model, those with a deployment. `away`: a driver does not answer, so that nothing is known of them."""

    each: Mapping[str, Looked] = MappingProxyType({})
    away: bool = False


async def known(plane: Plane, patience: float = PATIENCE) -> Engines:
    """Without a driver nothing is asked, and there are none."""
    if not plane.connections.drivers:
        return Engines()
    found = await plane.engines.get(FRESH, patience)
    if found is None or found[0] > LOST:
        return Engines(away=True)
    return found[1]  # type: ignore[no-any-return]  # of `looking`


def looking(plane: Plane) -> Task:
    async def look() -> Engines:
        each = {one.deployment.model: one for one in await lifecycle.look_at_all(plane)}
        return Engines(each, any(one.problem is not None for one in each.values()))

    return lambda: plane.engines.keep(look)
