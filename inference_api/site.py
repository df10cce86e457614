"""Assembles the HTTP side: pipelines and pages, the layers of features around them, Accounts outermost."""

from collections.abc import Sequence
from functools import cache

from starlette.routing import Route as Page
from starlette.types import ASGIApp

from inference_api.core import Core
from inference_api.feature import Feature, Run
from inference_api.http.accounts import Accounts
from inference_api.http.backends import Backends
from inference_api.http.dispatch import Dispatch
from inference_api.http.head import RequestHeaders
from inference_api.http.identify import Identify
from inference_api.http.openapi import Document
from inference_api.http.pages import Models, Probes, create_pages
from inference_api.http.pipeline import Stages
from inference_api.http.routes import INFERENCE_ROUTES
from inference_api.http.stored import StoredResponses
from inference_api.models import Reader, Route
from inference_api.observe.account import Annotate, Sink
from inference_api.upstream.attempt import SendAttempt


class Site:
    """Makes the ASGI apps of both ports. `probes`: readiness and metrics; `attempt`: one attempt on a backend."""

    def __init__(
        self, core: Core, stages: Stages, attempt: SendAttempt, probes: Probes, enabled: Sequence[Feature]
    ) -> None:
        self._core = core
        self._probes = probes
        self._enabled = enabled
        self._resolve = stages.resolve
        self._stored = StoredResponses(attempt, core.prepare, stages)
        self._routes = _routes(enabled)
        self._pipelines: dict[str, ASGIApp] = {route.path: self._stored.pipeline(route) for route in self._routes}

    def app(self, sinks: Sequence[Sink], annotators: Sequence[Annotate]) -> Accounts:
        """The app for clients; during its lifespan the background tasks run. `sinks` get the Record of each request.

        `annotators`: of requests without a model.
        """
        settings, tasks = self._core.settings, self._tasks()
        pages = create_pages(self._pages(), lambda app: self._core.running(tasks, self._probes.drain))
        app: ASGIApp = Dispatch(self._pipelines, pages)
        if identify := [feature.identify for feature in self._enabled if feature.identify]:
            app = Identify(app, identify, self._pipelines)
        for feature in reversed(self._enabled):
            app = feature.layer(app) if feature.layer else app
        read_headers = RequestHeaders(frozenset(name.encode() for name in settings.forward_headers))
        status = int(settings.validation_status)
        return Accounts(app, sinks, read_headers, self._core.mint_id, validation_status=status, annotators=annotators)

    def _tasks(self) -> list[Run]:
        return [
            *self._core.tasks(),
            *(task for feature in self._enabled for task in feature.tasks),
            # Sets readiness once backends are known; earlier requests are answered, too.
            lambda: self._probes.open(self._core.slices),
        ]

    def ops(self) -> Accounts:
        """The app for OPS_PORT. Its requests are neither counted nor logged."""
        return Accounts(create_pages(self._ops_pages()), (), RequestHeaders(), self._core.mint_id)

    def _pages(self) -> list[Page]:
        alone = self._core.settings.ops_port is None
        return [
            # Registered again so that a wrong method gets 405 with the right one in Allow.
            *(Page(path, pipeline, methods=["POST"]) for path, pipeline in self._pipelines.items()),
            *self._stored.routes(),
            *Models(self._core.fleet, self._resolve).routes(),
            *(page for feature in self._enabled for page in feature.pages),
            *(self._ops_pages() if alone else self._probes.routes()),
            *Document(self._routes, int(self._core.settings.validation_status), ops=alone).routes(),
        ]

    def _ops_pages(self) -> list[Page]:
        return [
            *self._probes.ops_routes(),
            *Backends(self._core.fleet, self._core.retry_policy.resting.get).routes(),
            *(page for feature in self._enabled for page in feature.ops_pages),
        ]


def _routes(enabled: Sequence[Feature]) -> Sequence[Route]:
    """The inference routes, whose readers keep the fields that features name."""
    names = {name: None for feature in enabled for name in feature.fields}
    if not names:
        return INFERENCE_ROUTES
    kept = tuple(names)
    # A reader is hashed by its identity.
    return [route._replace(reader=_keeping(route.reader, kept)) for route in INFERENCE_ROUTES]  # type: ignore[arg-type]


@cache
def _keeping(reader: Reader, names: tuple[str, ...]) -> Reader:
    """Routes share readers, and what one checks takes milliseconds to build."""
    return reader.keeping(names)
