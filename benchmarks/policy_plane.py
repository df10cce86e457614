"""The control plane with many keys and models: how soon a change is at the routers, and how long others wait meanwhile.

    .venv/bin/python -m benchmarks.policy_plane [--keys 100000] [--models 2000] [--changes 20] [--url postgresql://...]

`delivered`: from the request that ends a key to the last byte of the policy at all pollers, which hold long polls as
routers do. `answered`: until that request was answered. `health`: the slowest GET /healthz, asked all the time: for as
long the event loop was busy. `processor`: of the process that serves, for a change and its delivery, with the requests
of /healthz; `memory`: the same process. On a machine that does something else, too, only these two say something.
"""

import argparse
import asyncio
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import orjson
from sqlalchemy import insert

from control_plane.data import schema
from control_plane.data.database import Database, parse_url
from control_plane.data.tables import keys, models, organisations, tokens, users
from inference_api.policy.keys import MANAGEMENT, new_key

_SERVICE = "service-token-of-the-benchmark-0123456789"
_TEAMS = 100
_BATCH = 2000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keys", type=int, default=100_000)
    parser.add_argument("--models", type=int, default=2000)
    parser.add_argument("--changes", type=int, default=20)
    parser.add_argument("--pollers", type=int, default=3)
    parser.add_argument("--url", help="an empty database; without it, SQLite in a folder of its own")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        url = arguments.url or f"sqlite:///{folder}/control-plane.sqlite3"
        token, ids = asyncio.run(_fill(url, arguments.keys, arguments.models))
        with _serving(url, Path(folder)) as (base, pid):
            found = asyncio.run(_measure(base, pid, token, ids[: arguments.changes], arguments.pollers))
            found["memory_mb"] = _memory(pid)
    for name, value in found.items():
        print(f"{name:<22}{value}")


async def _fill(url: str, number: int, catalogue: int) -> tuple[str, list[str]]:
    """A management token, and the ids of the keys."""
    await schema.migrate(parse_url(url))
    database = Database(parse_url(url))
    token, now = new_key(prefix=MANAGEMENT), time.time_ns() // 1_000_000
    made = {"created_at": now, "disabled": False}
    teams = [{"name": f"team-{n}", "limits": [{"requests": 600, "per": 60}], **made} for n in range(_TEAMS)]
    ids: list[str] = []
    try:
        async with database.main.write() as connection:
            await connection.execute(insert(users).values(name="ana", platform_role="admin", **made))
            holder = {"id": token.id, "kind": "management", "name": "benchmark", "digest": token.digest, "user": "ana"}
            await connection.execute(insert(tokens).values(**holder, **made))
            await connection.execute(insert(organisations), teams)
            for start in range(0, number, _BATCH):
                rows = [_key(n, made) for n in range(start, min(number, start + _BATCH))]
                ids += [row["id"] for row in rows]
                await connection.execute(insert(keys), rows)
            await connection.execute(insert(models), [_model(n, now) for n in range(catalogue)])
    finally:
        await database.close()
    return token.key, ids


def _key(number: int, made: dict[str, Any]) -> dict[str, Any]:
    key = new_key()
    own = {"limits": [{"requests": 60, "per": 60}], "priority": 0, "weight": 1.0}
    names = {"name": f"key-{number}", "organisation": f"team-{number % _TEAMS}", "user": f"user-{number % 1000}"}
    return {"id": key.id, "digest": key.digest, **names, **own, **made}


def _model(number: int, now: int) -> dict[str, Any]:
    backends = [{"url": f"http://10.{number >> 8}.{number & 255}.{n}:8000"} for n in range(1, 5)]
    entry = orjson.dumps({"name": f"model-{number}", "backends": backends, "created": now // 1000}).decode()
    return {"name": f"model-{number}", "entry": entry, "updated_at": now}


@contextmanager
def _serving(url: str, folder: Path) -> Iterator[tuple[str, int]]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    environ = {
        **os.environ,
        "CONTROL_PLANE_DATABASE_URL": url,
        "CONTROL_PLANE_PORT": str(port),
        "CONTROL_PLANE_SERVICE_TOKEN": _SERVICE,
        "CONTROL_PLANE_LOG_LEVEL": "warning",
    }
    process = subprocess.Popen([sys.executable, "-m", "control_plane", "serve"], env=environ, cwd=folder)
    try:
        yield f"http://127.0.0.1:{port}", process.pid
    finally:
        process.terminate()
        process.wait(30)


async def _measure(base: str, pid: int, token: str, ids: list[str], pollers: int) -> dict[str, Any]:
    began = time.perf_counter()
    async with (
        httpx.AsyncClient(base_url=base, timeout=60, headers={"authorization": f"Bearer {_SERVICE}"}) as router,
        httpx.AsyncClient(base_url=base, timeout=60, headers={"authorization": f"Bearer {token}"}) as admin,
    ):
        is_ready = await _is_ready(router)
        while not is_ready:
            await asyncio.sleep(0.05)
            is_ready = await _is_ready(router)
        ready = time.perf_counter() - began
        plain = await router.get("/policy", headers={"accept-encoding": "identity"})
        packed = await router.get("/policy", headers={"accept-encoding": "gzip"})
        health = asyncio.create_task(_health(base))
        answered, delivered = [], []
        used = _processor(pid)
        for id in ids:
            one, other = await _change(router, admin, id, pollers)
            answered.append(one)
            delivered.append(other)
        used = (_processor(pid) - used) / len(ids)
        put = await _put_model(admin)
        health.cancel()
        slowest = await asyncio.gather(health, return_exceptions=True)
    return {
        "ready_s": f"{ready:.2f}",
        "policy_mb": f"{len(plain.content) / 1e6:.1f}",
        "policy_gzip_mb": f"{int(packed.headers['content-length']) / 1e6:.1f}",
        "answered_s": f"median {statistics.median(answered):.3f}, worst {max(answered):.3f}",
        "delivered_s": f"median {statistics.median(delivered):.3f}, worst {max(delivered):.3f}",
        "processor_s": f"{used:.3f}",
        "model_put_s": f"{put:.3f}",
        "health_ms": slowest[0],
    }


async def _is_ready(client: httpx.AsyncClient) -> bool:
    try:
        return (await client.get("/readyz")).status_code == 200
    except httpx.TransportError:
        return False


async def _change(router: httpx.AsyncClient, admin: httpx.AsyncClient, id: str, pollers: int) -> tuple[float, float]:
    """Seconds until the end of a key is answered, and until all pollers have the new policy."""
    etag = (await router.head("/policy")).headers["etag"]
    headers = {"if-none-match": etag, "prefer": "wait=25", "accept-encoding": "identity"}

    async def poll() -> float:
        answer = await router.get("/policy", headers=headers)
        assert answer.status_code == 200, answer.status_code
        return time.perf_counter()

    polls = [asyncio.create_task(poll()) for _ in range(pollers)]
    tag = (await admin.get(f"/api/v1/keys/{id}")).headers["etag"]
    # So that the polls are there.
    await asyncio.sleep(0.2)
    began = time.perf_counter()
    (await admin.delete(f"/api/v1/keys/{id}", headers={"if-match": tag})).raise_for_status()
    answered = time.perf_counter() - began
    return answered, max(await asyncio.gather(*polls)) - began


async def _put_model(admin: httpx.AsyncClient) -> float:
    began = time.perf_counter()
    entry = {"name": "new", "backends": [{"url": "http://10.9.9.9:8000"}]}
    (await admin.put("/models/new", json=entry)).raise_for_status()
    return time.perf_counter() - began


async def _health(base: str) -> str:
    took: list[float] = []
    async with httpx.AsyncClient(base_url=base, timeout=60) as client:
        try:
            while True:
                began = time.perf_counter()
                await client.get("/healthz")
                took.append(1000 * (time.perf_counter() - began))
                await asyncio.sleep(0.002)
        except asyncio.CancelledError:
            ordered = sorted(took)
            at = [ordered[len(ordered) * share // 100] for share in (50, 99)]
            return f"median {at[0]:.1f}, p99 {at[1]:.1f}, worst {ordered[-1]:.1f}"


def _processor(pid: int) -> float:
    """Seconds of the processor that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _memory(pid: int) -> str:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return f"{int(line.split()[1]) / 1000:.0f} at most"
    return "?"


if __name__ == "__main__":
    main()
