"""The tokens of backends' credentials, from environment variables and from files, which are reloaded."""

import logging
import os
import stat
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import suppress

from inference_api.headers import header_lines, without_lines
from inference_api.routing.entries import CatalogueEntry, Credentials
from inference_api.routing.files import Changes

logger = logging.getLogger(__name__)

_MAX_BYTES = 64 * 1024


class Tokens(dict[str, str]):
    """Maps the name of a variable, or the path of a file, to a token. Requests only look up; threads read files.

    Of `environ`, only variables that a catalogue may name are kept.
    """

    def __init__(self, environ: Mapping[str, str]) -> None:
        super().__init__((name, token) for name, token in environ.items() if name.startswith("BACKEND_"))
        self._files: dict[str, Changes] = {}
        self._complaints: dict[str, str] = {}

    def prepare(self, entries: Collection[CatalogueEntry]) -> None:
        """Read the files that these entries name, except those already read. Blocks."""
        for entry in entries:
            self._miss(entry)
        for path in paths_of(entries) - self._files.keys():
            self._files[path] = Changes(path)
            self._read(path)

    def _miss(self, entry: CatalogueEntry) -> None:
        """Tell once of a variable that is not set: the client of its models would blame its own key."""
        credentials = entry.credentials
        name = credentials.env if isinstance(credentials, Credentials) else None
        if name is None or self.get(name) or name in self._complaints:
            return
        self._complaints[name] = "not set"
        fields = {"fields": {"model": entry.name}}
        logger.warning("the variable %s is not set; its models are asked without a token", name, extra=fields)

    def retain(self, entries: Collection[CatalogueEntry]) -> None:
        """Drop files, and complaints of variables, that none of these entries names."""
        for path in self._files.keys() - paths_of(entries):
            for known in (self._files, self._complaints, self):
                known.pop(path, None)
        for name in self._complaints.keys() - self._files.keys() - _variables_of(entries):
            del self._complaints[name]

    def poll(self, now: bool) -> None:
        """As `routing.files.Watched`. Requests meanwhile use the current tokens."""
        for path, changes in list(self._files.items()):
            if changes.settled(now):
                self._read(path)

    def _read(self, path: str) -> None:
        try:
            token = read_token(path)
        except (OSError, ValueError) as exc:
            complaint = (exc.strerror if isinstance(exc, OSError) else "") or str(exc)
            if self._complaints.get(path) != complaint:
                self._complaints[path] = complaint
                kept = "the previous one stays" if path in self else "requests to its models carry no token"
                logger.warning("the token of the file %.200r cannot be used, %s: %s", path, kept, complaint)
            return
        if self.get(path) not in (None, token) or path in self._complaints:
            logger.info("the token file %.200r was reloaded", path)
        self._complaints.pop(path, None)
        self[path] = token


def paths_of(entries: Iterable[CatalogueEntry]) -> set[str]:
    return {credentials.file for credentials in _credentials_of(entries) if credentials.file is not None}


def _variables_of(entries: Iterable[CatalogueEntry]) -> set[str]:
    return {credentials.env for credentials in _credentials_of(entries) if credentials.env is not None}


def _credentials_of(entries: Iterable[CatalogueEntry]) -> Iterator[Credentials]:
    return (entry.credentials for entry in entries if isinstance(entry.credentials, Credentials))


def read_token(path: str) -> str:
    """The token in a file. Raises OSError or ValueError; messages never contain the content."""
    # A pipe would block until it has a writer.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise ValueError("it is not a regular file")
        content = os.read(descriptor, _MAX_BYTES)
    finally:
        os.close(descriptor)
    token = ""
    with suppress(UnicodeDecodeError):
        token = content.decode("ascii").strip()
    if not token or not token.isprintable() or " " in token:
        raise ValueError("it must hold one token of printable ASCII characters, and nothing else")
    return token


def with_token(lines: bytes, credentials: Credentials, token: str | None) -> bytes:
    """The lines of a head with the token in its header, replacing the client's value."""
    # An empty variable is a secret that was not filled in; every engine refuses `Bearer ` alone.
    if not token:
        return lines
    name = credentials.header.encode("ascii")
    lines = without_lines(lines, (credentials.header,))
    value = credentials.prefix.encode("ascii") + token.encode("latin-1", "ignore")
    return lines + header_lines([(name, value)])
