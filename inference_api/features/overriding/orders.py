"""The document of GET /overrides: what operators have ordered for backends, and until when. Pure."""

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import orjson

from inference_api.policy.document import unix_time

# Overrides of one document
MOST = 10_000
_ID = re.compile(r"ovr_[0-9A-HJKMNP-TV-Z]{26}")
_LONGEST_LABEL, _LONGEST_REASON = 2048, 500
_ACTIONS = frozenset({"drain", "out", "reset_circuit"})


class Order(NamedTuple):
    """One override. `backend`: a label; `model`: None for all; `ends`: Unix seconds; None: by hand."""

    id: str
    backend: str
    model: str | None
    action: Literal["drain", "out", "reset_circuit"]
    reason: str
    ends: float | None


class Obeyed:
    """The ids that this router obeys now, or has obeyed, for its reports."""

    def __init__(self) -> None:
        self.ids: list[str] = []


def read_orders(content: Iterable[bytes]) -> tuple[list[Order], set[str]]:
    """The overrides of a document, and unknown actions, which are left out. Raises ValueError."""
    document = orjson.loads(b"".join(content))
    listed = document.get("overrides") if isinstance(document, dict) else None
    if not isinstance(listed, list):
        raise ValueError("it has no list of `overrides`")
    if len(listed) > MOST:
        raise ValueError(f"it has {len(listed)} overrides; the limit is {MOST}")
    orders: list[Order] = []
    unknown: set[str] = set()
    for place, one in enumerate(listed):
        try:
            order = _order(one)
        except (KeyError, TypeError, ValueError) as exc:
            reason = f"{exc.args[0]} is required" if isinstance(exc, KeyError) else exc
            raise ValueError(f"overrides.{place}: {reason}") from None
        if order.action in _ACTIONS:
            orders.append(order)
        else:
            unknown.add(order.action[:20])
    return orders, unknown


def _order(one: Any) -> Order:
    if not isinstance(one, dict):
        raise ValueError("must be an object")
    backend, model, action = _text(one, "backend", _LONGEST_LABEL), one["model"], _text(one, "action", 64)
    identity, ends = _text(one, "id", 64), one["expires_at"]
    if not _ID.fullmatch(identity):
        raise ValueError("id must be `ovr_` and 26 characters")
    if model is not None and not isinstance(model, str):
        raise ValueError("model must be a name, or null")
    reason = "".join(c if c.isprintable() else " " for c in _text(one, "reason", 1 << 20)[:_LONGEST_REASON])
    return Order(identity, backend, model, action, reason, None if ends is None else unix_time(ends))  # type: ignore[arg-type]


def _text(one: dict[str, Any], name: str, longest: int) -> str:
    value = one[name]
    if not isinstance(value, str) or not 0 < len(value) <= longest:
        raise ValueError(f"{name} must be a text of 1 to {longest} characters")
    return value


class Orders:
    """Those of a document that hold at a time, by backend and model."""

    def __init__(self, listed: Sequence[Order] = (), now: float = 0.0) -> None:
        self.held = [order for order in listed if order.ends is None or order.ends > now]
        # Unix seconds between which all of this is so: the last end that has come, and the next one
        ends = [order.ends for order in listed if order.ends is not None]
        self._since = max((end for end in ends if end <= now), default=-math.inf)
        self._until = min((end for end in ends if end > now), default=math.inf)
        self.resets = [order for order in self.held if order.action == "reset_circuit"]
        self._lasting: dict[tuple[str, str | None], Order] = {}
        for order in self.held:
            if order.action != "reset_circuit":
                place = order.backend, order.model
                known = self._lasting.get(place)
                self._lasting[place] = order if known is None else _stronger(known, order)

    def are_old(self, now: float) -> bool:
        """Whether others of the document hold now: one has ended, or the clock was set back before an end."""
        return not self._since <= now < self._until

    def of(self, backend: str, model: str) -> Order | None:
        """What is ordered for this backend of this model: `out` wins over `drain`."""
        everywhere, here = self._lasting.get((backend, None)), self._lasting.get((backend, model))
        return here if everywhere is None else _stronger(everywhere, here)

    def backends(self) -> Iterator[str]:
        """The labels of all backends with a lasting order."""
        return (backend for backend, _ in self._lasting)

    def count(self, action: str) -> int:
        return sum(order.action == action for order in self.held)


def _stronger(one: Order, other: Order | None) -> Order:
    return one if other is None or other.action != "out" or one.action == "out" else other
