"""The pages of the console over a million usage rows: milliseconds, CPU and bytes of each.

    python -m benchmarks.console_pages [--rows 1000000] [--folder DIR] [--only TEXT]

SQLite, 2,000 models with two backends each, 40 organisations with ten keys each, 30 days of usage, of which 10,000
requests are of the last hour; two routers report. The service is a process of its own, asked as a platform admin. With
`--folder` the databases stay there, and are used again: their times are then of the day on which they were made.
"""

import argparse
import asyncio
import gzip
import random
import sqlite3
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
from sqlalchemy import insert, update

from benchmarks.usage_rows import Process
from control_plane.app import Application
from control_plane.data import schema, tables
from control_plane.data.database import Database, parse_url, usage_file
from control_plane.data.usage_tables import usage
from control_plane.passwords import Passwords
from control_plane.plane import offline
from control_plane.pure.histogram import bucket
from control_plane.pure.ids import new_id
from control_plane.services.rollup import roll_up
from control_plane.serving import Server
from control_plane.settings import Settings
from inference_api.server.server import listen
from tests.control_plane.conftest import SERVICE_TOKEN
from tests.ports import free_port

HOUR, DAY = 3_600_000, 86_400_000
MODELS, TEAMS, KEYS_EACH, DAYS, LAST_HOUR = 2_000, 40, 10, 30, 10_000
EMAIL, PASSWORD = "ana@example.org", "a long enough password"
# Targets: milliseconds, and bytes as they are sent
SLOWEST, LARGEST = 300, 150_000
TURNS = 5
_COLUMNS = [column.name for column in usage.columns]


def settings(url: str, port: int) -> Settings:
    return Settings(
        database_url=url,
        port=port,
        service_token=SERVICE_TOKEN,  # type: ignore[arg-type]
        usage_days=3660,
        router_url="http://127.0.0.1:9",
    )


def serve(url: str, port: int, back: int) -> None:
    """`back`: milliseconds that the clock is behind."""
    application = Application(settings(url, port), lambda: time.time_ns() // 1_000_000 - back)
    asyncio.run(Server(application).serve(sockets=[listen("127.0.0.1", port, "PORT")]))


def model(number: int) -> str:
    return f"model-{number:04}"


class Traffic:
    """Keys of teams, which use three models each; a few models have most of the requests."""

    def __init__(self, seed: int = 1) -> None:
        self._chance = random.Random(seed)
        self.keys = [f"{number:012}" for number in range(TEAMS * KEYS_EACH)]
        self._models = {key: [self._popular() for _ in range(3)] for key in self.keys}
        self._number = 0

    def _popular(self) -> int:
        return min(MODELS - 1, int(self._chance.paretovariate(0.5)) - 1)

    def rows(self, count: int, start: int, end: int) -> Iterator[tuple[Any, ...]]:
        """In the order of their time, which makes a table fast."""
        for place in range(count):
            yield self._row(start + (end - start) * place // count)

    def _row(self, at: int) -> tuple[Any, ...]:
        chance, self._number = self._chance, self._number + 1
        key = chance.choice(self.keys)
        number = int(key)
        name = chance.choice(self._models[key])
        backend = f"10.{name // 250}.{name % 250}.{chance.randrange(2)}:8000"
        draw = chance.random()
        status, outcome, attempts = (
            (200, "ok", 1) if draw < 0.97 else (502, "reset", 2) if draw < 0.99 else (200, "ok", 2)
        )
        details = None
        if attempts == 2:
            tried = {"status": 0, "start_ms": 0.4, "duration_ms": 1.1}
            other = f"{backend[:-6]}9:8000"
            details = orjson.dumps(
                [{"backend": other, "outcome": "reset", **tried}, {"backend": backend, "outcome": outcome, **tried}]
            ).decode()
        tokens, latency = chance.randrange(20, 4000), round(chance.lognormvariate(7, 0.8), 1)
        first = round(latency * chance.uniform(0.05, 0.5), 1)
        values = {
            "at": at, "id": f"9f3c5a1e77b04d21-{self._number}", "kind": "request", "router": "router-7f9c-8000",
            "request_id": f"{chance.getrandbits(64):016x}", "key_id": key, "key_name": f"key-{number}",
            "organisation": f"team-{number % TEAMS}", "user": f"user-{number % 100}", "end_user": None,
            "asked_model": model(name), "model": model(name), "backend": backend, "route": "chat_completions",
            "stream": 1, "status": status, "outcome": outcome, "code": None, "attempts": attempts,
            "attempt_details": details, "fallback": 0, "variant": None, "cache": None, "prompt": None, "votes": None,
            "input_tokens": tokens, "cached_input_tokens": tokens // 2, "output_tokens": chance.randrange(1, 900),
            "reasoning_tokens": None, "usage_source": "reported", "latency_ms": latency, "ttft_ms": first,
            "queued_ms": 0, "bytes": 31044, "cost_nanos": tokens * 200, "received_at": at + 1000,
            "latency_bucket": bucket(latency), "ttft_bucket": bucket(first),
        }  # fmt: skip
        return tuple(values[name] for name in _COLUMNS)


def fill(url: str, rows: int, now: int) -> None:
    """Make the databases."""
    asyncio.run(schema.migrate(parse_url(url)))
    traffic = Traffic()
    began = time.perf_counter()
    path = usage_file(Path(parse_url(url).database or ""))
    connection = sqlite3.connect(path)
    for pragma in ("synchronous = OFF", "journal_mode = OFF", "cache_size = -400000"):
        connection.execute(f"PRAGMA {pragma}")
    found = connection.execute(
        "SELECT name, sql FROM sqlite_master WHERE tbl_name = 'usage' AND sql LIKE 'CREATE INDEX%'"
    )
    indexes = found.fetchall()
    for name, _ in indexes:
        connection.execute(f"DROP INDEX {name}")
    names = ", ".join(f'"{name}"' for name in _COLUMNS)
    statement = f"INSERT INTO usage ({names}) VALUES ({', '.join('?' * len(_COLUMNS))})"
    with connection:
        last = min(rows, LAST_HOUR)
        connection.executemany(statement, traffic.rows(rows - last, now - DAYS * DAY, now - HOUR))
        connection.executemany(statement, traffic.rows(last, now - HOUR, now))
        for _, index in indexes:
            connection.execute(index)
        first = (now - DAYS * DAY) // HOUR * HOUR
        marks = [(HOUR, at) for at in range(first, now + 1, HOUR)]
        connection.executemany("INSERT INTO usage_changed (span, at) VALUES (?, ?)", marks)
    connection.execute("PRAGMA journal_mode = WAL")
    connection.close()
    print(f"  {rows:,} rows in {time.perf_counter() - began:.0f} s", flush=True)
    asyncio.run(_fill_main(url, traffic, now))
    began = time.perf_counter()
    asyncio.run(_sum_up(url, now))
    print(f"  summed in {time.perf_counter() - began:.0f} s", flush=True)


async def _sum_up(url: str, now: int) -> None:
    async with offline(settings(url, 0)) as plane:
        await roll_up(plane, now)


async def _fill_main(url: str, traffic: Traffic, now: int) -> None:
    database, passwords = Database(parse_url(url)), Passwords()
    made = {"created_at": now - DAYS * DAY}
    hashed = await passwords.hash(PASSWORD)
    teams = [
        {"name": f"team-{number}", "limits": [], "disabled": False, "budget": {"cost": 500, "per": "month"}, **made}
        for number in range(TEAMS)
    ]
    people = [
        {"name": f"user-{number}", "email": f"user-{number}@example.org", "disabled": False, **made}
        for number in range(100)
    ]
    admin = {
        "name": "ana",
        "email": EMAIL,
        "password_hash": hashed,
        "platform_role": "admin",
        "disabled": False,
        **made,
    }
    members = [
        {"organisation": f"team-{number % TEAMS}", "user": f"user-{number}", "role": "member", **made}
        for number in range(100)
    ]
    keys: list[dict[str, Any]] = [
        {
            "id": key, "name": f"key-{int(key)}", "digest": f"sha256:{int(key):064x}", "limits": [], "disabled": False,
            "organisation": f"team-{int(key) % TEAMS}", "user": f"user-{int(key) % 100}",
            "budget": {"tokens": 10**9, "per": "month"} if int(key) % 4 == 0 else None, **made,
        }
        for key in traffic.keys
    ]  # fmt: skip
    entries = [{"name": model(number), "entry": _entry(number), "updated_at": now} for number in range(MODELS)]
    audit = [
        {
            "id": new_id("aud", at), "at": at, "actor_kind": "user", "actor": "ana", "action": "key.update",
            "object_type": "key", "object_id": traffic.keys[number % len(keys)], "before": {"name": "a"},
            "after": {"name": "b"}, "address": "10.0.3.4", "organisation": f"team-{number % TEAMS}",
        }
        for number, at in enumerate(range(now - DAYS * DAY, now, DAYS * DAY // 5000))
    ]  # fmt: skip
    async with database.main.write() as connection:
        for table, found in (
            (tables.organisations, teams), (tables.users, people), (tables.memberships, members),
            (tables.keys, keys), (tables.models, entries), (tables.audit, audit),
        ):  # fmt: skip
            await connection.execute(insert(table), found)
        await connection.execute(insert(tables.users).values(**admin))
        await connection.execute(update(tables.revisions).values(revision=2))
    passwords.close()
    await database.close()


def _entry(number: int) -> str:
    if number % 50 == 49:
        variants = {model(number - 1): 1, model(number - 2): 1}
        return orjson.dumps({"name": model(number), "split": {"variants": variants}}).decode()
    backends = [f"http://{label}" for label in _labels(number)]
    return orjson.dumps({"name": model(number), "backends": backends, "price": {"input": 0.2, "output": 0.6}}).decode()


def _labels(number: int) -> list[str]:
    return [f"10.{number // 250}.{number % 250}.{place}:8000" for place in range(2)]


def report(etags: dict[str, Any], now: int) -> bytes:
    """Of a router that knows all models, of which a hundredth has a backend that is out."""
    rows: list[dict[str, Any]] = []
    for number in range(MODELS):
        for place, label in enumerate(_labels(number) if number % 50 != 49 else ()):
            row: dict[str, Any] = {"model": model(number), "backend": label, "state": "ready", "in_flight": 3,
                                   "circuit": "closed", "waiting": 1, "kv_usage": 0.4}  # fmt: skip
            if number % 100 == 7 and place == 0:
                error = {"outcome": "reset", "request_id": None, "at": now - 60_000}
                row |= {
                    "state": "open",
                    "circuit": "open",
                    "reason": "reset",
                    "since": now - 60_000,
                    "last_error": error,
                }
            rows.append(row)
    models = [
        {"name": model(number), "in_flight": 3, "queued": 0, "requests": 9, "errors": 0} for number in range(MODELS)
    ]
    usage_counts = {"made": 10, "delivered": 9, "queued": 1, "spooled": 0, "dropped": 0}
    return orjson.dumps(
        {
            "boot": "9f3c5a1e77b04d21", "version": "0.9.0", "started_at": now - DAY, "at": now, "draining": False,
            "in_flight": 40, "lag_ms": 2.1, "currency": "USD", "usage": usage_counts, "etags": {**etags, "spend": None},
            "overrides": [], "models": models, "backends": rows,
        }
    )  # fmt: skip


@contextmanager
def running(url: str, back: int) -> Iterator[tuple[Process, httpx.Client]]:
    """The service, and a client that is logged in."""
    port = free_port()
    child = subprocess.Popen([sys.executable, "-m", "benchmarks.console_pages", "--serve", url, str(port), str(back)])
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60, trust_env=False) as client:
            while True:
                try:
                    if client.get("/readyz").status_code == 200:
                        break
                except httpx.TransportError:
                    pass
                assert child.poll() is None
                time.sleep(0.1)
            body = {"email": EMAIL, "password": PASSWORD}
            answer = client.post("/api/v1/session", json=body, headers={"sec-fetch-site": "same-origin"})
            assert answer.status_code == 200, answer.text
            yield Process(child.pid), client
    finally:
        child.terminate()
        child.wait()


class Routers:
    """Two routers that report, when it is their time."""

    def __init__(self, client: httpx.Client, back: int) -> None:
        self._client = client
        self._back = back
        self._last = 0.0
        self._etags: dict[str, Any] = {"models": None, "policy": None, "overrides": None}

    def report(self) -> None:
        if time.monotonic() - self._last < 6:
            return
        body = report(self._etags, time.time_ns() // 1_000_000 - self._back)
        headers = {"authorization": f"Bearer {SERVICE_TOKEN}", "content-type": "application/json"}
        for name in ("router-1", "router-2"):
            answer = self._client.put(f"/routers/{name}", content=body, headers=headers)
            assert answer.status_code == 200, answer.text
            self._etags = answer.json()["etags"]
        self._last = time.monotonic()


def pages(client: httpx.Client, now: int) -> list[str]:
    one = client.get("/api/v1/requests", params={"outcome": "reset", "limit": 1}).json()["data"][0]
    moment = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(now / 1000 - 30 * 86400))
    console = [
        "", "models", f"models/{one['model']}", "backends", "backends?state=bad", "requests", f"requests/{one['id']}",
        f"requests/{one['request_id']}", f"requests?id={one['request_id'][:6]}", "requests?outcome=reset",
        f"requests?model={one['model']}", f"requests?key={one['key_id']}", "usage", "usage?range=7d",
        "usage?range=30d&group_by=model", "usage?range=30d&group_by=key,outcome", "keys", f"keys/{one['key_id']}",
        "prompts", "playground", "organisations", "organisations/team-1", "users", "users/user-1", "routers", "audit",
        "settings", "search?q=nothing",
    ]  # fmt: skip
    usage = f"/api/v1/usage?start={moment}"
    return [
        *(f"/console/{page}" for page in console),
        f"{usage}&group_by=model", f"{usage}&group_by=key,outcome", f"{usage}&bucket=1h&group_by=organisation",
        f"{usage}&organisation=team-1&group_by=user", f"/api/v1/requests?id={one['request_id'][:6]}",
        "/api/v1/requests", f"/api/v1/requests?key={one['key_id']}", "/api/v1/backends", "/api/v1/keys",
    ]  # fmt: skip


def measure(url: str, back: int, only: str) -> None:
    with running(url, back) as (process, client):
        routers = Routers(client, back)
        routers.report()
        print(f"  {'page':56} {'first':>6} {'median':>6} {'CPU':>6} {'kB':>6} {'gzip':>6}")
        for path in pages(client, time.time_ns() // 1_000_000 - back):
            if only not in path:
                continue
            took, cpu, status, body = [], [], 0, b""
            for turn in range(TURNS):
                routers.report()
                # Another question each time: answers are kept for a moment.
                given = path.replace("Z&", f".{turn}Z&")
                before, began = process.cpu, time.perf_counter()
                answer = client.get(given, headers={"accept-encoding": "identity"})
                took.append((time.perf_counter() - began) * 1000)
                cpu.append((process.cpu - before) * 1000)
                status, body = answer.status_code, answer.content
            _print(path, status, took, cpu, body)
        print(f"  resident: {process.resident} MiB")


def _print(path: str, status: int, took: list[float], cpu: list[float], body: bytes) -> None:
    median, small = statistics.median(took), len(gzip.compress(body, 6))
    slow = "  SLOW" if median > SLOWEST else ""
    large = "  LARGE" if small > LARGEST or len(body) > LARGEST else ""
    note = f"  {status}" if status != 200 else slow + large
    figures = f"{took[0]:6.0f} {median:6.0f} {statistics.median(cpu):6.0f} {len(body) / 1000:6.1f} {small / 1000:6.1f}"
    print(f"  {path[:56]:56} {figures}{note}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--only", default="", help="a part of the paths that are asked for")
    parser.add_argument("--serve", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        url, port, back = arguments.serve
        serve(url, int(port), int(back))
        return
    with ExitStack() as stack:
        folder = arguments.folder or Path(stack.enter_context(tempfile.TemporaryDirectory(dir=Path.cwd())))
        folder.mkdir(exist_ok=True)
        url, made = f"sqlite:///{folder}/control-plane.sqlite3", folder / "made"
        if not made.exists():
            now = time.time_ns() // 1_000_000
            fill(url, arguments.rows, now)
            made.write_text(str(now))
        # The clock goes on from the last row.
        measure(url, time.time_ns() // 1_000_000 - int(made.read_text()), arguments.only)


if __name__ == "__main__":
    main()
