"""How a model is, with what is known of its engine; and lines of engines' logs as pages show them. Pure."""

import re

from control_plane.pure.fleet import ModelStanding, ModelStatus
from control_plane.pure.lifecycle import Standing

_COMING = ("waiting", "pulling", "loading")
# Milliseconds in which routers learn that an engine is ready
_LEARN = 30_000
# What terminals take for orders: colours, titles, links
_ORDERS = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)|[@-Z\\-_])")
# Control characters but tabs, and those that turn the direction of text
_UNSEEN = re.compile("[\x00-\x08\x0a-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def with_engine(model: ModelStanding, engine: Standing, starts: bool, now: int, whole: bool = True) -> ModelStanding:
    """What routers report, with what the driver sees. `starts`: a request starts it, and waits meanwhile.

    `now`: Unix milliseconds. Without `whole`: no reasons.
    """
    reason = f": {engine.reason.rstrip('.')}." if engine.reason and whole else "."
    known = "" if model.state == "unknown" else f" {model.sentence}"
    if engine.state == "failing":
        state: ModelStatus = "failing" if model.state in ("failing", "unknown") else "degraded"
        return model._replace(state=state, sentence=f"Its engine fails{reason}{known}", since=engine.since)
    if model.state not in ("failing", "unknown"):
        return model
    if engine.state == "stopped":
        if starts:
            return model._replace(state="ok", sentence="Its engine is stopped, and the next request starts it.")
        return model._replace(sentence=f"Its engine is stopped.{known}")
    is_new = engine.state == "ready" and engine.since is not None and now - engine.since < _LEARN
    if starts and model.state == "failing" and (engine.state in _COMING or is_new):
        sentence = "Its engine is ready; routers see it within seconds."
        if not is_new:
            sentence = f"Its engine is {engine.state}{reason} Requests wait for it."
        return model._replace(state="degraded", sentence=sentence, since=engine.since)
    if engine.state in _COMING:
        return model._replace(sentence=f"Its engine is {engine.state}{reason}{known}")
    return model


def shown_line(line: str) -> str:
    """A line without orders for terminals; other control characters as `\\x07`, so that they are seen."""
    return _UNSEEN.sub(lambda found: ascii(found[0])[1:-1], _ORDERS.sub("", line))
