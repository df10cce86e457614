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
    entry = CatalogueEntry.model_validate({"name": "gone", "backends": [engine.url]})
    left = weakref.ref(entry)
    core.registry.replace_static(Catalogue([entry]))
    assert (await served.chat(model="gone")).status_code == 200
    del entry

    core.registry.replace_static(Catalogue([other]))
    gc.collect()

    assert left() is None


async def test_a_variable_that_is_not_set_is_told_of_once(
    start_engine: Start, start_router: Start, caplog: pytest.LogCaptureFixture
) -> None:
    entry = {"name": "m", "backends": [(await start_engine()).url], "credentials": {"env": "BACKEND_KEY"}}
    served: Served = await start_router(models=[entry])
    core = served.router.core
    for version in ("2", "3"):
        catalogue = Catalogue([CatalogueEntry.model_validate({**entry, "version": version})])
        core.registry.replace_static(catalogue)
        core._tokens.prepare(catalogue.values())

    assert len([record for record in caplog.records if "BACKEND_KEY" in record.getMessage()]) == 1
