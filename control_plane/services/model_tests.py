"""Tests of models: is its backend well, is it listed, does it answer. By hand, and by a schedule.

Requests go through the router, with a key that is lent and named KEY: who counts requests of people can leave its out.
An operator may choose one backend of the model's entry, which is asked directly.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any, Final
from urllib.parse import quote

import orjson

from control_plane.clients import backends
from control_plane.clients.backends import Asks, BackendAway
from control_plane.clients.router import RouterAway, read
from control_plane.errors import Invalid, NotFound, Problem, Refused
from control_plane.plane import Act, Plane
from control_plane.pure import model_tests
from control_plane.pure.model_tests import KINDS, MOST, Got, Kind, Said, Step
from control_plane.services import lending, lifecycle, model_results, models, overview, reports
from control_plane.services.lending import Borrower
from inference_api.routing.entries import CatalogueEntry

log = logging.getLogger(__name__)
# Of the keys with which models are tested
KEY: Final = "system:tests"
# Seconds of one test; tests at once in this process
SECONDS, AT_ONCE = 60.0, 4


async def test(
    plane: Plane,
    act: Act,
    model: str,
    kind: str | None = None,  # noqa: PT028  # of a model; it is none of pytest's
    backend: str | None = None,  # noqa: PT028
) -> dict[str, Any]:
    """Its result, which is kept. `kind` None: it is found out. `backend` None: through the router. Raises Refused."""
    entry = entry_of(plane, model)
    chosen = _kind(kind)
    asking = _through(plane, act) if backend is None else _direct(entry, backend)
    if backend is None:
        await _refuse_stopped(plane, entry.name)
    with _turn(plane, entry.name):
        at = plane.clock()
        async with asking as asks:
            found, steps = await _Test(plane, entry, backend, chosen, asks).run()
    return (await model_results.add(plane, act, entry.name, backend, found, at, steps)).body


def entry_of(plane: Plane, model: str) -> CatalogueEntry:
    """By name or alias. Raises NotFound."""
    catalogue = models.catalogue(plane)
    name = catalogue.owners.get(model, model)
    if name not in catalogue.stored:
        raise NotFound("model", model)
    return catalogue.stored[name].entry


class _Test:
    """One test. `backend`: asked directly, or None. `kind` None: the first that the engine does not refuse."""

    def __init__(
        self,
        plane: Plane,
        entry: CatalogueEntry,
        backend: str | None,
        kind: Kind | None,
        asks: Asks,
        seconds: float = SECONDS,
    ) -> None:
        self._plane = plane
        self._entry = entry
        self._is_direct = backend is not None
        self._name = (entry.served_model_name or entry.name) if self._is_direct else entry.name
        self._kinds = model_tests.kinds(entry.routes) or KINDS if kind is None else (kind,)
        self._kind = self._kinds[0]
        self._asks = asks
        self._seconds = seconds

    async def run(self) -> tuple[Kind, tuple[Step, ...]]:
        deadline = asyncio.get_running_loop().time() + self._seconds
        steps: list[Step] = []
        ended: str | None = None
        each = ("health", self._health), ("listed", self._listed), ("call", self._call)
        for name, do in each:
            if ended is not None:
                steps.append(Step(name, "skipped", ended))
                continue
            began = time.monotonic()
            said = await self._said(do, deadline)
            took = round((time.monotonic() - began) * 1000, 1)
            steps.append(Step(name, said.verdict, said.words, took))
            ended = "Not tried: nothing answers." if said.ends else None
        return self._kind, tuple(steps)

    async def _said(self, do: Callable[[], Awaitable[Said]], deadline: float) -> Said:
        try:
            async with asyncio.timeout_at(deadline):
                return await do()
        except TimeoutError:
            return Said("failed", f"It has not ended in {self._seconds:g} s, and was given up.", True)
        except (Refused, RouterAway, BackendAway) as exc:
            words = str(exc)
            return Said("failed", words[:1].upper() + words[1:], True)

    async def _health(self) -> Said:
        if self._is_direct:
            return model_tests.health(await self._asks("/health", None))
        seen = await reports.seen(self._plane)
        standing = {one.name: one for one in await overview.standing_models(self._plane, seen)}[self._entry.name]
        verdict: dict[str, model_tests.Verdict] = {"failing": "failed", "unknown": "skipped"}
        return Said(verdict.get(standing.state, "ok"), f"As routers report it: {standing.sentence}")

    async def _listed(self) -> Said:
        path = "/v1/models" if self._is_direct else f"/v1/models/{quote(self._name)}"
        return model_tests.listed(await self._asks(path, None), self._name)

    async def _call(self) -> Said:
        refused = ""
        *likelier, last = self._kinds
        for kind in likelier:
            got = await self._made(kind)
            if not model_tests.is_other_kind(got):
                break
            refused += f"No {kind} ({model_tests.refusal(got)}). "
        else:
            got = await self._made(last)
        said = model_tests.answered(self._kind, got)
        return said._replace(words=f"{refused}{self._kind}: {said.words}"[:2000])

    async def _made(self, kind: Kind) -> Got:
        self._kind = kind
        return await self._asks(*model_tests.call(kind, self._name))


def _kind(given: str | None) -> Kind | None:
    if given is None:
        return None
    found = next((kind for kind in KINDS if kind == given), None)
    if found is None:
        raise Invalid(Problem("kind", f"must be one of {', '.join(KINDS)}, not {given[:40]!r}"))
    return found


@asynccontextmanager
async def _through(plane: Plane, act: Act) -> AsyncIterator[Asks]:
    router = plane.connections.router
    if router is None:
        raise Refused(503, "no_router", "No router to test models through: set CONTROL_PLANE_ROUTER_URL.")

    async def ask(path: str, body: dict[str, Any] | None) -> Got:
        content = None if body is None else orjson.dumps(body)
        now = act._replace(at=plane.clock())
        async with lending.asked(plane, now, router, Borrower(KEY), content, SECONDS, path) as answer:
            return Got(answer.status, await read(answer.body, MOST))

    yield ask


def _direct(entry: CatalogueEntry, backend: str) -> AbstractAsyncContextManager[Asks]:
    """Raises Invalid: only what the entry names is asked."""
    if backend not in (one.url for one in entry.backends):
        raise Invalid(Problem("backend", f"must be the URL of a backend in the entry, not {backend[:128]!r}"))
    if entry.credentials is not None:
        message = "its entry has credentials, which only routers have: test the model through the router"
        raise Invalid(Problem("backend", message))
    return _based(entry, backend)


@asynccontextmanager
async def _based(entry: CatalogueEntry, backend: str) -> AsyncIterator[Asks]:
    async with backends.asking(backend, entry.headers) as ask:

        async def asks(path: str, body: dict[str, Any] | None) -> Got:
            based = entry.base_path is not None and path.startswith("/v1/")
            return await ask(f"{entry.base_path}{path[3:]}" if based else path, body)

        yield asks


async def _refuse_stopped(plane: Plane, model: str) -> None:
    """A request would start it, or tell nothing."""
    if not plane.connections.drivers:
        return
    try:
        looked = await lifecycle.look(plane, model)
    except NotFound:
        return
    if looked.standing.state in ("stopped", "stopping"):
        raise Refused(409, "stopped", f"The engine of {model!r} is {looked.standing.state}: start it first.")


class _turn:
    """One test of each model at once, and AT_ONCE in this process. Raises Refused."""

    def __init__(self, plane: Plane, model: str) -> None:
        self._testing = plane.testing
        self._model = model

    def __enter__(self) -> None:
        if self._model in self._testing:
            raise Refused(409, "test_runs", f"A test of {self._model!r} runs already.", headers={"Retry-After": "5"})
        if len(self._testing) >= AT_ONCE:
            message = f"{AT_ONCE} tests run already. Try again when one has ended."
            raise Refused(429, "too_many_tests", message, headers={"Retry-After": "5"})
        self._testing.add(self._model)

    def __exit__(self, *exc: object) -> None:
        self._testing.discard(self._model)
