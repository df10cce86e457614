"""Records of requests that nobody sent, for what is told of requests."""

from typing import Any

from inference_api.models import Outcome
from inference_api.observe.account import Record

_ANSWERED = Record(
    request_id="id-1",
    route="chat_completions",
    model_name="m",
    asked="m",
    backend="a:8000",
    status=200,
    outcome=Outcome.OK,
    attempts=1,
    stream=False,
    code=None,
    took=0.1,
    first=None,
    overhead=0.001,
    tokens=(None, None, None, None),
    events=0,
    size=1,
    caller=None,
    model=None,
    client=None,
    path="/v1/chat/completions",
    extra={},
    state={},
    body_size=0,
    fields={},
    answered=200,
    accepted=0.001,
)


def record_of(model_name: str = "m", **fields: Any) -> Record:
    """A JSON answer of a model, but for these fields."""
    return _ANSWERED._replace(model_name=model_name, **fields)
