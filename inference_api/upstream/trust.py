"""Whom TLS trusts, as the machine says: SSL_CERT_FILE and SSL_CERT_DIR included, read again when they change."""

import logging
import ssl
from collections.abc import Callable
from functools import partial

from inference_api.routing.files import Changes

logger = logging.getLogger(__name__)


class Trust:
    """Gives the context for a new connection; it is made when the first one is needed."""

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
        """As `routing.files.Watched`; connections that are open stay."""
        if not self._changes.settled(now) or self._context is None:
            return None
        try:
            # The default context takes no offence at a file that is missing or broken, and trusts nobody then.
            if self._context.cert_store_stats()["x509_ca"]:
                ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(self._file)
            return partial(self._use, ssl.create_default_context())
        except OSError as exc:
            return partial(self._keep, f"{self._file}: {exc.strerror or exc}")

    def _use(self, context: ssl.SSLContext) -> None:
        self._complaint = ""
        self._context = context
        logger.info("the trusted certificates were read again")

    def _keep(self, complaint: str) -> None:
        if complaint != self._complaint:
            self._complaint = complaint
            logger.warning("the trusted certificates were not read again, the last ones stay: %s", complaint)
