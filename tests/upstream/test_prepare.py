"""What is prepared for the attempts of a call, and kept per model for as long as the model is there."""

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest

from inference_api.routing.catalogue import Catalogue
from inference_api.routing.entries import CatalogueEntry
from tests.conftest import Served

pytestmark = pytest.mark.anyio
Start = Callable[..., Any]


async def test_nothing_is_kept_of_a_model_that_has_left(start_engine: Start, start_router: Start) -> None:
    engine = await start_engine()
    served: Served = await start_router(engine)
    core = served.router.core
    other = CatalogueEntry.model_validate({"name": "other", "backends": [engine.url]})
    for name in ("gone", "other"):
        entry = CatalogueEntry.model_validate({"name": name, "backends": [engine.url]})
        core.registry.replace_static(Catalogue([entry]))
        assert (await served.chat(model=name)).status_code == 200
        if name == "gone":
            left = weakref.ref(entry)
        del entry

    core.registry.replace_static(Catalogue([other]))
    gc.collect()

    assert left() is None
