"""Where the policy in use comes from, and how it is replaced: as a whole, without stopping the event loop."""

import logging
import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path

from inference_api.policy.reading import MAX_BYTES, PolicyError, read
from inference_api.policy.snapshot import Policy
from inference_api.routing.files import Changes
from inference_api.threads import at_once, giving_way

logger = logging.getLogger(__name__)

Drive = Callable[[Generator[None, None, Policy]], Policy]

# Characters of a piece of a text
_PIECE = 64 * 1024
# Why a policy could not be read
REASONS = ("connect", "timeout", "status", "garbage")


class Policies:
    """The policy in use: `current` is replaced as a whole; None before the first one.

    `age` gives the seconds since it was last known to be the newest; `source`: for the log.
    """

    def __init__(self, source: str, clock: Callable[[], float] = time.time) -> None:
        self.source = source
        self.current: Policy | None = None
        # Unix seconds
        self.confirmed = 0.0
        self.clock = clock
        self.failures = dict.fromkeys(REASONS, 0)
        self._listeners: list[Callable[[Policy], None]] = []

    def on_change(self, tell: Callable[[Policy], None]) -> None:
        """Call `tell` with each new policy, on the event loop."""
        self._listeners.append(tell)

    def replace(self, policy: Policy) -> None:
        old, self.current = self.current, policy
        for tell in self._listeners:
            tell(policy)
        if old is not None:
            # Without a thread it is freed at once.
            with suppress(RuntimeError):
                threading.Thread(target=giving_way, args=(old.dismantle(),), name="policy", daemon=True).start()

    def confirm(self, at: float | None = None) -> None:
        """Note that the current policy is the newest one, now or at this time."""
        self.confirmed = self.clock() if at is None else at

    @property
    def age(self) -> float:
        return max(0.0, self.clock() - self.confirmed)


class PolicyFile:
    """The policy of a file, YAML or JSON; a bad one is logged once, and the previous policy stays in use.

    `drive` runs the steps of reading a changed file.
    """

    def __init__(self, path: Path, policies: Policies, *, peppered: bool, drive: Drive = giving_way) -> None:
        self._path = path
        self._policies = policies
        self._peppered = peppered
        self._drive = drive
        self._changes = Changes(path)
        self._complaint = ""

    def load(self) -> None:
        """Read it at the start. Raises PolicyError with the name of the file."""
        self._use(self._read(at_once), log=False)

    def poll(self, now: bool) -> Callable[[], None] | None:
        if not self._changes.settled(now):
            return None if self._complaint else self._policies.confirm
        try:
            policy = self._read(self._drive)
        except PolicyError as exc:
            return partial(self._keep, str(exc))
        return partial(self._use, policy)

    def _read(self, drive: Drive) -> Policy:
        return read_file(self._path, peppered=self._peppered, drive=drive)

    def _use(self, policy: Policy, log: bool = True) -> None:
        self._complaint = ""
        self._policies.replace(policy)
        self._policies.confirm()
        if log:
            logger.info("the policy was reloaded", extra={"fields": {"keys": policy.keys}})

    def _keep(self, complaint: str) -> None:
        self._policies.failures["garbage"] += 1
        if complaint != self._complaint:
            self._complaint = complaint
            logger.warning("the policy could not be reloaded, the previous one stays: %s", complaint)


def read_file(path: Path, *, peppered: bool, drive: Drive = at_once) -> Policy:
    """The policy of a file, JSON by its suffix or else YAML. Raises PolicyError with the name of the file."""
    try:
        return drive(read(_text_of(path), peppered=peppered, is_yaml=path.suffix != ".json"))
    except PolicyError as exc:
        raise PolicyError(f"policy {str(path)!r}: {exc}") from None


def _text_of(path: Path) -> Iterator[str]:
    """The text of the file, in pieces. Raises PolicyError, or UnicodeDecodeError."""
    try:
        if (size := path.stat().st_size) > MAX_BYTES:
            raise PolicyError(f"it has {size} bytes; the limit is {MAX_BYTES}")
        with path.open(encoding="utf-8") as file:
            while piece := file.read(_PIECE):
                yield piece
    except OSError as exc:
        reason = exc.strerror or str(exc)
        raise PolicyError(f"it cannot be read: {reason}; INFERENCE_API_POLICY must name a file that can") from None
