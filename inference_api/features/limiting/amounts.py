"""How many tokens a request may use, estimated before it is sent, and what it has used in the end."""

from collections.abc import Mapping
from typing import Any

from inference_api.core import Core
from inference_api.models import Call, Route
from inference_api.routing.fleet import Model

# What generates tokens; other routes only read.
_GENERATES = frozenset(
    {
        *("chat_completions", "chat_completions_batch", "completions", "responses", "messages", "invocations"),
        *("transcriptions", "translations", "realtime"),
    }
)
# All three are read, since engines take the one that their API names.
FIELDS = ("max_tokens", "max_completion_tokens", "max_output_tokens", "n")
_MOST = FIELDS[:3]
# Media in a JSON body: its bytes are no measure of tokens. It is looked for in the first bytes, as a search takes time.
_MEDIA = b";base64,"
_SEARCHED = 1 << 20
# Running means: their first value, and the weight of each new one
_FIRST = 1000.0
_WEIGHT = 1 / 16
# Models whose means are kept
_MODELS = 10_000


class Means:
    """The running means of a model's tokens: of the input, and of the output per choice."""

    __slots__ = ("input", "output")

    def __init__(self) -> None:
        self.input = self.output = _FIRST

    def add(self, input_tokens: int | None, output_tokens: int | None, choices: int) -> None:
        """Note what an engine has reported; None: not reported."""
        if input_tokens is not None:
            self.input += (input_tokens - self.input) * _WEIGHT
        if output_tokens is not None:
            self.output += (output_tokens / choices - self.output) * _WEIGHT


class Estimates:
    """The means of all models, and estimates by them; shared by the features that reserve tokens."""

    def __init__(self) -> None:
        # By model; those of models whose requests nobody has estimated are not learned.
        self.known: dict[str, Means] = {}

    @classmethod
    def shared(cls, core: Core) -> "Estimates":
        """The one of this router."""
        found = core.provided(cls)
        if found is None:
            core.provide(found := cls())
        return found

    def means_of(self, model: str) -> Means:
        found = self.known.get(model)
        if found is None:
            if len(self.known) >= _MODELS:
                self.known.clear()
            found = self.known[model] = Means()
        return found

    def of(self, call: Call, model: Model) -> tuple[int, int]:
        """Tokens of input and output that the request may take."""
        means, route = self.means_of(model.name), call.route
        read = input_estimate(route, call.body, model.max_model_len, means)
        return read, output_estimate(route, call.fields, means)


def input_estimate(route: Route, body: bytes, most: int | None, means: Means) -> int:
    """Tokens of the prompt. `most`: what the model takes, None: not known."""
    size = len(body)
    if route.multipart or body.find(_MEDIA, 0, _SEARCHED) >= 0:
        return round(means.input)
    tokens = (size + 3) // 4
    return tokens if most is None or tokens <= most else most


def output_estimate(route: Route, fields: Mapping[str, Any], means: Means) -> int:
    """The most tokens that the request allows, for all its choices; the mean if it names no maximum."""
    if route.label not in _GENERATES:
        return 0
    most = 0
    for name in _MOST:
        value = fields.get(name)
        if value is not None:
            # Not a list, which is made for each request
            value = value if type(value) is int else _number(value)
            if value > most:
                most = value
    choices = choices_of(fields)
    if most:
        return most * choices
    return round(means.output * choices)


def choices_of(fields: Mapping[str, Any]) -> int:
    value = fields.get("n")
    return 1 if value is None else max(_number(value), 1)


def _number(value: Any) -> int:
    """A number as engines read it, also from a text; 0: none."""
    if type(value) is int:
        return value
    try:
        return int(float(value)) if isinstance(value, str | float) else 0
    except (ValueError, OverflowError):
        return 0
