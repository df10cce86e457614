"""The queries of docs/usage.md: they name fields that records have, and the SQL sums what it says."""

import re
import sqlite3
from pathlib import Path
from typing import Any

import orjson

DOCS = Path(__file__).parent.parent.parent / "docs"
PAGE = (DOCS / "usage.md").read_text()
FIELDS = [*orjson.loads((DOCS / "schemas/usage-record.json").read_bytes())["properties"]]


def test_queries_of_the_log_name_fields_of_a_record() -> None:
    queries = [
        line for line in PAGE.splitlines() if line.startswith("| ") and ("container=" in line or "unwrap" in line)
    ]

    named = {name for query in queries for name in re.findall(r"(?:unwrap |by \()(\w+)", query)}
    assert named == {"organisation", "output_tokens", "cost_nanos"}
    assert named <= {*FIELDS}


def test_the_sql_sums_requests_tokens_cost_and_refusals_of_each_organisation() -> None:
    (query,) = re.findall(r"```sql\n(.*?)```", PAGE, re.DOTALL)
    tokens: dict[str, Any] = {"kind": "request", "status": 200, "input_tokens": 100, "output_tokens": 20}
    records = [
        {**tokens, "organisation": "team-a", "cost_nanos": 2 * 10**9},
        {**tokens, "organisation": "team-a", "cost_nanos": None, "output_tokens": None},
        {**tokens, "organisation": "team-a", "status": 429, "input_tokens": 0, "output_tokens": 0, "cost_nanos": 0},
        {**tokens, "organisation": "team-b", "cost_nanos": 5 * 10**9},
        # Nobody pays for it.
        {**tokens, "organisation": "team-b", "kind": "shadow", "cost_nanos": 0},
    ]
    with sqlite3.connect(":memory:") as database:
        database.execute(f"CREATE TABLE usage ({', '.join(FIELDS)})")
        for record in records:
            row = [record.get(name) for name in FIELDS]
            database.execute(f"INSERT INTO usage VALUES ({', '.join('?' * len(FIELDS))})", row)

        assert database.execute(query).fetchall() == [("team-b", 1, 120, 5, 0), ("team-a", 3, 120, 2, 1)]
    database.close()
