"""POLICY: keys, limits, budgets and prompts, from a file or from the registry, for the features that apply them."""

import logging
from collections.abc import Collection, Iterator
from functools import partial
from pathlib import Path

from inference_api.core import Core
from inference_api.feature import Feature, Switch
from inference_api.observe.exposition import Family
from inference_api.observe.families import counter, gauge
from inference_api.policy.options import REGISTRY, Options
from inference_api.policy.reading import PolicyError
from inference_api.policy.remote import PolicyRegistry
from inference_api.policy.source import Policies, PolicyFile
from inference_api.policy.warnings import warnings
from inference_api.settings import PREFIX, Settings, SettingsError

logger = logging.getLogger(__name__)


def build(core: Core, settings: Settings) -> Feature | None:
    """Off without a source of the policy. Raises SettingsError if there is a file that is not valid."""
    options = settings.of(Options)
    cache = options.policy_cache
    if cache is not None and options.policy != REGISTRY:
        needs = f"is used with {PREFIX}POLICY=registry only; set that, or unset it"
        raise SettingsError(f"{PREFIX}POLICY_CACHE={str(cache)!r}: {needs}")
    if options.policy is None:
        return None
    policies = Policies(options.policy)
    core.provide(policies)
    collect = partial(families, policies)
    if options.policy != REGISTRY:
        _read_file(core, options, policies)
        # Of a registry the names are not known.
        return Feature("policy", collect=collect, check=partial(_warnings, policies, _names(core)))
    client = core.registry_client
    if client is None:
        needs = f"needs {PREFIX}REGISTRY_URL; set it to the base URL of the registry"
        raise SettingsError(f"{PREFIX}POLICY='registry': {needs}")
    peppered, rand = bool(options.peppers), core.rand.random
    registry = PolicyRegistry(policies, client, settings.registry_refresh, peppered=peppered, cache=cache, rand=rand)
    core.snapshots["policy"] = registry.snapshot
    if registry.file is not None:
        core.provide(registry.file)
    core.at_start(registry.start)
    return Feature("policy", collect=collect, tasks=(registry.run,))


def _read_file(core: Core, options: Options, policies: Policies) -> None:
    file = PolicyFile(Path(options.policy or ""), policies, peppered=bool(options.peppers))
    try:
        file.load()
    except PolicyError as exc:
        raise SettingsError(str(exc)) from None
    core.watch(file)


def _names(core: Core) -> Collection[str] | None:
    """The names of models, None if they are not known: those of a registry, or of engines."""
    models = core.fleet.models.values()
    if core.settings.registry_url or any(model.entry.discover for model in models):
        return None
    return core.fleet.served


def _warnings(policies: Policies, models: Collection[str] | None) -> Iterator[str]:
    assert policies.current is not None
    for warning in warnings(policies.current, models, policies.clock()):
        yield f"policy {policies.source!r}: {warning}"


def families(policies: Policies) -> Iterator[Family]:
    policy, text = policies.current, "Seconds since the policy in use was known to be the newest one."
    yield gauge("policy_age_seconds", text, (), [] if policy is None else [((), policies.age)])
    yield gauge("policy_keys", "API keys of the policy in use.", (), [((), 0 if policy is None else policy.keys)])
    failures = [((reason,), count) for reason, count in policies.failures.items()]
    yield counter("policy_refresh_failures", "Failed reads of the policy.", ("reason",), failures)


FEATURE = Switch(build, Options)
