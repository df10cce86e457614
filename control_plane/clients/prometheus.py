"""Prometheus' HTTP API: what an expression is at one time, and at several. It is asked nothing else."""

import asyncio
import re
from typing import Any

import httpx
import orjson

from control_plane.clients.http import http_client
from control_plane.pure.series import Answer, Times, answer

# Seconds of a question; series of an answer; its bytes; questions at once
TIMEOUT, MOST_SERIES, _LARGEST, _AT_ONCE = 10.0, 50, 4 * 1024 * 1024, 8


class PrometheusFailed(Exception):
    """A question without an answer. The message is a sentence without the address; `away`: another try may help."""

    def __init__(self, message: str, away: bool = False) -> None:
        super().__init__(message)
        self.away = away


class Prometheus:
    """`url`: as PROMETHEUS_URL has it. `token`: sent there and nowhere else: no redirect is followed."""

    def __init__(self, url: str, token: str | None = None, timeout: float = TIMEOUT) -> None:
        self._url = url
        self._timeout = timeout
        self._turns = asyncio.Semaphore(_AT_ONCE)
        headers = {} if token is None else {"authorization": f"Bearer {token}"}
        self._client = http_client(None, headers)

    async def close(self) -> None:
        await self._client.aclose()

    async def over(self, expression: str, times: Times) -> Answer:
        """Raises PrometheusFailed."""
        span = {"start": _seconds(times.first), "end": _seconds(times.last), "step": _seconds(times.step)}
        return await self._ask("query_range", {"query": expression, **span})

    async def at(self, expression: str, time: int) -> Answer:
        """`time`: Unix milliseconds. Raises PrometheusFailed."""
        return await self._ask("query", {"query": expression, "time": _seconds(time)})

    async def _ask(self, path: str, form: dict[str, str]) -> Answer:
        try:
            async with asyncio.timeout(self._timeout), self._turns:
                status, body = await self._post(f"{self._url}/api/v1/{path}", form)
        except TimeoutError:
            raise PrometheusFailed(f"Prometheus has not answered within {self._timeout:g} s.", away=True) from None
        except (httpx.HTTPError, httpx.InvalidURL) as exc:
            raise PrometheusFailed(f"Prometheus cannot be reached ({type(exc).__name__}).", away=True) from None
        if status != 200:
            raise _refused(status, body)
        try:
            return answer(orjson.loads(body), MOST_SERIES)
        except ValueError:
            message = (
                "What answers in place of Prometheus does not speak its API; look at CONTROL_PLANE_PROMETHEUS_URL."
            )
            raise PrometheusFailed(message) from None

    async def _post(self, url: str, form: dict[str, str]) -> tuple[int, bytes]:
        body = bytearray()
        async with self._client.stream("POST", url, data=form) as response:
            async for chunk in response.aiter_bytes():
                body += chunk
                if len(body) > _LARGEST:
                    raise PrometheusFailed("Prometheus' answer is larger than 4 MiB; ask for one model or backend.")
        return response.status_code, bytes(body)


def _seconds(milliseconds: int) -> str:
    return f"{milliseconds / 1000:.3f}"


def _refused(status: int, body: bytes) -> PrometheusFailed:
    """By status, and the kind of error that Prometheus names."""
    if status in (401, 403):
        return PrometheusFailed(f"Prometheus refuses access ({status}); look at CONTROL_PLANE_PROMETHEUS_TOKEN.")
    if 300 <= status < 400:
        message = f"Prometheus answers with a redirect ({status}), which is not followed"
        return PrometheusFailed(f"{message}; set CONTROL_PLANE_PROMETHEUS_URL to where it leads.")
    kind = _kind(body)
    return PrometheusFailed(f"Prometheus answers {status}{f' ({kind})' if kind else ''}.", away=status >= 500)


def _kind(body: bytes) -> str | None:
    try:
        kind: Any = orjson.loads(body)["errorType"]
    except (orjson.JSONDecodeError, KeyError, TypeError):
        return None
    return kind if isinstance(kind, str) and re.fullmatch(r"[a-z_]{1,40}", kind) else None
