"""How many tokens a request may use, estimated before it is sent, and what it has used in the end."""

from collections.abc import Callable, Mapping
from typing import Any

from inference_api.core import Core
from inference_api.models import Call
from inference_api.routing.fleet import Model

# What generates tokens; other routes only read.
_GENERATES = frozenset(
    {
        *("chat_completions", "chat_completions_batch", "completions", "responses", "messages", "invocations"),
        *("transcriptions", "translations", "realtime"),
    }
)
# All three are read, since engines take the one that their API names.
FIELDS = _TOKENS, _COMPLETION, _OUTPUT, _CHOICES = "max_tokens", "max_completion_tokens", "max_output_tokens", "n"
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

    def learn(self, model: str, read: int | None, made: int | None, fields: Mapping[str, Any]) -> None:
        """Note what an engine has reported of a request with these fields; None: not reported."""
        means = self.known.get(model)
        if means is None:
            return
        if read is not None:
            means.input += (read - means.input) * _WEIGHT
        if made is not None:
            choices = fields.get(_CHOICES)
            each = made if choices is None else made / max(_number(choices), 1)
            means.output += (each - means.output) * _WEIGHT

    def of(self, call: Call, model: Model) -> tuple[int, int]:
        """Tokens of input and output that the request may take."""
        means = self.known.get(model.name) or self.means_of(model.name)
        # By place: by name costs ten times as much.
        route, body, get = call[0], call[3], call[8].get
        most = model.max_model_len
        tokens = (len(body) + 3) // 4
        if most is not None and tokens > most:
            tokens = most
        # A form, or media. Few prompts have a semicolon, which is found much faster than all of it.
        if route.multipart or (body.find(b";", 0, _SEARCHED) >= 0 and body.find(_MEDIA, 0, _SEARCHED) >= 0):
            tokens = round(means.input)
        return tokens, _output(get, means) if route.label in _GENERATES else 0


def _output(get: Callable[[str], Any], means: Means) -> int:
    """The most tokens that the request allows, for all its choices; the mean if it names no maximum."""
    most, given = 0, get(_TOKENS)
    if given is not None:
        most = given if type(given) is int else _number(given)
    given = get(_COMPLETION)
    if given is not None:
        most = max(most, _number(given))
    given = get(_OUTPUT)
    if given is not None:
        most = max(most, _number(given))
    given = get(_CHOICES)
    choices = 1 if given is None else max(_number(given), 1)
    return most * choices if most > 0 else round(means.output * choices)


def _number(value: Any) -> int:
    """A number as engines read it, also from a text; 0: none."""
    if type(value) is int:
        return value
    try:
        return int(float(value)) if isinstance(value, str | float) else 0
    except (ValueError, OverflowError):
        return 0
