"""The composition root: the resources, the documents that routers poll, and what runs beside the requests."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from fastapi import FastAPI
from starlette.applications import Starlette
from starlette.routing import BaseRoute, Mount, Route
from starlette.types import ASGIApp, Receive, Scope, Send

from control_plane.connections import Connections, connections
from control_plane.data.database import Database
from control_plane.documents import Documents
from control_plane.http import ingest, routers, snapshots, spend
from control_plane.http.api import audit as audit_api
from control_plane.http.api import engines as engines_api
from control_plane.http.api import fleet as fleet_api
from control_plane.http.api import inspections as inspections_api
from control_plane.http.api import keys as keys_api
from control_plane.http.api import limits as limits_api
from control_plane.http.api import metrics as metrics_api
from control_plane.http.api import model_tests as model_tests_api
from control_plane.http.api import models as models_api
from control_plane.http.api import organisations as organisations_api
from control_plane.http.api import prices as prices_api
from control_plane.http.api import prompts as prompts_api
from control_plane.http.api import records as records_api
from control_plane.http.api import session as session_api
from control_plane.http.api import settings as settings_api
from control_plane.http.api import tokens as tokens_api
from control_plane.http.api import triage as triage_api
from control_plane.http.api import usage as usage_api
from control_plane.http.api import users as users_api
from control_plane.http.api.bodies import JsonBodies
from control_plane.http.api.openapi import Documented
from control_plane.http.console import (
    account,
    backends,
    help,
    hosts,
    keys,
    new_model,
    overview,
    playground,
    request,
    requests,
    static,
    unknown,
)
from control_plane.http.console import audit as audit_page
from control_plane.http.console import model as model_page
from control_plane.http.console import models as models_page
from control_plane.http.console import organisations as organisations_page
from control_plane.http.console import prompts as prompts_page
from control_plane.http.console import routers as routers_page
from control_plane.http.console import settings as settings_page
from control_plane.http.console import triage as triage_page
from control_plane.http.console import usage as usage_page
from control_plane.http.console import users as users_page
from control_plane.http.console.login import Login
from control_plane.http.console.shell import Page, Pages, Rendering
from control_plane.http.counting import METHODS, route_among
from control_plane.http.guard import Guarded
from control_plane.http.idempotency import Idempotent
from control_plane.http.requests import Bounded, Failures, Identified, Rendered
from control_plane.metrics import Metrics
from control_plane.passwords import Passwords
from control_plane.plane import Plane, Task
from control_plane.services import (
    engines,
    idling,
    keeper,
    models,
    overrides,
    policy,
    prices,
    reports,
    sweeping,
    testing,
    tokens,
)
from control_plane.settings import Settings

if TYPE_CHECKING:
    from control_plane.clients.openid import Provider
from registry_stub.metrics import Counted

log = logging.getLogger(__name__)

# Documents by name: what makes each. Each has a row in the table `revisions`; `prices` and `tokens` are not served.
BUILDERS = {
    models.DOCUMENT: models.build,
    overrides.DOCUMENT: overrides.build,
    policy.DOCUMENT: policy.build,
    prices.DOCUMENT: prices.build,
    tokens.DOCUMENT: tokens.build,
}
# Documents that routers poll, beside the models
POLLED: tuple[str, ...] = (overrides.DOCUMENT, policy.DOCUMENT)
# Resources under /api/v1, in the order of the documentation
RESOURCES = (
    session_api.router,
    organisations_api.router,
    users_api.router,
    tokens_api.router,
    audit_api.router,
    models_api.router,
    inspections_api.router,
    keys_api.router,
    limits_api.router,
    prompts_api.router,
    settings_api.router,
    fleet_api.router,
    engines_api.router,
    model_tests_api.router,
    triage_api.router,
    prices_api.router,
    usage_api.router,
    records_api.router,
    metrics_api.router,
)
# Pages of the console, in the order of the navigation; the last answers for what is none.
CONSOLE: tuple[Page, ...] = (
    overview.PAGE,
    models_page.PAGE,
    model_page.PAGE,
    new_model.PAGE,
    triage_page.PAGE,
    backends.PAGE,
    hosts.PAGE,
    requests.PAGE,
    request.PAGE,
    routers_page.PAGE,
    usage_page.PAGE,
    keys.PAGE,
    keys.DETAIL,
    prompts_page.PAGE,
    prompts_page.DETAIL,
    playground.PAGE,
    organisations_page.PAGE,
    organisations_page.DETAIL,
    users_page.PAGE,
    users_page.DETAIL,
    audit_page.PAGE,
    settings_page.PAGE,
    account.PAGE,
    help.PAGE,
    unknown.PAGE,
)
# Routes of the machine side, beside the documents
MACHINE: tuple[Route, ...] = (*routers.ROUTES, *ingest.ROUTES, *spend.ROUTES)
# What runs beside the requests: functions of the Plane
TASKS: tuple[Callable[[Plane], Task], ...] = (
    reports.housekeeping,
    keeper.keeping,
    sweeping.sweeping,
    testing.testing,
    idling.idling,
    engines.looking,
)
MAX_BODY_BYTES = 1024 * 1024
# Of paths that begin so; a report has every backend of every model.
LARGER = {"/routers/": 16 * MAX_BODY_BYTES}


class Application:
    """ASGI app of the whole service. `api_port`: local port of API_PORT, once it is bound; None: all on one.

    `clock`: Unix milliseconds. `outside`: instead of what the settings name.
    """

    def __init__(
        self,
        settings: Settings,
        clock: Callable[[], int] = lambda: time.time_ns() // 1_000_000,
        outside: Connections | None = None,
    ) -> None:
        self.database = Database(settings.url)
        documents = Documents(self.database.main, BUILDERS, clock)
        metrics = Metrics()
        passwords = Passwords(metrics.password_hashes.inc)
        outside = outside or connections(settings)
        self.plane = Plane(settings, self.database, documents, metrics, clock, passwords, outside)
        self.api_port: int | None = None
        failures = Failures(self.plane.metrics)
        api = JsonBodies(_api(self.plane, failures))
        machine = [
            *snapshots.routes(*POLLED),
            *MACHINE,
            Route("/healthz", snapshots.healthz),
            Route("/readyz", snapshots.readyz),
            Route("/metrics", self.plane.metrics.page),
        ]
        self._provider = _provider(settings, clock)
        console = self._console = Pages(CONSOLE)
        self._refusals = Rendering(console)
        login = Login(console)
        open_pages = [*static.ROUTES, *login.routes(), *_openid_routes(self._provider, login)]
        people = [Mount("/api/v1", Idempotent(api)), *open_pages, *console.routes()]
        self._whole = self._served([*machine, *people], failures)
        self._machine, self._people = self._served(machine, failures), self._served(people, failures)
        self.plane.metrics.gauge("models", "Models in the catalogue.", self._models)
        self.plane.metrics.gauge(
            "database_up", "Whether the database answered when last asked.", lambda: float(documents.reachable)
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or self.api_port is None:
            app = self._whole
        else:
            # By the local port of the connection, which clients cannot forge.
            app = self._people if scope["server"][1] == self.api_port else self._machine
        await app(scope, receive, send)

    def end_answers(self) -> None:
        """End the answers of routers that people wait for in the console: they would hold the process."""
        self.plane.connections.end_answers()

    def _served(self, routes: Sequence[BaseRoute], failures: Failures) -> ASGIApp:
        app = Starlette(routes=routes, exception_handlers=failures.handlers(), lifespan=self._lifespan)
        app.router.redirect_slashes = False
        app.state.plane, app.state.routes = self.plane, routes
        settings = self.plane.settings
        guarded = Rendered(Guarded(Bounded(app, MAX_BODY_BYTES, LARGER), self.plane), "/console", self._refusals)
        return Identified(Counted(guarded, self.plane.metrics, route_among(routes), METHODS), settings.trusted_proxies)

    @asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
        try:
            await self.plane.documents.follow()
            async with asyncio.TaskGroup() as group:
                tasks = (self.plane.documents.run, *self._tasks(), self._console.warm)
                running = [group.create_task(run()) for run in tasks]
                yield
                for task in running:
                    task.cancel()
        finally:
            self.plane.passwords.close()
            if self._provider is not None:
                await self._provider.close()
            await self.plane.connections.close()
            await self.database.close()

    def _tasks(self) -> list[Task]:
        drivers = self.plane.connections.drivers.values()
        return [*(make(self.plane) for make in TASKS), *(driver.run for driver in drivers)]

    def _models(self) -> float:
        documents = self.plane.documents
        return float(len(models.catalogue(self.plane).stored)) if documents.filled else 0.0


def _provider(settings: Settings, clock: Callable[[], int]) -> "Provider | None":
    """Of logins by OpenID, where it is set up: it needs an extra."""
    if settings.oidc_issuer is None or settings.oidc_client_id is None:
        return None
    from control_plane.clients.openid import Provider

    secret = settings.oidc_client_secret
    return Provider(
        settings.oidc_issuer, settings.oidc_client_id, None if secret is None else secret.get_secret_value(), clock
    )


def _openid_routes(provider: "Provider | None", login: Login) -> list[Route]:
    if provider is None:
        return []
    from control_plane.http import openid

    return openid.routes(provider, login)


def _api(plane: Plane, failures: Failures) -> FastAPI:
    # Not `include_router`: it would build each route anew, at the first request, while all others wait.
    routes = [route for router in RESOURCES for route in router.routes]
    app = FastAPI(
        routes=routes,
        openapi_url="/openapi.json",
        docs_url=None,
        redoc_url=None,
        exception_handlers=dict(failures.handlers()),
        redirect_slashes=False,
    )
    app.state.plane, app.state.routes = plane, routes
    documented = Documented(app)
    # Looked up at the first request of the document
    app.openapi = documented.document  # type: ignore[method-assign]
    app.add_route("/docs", documented.page, include_in_schema=False)
    return app
