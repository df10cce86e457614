"""Hashes of passwords: argon2id, in threads of their own, two at a time, as memory is what an attacker would use up."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from argon2 import PasswordHasher
from argon2.exceptions import InvalidHashError, VerificationError

T = TypeVar("T")

_AT_ONCE = 2
_MEMORY_KIB, _PASSES, _LANES = 19 * 1024, 2, 1
# Of no password, with the cost of all others
_NOBODY = f"$argon2id$v=19$m={_MEMORY_KIB},t={_PASSES},p={_LANES}$bm8gc2FsdCBhdCBhbGw$" + "A" * 43


class Passwords:
    """Makes and checks hashes. `count` is called once for each computation."""

    def __init__(self, count: Callable[[], None] = lambda: None) -> None:
        self._hasher = PasswordHasher(_PASSES, _MEMORY_KIB, _LANES)
        self._threads = ThreadPoolExecutor(_AT_ONCE, "passwords")
        self._count = count

    async def hash(self, password: str) -> str:
        return await self._run(lambda: self._hasher.hash(password))

    async def verify(self, stored: str | None, password: str) -> bool:
        """Whether it is the password. Without a stored hash it costs the same, and is not."""

        def check() -> bool:
            try:
                return self._hasher.verify(stored or _NOBODY, password)
            except (VerificationError, InvalidHashError):
                return False

        return await self._run(check) and stored is not None

    def is_outdated(self, stored: str) -> bool:
        """Whether it was made with another cost."""
        return self._hasher.check_needs_rehash(stored)

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _run(self, call: Callable[[], T]) -> T:
        self._count()
        return await asyncio.get_running_loop().run_in_executor(self._threads, call)
