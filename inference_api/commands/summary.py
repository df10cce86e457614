"""The summary that `serve` logs at its start."""

import ipaddress
import logging

from inference_api.application import Application
from inference_api.commands.configuration import PACKAGED
from inference_api.policy.source import Policies
from inference_api.settings import Settings, without_password

logger = logging.getLogger(__name__)

_SHOWN_MODELS = 20


class Summary:
    """Log one event `serving`, and warnings of probable mistakes.

    `source`: the file of the static catalogue, `packaged`, or `--backend`.
    """

    def __init__(self, settings: Settings, application: Application, source: str) -> None:
        self._settings = settings
        self._application = application
        self._source = source

    def tell(self, address: str) -> None:
        """Warn of an open router. `address`: host and port of the listener, as in a URL."""
        settings, models = self._settings, self._application.core.fleet.models
        names = list(models)
        backends = sum(len(model.backends) for model in models.values())
        shown = names if len(names) <= _SHOWN_MODELS else [*names[:_SHOWN_MODELS], f"{len(names) - _SHOWN_MODELS} more"]
        fields: dict[str, object] = {
            "address": address,
            "ops_port": settings.ops_port,
            "models": shown,
            "backends": backends,
            "catalogue": self._source,
            "registry": settings.registry_url and without_password(settings.registry_url),
            "policy": self._policy(),
            "features": self._features(),
        }
        if settings.ops_port is None:
            del fields["ops_port"]
        if fields["policy"] is None:
            del fields["policy"]
        logger.info("serving", extra={"fields": fields})
        if self._source == "packaged" and settings.registry_url is None:
            logger.warning("serve without a catalogue: %s", PACKAGED)
        if "keys" not in self._application.features and not is_loopback(settings.host):
            logger.warning(
                "every client that can reach %s can use every model: there is no authentication and no TLS; set "
                "INFERENCE_API_AUTH=keys, listen on 127.0.0.1, or put a gateway in front",
                address,
            )

    def _policy(self) -> dict[str, object] | None:
        policies = self._application.core.provided(Policies)
        if policies is None:
            return None
        return {"source": policies.source, "keys": None if policies.current is None else policies.current.keys}

    def _features(self) -> list[str]:
        settings = self._settings
        on = {
            "endpointslices": settings.discovery == "endpointslices",
            "ops_port": settings.ops_port is not None,
        }
        return [*self._application.features, *(name for name, is_on in on.items() if is_on)]


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach it."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
