"""What the server is given: the ASGI apps, and what the signals of the process mean."""

import logging
from collections.abc import Sequence

from starlette.types import ASGIApp

from inference_api.core import Core
from inference_api.feature import Feature
from inference_api.http.accounts import Accounts
from inference_api.http.pages import Probes

logger = logging.getLogger(__name__)


class Application:
    """`app` serves clients, `ops` serves probes and metrics on a port of their own. `features`: those that are on."""

    def __init__(self, core: Core, app: Accounts, ops: ASGIApp, probes: Probes, features: Sequence[Feature]) -> None:
        self.core = core
        self.app: ASGIApp = app
        self.ops = ops
        self.probes = probes
        self.features = {feature.name: feature for feature in features}
        self.rejected = app.rejected

    def drain(self) -> None:
        """The process has been asked to stop: readiness fails, so that no new traffic comes; what does is answered."""
        self.probes.drain()

    def reload(self) -> None:
        """Read catalogue, credentials and trusted certificates again, now; what is in flight goes on."""
        logger.info("configuration is read again")
        self.core.reloader.now()

    def close(self) -> None:
        """The process ends: features send what they have not sent."""
        for feature in self.features.values():
            if feature.close:
                feature.close()
