"""REPORT_INTERVAL: the control plane gets the state of this router and its backends, at every interval.

The answer names the newest models, policy and overrides; what the router does not have it asks for at once. A control
plane that is slow or away costs a request nothing: there is one task, and one report on its way.
"""

import asyncio
import logging
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Annotated, Any, TypeVar

import httpx
import orjson
from pydantic import Field

from inference_api import __version__
from inference_api.core import Core
from inference_api.feature import Feature, Switch
from inference_api.features import cost
from inference_api.features.delivery.tally import NOTHING, Tally
from inference_api.features.overriding.orders import Obeyed
from inference_api.features.queueing.waits import Waits
from inference_api.http.backends import Backends
from inference_api.observe.exposition import Family
from inference_api.observe.families import counter
from inference_api.observe.metrics import BROKEN
from inference_api.pace import spread
from inference_api.routing.causes import cause_of
from inference_api.routing.registry import RegistryError, read_body
from inference_api.settings import PREFIX, Group, Settings, SettingsError

logger = logging.getLogger(__name__)

T = TypeVar("T")

# Why a report was not taken
_REASONS = ("connect", "timeout", "status")
# Seconds for one report, and for the last one; for the last usage records, which are in that.
_TIMEOUT = 10.0
_GRACE = 1.0
_LONGEST = 10.0
# Seconds until the next report to a registry that takes none
_RARELY = 60.0
_TAKES_NONE = frozenset({404, 405})
# Bytes of an answer
_MAX_ANSWER = 64 * 1024
# Models, or counters of requests, between which others have their turn
_SLICE = 500


class Options(Group):
    report_interval: Annotated[float, Field(ge=0, allow_inf_nan=False)] = Field(
        default=0,
        description="seconds between two reports to the control plane, +-20 %; 0: none, and no overrides are obeyed",
    )


def build(core: Core, settings: Settings) -> Feature | None:
    """Off unless there is an interval. Raises SettingsError if there is no control plane."""
    every = settings.of(Options).report_interval
    if not every:
        return None
    if core.registry_client is None:
        needs = f"needs the URL of the control plane; set {PREFIX}REGISTRY_URL, or unset it"
        raise SettingsError(f"{PREFIX}REPORT_INTERVAL='{every:g}': {needs}")
    document = ReportDocument(core, settings.of(cost.Options).currency)
    reports = Reports(core, core.registry_client, document, every)
    return Feature("reports", collect=lambda: families(reports.failures), tasks=(reports.run,))


class ReportDocument:
    """Makes the body of a report, in slices. `now`: Unix seconds."""

    def __init__(self, core: Core, currency: str, now: Callable[[], float] = time.time) -> None:
        self._core = core
        self._currency = currency
        self._now = now
        self._began = now()
        self._backends = Backends(core.fleet, core.retry_policy.resting.get)
        self._waits = Waits.shared(core)

    async def body(self) -> bytes:
        models = await self._models()
        parts = [orjson.dumps(self._head())[:-1], b',"models":[', models, b'],"backends":[']
        rows = [orjson.dumps(some)[1:-1] async for some in self._backends.rows()]
        return b"".join((*parts, b",".join(rows), b"]}"))

    def _head(self) -> dict[str, Any]:
        core = self._core
        tally, obeyed = core.provided(Tally), core.provided(Obeyed)
        followed = {name: snapshot.etag for name, snapshot in core.snapshots.items()}
        return {
            "boot": core.boot,
            "version": __version__[:64],
            "started_at": int(self._began * 1000),
            "at": int(self._now() * 1000),
            "draining": core.is_draining,
            "in_flight": core.admission.in_flight,
            "lag_ms": round(core.lag.take_largest() * 1000, 3),
            "currency": self._currency,
            "usage": NOTHING if tally is None else tally.counts(),
            "etags": {"models": core.registry.etag, "policy": None, "overrides": None, "spend": None} | followed,
            "overrides": [] if obeyed is None else obeyed.ids,
        }

    async def _models(self) -> bytes:
        """Those of the catalogue. Its adapters count in a model, whose places they take."""
        requests: Counter[str] = Counter()
        errors: Counter[str] = Counter()
        metrics, served = self._core.metrics, self._core.fleet.served

        def owner(name: str) -> str:
            model = served.get(name)
            return name if model is None else (model.parent or model).name

        async for (name, _, code, _), cell in _giving_way(list(metrics.requests.items())):
            requests[owner(name)] += cell.count
            if code >= 500:
                errors[owner(name)] += cell.count
        async for (name, reason), count in _giving_way(list(metrics.aborts.items())):
            if reason in BROKEN:
                errors[owner(name)] += count.count
        rows = []
        async for name, model in _giving_way(list(self._core.fleet.models.items())):
            depth = self._waits.depth
            row = {
                "name": name,
                "in_flight": model.in_flight,
                "queued": depth(name, "queue") + depth(name, "hold"),
                "requests": requests[name],
                "errors": errors[name],
            }
            rows.append(orjson.dumps(row))
        return b",".join(rows)


class Reports:
    """Sends them. `every`: seconds between two, +-20 %; `rarely`: to a registry that takes none."""

    def __init__(
        self,
        core: Core,
        client: httpx.AsyncClient,
        document: ReportDocument,
        every: float,
        rarely: float = _RARELY,
        timeout: float = _TIMEOUT,
        grace: float = _GRACE,
    ) -> None:
        self._core = core
        self._client = client
        self._document = document
        self._every, self._rarely = every, rarely
        self._timeout, self._grace = timeout, grace
        self.failures = Counter(dict.fromkeys(_REASONS, 0))
        self._complaint: str | None = None
        # What to do about another ETag than the router's, by the name of the document
        self._polls: dict[str, tuple[Callable[[], str | None], Callable[[], None]]] = {
            "models": (lambda: core.registry.etag, core.registry.poll_now)
        }
        for name in ("policy", "overrides"):
            if (snapshot := core.snapshots.get(name)) is not None:
                self._polls[name] = partial(getattr, snapshot, "etag"), snapshot.poll_now

    async def run(self) -> None:
        """Report until cancelled, and then once more: the drain is over."""
        try:
            while True:
                pause = self._every
                try:
                    pause = await self._report()
                except Exception:
                    # The boundary of a background task: it must survive for the next report.
                    logger.exception("the report to the control plane could not be made")
                await asyncio.sleep(spread(pause, self._core.rand.random()))
        except asyncio.CancelledError:
            await self._last()
            raise

    async def _last(self) -> None:
        try:
            await self._flushed(self._core.seconds_left() - self._grace)
            async with asyncio.timeout(self._grace):
                await self._report()
        except Exception:
            logger.warning("the last report to the control plane was not sent")

    async def _flushed(self, seconds: float) -> None:
        """Wait for what becomes of the last usage records."""
        tally = self._core.provided(Tally)
        if tally is not None and seconds > 0:
            with suppress(TimeoutError):
                async with asyncio.timeout(min(seconds, _LONGEST)):
                    await tally.flushed.wait()

    async def _report(self) -> float:
        """Send one report. Returns the seconds until the next."""
        body = await self._document.body()
        status = 0
        try:
            async with asyncio.timeout(self._timeout):
                status, answer = await self._put(body)
            etags = _etags(status, answer)
        except (RegistryError, TimeoutError) as exc:
            error = exc if isinstance(exc, RegistryError) else RegistryError("timeout", "it did not answer in time")
            self._failed(error, status)
            return self._rarely if status in _TAKES_NONE else self._every
        if self._complaint is not None:
            self._complaint = None
            logger.info("the control plane takes reports again")
        for name, (held, poll_now) in self._polls.items():
            newest = etags.get(name)
            if isinstance(newest, str) and newest != held():
                poll_now()
        return self._every

    async def _put(self, body: bytes) -> tuple[int, bytes]:
        """The status and the content of the answer. Raises RegistryError."""
        headers = {"content-type": "application/json", "accept-encoding": "identity"}
        asked = self._client.stream(
            "PUT", f"/routers/{self._core.instance}", content=body, headers=headers, follow_redirects=False
        )
        try:
            async with asked as response:
                return response.status_code, b"".join(await read_body(response, _MAX_ANSWER))
        except httpx.TimeoutException as exc:
            raise RegistryError("timeout", "it did not answer in time") from exc
        except (httpx.HTTPError, httpx.InvalidURL) as exc:
            raise RegistryError("connect", f"it cannot be reached ({cause_of(exc)})") from exc

    def _failed(self, error: RegistryError, status: int) -> None:
        # What is no answer of a control plane has the wrong status, too.
        reason = error.reason if error.reason in _REASONS else "status"
        self.failures[reason] += 1
        complaint = f"{reason} {status}"
        if complaint != self._complaint:
            self._complaint = complaint
            if status in _TAKES_NONE:
                text = "the registry takes no reports, as it is no control plane: it answered with the status %d"
                logger.warning(text, status)
            else:
                logger.warning("the control plane does not take the reports: %s", error)


def _etags(status: int, answer: bytes) -> dict[str, Any]:
    """The ETags of the newest documents. Raises RegistryError."""
    if status != 200:
        raise RegistryError("status", f"it answered with the status {status}")
    try:
        etags = orjson.loads(answer).get("etags")
    except (orjson.JSONDecodeError, AttributeError):
        etags = None
    if not isinstance(etags, dict):
        raise RegistryError("status", "its answer has no `etags`")
    return etags


async def _giving_way(items: Sequence[T]) -> AsyncIterator[T]:
    """The items; now and then, requests have their turn."""
    for number, item in enumerate(items, start=1):
        yield item
        if number % _SLICE == 0:
            await asyncio.sleep(0)


def families(failures: Mapping[str, int]) -> Iterator[Family]:
    text = "Reports that the control plane did not take."
    yield counter("report_failures", text, ("reason",), [((reason,), float(n)) for reason, n in failures.items()])


FEATURE = Switch(build, Options)
