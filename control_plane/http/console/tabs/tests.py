"""The tab Tests: is the model well, is it listed, does it answer; what tests have found before."""

from typing import Any

from starlette.responses import Response

from control_plane.http.console import lists
from control_plane.http.console.forms import Form
from control_plane.http.console.tabs import Look, Tab, served
from control_plane.pure.model_tests import KINDS
from control_plane.services import model_results, model_tests

# Results on one page
_RESULTS = 20


async def _test(look: Look, form: Form) -> Response | None:
    chosen = form.optional("kind"), form.optional("backend")
    await model_tests.test(look.visit.plane, look.visit.act, look.name, *chosen)
    return look.visit.back("tested", tab="tests")


async def _of_tests(look: Look) -> dict[str, Any]:
    plane = look.visit.plane
    after = lists.after(look.visit, str)
    rows = await model_results.listed(plane, look.name, _RESULTS + 1, after and after[0])
    found = lists.page(rows, lambda row: [row.id], _RESULTS)
    entry = look.stored.entry if look.stored else None
    return {
        "routed": plane.connections.router is not None,
        "operates": look.visit.may("backends.operate"),
        "kinds": KINDS,
        "urls": [one.url for one in entry.backends] if entry and entry.credentials is None else [],
        "results": found.rows,
        "after": found.after,
        "seconds": model_tests.SECONDS,
        "every": plane.settings.model_test_every,
    }


TAB = Tab("tests", "Tests", served("backends.see"), _of_tests, {"test": ("backends.operate", _test)})
