"""Logs of engines, as their driver has them: the last lines, and those that come. Nothing of them is stored."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from typing import Any, NamedTuple

from control_plane.errors import Invalid, NotFound, Problem, Refused
from control_plane.plane import Plane
from control_plane.pure.lifecycle import LINES, MOST_LINES, Driver, DriverError, LogQuery
from control_plane.services import lifecycle
from control_plane.services.deployments import driver_of

# Seconds that a log is followed at most, for a whole log that is not, and between two signs of life
LONGEST, PATIENCE, BEAT = 600.0, 20.0, 15.0
# Logs that are followed at once
AT_ONCE = 20
Take = Callable[[str | None], Awaitable[None]]
_END: Any = object()


class Wanted(NamedTuple):
    """`instance`: a pod or process. `model`: of which; None: looked for among all. Else as LogQuery."""

    instance: str
    model: str | None = None
    container: str | None = None
    lines: int = LINES
    previous: bool = False


class Source(NamedTuple):
    """Where a log is read. `query.container`: chosen, if the instance has several and none was named."""

    model: str
    driver: Driver
    object: str
    query: LogQuery


class LogPage(NamedTuple):
    """`truncated`: there may be lines before the first."""

    source: Source
    lines: tuple[str, ...]
    truncated: bool


async def source(plane: Plane, wanted: Wanted) -> Source:
    """Where these lines are. Raises NotFound, Invalid."""
    if not 1 <= wanted.lines <= MOST_LINES:
        raise Invalid(Problem("tail", f"must be 1 to {MOST_LINES}"))
    if wanted.model is None:
        found = await lifecycle.look_at_all(plane)
    else:
        found = [await lifecycle.look(plane, wanted.model)]
    for one in found:
        for instance in one.observed.instances:
            if instance.name == wanted.instance:
                driver = driver_of(plane, one.deployment.driver)
                container = wanted.container
                if container is not None and container not in instance.containers:
                    known = ", ".join(instance.containers) or "none"
                    raise Invalid(Problem("container", f"{container[:64]!r} is not one of {known}"))
                query = LogQuery(
                    instance.name, container or next(iter(instance.containers), None), wanted.lines, wanted.previous
                )
                return Source(one.deployment.model, driver, one.deployment.object, query)
    if problem := next((one.problem for one in found if one.problem), None):
        raise Refused(503, "driver_away", problem, headers={"Retry-After": "5"})
    raise NotFound("pod or process", wanted.instance)


async def read(plane: Plane, wanted: Wanted) -> LogPage:
    """The last lines. Raises Refused."""
    found = await source(plane, wanted)
    try:
        async with asyncio.timeout(PATIENCE), aclosing(_lines(found.driver, found.object, found.query)) as lines:
            kept = tuple([line async for line in lines])
    except TimeoutError:
        message = f"The log of {wanted.instance!r} was not read within {PATIENCE:g} s. Ask for fewer lines."
        raise Refused(503, "driver_away", message, headers={"Retry-After": "5"}) from None
    except DriverError as exc:
        raise lifecycle.refused(exc, "logs_disabled") from None
    return LogPage(found, kept[-wanted.lines :], len(kept) >= wanted.lines)


async def follow(plane: Plane, found: Source, take: Take, longest: float = LONGEST) -> str:
    """Give the last lines to `take`, then each that comes, and None if none has come for a while; why it ended.

    `longest`: seconds for all of it. Raises Refused, also in the middle.
    """
    if plane.connections.long_answers >= AT_ONCE:
        message = f"{AT_ONCE} logs are followed already: close one of them."
        raise Refused(429, "too_many_answers", message, headers={"Retry-After": "5"})
    lines = _lines(found.driver, found.object, found.query._replace(follows=True))
    try:
        async with plane.connections.bounded(longest):
            await _give(lines, take)
        return "The log has ended, or cannot be followed further: open it again for what came since."
    except TimeoutError:
        return "It was followed for as long as may be, or the control plane stops: open it again."
    except DriverError as exc:
        raise lifecycle.refused(exc, "logs_disabled") from None
    finally:
        await lines.aclose()


async def _give(lines: AsyncGenerator[str, None], take: Take) -> None:
    coming: asyncio.Task[Any] | None = None
    try:
        while True:
            coming = coming or asyncio.create_task(_next(lines))
            done, _ = await asyncio.wait({coming}, timeout=BEAT)
            if not done:
                await take(None)
                continue
            line, coming = coming.result(), None
            if line is _END:
                return
            await take(line)
    finally:
        if coming is not None:
            coming.cancel()
            await asyncio.wait({coming})


async def _next(lines: AsyncGenerator[str, None]) -> Any:
    return await anext(lines, _END)


async def _lines(driver: Driver, object: str, query: LogQuery) -> AsyncGenerator[str, None]:
    if not driver.reads_logs:
        raise DriverError("forbidden", "Logs are not read here: set CONTROL_PLANE_KUBERNETES_LOGS=on, with its right.")
    async with aclosing(driver.log(object, query)) as lines:
        async for line in lines:
            yield line
