"""Who asks a service, without HTTP."""

from control_plane.plane import Act
from control_plane.pure.roles import Principal
from tests.control_plane.conftest import Running


def act_of(plane: Running, name: str = "ana", platform_role: str | None = None, **roles: str) -> Act:
    """A user with these roles, by organisation (`team_a`: in `team-a`), now."""
    by_organisation = {where.replace("_", "-"): role for where, role in roles.items()}
    return Act(Principal("user", name, platform_role, by_organisation), plane.clock())
