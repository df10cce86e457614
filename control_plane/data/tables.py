"""The tables of the main database, in SQLAlchemy Core. Those of usage are in `usage_tables`.

Columns `*_at` and `at`: Unix milliseconds, UTC. Money: 10^-9 of CURRENCY. Organisations, users, models and prompts have
their names as keys: a name is never used again, so that ended ones stay. Names that records carry are no foreign keys:
what is ended or deleted must not take its history with it.
"""

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    Float,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    SmallInteger,
    String,
    Table,
    Text,
    UniqueConstraint,
)
from sqlalchemy.dialects import postgresql

CONVENTION = {
    "ix": "ix_%(column_0_N_label)s",
    "uq": "uq_%(table_name)s_%(column_0_N_name)s",
    "fk": "fk_%(table_name)s_%(column_0_N_name)s",
    "pk": "pk_%(table_name)s",
}
metadata = MetaData(naming_convention=CONVENTION)
# An absent value is SQL's NULL, not JSON's.
Json = JSON(none_as_null=True).with_variant(postgresql.JSONB(none_as_null=True), "postgresql")
Name = String(128)
Id = String(40)

# The number of changes of each document that routers poll, and of the tokens: replicas compare it with theirs.
revisions = Table(
    "revisions",
    metadata,
    Column("document", String(32), primary_key=True),
    Column("revision", BigInteger, nullable=False),
)

# `entry`: JSON exactly as it is served, since its ETag depends on the bytes.
models = Table(
    "models",
    metadata,
    Column("position", BigInteger().with_variant(Integer, "sqlite"), primary_key=True, autoincrement=True),
    Column("name", Name, nullable=False, unique=True),
    Column("entry", Text, nullable=False),
    Column("updated_at", BigInteger, nullable=False),
    Column("updated_by", Name),
)

organisations = Table(
    "organisations",
    metadata,
    Column("name", Name, primary_key=True),
    Column("title", String(256)),
    Column("disabled", Boolean, nullable=False, default=False),
    Column("models", Json),
    Column("limits", Json, nullable=False),
    Column("budget", Json),
    Column("created_at", BigInteger, nullable=False),
    Column("created_by", Name),
    Column("ended_at", BigInteger),
)

users = Table(
    "users",
    metadata,
    Column("name", Name, primary_key=True),
    # In lower case; NULL once the user is ended and erased.
    Column("email", String(320), unique=True),
    Column("title", String(256)),
    Column("password_hash", Text),
    Column("oidc_issuer", Text),
    Column("oidc_subject", Text),
    Column("platform_role", String(16)),
    Column("disabled", Boolean, nullable=False, default=False),
    Column("created_at", BigInteger, nullable=False),
    Column("created_by", Name),
    Column("last_login_at", BigInteger),
    Column("ended_at", BigInteger),
    UniqueConstraint("oidc_issuer", "oidc_subject"),
)

memberships = Table(
    "memberships",
    metadata,
    Column("organisation", Name, ForeignKey("organisations.name"), primary_key=True),
    Column("user", Name, ForeignKey("users.name"), primary_key=True, index=True),
    Column("role", String(16), nullable=False),
    Column("created_at", BigInteger, nullable=False),
)

# `digest`: SHA-256 of the cookie's secret; the one before holds for requests that were under way. `rights`: digest of
# those that the user had when the secret was made.
sessions = Table(
    "sessions",
    metadata,
    Column("digest", String(64), primary_key=True),
    Column("previous_digest", String(64), unique=True),
    Column("previous_until", BigInteger),
    Column("rights", String(64), nullable=False),
    Column("id", Id, nullable=False, unique=True),
    Column("user", Name, ForeignKey("users.name"), nullable=False, index=True),
    Column("created_at", BigInteger, nullable=False),
    Column("seen_at", BigInteger, nullable=False),
    Column("expires_at", BigInteger, nullable=False, index=True),
    Column("address", String(64)),
    Column("agent", String(256)),
)

# One-time URLs, by `purpose`: `password`, of the first admin (`user` is NULL) and of users who choose theirs; `login`.
setups = Table(
    "setups",
    metadata,
    Column("digest", String(64), primary_key=True),
    Column("purpose", String(16), nullable=False),
    Column("user", Name, ForeignKey("users.name"), index=True),
    Column("created_at", BigInteger, nullable=False),
    Column("expires_at", BigInteger, nullable=False),
    Column("used_at", BigInteger),
)

# Logins that are at an OpenID provider. `state`, `browser`, `nonce`: SHA-256 of what the browser and the provider have.
login_states = Table(
    "login_states",
    metadata,
    Column("state", String(64), primary_key=True),
    Column("browser", String(64), nullable=False),
    Column("nonce", String(64), nullable=False),
    Column("next", Text),
    Column("expires_at", BigInteger, nullable=False, index=True),
)

login_failures = Table(
    "login_failures",
    metadata,
    Column("id", BigInteger().with_variant(Integer, "sqlite"), primary_key=True, autoincrement=True),
    # SHA-256 of the e-mail address: what people type may be a password.
    Column("account", String(64), nullable=False),
    Column("address", String(64), nullable=False),
    Column("at", BigInteger, nullable=False),
    Index("ix_login_failures_account_at", "account", "at"),
    Index("ix_login_failures_address_at", "address", "at"),
)

# `revision`: of the policy, when the row was last changed: the policy is made anew from what is newer than it.
# `playground`: lent to `user`, or to the system, by services/lending, again and again; nobody has its secret.
keys = Table(
    "keys",
    metadata,
    Column("id", String(12), primary_key=True),
    Column("name", Name, nullable=False),
    Column("digest", String(80), nullable=False, unique=True),
    Column("previous_digest", String(80), unique=True),
    Column("previous_until", BigInteger),
    Column("organisation", Name, ForeignKey("organisations.name"), index=True),
    Column("user", Name, index=True),
    Column("models", Json),
    Column("limits", Json, nullable=False),
    Column("budget", Json),
    Column("priority", SmallInteger, nullable=False, default=0),
    Column("weight", Float, nullable=False, default=1.0),
    Column("expires_at", BigInteger),
    Column("disabled", Boolean, nullable=False, default=False),
    Column("created_at", BigInteger, nullable=False),
    Column("created_by", Name),
    Column("ended_at", BigInteger),
    Column("last_used_at", BigInteger),
    Column("revision", BigInteger, nullable=False, default=0),
    Column("playground", Boolean, nullable=False, default=False),
    Index("ix_keys_created_at_id", "created_at", "id"),
    Index("ix_keys_revision_id", "revision", "id"),
)

# `kind`: management or service. `user`: whose rights a management token has, lowered to `role` in `organisation`.
tokens = Table(
    "tokens",
    metadata,
    Column("id", String(12), primary_key=True),
    Column("kind", String(16), nullable=False),
    Column("name", Name, nullable=False),
    Column("digest", String(80), nullable=False, unique=True),
    Column("previous_digest", String(80), unique=True),
    Column("previous_until", BigInteger),
    Column("scopes", Json),
    Column("organisation", Name),
    Column("role", String(16)),
    Column("user", Name, index=True),
    Column("expires_at", BigInteger),
    Column("disabled", Boolean, nullable=False, default=False),
    Column("created_at", BigInteger, nullable=False),
    Column("created_by", Name),
    Column("ended_at", BigInteger),
    Column("last_used_at", BigInteger),
)

# `body`: the item of the policy, without its id.
limits = Table(
    "limits",
    metadata,
    Column("id", Id, primary_key=True),
    Column("body", Json, nullable=False),
    Column("created_at", BigInteger, nullable=False),
    Column("created_by", Name),
)
# `name` is "" for each holder of the scope: SQL holds no two NULLs for equal.
budgets = Table(
    "budgets",
    metadata,
    Column("id", Id, primary_key=True),
    Column("scope", String(16), nullable=False),
    Column("name", Name, nullable=False, default=""),
    Column("unit", String(16), nullable=False),
    Column("per", String(8), nullable=False),
    Column("body", Json, nullable=False),
    Column("created_at", BigInteger, nullable=False),
    Column("created_by", Name),
    UniqueConstraint("scope", "name", "unit", "per"),
)

# Nanos per million tokens, and per request. Rows are only added.
prices = Table(
    "prices",
    metadata,
    Column("id", Id, primary_key=True),
    Column("model", Name, nullable=False),
    Column("valid_from", BigInteger, nullable=False),
    Column("input", BigInteger, nullable=False),
    Column("cached_input", BigInteger),
    Column("output", BigInteger, nullable=False),
    Column("request", BigInteger, nullable=False, default=0),
    Column("created_at", BigInteger, nullable=False),
    Column("created_by", Name),
    Index("ix_prices_model_valid_from", "model", "valid_from"),
)

# `revision`: as that of keys; of its versions and labels, too.
prompts = Table(
    "prompts",
    metadata,
    Column("name", Name, primary_key=True),
    Column("organisation", Name, ForeignKey("organisations.name"), index=True),
    Column("created_at", BigInteger, nullable=False),
    Column("created_by", Name),
    Column("ended_at", BigInteger),
    Column("revision", BigInteger, nullable=False, default=0, index=True),
)
# `body`: {"messages": [...]} or {"text": "..."}, and "variables".
prompt_versions = Table(
    "prompt_versions",
    metadata,
    Column("prompt", Name, ForeignKey("prompts.name"), primary_key=True),
    Column("version", Integer, primary_key=True, autoincrement=False),
    Column("body", Json, nullable=False),
    Column("note", Text),
    Column("created_at", BigInteger, nullable=False),
    Column("created_by", Name),
)
prompt_labels = Table(
    "prompt_labels",
    metadata,
    Column("prompt", Name, ForeignKey("prompts.name"), primary_key=True),
    Column("label", String(64), primary_key=True),
    Column("version", Integer, nullable=False),
    Column("moved_at", BigInteger, nullable=False),
    Column("moved_by", Name),
)

overrides = Table(
    "overrides",
    metadata,
    Column("id", Id, primary_key=True),
    Column("backend", Text, nullable=False),
    Column("model", Name),
    Column("action", String(16), nullable=False),
    Column("reason", String(500), nullable=False),
    Column("created_at", BigInteger, nullable=False),
    Column("created_by", Name),
    Column("expires_at", BigInteger),
    Column("ended_at", BigInteger),
    Column("ended_by", Name),
    Index("ix_overrides_expires_at", "expires_at"),
)

# What runs the engines of a model: an object of a driver, of which there are `min` to `max` instances while it runs.
# `last_activation_at`: a router held requests for it; `was_ready_at`: first seen ready since then,
# and since it was started.
deployments = Table(
    "deployments",
    metadata,
    Column("model", Name, primary_key=True),
    Column("driver", String(16), nullable=False),
    Column("namespace", String(63)),
    Column("object", String(253), nullable=False),
    Column("min", Integer, nullable=False),
    Column("max", Integer, nullable=False),
    Column("idle_seconds", Integer),
    Column("scale_to_zero", Boolean, nullable=False, default=False),
    Column("last_activation_at", BigInteger),
    Column("was_ready_at", BigInteger),
    Column("updated_at", BigInteger, nullable=False),
    Column("updated_by", Name),
)

# `kind`: chat, completion, embedding, rerank. `steps`: [{name, verdict, words, took_ms}]. `by`: None: by the schedule.
model_tests = Table(
    "model_tests",
    metadata,
    Column("id", Id, primary_key=True),
    Column("model", Name, nullable=False),
    Column("backend", Text),
    Column("kind", String(16), nullable=False),
    Column("at", BigInteger, nullable=False, index=True),
    Column("by", Name),
    Column("ok", Boolean, nullable=False),
    Column("steps", Json, nullable=False),
    Index("ix_model_tests_model_at", "model", "at"),
)

# `source`: hub, folder, file. `result`: what was found, as the API shows it.
inspections = Table(
    "inspections",
    metadata,
    Column("id", Id, primary_key=True),
    Column("source", String(16), nullable=False),
    Column("ref", Text, nullable=False),
    Column("at", BigInteger, nullable=False, index=True),
    Column("by", Name),
    Column("result", Json, nullable=False),
)

# `result`: groups of log lines by their masked template, with counts; no line itself is stored.
triages = Table(
    "triages",
    metadata,
    Column("id", Id, primary_key=True),
    Column("model", Name, nullable=False),
    Column("at", BigInteger, nullable=False, index=True),
    Column("by", Name),
    Column("result", Json, nullable=False),
)

# The last report of each router, and the milliseconds between its last two.
routers = Table(
    "routers",
    metadata,
    Column("instance", Name, primary_key=True),
    Column("report", Json, nullable=False),
    Column("at", BigInteger, nullable=False),
    Column("interval", BigInteger, nullable=False),
)

audit = Table(
    "audit",
    metadata,
    Column("id", Id, primary_key=True),
    Column("at", BigInteger, nullable=False, index=True),
    Column("actor_kind", String(16), nullable=False),
    Column("actor", Name),
    Column("action", String(64), nullable=False),
    Column("object_type", String(32), nullable=False),
    Column("object_id", String(256)),
    Column("organisation", Name),
    Column("before", Json),
    Column("after", Json),
    Column("reason", String(500)),
    Column("address", String(64)),
    Column("request_id", String(128)),
    Index("ix_audit_object", "object_type", "object_id", "id"),
    Index("ix_audit_actor_id", "actor", "id"),
    Index("ix_audit_organisation_id", "organisation", "id"),
)

# Settings that people change while it runs.
config_kv = Table(
    "config_kv",
    metadata,
    Column("key", String(64), primary_key=True),
    Column("value", Json, nullable=False),
    Column("updated_at", BigInteger, nullable=False),
    Column("updated_by", Name),
)

# Answers to POSTs with an Idempotency-Key, without secrets; status 0 while the request runs.
idempotency = Table(
    "idempotency",
    metadata,
    Column("actor", String(160), primary_key=True),
    Column("key", String(256), primary_key=True),
    Column("request", String(64), nullable=False),
    Column("status", SmallInteger, nullable=False),
    Column("headers", Json, nullable=False),
    Column("body", Text, nullable=False),
    Column("at", BigInteger, nullable=False, index=True),
)
