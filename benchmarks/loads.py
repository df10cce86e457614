"""The loads: how many requests over how many connections, JSON or streams."""

from dataclasses import dataclass, replace

from benchmarks import wire
from benchmarks.client import Client, Exchange


@dataclass(frozen=True, slots=True)
class Load:
    """A counted amount of work: `count` requests over `connections`; `tokens` events each, or JSON when 0."""

    name: str
    connections: int
    count: int
    tokens: int = 0
    interval: float = 0.010
    """Seconds between two events of a stream: slow enough that they arrive one by one."""
    slices: int = 4
    """How often it is run in a round, the candidates taking turns: a machine's speed changes from second to second."""

    def scaled(self, share: float) -> "Load":
        """A share of the work. Streams keep their pace, so there must be fewer of them at a time."""
        connections = max(1, round(self.connections * share)) if self.tokens else self.connections
        return replace(self, connections=connections, count=max(connections, round(self.count * share)))

    def warm_up(self) -> "Load":
        count = self.connections if self.tokens else max(self.connections, self.count // 10)
        return replace(self, count=count, tokens=min(self.tokens, 20), interval=0.010)

    async def run(self, client: Client) -> tuple[float, list[Exchange]]:
        # Ten times what the slowest router we know needs: only a hang gets there.
        patience = 60 + 10 * self.count * (self.tokens * self.interval if self.tokens else 0.02)
        return await client.run(wire.request(client.port, self.tokens, self.interval), self.count, patience)


LOADS = {
    load.name: load
    for load in (
        Load("json", connections=16, count=5_000),
        Load("json-1", connections=1, count=2_000),
        Load("streams", connections=100, count=100, tokens=100),
        Load("streams-16", connections=16, count=32, tokens=100),
        Load("streams-200", connections=200, count=200, tokens=100),
        Load("open", connections=500, count=500, tokens=8, interval=1.0, slices=1),
    )
}
