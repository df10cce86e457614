"""The loads: how many requests over how many connections, JSON or streams, and on what setup."""

from dataclasses import dataclass, replace

from benchmarks import wire
from benchmarks.client import Client, Exchange
from benchmarks.setup import ONE_OF_EACH, Setup


@dataclass(frozen=True, slots=True)
class Load:
    """A counted amount of work: `count` requests over `connections`; `tokens` events each, or JSON when 0."""

    name: str
    connections: int
    count: int
    tokens: int = 0
    interval: float = 0.010
    """Seconds between two events of a stream: slow enough that they arrive one by one. 0: as fast as they are taken."""
    slices: int = 4
    """How often it is run in a round, the candidates taking turns: a machine's speed changes from second to second."""
    prompt: int = 0
    """Bytes of text in a request, when it is to be a long one."""
    embeddings: bool = False
    """Ask for embeddings: the answer is a megabyte."""
    rate: float = 0.0
    """Requests per second, sent when they fall due (open loop); 0: as fast as the answers come (closed loop)."""
    setup: Setup = ONE_OF_EACH

    def scaled(self, share: float) -> "Load":
        """A share of the work. Streams keep their pace, so there must be fewer of them at a time."""
        connections = max(1, round(self.connections * share)) if self.tokens else self.connections
        count = max(connections, round(self.count * share))
        return replace(self, connections=connections, count=count, rate=self.rate * share)

    def warm_up(self) -> "Load":
        # A router closes connections to backends within seconds, so each slice begins without any.
        connect = min(self.count, 6 * self.setup.backends) if self.setup.backends > 1 else 0
        count = self.connections if self.tokens else max(self.connections, self.count // 10, connect)
        return replace(self, count=count, tokens=min(self.tokens, 20), interval=0.010, rate=0.0)

    async def run(self, client: Client) -> tuple[float, list[Exchange]]:
        # Ten times what the slowest router we know needs: only a hang gets there.
        turns = self.count / self.connections
        patience = 60 + 10 * (turns * self.tokens * self.interval if self.tokens else self.count * 0.02)
        patience += self.count / self.rate if self.rate else 0
        return await client.run(self.request(client.port), self.count, patience, self.rate)

    def request(self, port: int) -> bytes:
        if self.embeddings:
            return wire.embeddings_request(port)
        return wire.request(port, self.tokens, self.interval, self.prompt)

    def check(self, answer: bytes) -> wire.Checked:
        """Raises BadAnswer."""
        return wire.check_embeddings(answer) if self.embeddings else wire.check(answer, self.tokens)


LOADS = {
    load.name: load
    for load in (
        Load("json", connections=16, count=5_000),
        Load("json-1", connections=1, count=2_000),
        Load("streams", connections=100, count=100, tokens=100),
        Load("streams-16", connections=16, count=32, tokens=100),
        Load("streams-200", connections=200, count=200, tokens=100),
        Load("flood", connections=64, count=192, tokens=500, interval=0.0),
        Load("rate-1000", connections=32, count=2_000, rate=1_000),
        Load("rate-streams", connections=64, count=200, tokens=10, rate=100),
        Load("slow-2000", connections=2000, count=2000, tokens=4, interval=3.0, slices=1, setup=Setup(streams=2000)),
        Load("prompt-100k", connections=16, count=1_000, prompt=100_000),
        Load("prompt-1m", connections=4, count=200, prompt=1_000_000),
        Load("embeddings-1m", connections=4, count=100, embeddings=True),
        Load("models-10000", connections=16, count=5_000, setup=Setup(models=10_000)),
        Load("backends-256", connections=16, count=5_000, setup=Setup(backends=256)),
    )
}
