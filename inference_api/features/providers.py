"""Catalogue key `routes`: the inference routes that a model is served on; any other is a 404 for it."""

from collections.abc import Awaitable, Iterator

from inference_api.core import Core
from inference_api.errors import RouteNotServed
from inference_api.feature import Feature, Switch
from inference_api.http.routes import INFERENCE_ROUTES, REALTIME
from inference_api.models import Call, Reply, Send
from inference_api.routing.entries import CatalogueEntry
from inference_api.routing.fleet import Model
from inference_api.settings import Settings

_LABELS = {route.label for route in (*INFERENCE_ROUTES, REALTIME)}


def build(core: Core, settings: Settings) -> Feature:
    """Always built, and only on the way of models with the key."""

    def check() -> Iterator[str]:
        for name, model in core.fleet.models.items():
            for label in model.entry.routes or ():
                if label not in _LABELS:
                    yield f"model {name!r}: routes: there is no route {label!r}; one of {', '.join(sorted(_LABELS))}"

    return Feature("providers", send=_of_routes, member=_of_routes, for_model=has_routes, check=check)


def has_routes(entry: CatalogueEntry) -> bool:
    return entry.routes is not None


def _of_routes(send: Send) -> Send:
    def checked(call: Call, model: Model) -> Awaitable[Reply]:
        routes = model.entry.routes
        # A stored response was made by the model.
        if routes is not None and call[0].label not in routes:
            raise RouteNotServed(model.name, call[0].path, routes)
        return send(call, model)

    return checked


FEATURE = Switch(build)
