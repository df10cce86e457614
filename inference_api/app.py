"""The composition root: the list of features, and the order of their parts. No other module imports features."""

from collections.abc import Sequence

from starlette.routing import Route
from starlette.types import ASGIApp

from inference_api.application import Application
from inference_api.core import Core, Outside
from inference_api.feature import Feature, Run, chain, with_taps
from inference_api.features import engine_load, tracing
from inference_api.http.accounts import Accounts
from inference_api.http.backends import Backends
from inference_api.http.dispatch import Dispatch
from inference_api.http.head import RequestHeaders
from inference_api.http.identify import Identify
from inference_api.http.openapi import Document
from inference_api.http.pages import Models, Probes, create_pages
from inference_api.http.pipeline import Resolve, Stages
from inference_api.http.routes import INFERENCE_ROUTES
from inference_api.http.stored import StoredResponses
from inference_api.models import Send
from inference_api.observe.account import Sink
from inference_api.observe.lines import access_log
from inference_api.routing.entries import entry_type
from inference_api.settings import Group, Settings
from inference_api.upstream.admission import model_admission
from inference_api.upstream.attempt import SendAttempt

# Settings and catalogue keys of features
GROUPS: tuple[type[Group], ...] = (engine_load.Options,)
ENTRY = entry_type(())
FEATURES = (
    # Outermost, so that a span covers the whole request.
    tracing.build,
    # Has no layer: polls the engines' load in the background.
    engine_load.build,
)


def build(settings: Settings, outside: Outside | None = None, features: Sequence[Feature] = ()) -> Application:
    """Build the router. `features` follow those that the settings enable.

    Raises CatalogueError if the static catalogue cannot be read, SettingsError if a feature cannot be built.
    """
    core = Core(settings, outside or Outside(), engine_load.balancers(settings), ENTRY)
    enabled = [*(made for make in FEATURES if (made := make(core, settings)) is not None), *features]
    resolve = _resolve(core, enabled)
    attempt = core.attempt([feature.attempt for feature in enabled if feature.attempt])
    stages = Stages(
        resolve, _send(core, attempt, enabled), core.admission, settings.max_body_bytes, settings.write_stall_timeout
    )
    stored = StoredResponses(attempt, core.prepare, stages)
    pipelines: dict[str, ASGIApp] = {route.path: stored.pipeline(route) for route in INFERENCE_ROUTES}
    probes = core.probes([feature.collect for feature in enabled if feature.collect])
    ops_pages = [
        *probes.ops_routes(),
        *Backends(core.fleet, core.retry_policy.resting.get).routes(),
        *(page for feature in enabled for page in feature.ops_pages),
    ]
    pages = [
        # Registered again so that a wrong method gets 405 with the right one in Allow.
        *(Route(path, pipeline, methods=["POST"]) for path, pipeline in pipelines.items()),
        *stored.routes(),
        *Models(core.fleet, resolve).routes(),
        *(page for feature in enabled for page in feature.pages),
        *(ops_pages if settings.ops_port is None else probes.routes()),
        *Document(INFERENCE_ROUTES, ops=settings.ops_port is None).routes(),
    ]
    tasks = _tasks(core, enabled, probes)
    app: ASGIApp = Dispatch(pipelines, create_pages(pages, lambda app: core.running(tasks, probes.drain)))
    if identify := [feature.identify for feature in enabled if feature.identify]:
        app = Identify(app, identify)
    for feature in reversed(enabled):
        app = feature.layer(app) if feature.layer else app
    read_headers = RequestHeaders(frozenset(name.encode() for name in settings.forward_headers))
    accounts = Accounts(app, _sinks(core, enabled), read_headers, core.mint_id)
    ops = Accounts(create_pages(ops_pages), (), RequestHeaders(), core.mint_id)
    return Application(core, accounts, ops, probes, enabled)


def _resolve(core: Core, enabled: Sequence[Feature]) -> Resolve:
    resolve: Resolve = core.registry.resolve
    for feature in reversed(enabled):
        resolve = feature.resolve(resolve) if feature.resolve else resolve
    return resolve


def _send(core: Core, attempt: SendAttempt, enabled: Sequence[Feature]) -> Send:
    taps = [feature.tap for feature in enabled if feature.tap]
    return chain(
        core.attempts(attempt),
        [
            # Outermost: taps see the answer that the client gets, also one that a feature made.
            *([with_taps(taps)] if taps else ()),
            *(feature.send for feature in enabled if feature.send),
            # Innermost: counts in the model that runs, and the layers above can handle Overloaded.
            model_admission,
        ],
    )


def _sinks(core: Core, enabled: Sequence[Feature]) -> list[Sink]:
    return [
        core.metrics.record,
        *(feature.record for feature in enabled if feature.record),
        # Last: writing the line does not delay the others.
        *([access_log(core.outside.write_line, core.settings.log_level)] if core.outside.write_line else ()),
    ]


def _tasks(core: Core, enabled: Sequence[Feature], probes: Probes) -> list[Run]:
    return [
        *core.tasks(),
        *(task for feature in enabled for task in feature.tasks),
        # Sets readiness once backends are known; earlier requests are answered, too.
        lambda: probes.open(core.slices),
    ]
