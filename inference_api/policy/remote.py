"""The policy of the registry, `GET /policy`, and its copy on the disk for a start without the registry."""

import asyncio
import codecs
import hashlib
import logging
import random
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import httpx

from inference_api.policy.reading import MAX_BYTES, PolicyError, read
from inference_api.policy.snapshot import Policy
from inference_api.policy.source import Policies
from inference_api.routing.registry import RegistryError
from inference_api.routing.snapshots import Keeper, Snapshot, SnapshotFile
from inference_api.threads import giving_way, in_thread

logger = logging.getLogger(__name__)

# Name of the policy in the file
_NAME = "policy"
_SHOWN_KEYS = 10


class PolicyRegistry:
    """Keeps Policies up to date with the registry.

    `cache`: file with the last good policy, used if the registry has not answered `patience` seconds after the start.
    """

    def __init__(
        self,
        policies: Policies,
        client: httpx.AsyncClient,
        refresh: float,
        *,
        peppered: bool,
        cache: Path | None = None,
        patience: float = 5.0,
        rand: Callable[[], float] = random.random,
        max_bytes: int = MAX_BYTES,
    ) -> None:
        self._policies = policies
        self._peppered = peppered
        self._patience = patience
        self.snapshot = Snapshot(client, "/policy", self, refresh, max_bytes, rand=rand)
        self.file = None if cache is None else SnapshotFile(cache)
        self._keeper = None if self.file is None else Keeper(self.file, _NAME)
        self._began: float | None = None
        # Of the content in use
        self._digest = b""
        self._empty_once = False
        # Unknown keys, and the reason of the failure, that were logged
        self._ignored: set[str] = set()
        self._logged: str | None = None

    async def start(self) -> None:
        """The first poll, before the first request."""
        self._began = asyncio.get_running_loop().time()
        await self.snapshot.start(self._patience)

    async def run(self) -> None:
        """Poll until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self.snapshot.run())
            if self._keeper is not None:
                group.create_task(self._read_file(self._keeper))
                group.create_task(self._keeper.run())

    # The answers

    async def take(self, content: Sequence[bytes]) -> bool:
        digest, policy, ignored = await in_thread(partial(self._read, content, self._digest), "policy")
        current = self._policies.current
        if policy is None:
            self._empty_once = False
            return True
        if current is not None and current.keys and not policy.keys and not self._empty_once:
            # More often a fault than intended: accept it the second time.
            self._empty_once = True
            logger.warning("the registry's policy has no keys; the previous one stays until a second answer agrees")
            return False
        self._empty_once = False
        self._use(policy, digest, ignored)
        if self._keeper is not None:
            self._keeper.keep(content)
        return True

    def confirm(self) -> None:
        self._empty_once = False
        self._policies.confirm()
        if self._logged is not None:
            logger.info("the registry gives the policy again")
        self._logged = None
        if self._keeper is not None:
            self._keeper.confirm()

    def failed(self, error: RegistryError) -> None:
        self._empty_once = False
        self._policies.failures[error.reason] += 1
        if error.reason != self._logged:
            self._logged = error.reason
            serving = "none" if self._policies.current is None else "the last one"
            logger.warning("the policy cannot be refreshed: %s", error, extra={"fields": {"serving": serving}})

    def _read(self, content: Sequence[bytes], known: bytes) -> tuple[bytes, Policy | None, set[str]]:
        """In a thread: the digest of the content, and its policy unless the digest is known. Raises PolicyError."""
        ignored: set[str] = set()
        hashed = hashlib.sha256()
        for chunk in content:
            hashed.update(chunk)
        digest = hashed.digest()
        if digest == known:
            return digest, None, ignored
        pieces = codecs.iterdecode(content, "utf-8")
        try:
            return digest, giving_way(read(pieces, peppered=self._peppered, ignored=ignored)), ignored
        except PolicyError as exc:
            raise PolicyError(f"policy of the registry: {exc}") from None

    def _use(self, policy: Policy, digest: bytes, ignored: set[str]) -> None:
        if ignored - self._ignored:
            names = ", ".join(sorted(ignored)[:_SHOWN_KEYS])
            logger.warning("unknown keys in the registry's policy are ignored: %s", names)
            self._ignored |= ignored
        self._digest = digest
        self._policies.replace(policy)
        logger.info("the policy has changed", extra={"fields": {"keys": policy.keys}})

    # The file

    async def _read_file(self, keeper: Keeper) -> None:
        began = asyncio.get_running_loop().time() if self._began is None else self._began
        await asyncio.sleep(began + self._patience - asyncio.get_running_loop().time())
        if self._policies.current is not None:
            return
        try:
            content, written = await keeper.load()
            digest, policy, ignored = await in_thread(partial(self._read, content, b""), "policy")
        except (OSError, ValueError) as exc:
            reason = (exc.strerror if isinstance(exc, OSError) else None) or exc
            logger.warning("INFERENCE_API_POLICY_CACHE cannot be used: %s", reason)
            return
        # The registry may have answered in the meantime.
        if policy is not None and self._policies.current is None:
            self._use(policy, digest, ignored)
            self._policies.confirm(written)
            logger.warning("the registry has given no policy: that of INFERENCE_API_POLICY_CACHE is used")
