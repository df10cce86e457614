"""The tables of usage: in a file of their own on SQLite, so that a full or torn one does not stop the catalogue.

`usage` has a row per record; `usage_hour` and `usage_day` are sums of them, which are recomputed and never added to.
"""

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Double,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    SmallInteger,
    Table,
    Text,
)
from sqlalchemy.types import TypeEngine

from control_plane.data.tables import CONVENTION, Json

metadata = MetaData(naming_convention=CONVENTION)
# Compared byte by byte, so that an index finds prefixes; routers' words have no length but the batch's.
Word: TypeEngine[str] = Text().with_variant(Text(collation="C"), "postgresql")
_Serial = BigInteger().with_variant(Integer, "sqlite")

# Of what usage can be grouped and filtered by: name in a query -> column.
DIMENSIONS = {
    "model": "model",
    "asked_model": "asked_model",
    "key": "key_id",
    "user": "user",
    "organisation": "organisation",
    "backend": "backend",
    "route": "route",
    "outcome": "outcome",
    "variant": "variant",
}
DIMENSION_COLUMNS = ("kind", *DIMENSIONS.values())

# One record, as usage-record.json has it, and when it came; on PostgreSQL in a partition per UTC day of `at`.
# The buckets are those of the histograms of latency_ms and ttft_ms.
usage = Table(
    "usage",
    metadata,
    Column("at", BigInteger, primary_key=True, autoincrement=False),
    Column("id", Word, primary_key=True),
    Column("kind", Word, nullable=False),
    Column("router", Word, nullable=False),
    Column("request_id", Word, nullable=False),
    Column("key_id", Word),
    Column("key_name", Word),
    Column("organisation", Word),
    Column("user", Word),
    Column("end_user", Word),
    Column("asked_model", Word, nullable=False),
    Column("model", Word, nullable=False),
    Column("backend", Word),
    Column("route", Word, nullable=False),
    Column("stream", Boolean, nullable=False),
    Column("status", SmallInteger, nullable=False),
    Column("outcome", Word, nullable=False),
    Column("code", Word),
    Column("attempts", BigInteger, nullable=False),
    Column("attempt_details", Json),
    Column("fallback", Boolean, nullable=False),
    Column("variant", Word),
    Column("cache", Word),
    Column("prompt", Word),
    Column("votes", Word),
    Column("input_tokens", BigInteger),
    Column("cached_input_tokens", BigInteger),
    Column("output_tokens", BigInteger),
    Column("reasoning_tokens", BigInteger),
    Column("usage_source", Word, nullable=False),
    Column("latency_ms", Double, nullable=False),
    Column("ttft_ms", Double),
    Column("queued_ms", Double, nullable=False),
    Column("bytes", BigInteger, nullable=False),
    Column("cost_nanos", BigInteger),
    Column("received_at", BigInteger, nullable=False),
    Column("latency_bucket", SmallInteger, nullable=False),
    Column("ttft_bucket", SmallInteger),
    Index("ix_usage_id", "id"),
    Index("ix_usage_request_id", "request_id"),
    Index("ix_usage_organisation_at", "organisation", "at"),
    Index("ix_usage_key_id_at", "key_id", "at"),
    Index("ix_usage_model_at", "model", "at"),
    postgresql_partition_by="RANGE (at)",
)
Index(
    "ix_usage_failed_at",
    usage.c.at,
    sqlite_where=usage.c.outcome != "ok",
    postgresql_where=usage.c.outcome != "ok",
)

# On PostgreSQL, the ids that `usage` has: a partitioned table cannot say that an id is there once whatever its time is.
usage_ids = Table(
    "usage_ids",
    metadata,
    Column("id", Word, primary_key=True),
    Column("at", BigInteger, nullable=False),
    Index("ix_usage_ids_at", "at", postgresql_using="brin"),
)

# Sums of a span; `records` of all kinds, `requests` of those of clients, `counted` of those that budgets count.
MEASURES = (
    "records",
    "requests",
    "errors",
    "input_tokens",
    "cached_input_tokens",
    "output_tokens",
    "cost_nanos",
    "unpriced",
    "estimated",
    "counted",
)


def _sums(name: str) -> Table:
    """`at`: begin of the span. The histograms are of the kind `request`."""
    return Table(
        name,
        metadata,
        Column("id", _Serial, primary_key=True, autoincrement=True),
        Column("at", BigInteger, nullable=False, index=True),
        Column("kind", Word, nullable=False),
        *(
            Column(column, Word, nullable=column in ("key_id", "user", "organisation", "backend", "variant"))
            for column in DIMENSIONS.values()
        ),
        *(Column(column, BigInteger, nullable=False) for column in MEASURES),
        Column("latency", LargeBinary),
        Column("ttft", LargeBinary),
        Index(f"ix_{name}_organisation_at", "organisation", "at"),
    )


usage_hour = _sums("usage_hour")
usage_day = _sums("usage_day")

# Spans (milliseconds of an hour or day, from `at`) whose sums are to be made: a mark per batch and hour, so that no two
# batches wait for each other.
usage_changed = Table(
    "usage_changed",
    metadata,
    Column("id", _Serial, primary_key=True, autoincrement=True),
    Column("span", BigInteger, nullable=False),
    Column("at", BigInteger, nullable=False),
    Index("ix_usage_changed_span_at", "span", "at"),
)

# How often the sums of a span were made: what was read of them holds as long as they are the same.
usage_made = Table(
    "usage_made",
    metadata,
    Column("span", BigInteger, primary_key=True, autoincrement=False),
    Column("at", BigInteger, primary_key=True, autoincrement=False),
    Column("number", BigInteger, nullable=False),
)

# `kept_from`: records before it are refused, since the rows of that time may be deleted.
usage_state = Table(
    "usage_state",
    metadata,
    Column("name", Text, primary_key=True),
    Column("value", BigInteger, nullable=False),
)
