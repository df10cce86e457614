"""USAGE: one record of each request on an inference route, to the log or to the control plane.

It is made and encoded at the end of the request, and put into a queue; `delivery` does the rest in the background. A
request never waits for it, and never fails because of it.
"""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from time import perf_counter
from typing import Any, Literal, cast

from pydantic import Field

from inference_api.core import Core
from inference_api.feature import Feature, Switch
from inference_api.features.delivery.records import END_USER, FAILED, STARTED, Try, UsageRecords
from inference_api.features.delivery.sender import Delivery, posting
from inference_api.features.delivery.spool import Spool
from inference_api.features.delivery.tally import Tally
from inference_api.features.spending.deliveries import Deliveries
from inference_api.models import Call
from inference_api.observe.exposition import Family
from inference_api.observe.families import counter, gauge
from inference_api.settings import PREFIX, Group, Settings, SettingsError
from inference_api.upstream.failures import Failure
from inference_api.upstream.retry import GiveUp, Retry


class Options(Group):
    usage: Literal["off", "log", "registry"] = Field(
        default="off", description="where the usage record of each request goes: log, registry (the control plane)"
    )
    usage_spool: Path | None = Field(
        default=None,
        description="directory for usage records while the control plane is away, 64 MiB; unset: they wait in memory",
    )


def build(core: Core, settings: Settings) -> Feature | None:
    """Raises SettingsError if there is no control plane, or the spool is no directory."""
    options = settings.of(Options)
    if options.usage == "off":
        return None
    if options.usage == "log":
        records = UsageRecords(core.boot, core.instance, core.outside.write_usage or (lambda record: None))
        core.provide(Tally(records))
        return _feature(records, collect=lambda: families({"logged": records.made}, None))
    if core.registry_client is None:
        raise SettingsError(
            f"{PREFIX}USAGE='registry': needs the URL of the control plane; set {PREFIX}REGISTRY_URL, or USAGE to log"
        )
    spool = None if options.usage_spool is None else _spool(options.usage_spool, core.boot)
    deliveries = core.provided(Deliveries)
    delivery = Delivery(
        posting(core.registry_client),
        spool,
        seconds_left=core.seconds_left,
        rand=core.rand.random,
        on_delivered=(lambda lines: None) if deliveries is None else deliveries.tell,
    )
    records = UsageRecords(core.boot, core.instance, delivery.put)
    core.provide(Tally(records, delivery))
    return _feature(
        records, collect=lambda: families(delivery.results, delivery), tasks=(delivery.run,), close=delivery.close
    )


def _feature(records: UsageRecords, **parts: Any) -> Feature:
    return Feature(
        "usage",
        fields=END_USER,
        failed=_failed,
        annotate=records.annotate,
        record=records.record,
        leg=records.leg,
        **parts,
    )


def _spool(directory: Path, boot: str) -> Spool:
    if directory.exists() and not directory.is_dir():
        raise SettingsError(f"{PREFIX}USAGE_SPOOL={str(directory)!r}: is not a directory; set it to one, or unset it")
    return Spool(directory, boot)


def _failed(call: Call, failure: Failure, decision: Retry | GiveUp) -> None:
    """Note an attempt that failed, for `attempt_details`, and when the next one begins.

    Only that: a coroutine around each attempt would cost more than all else of a record.
    """
    state, now = cast(dict[str, Any], call.state), perf_counter()
    status = 0 if failure.reply is None else failure.reply.status
    tried: Try = failure.backend.label, failure.outcome._value_, status, state.get(STARTED), now
    state.setdefault(FAILED, []).append(tried)
    state[STARTED] = now + (decision.delay if isinstance(decision, Retry) else 0.0)


def families(results: "Counter[str] | dict[str, int]", delivery: Delivery | None) -> Iterator[Family]:
    text = "Usage records by what became of them; a spooled one is delivered later."
    yield counter("usage_records", text, ("result",), [((result,), float(n)) for result, n in dict(results).items()])
    if delivery is None:
        return
    dropped = [((reason,), float(n)) for reason, n in dict(delivery.dropped).items()]
    yield counter("usage_dropped", "Usage records that are lost.", ("reason",), dropped)
    waiting = [((), float(len(delivery.outbox)))]
    yield gauge("usage_queue_records", "Usage records in memory that the control plane does not have yet.", (), waiting)
    size = 0 if delivery.spool is None else delivery.spool.size
    yield gauge("usage_spool_bytes", "Bytes of usage records on disk that wait.", (), [((), float(size))])


FEATURE = Switch(build, Options)
