"""The composition root: the list of features, and the order of their parts. No other module imports features."""

from collections.abc import Sequence

from inference_api.application import Application
from inference_api.chains import ByModel, chain, compose
from inference_api.core import Core, Outside
from inference_api.feature import Feature

from inference_api.features import (  # isort: skip
    adapters, budgets, cache, consensus, cors, cost, engine_load, fallback, hedge, hold, keys, limits, metering,
    overrides, policy, prompts, providers, queue, race, realtime, reports, shadow, split, tracing, trusted_proxies,
    usage, virtual,
)  # fmt: skip
from inference_api.http.pipeline import Stages
from inference_api.observe.account import Sink
from inference_api.observe.lines import access_log
from inference_api.routing.entries import CatalogueEntry, entry_type, refusing
from inference_api.settings import Settings
from inference_api.site import Site
from inference_api.upstream.attempt import SendAttempt

FEATURES = (
    # Around all others: it answers before anyone is asked for a key, and is on their errors.
    cors.FEATURE,
    # Around all that a request passes, so that a span covers it.
    tracing.FEATURE,
    # Has no layer: polls the engines' load in the background.
    engine_load.FEATURE,
    # Names that engines list; asks another backend, directly around the attempts.
    adapters.FEATURE,
    # Before all that reads the address of a client.
    trusted_proxies.FEATURE,
    # Before all that applies it.
    policy.FEATURE,
    keys.FEATURE,
    # Before all that reads or counts a request: one that is not valid is none.
    virtual.FEATURE,
    # Outermost of those that answer: all others see the request with its prompt.
    prompts.FEATURE,
    # Before all that counts a request: what a model has no route for is none.
    providers.FEATURE,
    # A copy is asked for its tokens by itself. Annotates first: what others make of a request begins with its tokens.
    shadow.FEATURE,
    metering.FEATURE,
    cost.FEATURE,
    # Before limits and budgets: those of a variant hold.
    split.FEATURE,
    # Before the limits: what no budget is left for takes nothing from them.
    budgets.FEATURE,
    # Around all that answers a request.
    limits.FEATURE,
    # Inside of the limits: an answer of the cache is a request, and its tokens are given back.
    cache.FEATURE,
    # Inside of all that is done once for a request.
    consensus.FEATURE,
    race.FEATURE,
    # Around the queue of a model: another one may have a place at once.
    fallback.FEATURE,
    # Directly around admission, whose places the queue gives away; what has no backend takes none.
    hold.FEATURE,
    queue.FEATURE,
    # The last one with an `ask`: in place of the attempt loop.
    hedge.FEATURE,
    # A page, whose sessions pass what any request passes.
    realtime.FEATURE,
    # Annotates last: the record has what the others noted.
    usage.FEATURE,
    # Have no layer: what operators order for backends, and reports to the control plane, which are of all others.
    overrides.FEATURE,
    reports.FEATURE,
)
# The settings of features, and the class of catalogue entries with their keys
GROUPS = tuple(feature.options for feature in FEATURES if feature.options)
ENTRY = entry_type(key for feature in FEATURES for key in feature.keys)


def build(settings: Settings, outside: Outside | None = None, features: Sequence[Feature] = ()) -> Application:
    """Build the router. `features` follow those that the settings enable.

    Raises CatalogueError if the static catalogue cannot be read, SettingsError if a feature cannot be built.
    """
    balancers = [switch.balancers(settings) for switch in FEATURES if switch.balancers]
    core = Core(settings, outside or Outside(), balancers, entry_of(settings))
    enabled = [*(made for switch in FEATURES if (made := switch.build(core, settings)) is not None), *features]
    attempt = core.send_attempt([feature.attempt for feature in enabled if feature.attempt])
    parts = _parts(core, attempt, enabled)
    core.look_up = chain(core.look_up, [feature.resolve for feature in enabled if feature.resolve])
    stages = Stages(core.look_up, parts.send, core.admission, settings.max_body_bytes, settings.write_stall_timeout)
    collectors = [feature.collect for feature in enabled if feature.collect]
    probes = core.probes(collectors, [feature.ready for feature in enabled if feature.ready])
    site = Site(core, stages, attempt, probes, enabled)
    app = site.app(_sinks(core, enabled), parts.annotators)
    return Application(core, app, site.ops(), probes, enabled)


def entry_of(settings: Settings) -> type[CatalogueEntry]:
    """The class of catalogue entries, which refuses those that do not go with the settings."""
    reasons = [reason for switch in FEATURES if switch.refuse and (reason := switch.refuse(settings)) is not None]
    return refusing(ENTRY, reasons) if reasons else ENTRY


def _parts(core: Core, attempt: SendAttempt, enabled: Sequence[Feature]) -> ByModel:
    send = core.forward(attempt, [feature.failed for feature in enabled if feature.failed])
    core.members.chains = parts = compose(send, core.admission, enabled)
    core.legs.parts = [feature.leg for feature in enabled if feature.leg]
    return parts


def _sinks(core: Core, enabled: Sequence[Feature]) -> list[Sink]:
    return [
        core.metrics.record,
        *(feature.record for feature in enabled if feature.record),
        # Last: writing the line does not delay the others.
        *([access_log(core.outside.write_line, core.settings.log_level)] if core.outside.write_line else ()),
    ]
