"""What has become of the usage records of this process, for its reports."""

import asyncio
from collections.abc import Mapping

from inference_api.features.delivery.records import UsageRecords
from inference_api.features.delivery.sender import Delivery

NOTHING: Mapping[str, int] = dict.fromkeys(("made", "delivered", "queued", "spooled", "dropped"), 0)


class Tally:
    """`delivery`: None if the control plane gets no records."""

    def __init__(self, records: UsageRecords, delivery: Delivery | None = None) -> None:
        self._records = records
        self._delivery = delivery

    def counts(self) -> Mapping[str, int]:
        """Made, delivered and dropped since the start; queued and spooled now."""
        delivery, made = self._delivery, {"made": self._records.made}
        if delivery is None:
            return {**NOTHING, **made}
        spool = delivery.spool
        return made | {
            "delivered": delivery.results["delivered"],
            "queued": len(delivery.outbox),
            "spooled": 0 if spool is None else spool.records,
            "dropped": sum(delivery.dropped.values()),
        }

    @property
    def flushed(self) -> asyncio.Event:
        """Set when the process stops, and all that could be sent was."""
        if self._delivery is not None:
            return self._delivery.flushed
        done = asyncio.Event()
        done.set()
        return done
