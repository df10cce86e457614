"""Keys `discover` and `adapters`: names that engines list, such as LoRA adapters, are served.

An adapter is a view of the model that it belongs to (routing.fleet.Adapter): requests find it as any other name. What
happens on their way happens here: an engine may say that it does not have the adapter any more.
"""

from collections.abc import Iterable, Iterator
from typing import Annotated, Any

import httpx
import orjson
from pydantic import Field

from inference_api.core import Core
from inference_api.discovery.list_poller import ListPoller
from inference_api.discovery.lists import Lists
from inference_api.feature import Feature, Switch
from inference_api.models import RAN, Call, Outcome, Reply, Send
from inference_api.observe.account import Record
from inference_api.observe.exposition import Family
from inference_api.observe.families import gauge
from inference_api.routing.entries import CatalogueEntry
from inference_api.routing.fleet import Adapter, Model
from inference_api.settings import Group, Settings
from inference_api.upstream.failures import outcome_of
from inference_api.upstream.response import ResponseStream

# Bytes of an answer with an error that are read; longer ones are not vLLM's.
_MOST = 16 * 1024


class Options(Group):
    engine_interval: Annotated[float, Field(gt=0, allow_inf_nan=False)] = Field(
        default=15,
        description="seconds between two reads of a backend's /v1/models where the catalogue has `discover`, +-20 %",
    )


def build(core: Core, settings: Settings) -> Feature:
    """Always built. Without a model that has one of its keys it does nothing, four times a second."""
    return Adapters(core, settings.of(Options).engine_interval).feature()


class Adapters:
    """`every`: seconds between two lists of a backend."""

    def __init__(self, core: Core, every: float) -> None:
        self._core = core
        self._fleet = core.fleet
        failures = core.discovery.failures
        self.lists = Lists(every, failures)
        self._poller = ListPoller(
            core.fleet,
            self.lists,
            core.own_transport,
            every,
            headers=core.own_headers,
            on_name=core.health.compared_name,
            on_missing=lambda backend: core.metrics.backend_failed(backend, "model"),
            on_change=self._changed,
            failures=failures,
            rand=core.rand.random,
        )
        core.fleet.discover(self.lists.find)

    def feature(self) -> Feature:
        return Feature(
            "adapters",
            ask=self.ask,
            for_model=self._is_of_adapter,
            annotate=self.annotate,
            collect=self.collect,
            tasks=(self._poller.run,),
            ready=self._poller.ready,
            check=self.check,
        )

    def ask(self, send: Send) -> Send:
        async def asking(call: Call, model: Model) -> Reply:
            reply = await send(call, model)
            if reply.status != 404 or reply.backend is None or not isinstance(model, Adapter):
                return reply
            try:
                if not await _lacks_the_model(reply):
                    return reply
                self.lists.deny(model, reply.backend)
                if not model.backends:
                    return reply
                await reply.aclose(Outcome.UPSTREAM_4XX)
            except BaseException as exc:
                await reply.aclose(outcome_of(exc))
                raise
            # It was not executed there, so that another one may be asked: once.
            reply = await send(call, model)
            if reply.status == 404 and reply.backend is not None:
                try:
                    if await _lacks_the_model(reply):
                        self.lists.deny(model, reply.backend)
                except BaseException as exc:
                    await reply.aclose(outcome_of(exc))
                    raise
            return reply

        return asking

    def annotate(self, record: Record, extra: dict[str, Any]) -> None:
        model = record.state.get(RAN, record.model)
        if isinstance(model, Adapter):
            extra["parent"] = model.parent.name

    def collect(self) -> Iterator[Family]:
        """Only of models with one of the keys, and their adapters."""
        models = [model for model in self._fleet.served.values() if model.entry.discover or model.entry.adapters]
        if models:
            yield from families(models)

    def check(self) -> Iterator[str]:
        """Adapters of the catalogue that are not served."""
        parents: dict[str, str] = {}
        named = {alias for model in self._fleet.models.values() for alias in (model.name, *model.entry.aliases)}
        for name, model in self._fleet.models.items():
            if model.entry.discover and not model.entry.backends:
                yield f"model {name!r}: discover: there are no backends to ask"
            for adapter in model.entry.adapters or ():
                if adapter in named:
                    yield f"model {name!r}: adapters: {adapter!r} is the name of a model, which is served instead"
                elif parents.setdefault(adapter, name) != name:
                    other = parents[adapter]
                    yield f"model {name!r}: adapters: {adapter!r} is one of the model {other!r}, too; none is served"

    def _is_of_adapter(self, entry: CatalogueEntry) -> bool:
        model = self._fleet.served.get(entry.name)
        return isinstance(model, Adapter) and model.entry is entry

    def _changed(self) -> None:
        self._core.metrics.forget_models()
        self._core.prepare.retain(self._fleet.served)


def families(models: Iterable[Model]) -> Iterator[Family]:
    counts = (((model.name,), float(sum(one.lacks is None for one in model.backends))) for model in models)
    yield gauge("model_backends", "Backends that have the model, as they list it.", ("model_name",), counts)


async def _lacks_the_model(reply: Reply) -> bool:
    """Whether a 404 says that the engine does not have the model; reads the body without taking it."""
    stream = reply.stream
    if not isinstance(stream, ResponseStream):
        return False
    try:
        body = await stream.peek(_MOST)
    except httpx.TransportError:
        # The relay meets it again.
        return False
    try:
        error = orjson.loads(body).get("error")
    except (ValueError, AttributeError):
        return False
    if not isinstance(error, dict):
        return False
    return error.get("type") == "NotFoundError" and (
        error.get("param") == "model" or "model" in str(error.get("message"))
    )


FEATURE = Switch(build, Options)
