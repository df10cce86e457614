"""What models were asked and have cost, as far as the caller may see it."""

import pytest

from control_plane.services import model_use
from tests.control_plane.acts import act_of
from tests.control_plane.conftest import Running
from tests.control_plane.usage import record, taken

pytestmark = pytest.mark.anyio


async def test_what_is_kept_for_a_member_is_not_shown_to_a_colleague(sqlite_plane: Running) -> None:
    await taken(sqlite_plane, *(record(model="m", organisation="team-a", user=user) for user in ("max", "ana", "ana")))

    async def seen(name: str) -> int:
        found = await model_use.of_models(sqlite_plane.plane, act_of(sqlite_plane, name, team_a="member"), ["m"])
        return found["m"].requests

    assert [await seen("max"), await seen("ana"), await seen("eve")] == [1, 2, 0]
