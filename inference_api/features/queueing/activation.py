"""Asks the control plane to start a model for which requests are held."""

import asyncio
import logging
from collections.abc import Callable, Iterator
from time import monotonic
from urllib.parse import quote

import httpx

from inference_api.observe.exposition import Family
from inference_api.observe.families import counter
from inference_api.observe.series import Count, Series
from inference_api.routing.causes import cause_of
from inference_api.routing.fleet import Fleet

logger = logging.getLogger(__name__)

# Seconds between two requests for one model
EVERY = 10.0


class Activations:
    """POST /activations/{model}, one at a time for each model, again while requests are held; no answer matters.

    `instance`: this router. `every`: seconds.
    """

    def __init__(self, client: httpx.AsyncClient, fleet: Fleet, instance: str, every: float = EVERY) -> None:
        self._client = client
        self._fleet = fleet
        self._instance = instance
        self._every = every
        self._results: Series[tuple[str, str], Count] = Series(
            lambda labels: Count(), lambda labels: labels[0] in fleet.models
        )
        # By model: the task, when it asked last, in loop time, and the failure that was logged
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._asked: dict[str, float] = {}
        self._logged: dict[str, str] = {}

    def start(self, model: str, waiting: Callable[[], int]) -> None:
        """The first request of this model is held; `waiting`: how many are now."""
        if model not in self._tasks:
            self._tasks[model] = asyncio.create_task(self._run(model, waiting))

    def stop(self, model: str) -> None:
        """None is held any more."""
        task = self._tasks.pop(model, None)
        if task is not None:
            task.cancel()

    def collect(self) -> Iterator[Family]:
        if self._results:
            yield from families({labels: cell.count for labels, cell in self._results.snapshot().items()})

    async def _run(self, model: str, waiting: Callable[[], int]) -> None:
        # Requests that come and go must not ask more often.
        await asyncio.sleep(max(0.0, self._asked.get(model, -self._every) + self._every - monotonic()))
        while True:
            self._forget()
            self._asked[model] = monotonic()
            failure = await self._ask(model, waiting())
            self._results[model, "ok" if failure is None else "error"].count += 1
            self._log(model, failure)
            await asyncio.sleep(self._every)

    async def _ask(self, model: str, waiting: int) -> str | None:
        """The reason for which it failed, or None."""
        body = {"router": self._instance, "reason": "hold", "waiting": waiting}
        # Names may have a slash; of those with dots nothing may be taken for a step in a path.
        path = "/activations/" + quote(model, safe="" if ".." in model else "/:@")
        headers = {"accept-encoding": "identity"}
        try:
            # The body of the answer is not read.
            async with self._client.stream("POST", path, json=body, headers=headers, follow_redirects=False) as answer:
                return None if answer.status_code in (200, 202) else f"status {answer.status_code}"
        except (httpx.HTTPError, httpx.InvalidURL) as exc:
            return cause_of(exc)
        except Exception:
            # The boundary of a background task: it must survive for the next time.
            logger.exception("asking for a model failed")
            return "internal error"

    def _log(self, model: str, failure: str | None) -> None:
        """Once, until it changes."""
        if failure is None:
            self._logged.pop(model, None)
        elif self._logged.get(model) != failure:
            self._logged[model] = failure
            fields = {"model": model, "cause": failure}
            logger.warning("the control plane does not start a model that is asked for", extra={"fields": fields})

    def _forget(self) -> None:
        """Forget models that have left the catalogue."""
        for known in (self._asked, self._logged):
            for name in known.keys() - self._fleet.models.keys():
                del known[name]
        self._results.forget()


def families(results: dict[tuple[str, str], int]) -> Iterator[Family]:
    text = "Requests to the control plane to start a model for which requests are held."
    series = [(labels, float(count)) for labels, count in results.items()]
    yield counter("activations", text, ("model_name", "result"), series)
