"""A million usage rows in the control plane: what they cost to take, to sum and to find.

    python -m benchmarks.usage_rows [--rows 1000000] [--database sqlite|postgresql]

The service is a process of its own on one core, and gets records of 30 days: it runs five times, by a clock that is set
back, each time with records of six days. Figures are by the wall, and by the CPU seconds of the service alone.
"""

import argparse
import asyncio
import gzip
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import orjson
from sqlalchemy import select

from control_plane.app import Application
from control_plane.data import schema
from control_plane.data.database import Database, parse_url
from control_plane.data.usage_tables import usage_changed
from control_plane.serving import Server
from control_plane.settings import Settings
from inference_api.server.server import listen
from tests.control_plane.conftest import SERVICE_TOKEN, management_token
from tests.ports import free_port
from tests.postgresql import postgresql

BATCH = 500
DAY = 86_400_000
WEEKS = 5
CORE, OTHER_CORE = 0, 1


def serve(url: str, port: int, back: int) -> None:
    """`back`: milliseconds that the clock is behind."""
    os.sched_setaffinity(0, {CORE})
    settings = Settings(database_url=url, service_token=SERVICE_TOKEN, usage_days=60)  # type: ignore[arg-type]
    application = Application(settings, lambda: time.time_ns() // 1_000_000 - back)
    listener = listen("127.0.0.1", port, "PORT")
    asyncio.run(Server(application).serve(sockets=[listener]))


class Traffic:
    """50 keys of 10 organisations, which use 2 or 3 of 8 models each, on 3 backends each."""

    def __init__(self, seed: int = 1) -> None:
        self._chance = random.Random(seed)
        self._models = {
            f"{number:012}": self._chance.sample(range(8), self._chance.choice((2, 3))) for number in range(50)
        }
        self._keys = list(self._models)
        self._number = 0

    def batch(self, start: int, end: int) -> bytes:
        return gzip.compress(orjson.dumps({"records": [self._record(start, end) for _ in range(BATCH)]}), 1)

    def _record(self, start: int, end: int) -> dict[str, Any]:
        chance, self._number = self._chance, self._number + 1
        key = chance.choice(self._keys)
        model = f"model-{chance.choice(self._models[key])}"
        ok = chance.random() < 0.97
        tokens = chance.randrange(20, 4000)
        return {
            "id": f"9f3c5a1e77b04d21-{self._number}", "kind": "request", "at": chance.randrange(start, end),
            "router": "router-7f9c-8000", "request_id": f"{chance.getrandbits(64):016x}", "key_id": key,
            "organisation": f"team-{int(key) % 10}", "user": f"user-{int(key) % 30}", "end_user": None,
            "asked_model": model, "model": model, "backend": f"10.0.{model[-1]}.{chance.randrange(3)}:8000",
            "route": "chat_completions", "stream": True, "status": 200 if ok else 502,
            "outcome": "ok" if ok else "reset", "code": None, "attempts": 1, "fallback": False, "variant": None,
            "cache": None, "prompt": None, "votes": None, "input_tokens": tokens, "cached_input_tokens": tokens // 2,
            "output_tokens": chance.randrange(1, 900), "reasoning_tokens": None, "usage_source": "reported",
            "latency_ms": round(chance.lognormvariate(7, 0.8), 1), "ttft_ms": round(chance.lognormvariate(5, 0.6), 1),
            "queued_ms": 0, "bytes": 31044, "cost_nanos": tokens * 200,
        }  # fmt: skip


class Process:
    """What a process has used, by /proc."""

    def __init__(self, pid: int) -> None:
        self._folder = Path(f"/proc/{pid}")

    @property
    def cpu(self) -> float:
        """Seconds."""
        fields = (self._folder / "stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    @property
    def resident(self) -> int:
        """MiB."""
        return int((self._folder / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") >> 20


@contextmanager
def running(url: str, back: int) -> Iterator[tuple[Process, str]]:
    port = free_port()
    command = [sys.executable, "-m", "benchmarks.usage_rows", "--serve", url, str(port), str(back)]
    child = subprocess.Popen(command)
    address = f"http://127.0.0.1:{port}"
    try:
        while True:
            try:
                if httpx.get(f"{address}/readyz").status_code == 200:
                    break
            except httpx.TransportError:
                time.sleep(0.1)
        yield Process(child.pid), address
    finally:
        child.terminate()
        child.wait()


def measure(url: str, rows: int) -> None:
    os.sched_setaffinity(0, {OTHER_CORE})
    asyncio.run(schema.migrate(parse_url(url)))
    token = asyncio.run(_token(url))
    traffic, now = Traffic(), time.time_ns() // 1_000_000
    wall = cpu = 0.0
    resident: list[int] = []
    last = ""
    for week in range(WEEKS):
        back = (WEEKS - 1 - week) * 6 * DAY
        with (
            running(url, back) as (process, address),
            httpx.Client(base_url=address, headers={"authorization": f"Bearer {SERVICE_TOKEN}"}, timeout=60) as client,
        ):
            for number in range(rows // WEEKS // BATCH):
                body = traffic.batch(now - back - 6 * DAY, now - back)
                before, began = process.cpu, time.perf_counter()
                answer = client.post(
                    "/usage", content=body, headers={"content-encoding": "gzip", "content-type": "application/json"}
                )
                wall += time.perf_counter() - began
                cpu += process.cpu - before
                assert answer.json()["accepted"] == BATCH, answer.text
                if number == 20:
                    resident.append(process.resident)
            resident.append(process.resident)
            if week == WEEKS - 1:
                _settle(url, now)
                sent = rows // WEEKS // BATCH * BATCH * WEEKS
                print(f"  {sent:,} records: {sent / wall:,.0f}/s by the wall, {sent / cpu:,.0f}/s of the service's CPU")
                print(f"  resident MiB at the 20th batch and the last of each run: {resident}")
                last = _ask(client, token, now)
                print(f"  after the questions: {process.resident} MiB")
    print(last)


async def _token(url: str) -> str:
    database = Database(parse_url(url))
    try:
        return await management_token(database, "ana", "admin")
    finally:
        await database.close()


def _settle(url: str, until: int) -> None:
    """Wait until the closed hours and days are summed."""
    began = time.perf_counter()
    while asyncio.run(_unsummed(url, until)):
        time.sleep(1)
    print(f"  hours and days summed {time.perf_counter() - began:.0f} s after the last batch")


async def _unsummed(url: str, until: int) -> bool:
    database = Database(parse_url(url))
    ended = usage_changed.c.at + usage_changed.c.span <= until
    try:
        async with database.usage.read() as connection:
            return (await connection.execute(select(usage_changed.c.id).where(ended).limit(1))).first() is not None
    finally:
        await database.close()


def _ask(client: httpx.Client, token: str, now: int) -> str:
    headers = {"authorization": f"Bearer {token}"}
    end = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(now / 1000))
    start = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(now / 1000 - 30 * 86400))
    span = {"start": start, "end": end}
    newest = client.get("/api/v1/requests", params={"limit": 1}, headers=headers)
    one = newest.json()["data"][0]
    questions: list[tuple[str, str, dict[str, str]]] = [
        ("30 days, by model", "/api/v1/usage", {**span, "group_by": "model"}),
        ("30 days, by key and outcome", "/api/v1/usage", {**span, "group_by": "key,outcome"}),
        ("30 days by the hour, by organisation", "/api/v1/usage", {**span, "bucket": "1h", "group_by": "organisation"}),
        ("30 days of one organisation", "/api/v1/usage", {**span, "organisation": "team-1", "group_by": "user"}),
        ("a request by id", f"/api/v1/requests/{one['id']}", {}),
        ("a request by request id", "/api/v1/requests", {"id": one["request_id"]}),
        ("by 6 characters of it", "/api/v1/requests", {"id": one["request_id"][:6]}),
        ("newest of one key", "/api/v1/requests", {"key": one["key_id"]}),
        ("newest failures", "/api/v1/requests", {"outcome": "reset"}),
    ]
    lines = []
    for title, path, query in questions:
        took = []
        for turn in range(5):
            # Another question each time: answers are kept for a moment.
            given = query if path != "/api/v1/usage" else {**query, "start": query["start"].replace("Z", f".{turn}Z")}
            began = time.perf_counter()
            answer = client.get(path, params=given, headers=headers)
            took.append((time.perf_counter() - began) * 1000)
            assert answer.status_code == 200, answer.text
        lines.append(f"  {title:38} first {took[0]:6.0f} ms, median of 5 {statistics.median(took):6.0f} ms")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--database", choices=("sqlite", "postgresql"), action="append")
    parser.add_argument("--serve", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        url, port, back = arguments.serve
        serve(url, int(port), int(back))
        return
    for database in arguments.database or ("sqlite", "postgresql"):
        print(database)
        with ExitStack() as stack:
            if database == "postgresql":
                server = stack.enter_context(postgresql())
                url = server.url(server.create())
            else:
                folder = stack.enter_context(tempfile.TemporaryDirectory(dir=Path.cwd()))
                url = f"sqlite:///{folder}/control-plane.sqlite3"
            measure(url, arguments.rows)


if __name__ == "__main__":
    main()
