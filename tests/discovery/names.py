"""A name server that says what a test tells it to, hangs, or refuses."""

import asyncio
from collections.abc import Collection, Iterable


class Names:
    """A name server: `answers` are what it says, an exception or addresses; one that has none hangs until it has."""

    def __init__(self, **answers: Iterable[str] | Exception) -> None:
        self.answers = dict(answers)
        self.asked: list[str] = []
        self.under_way = 0
        self.most = 0
        self._changed = asyncio.Event()

    async def __call__(self, host: str) -> Collection[str]:
        self.asked.append(host)
        self.under_way += 1
        self.most = max(self.most, self.under_way)
        try:
            while host not in self.answers:
                await self._changed.wait()
        finally:
            self.under_way -= 1
        answer = self.answers[host]
        if isinstance(answer, Exception):
            raise answer
        return list(answer)

    def say(self, host: str, answer: Iterable[str] | Exception) -> None:
        self.answers[host] = answer
        self._changed.set()
        self._changed = asyncio.Event()
