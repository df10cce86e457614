"""The tokens of each request, for its usage record, its cost and its limits.

Engines count the tokens of a stream only if they are asked to: the router asks, and takes the event with the answer out
of the stream again, unless the client asked, too.
"""

from collections.abc import Awaitable
from typing import Any, Literal, cast

from inference_api.core import Core
from inference_api.feature import Feature, Switch
from inference_api.features import usage
from inference_api.features.delivery.metered import Calibration, metered
from inference_api.features.delivery.records import METERED, Metered
from inference_api.http.turns import Turns
from inference_api.models import OK, Call, Edit, EventFilter, Reply, Send
from inference_api.observe.account import Record
from inference_api.policy.options import Options as PolicyOptions
from inference_api.relay.dialects import Event
from inference_api.routing.entries import CatalogueEntry, EntryKey
from inference_api.routing.fleet import Model
from inference_api.settings import Settings
from inference_api.upstream.stream_options import NAME, add, asks, override

KEY: EntryKey[str] = EntryKey("usage", Literal["ask", "leave"], "ask")
_ASKED = frozenset({"chat_completions", "completions"})
_ABSENT = object()
_REPORTED = ("reported",)
# In every report of tokens, and in no other event: within a text its quote is escaped.
_MARKER = b'_tokens"'
_CHOICES, _NO_CHOICES, _USAGE = b'"choices"', b'"choices":[]', b'"usage":{'


def build(core: Core, settings: Settings) -> Feature:
    """Always built: a price in the catalogue turns it on for its model."""
    metering = Metering(core)
    is_wanted = settings.of(usage.Options).usage != "off" or settings.of(PolicyOptions).policy is not None
    return Feature(
        "metering",
        fields=(NAME,),
        ask=metering.ask,
        annotate=metering.annotate,
        leg=metering.leg,
        for_model=None if is_wanted else has_price,
    )


def has_price(entry: CatalogueEntry) -> bool:
    return getattr(entry, "price", None) is not None


def is_not_a_report(event: bytes) -> bool:
    """Whether an event is more than the tokens of the whole stream: the client gets those only if it asked."""
    if event.find(_NO_CHOICES) >= 0 and event.find(_USAGE) >= 0 and event.count(_CHOICES) == 1:
        # As nearly all engines write it; a text cannot have it, as its quotes are escaped.
        return False
    document = Event(event).document
    return document.get("choices") != [] or not isinstance(document.get("usage"), dict)


FILTER = EventFilter(_MARKER, is_not_a_report)


class Metering:
    """Asks engines for the tokens of streams, and puts those of each request into its state, under METERED."""

    def __init__(self, core: Core) -> None:
        self._fleet = core.fleet
        self._turns: Turns = core.admission.turns
        self.calibration = Calibration()

    def ask(self, send: Send) -> Send:
        def asking(call: Call, model: Model) -> Awaitable[Reply]:
            if not call[2] or call[0].label not in _ASKED or KEY.of(model.entry) == "leave":
                return send(call, model)
            options = call.fields.get(NAME, _ABSENT)
            if options is _ABSENT:
                return _asked(send, call, model, add(call.body))
            # What an engine refuses is the client's own affair.
            if asks(options) or not (options is None or isinstance(options, dict)):
                return send(call, model)
            return self._override(send, call, model)

        return asking

    async def _override(self, send: Send, call: Call, model: Model) -> Reply:
        edit = await self._turns.run(override(call.body))
        return await (send(call, model) if edit is None else _asked(send, call, model, edit))

    def annotate(self, record: Record, extra: dict[str, Any]) -> None:
        state, counts, events = cast(dict[str, Any], record[21]), record[13], record[14]
        if not events and counts[0] is not None and counts[2] is not None and 200 <= record[24] < 300:
            # Nearly every JSON answer
            state[METERED] = counts + _REPORTED
            return
        if METERED in state:
            # A feature that answered by itself knows better.
            return
        model = record[2]
        tokens: Metered = metered(record, self.calibration.of(model))
        state[METERED] = tokens
        if events and record[6] is OK and tokens[4] == "reported" and tokens[2]:
            self.calibration.learn(model, tokens[2], events, len(self._fleet.served))

    def leg(self, record: Record, extra: dict[str, Any]) -> None:
        state = cast(dict[str, Any], record.state)
        if METERED not in state:
            state[METERED] = metered(record, self.calibration.of(record.model_name))


async def _asked(send: Send, call: Call, model: Model, edit: Edit) -> Reply:
    # Avoids `_replace`, which takes all fields by name.
    call = tuple.__new__(Call, (*call[:-1], (*call[-1], edit)))
    reply = await send(call, model)
    if reply.filter is None:
        reply.filter = FILTER
    return reply


FEATURE = Switch(build, keys=(KEY,))
