"""The system's trusted certificates for TLS, with SSL_CERT_FILE and SSL_CERT_DIR, reloaded when they change."""

import logging
import ssl
from collections.abc import Callable
from functools import partial

from inference_api.routing.files import Changes

logger = logging.getLogger(__name__)


class Trust:
    """Returns the context for a new connection; created on first use."""

    def __init__(self) -> None:
        paths = ssl.get_default_verify_paths()
        self._file = paths.cafile or paths.openssl_cafile
        self._changes = Changes(self._file, paths.capath or paths.openssl_capath)
        self._context: ssl.SSLContext | None = None
        self._complaint = ""

    def __call__(self) -> ssl.SSLContext:
        if self._context is None:
            self._context = ssl.create_default_context()
        return self._context

    def poll(self, now: bool) -> Callable[[], None] | None:
        """As `routing.files.Watched`. Open connections stay."""
        if not self._changes.settled(now) or self._context is None:
            return None
        try:
            # The default context ignores a missing or broken file, and then trusts no certificate.
            if self._context.cert_store_stats()["x509_ca"]:
                ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(self._file)
            return partial(self._use, ssl.create_default_context())
        except OSError as exc:
            return partial(self._keep, f"{self._file}: {exc.strerror or exc}")

    def _use(self, context: ssl.SSLContext) -> None:
        self._complaint = ""
        self._context = context
        logger.info("the trusted certificates were reloaded")

    def _keep(self, complaint: str) -> None:
        if complaint != self._complaint:
            self._complaint = complaint
            logger.warning("the trusted certificates could not be reloaded, the previous ones stay: %s", complaint)
