"""Budgets over HTTP: who is refused, what is announced, and what the registry's sums change."""

import asyncio
import gzip
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import orjson
import pytest

from inference_api.policy.keys import digest, new_key
from tests.conftest import Served
from tests.fakes import COMPLETION, FakeEngine, Line, Received, ScriptedServer, hang, json_response, raw, until

pytestmark = pytest.mark.anyio
Start = Callable[..., Any]

KEY = new_key()
AUTHORIZED = {"authorization": f"Bearer {KEY.key}"}
ENTRY = {"id": KEY.id, "name": "batch", "digest": digest(KEY.key.encode()), "organisation": "team-a", "user": "ana"}
BODY = {"model": "m", "messages": [{"role": "user", "content": "x" * 100}], "max_tokens": 10}
# 1 USD a request
PRICE = {"input": 0, "output": 0, "request": 1}
DAY = {"period_start": "2026-11-28T00:00:00Z", "resets_at": "2100-01-01T00:00:00Z"}


@pytest.fixture
def policy(tmp_path: Path) -> Callable[..., str]:
    """A policy with one key; `budget`: that of its organisation."""

    def write(budget: Any = None, **more: Any) -> str:
        organisation = {"name": "team-a", **({"budget": budget} if budget else {})}
        path = tmp_path / "policy.json"
        path.write_bytes(orjson.dumps({"organisations": [organisation], "keys": [ENTRY], **more}))
        return str(path)

    return write


async def ask(served: Served, **more: Any) -> httpx.Response:
    return await served.client.post("/v1/chat/completions", json=BODY | more, headers=AUTHORIZED)


def message(answer: httpx.Response) -> Any:
    return answer.json()["error"]["message"]


async def test_a_budget_that_is_used_up_refuses(start_engine: Start, start_router: Start, policy: Any) -> None:
    engine: FakeEngine = await start_engine()
    budget = {"cost": 2.5, "per": "month"}
    served: Served = await start_router(engine, entry={"price": PRICE}, auth="keys", policy=policy(budget))

    answers = [await ask(served) for _ in range(4)]

    # The request that crosses it completes.
    assert [answer.status_code for answer in answers] == [200, 200, 200, 429]
    refused = answers[-1]
    assert refused.json()["error"] | {"message": ""} == {
        "message": "",
        "type": "insufficient_quota",
        "param": None,
        "code": "insufficient_quota",
    }
    assert message(refused).startswith("Budget used up for organisation 'team-a': 2.5 USD per month. It resets at ")
    assert message(refused).endswith("-01T00:00:00Z.")
    assert refused.headers["x-should-retry"] == "false"
    assert "retry-after" not in refused.headers
    # From the soft limit on, 80 %, which the third began beyond.
    remaining = [answer.headers.get("x-inference-budget-remaining") for answer in answers]
    assert remaining == [None, None, "0.20", None]
    assert await served.metric("inference_api_budgets", state="hard") == 1
    assert await served.metric("inference_api_rejected_requests_total", reason="budget") == 1
    assert len(engine.requests) == 3


@pytest.mark.parametrize(
    ("budgets", "shown"),
    [
        ([{"scope": "all", "requests": 1, "per": "day"}], "all callers: 1 requests per day"),
        ([{"scope": "user", "name": "ana", "requests": 1, "per": "week"}], "user 'ana': 1 requests per week"),
        ([{"scope": "user", "tokens": 5, "per": "day"}], "user 'ana': 5 tokens per day"),
        ([{"scope": "key", "name": KEY.id, "tokens": 5, "per": "day"}], "key 'batch': 5 tokens per day"),
        ([{"scope": "organisation", "requests": 1, "per": "day"}], "organisation 'team-a': 1 requests per day"),
    ],
)
async def test_each_holder_has_a_budget(
    budgets: Any, shown: str, start_engine: Start, start_router: Start, policy: Any
) -> None:
    served: Served = await start_router(await start_engine(), auth="keys", policy=policy(budgets=budgets))

    first, second = await ask(served), await ask(served)

    assert (first.status_code, second.status_code) == (200, 429)
    assert message(second).startswith(f"Budget used up for {shown}.")


async def test_of_another_user_nothing_is_taken(start_engine: Start, start_router: Start, policy: Any) -> None:
    budgets = [{"scope": "user", "name": "bob", "requests": 1, "per": "day"}]
    served: Served = await start_router(await start_engine(), auth="keys", policy=policy(budgets=budgets))

    assert [(await ask(served)).status_code for _ in range(3)] == [200] * 3


async def test_callers_without_a_key_share_the_budget_of_all(
    start_engine: Start, start_router: Start, policy: Any
) -> None:
    budgets = [{"scope": "all", "requests": 1, "per": "day"}, {"scope": "user", "requests": 1, "per": "day"}]
    served: Served = await start_router(await start_engine(), policy=policy(budgets=budgets))

    assert [(await served.chat()).status_code for _ in range(2)] == [200, 429]


async def test_a_model_without_a_price_is_closed_to_a_cost_budget(
    start_engine: Start, start_router: Start, policy: Any
) -> None:
    engine: FakeEngine = await start_engine()
    served: Served = await start_router(engine, auth="keys", policy=policy({"cost": 1, "per": "day"}))

    answer = await ask(served)

    assert (answer.status_code, answer.json()["error"]["code"]) == (403, "model_not_priced")
    assert message(answer) == "The model 'm' has no price, and 'team-a' has a cost budget."
    assert answer.json()["error"]["param"] == "model"
    assert engine.requests == []


async def test_an_empty_purse_does_not_close_a_free_model(
    start_engine: Start, start_router: Start, policy: Any
) -> None:
    """LIT#10973, #29912."""
    engine = await start_engine()
    models = [
        {"name": name, "backends": [engine.url], "price": {"input": 0, "output": 0, "request": request}}
        for name, request in (("m", 1), ("free", 0))
    ]
    served: Served = await start_router(models=models, auth="keys", policy=policy({"cost": 1, "per": "day"}))

    statuses = [(await ask(served, model=name)).status_code for name in ("m", "m", "free", "free")]

    assert statuses == [200, 429, 200, 200]


async def test_requests_in_flight_have_reserved_their_part(
    start_engine: Start, start_router: Start, policy: Any
) -> None:
    engine: FakeEngine = await start_engine(hang)
    served: Served = await start_router(engine, auth="keys", policy=policy({"requests": 2, "per": "day"}))

    waiting = [asyncio.create_task(ask(served)) for _ in range(2)]
    await until(lambda: engine.busy == 2)
    refused = await ask(served)
    for task in waiting:
        task.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)

    assert refused.status_code == 429


async def test_what_a_failed_request_reserved_is_given_back(
    start_engine: Start, start_router: Start, policy: Any
) -> None:
    engine: FakeEngine = await start_engine(raw(json_response({"error": {}}, "500 Internal Server Error")))
    budget = {"cost": 0.5, "per": "day"}
    served: Served = await start_router(engine, entry={"price": PRICE}, auth="keys", policy=policy(budget))

    statuses = [(await ask(served)).status_code for _ in range(3)]
    engine.script = raw(json_response(COMPLETION))
    statuses += [(await ask(served)).status_code for _ in range(2)]

    assert statuses == [500, 500, 500, 200, 429]


async def test_refusals_are_in_the_order_of_the_contract(start_engine: Start, start_router: Start, policy: Any) -> None:
    """The budget before the rate limit, and an unpriced model before both."""
    limits = [{"scope": "all", "requests": 1, "per": 3600}]
    path = policy({"requests": 1, "per": "day"}, limits=limits)
    served: Served = await start_router(await start_engine(), auth="keys", policy=path)

    codes = [(await ask(served)).json().get("error", {}).get("code") for _ in range(2)]
    unknown = await ask(served, model="nope")

    assert codes == [None, "insufficient_quota"]
    assert unknown.json()["error"]["code"] == "model_not_found"


# Sums of the registry


class Books(ScriptedServer):
    """A registry that takes usage records, and tells of the spend in `told`, else of the requests in its records."""

    def __init__(self) -> None:
        super().__init__(self._answer)
        self.told: list[dict[str, Any]] = []
        self.at = "2026-11-28T12:00:00Z"
        self.currency = "USD"
        self.reads = 0
        self.records: dict[str, dict[str, Any]] = {}

    async def _answer(self, request: Received, line: Line) -> None:
        if request.target == "/spend":
            self.reads += 1
            document = {"at": self.at, "currency": self.currency, "budgets": self.told or self._sums()}
            await line.send(json_response(document))
        elif request.target == "/usage":
            records = orjson.loads(gzip.decompress(request.body))["records"]
            self.records |= {record["id"]: record for record in records}
            self.at = datetime.now(UTC).isoformat().replace("+00:00", "Z")
            await line.send(json_response({"accepted": len(records), "duplicates": 0, "refused": []}))
        else:
            await line.send(json_response({"models": []}, "503 Service Unavailable"))

    def _sums(self) -> list[dict[str, Any]]:
        spent = sum(record["code"] is None for record in self.records.values())
        return [{"id": "organisation:team-a:requests:month", "spent": spent, **DAY}] if spent else []


@pytest.fixture
async def books() -> Any:
    async with Books() as server:
        yield server


async def test_the_registry_sums_what_all_routers_spent(
    books: Books, start_engine: Start, start_router: Start, policy: Any
) -> None:
    books.told = [{"id": "organisation:team-a:requests:month", "spent": 500, **DAY}]
    path = policy({"requests": 500, "per": "month"})
    served: Served = await start_router(
        await start_engine(), auth="keys", policy=path, usage="registry", registry_url=books.url
    )
    # The first requests may go through, before the first sum is there.
    await until(lambda: books.reads)

    refused = await ask(served)
    age = await served.metric("inference_api_spend_age_seconds")

    assert refused.status_code == 429
    # The end of the period is the registry's.
    assert message(refused).endswith("It resets at 2100-01-01T00:00:00Z.")
    assert age > 0


async def test_routers_share_a_budget_by_their_records(
    books: Books, start_engine: Start, start_router: Start, policy: Any
) -> None:
    """BIF#3547: a counter of each router would let through the budget times the routers."""
    path = policy({"requests": 10, "per": "month"})
    settings = {"auth": "keys", "policy": path, "usage": "registry", "registry_url": books.url}
    first: Served = await start_router(await start_engine(), **settings)
    second: Served = await start_router(await start_engine(), **settings)

    statuses = [(await ask(first)).status_code for _ in range(12)]
    await until(lambda: len(books.records) == 12)
    # Sums, deliveries and own records at any stage: nothing counts twice, and nothing is forgotten.
    reads = books.reads
    await until(lambda: books.reads >= reads + 3, seconds=40)

    assert statuses == [200] * 10 + [429] * 2
    assert [(await ask(served)).status_code for served in (first, second)] == [429, 429]
    assert sum(record["code"] is None for record in books.records.values()) == 10


async def test_a_spend_in_another_currency_is_not_believed(
    books: Books, start_engine: Start, start_router: Start, policy: Any, caplog: pytest.LogCaptureFixture
) -> None:
    books.currency = "EUR"
    books.told = [{"id": "organisation:team-a:requests:month", "spent": 500, **DAY}]
    path = policy({"requests": 500, "per": "month"})
    served: Served = await start_router(
        await start_engine(), auth="keys", policy=path, usage="registry", registry_url=books.url
    )
    await until(lambda: books.reads)

    assert (await ask(served)).status_code == 200
    await until(lambda: "its currency is 'EUR', and CURRENCY is 'USD'" in caplog.text)


async def test_without_budgets_the_spend_is_not_asked_for(
    books: Books, start_engine: Start, start_router: Start, policy: Any
) -> None:
    served: Served = await start_router(
        await start_engine(), auth="keys", policy=policy(), usage="registry", registry_url=books.url
    )

    await ask(served)
    await until(lambda: books.records)

    assert books.reads == 0


async def test_records_of_an_earlier_process_are_not_taken_from_what_this_one_counts(
    books: Books, start_engine: Start, start_router: Start, policy: Any, tmp_path: Path
) -> None:
    """Its spool is delivered by this router, and was never a part of its own sum."""
    books.told = [{"id": "organisation:team-a:requests:month", "spent": 0, **DAY}]
    path, spool = policy({"requests": 2, "per": "month"}), tmp_path / "spool"
    settings = {"auth": "keys", "policy": path, "usage": "registry", "registry_url": books.url}
    first: Served = await start_router(await start_engine(), **settings)
    await ask(first)
    await until(lambda: books.records)
    [record] = books.records.values()
    spool.mkdir()
    (spool / "earlier.jsonl").write_bytes(orjson.dumps({**record, "id": "0000000000000000-1"}) + b"\n")

    served: Served = await start_router(await start_engine(), **settings, usage_spool=str(spool))
    statuses = [(await ask(served)).status_code]
    await until(lambda: len(books.records) == 3)
    await until(lambda: not list(spool.glob("earlier*")))
    statuses += [(await ask(served)).status_code for _ in range(2)]

    assert statuses == [200, 200, 429]
