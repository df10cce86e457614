"""A router with a virtual model of the members a, b, c ..., each with one scripted engine."""

from collections.abc import Callable, Sequence
from typing import Any

from inference_api.feature import Feature
from inference_api.observe.account import Record
from tests.conftest import Served
from tests.fakes import FakeEngine

Start = Callable[..., Any]


class Several:
    """`engines`: those of the members, in order. `legs`: the Records of members whose answer was not taken."""

    def __init__(self, name: str, served: Served, engines: list[FakeEngine]) -> None:
        self.name = name
        self.served = served
        self.engines = engines
        self.legs: list[Record] = []
        self.records: list[Record] = []

    async def ask(self, model: str = "", stream: bool = False, **more: Any) -> Any:
        return await self.served.chat(stream, model or self.name, **more)

    async def outcomes(self, model: str) -> dict[str, float]:
        """The attempts of a model, by how they ended."""
        found = {}
        for line in (await self.served.client.get("/metrics")).text.splitlines():
            if line.startswith("inference_api_upstream_attempts_total{") and f'model_name="{model}"' in line:
                found[line.split('outcome="')[1].split('"')[0]] = float(line.rsplit(" ", 1)[1])
        return found


async def start_several(
    start_engine: Start,
    start_router: Start,
    name: str,
    value: dict[str, Any],
    key: str,
    scripts: Sequence[Any],
    more: Sequence[dict[str, Any]] = (),
    members: dict[str, Any] | None = None,
    features: Sequence[Feature] = (),
    **settings: Any,
) -> Several:
    """The virtual model `name` has `value`, beside its members, under `key`; `more`: other entries of the catalogue;
    `members`: what the entries of the members have, too.
    """
    engines = [await start_engine(script) for script in scripts]
    names = "abcdefgh"[: len(scripts)]
    models = [{"name": n, "backends": [e.url], **(members or {})} for n, e in zip(names, engines, strict=True)]
    virtual = {"name": name, key: {"members": list(names), **value}}
    several = Several(name, None, engines)  # type: ignore[arg-type]

    def leg(record: Record, extra: dict[str, Any]) -> None:
        # As usage records: those that never reached a backend have none.
        if record.attempts:
            several.legs.append(record)

    listens = Feature("listens", leg=leg, record=several.records.append)
    several.served = await start_router(models=[*models, virtual, *more], features=[*features, listens], **settings)
    return several
