"""What takes long is done so often at once, and no more."""

from contextlib import ExitStack

import pytest

from control_plane.errors import Refused
from control_plane.services.turns import turn
from tests.control_plane.conftest import Running

pytestmark = pytest.mark.anyio


async def test_one_too_many_is_refused_until_another_ends(sqlite_plane: Running) -> None:
    plane = sqlite_plane.plane
    with ExitStack() as running:
        for _ in range(2):
            running.enter_context(turn(plane, "triages", 2))
        # Another kind has turns of its own.
        running.enter_context(turn(plane, "inspections", 1))
        with pytest.raises(Refused) as refused:
            running.enter_context(turn(plane, "triages", 2))

    assert (refused.value.status, refused.value.code) == (429, "too_many_triages")
    assert refused.value.headers["Retry-After"]
    with pytest.raises(KeyError), turn(plane, "triages", 1):
        raise KeyError
    with turn(plane, "triages", 1):
        pass
