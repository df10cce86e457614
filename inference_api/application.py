"""The object that the server runs: the ASGI apps, and the reactions to signals."""

import logging
from collections.abc import Sequence

from starlette.types import ASGIApp

from inference_api.core import Core
from inference_api.feature import Feature
from inference_api.http.accounts import Accounts
from inference_api.http.pages import Probes

logger = logging.getLogger(__name__)


class Application:
    """`app` serves clients, `ops` serves probes and metrics on OPS_PORT. `features`: those that are enabled."""

    def __init__(self, core: Core, app: Accounts, ops: ASGIApp, probes: Probes, features: Sequence[Feature]) -> None:
        self.core = core
        self.app: ASGIApp = app
        self.ops = ops
        self.probes = probes
        self.features = {feature.name: feature for feature in features}
        self.rejected = app.rejected

    def drain(self) -> None:
        """Begin to stop: readiness fails, so that new traffic goes elsewhere. Requests are still answered."""
        self.probes.drain()
        self.core.drain()

    def reload(self) -> None:
        """Reload catalogue, credentials and trusted certificates now; requests in flight continue."""
        logger.info("reloading the configuration")
        self.core.reloader.now()

    def close(self) -> None:
        """Flush the features before the process ends."""
        for feature in self.features.values():
            if feature.close:
                try:
                    feature.close()
                except Exception:
                    # The others have something to send, too.
                    logger.exception("the feature %s did not end as it should", feature.name)
