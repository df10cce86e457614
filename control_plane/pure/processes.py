"""Engines as processes of this machine: the file that has their commands, and what is decided of them."""

import re
from collections.abc import Mapping
from typing import Annotated, NamedTuple
from urllib.parse import urlsplit

import yaml
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, field_validator

from control_plane.errors import problems_of
from inference_api.routing.catalogue import CatalogueError, YamlLoader
from inference_api.routing.wording import suggestion

_SHOWN = 5
_SECRET = re.compile(r"(TOKEN|SECRET|PASSWORD|KEY)$")
_Text = Annotated[str, StringConstraints(pattern=r"^[^\x00]*$", max_length=32 * 1024)]
_Variable = Annotated[str, StringConstraints(pattern=r"^[^=\x00]+$", max_length=256)]


class ProcessesError(ValueError):
    """The file cannot be used; a sentence for each key, with the fix."""


class Command(BaseModel):
    """A process. `health`: URL that answers 200 when it is ready. `stop_after`: seconds from SIGTERM to SIGKILL.

    `environment`: beside that of the control plane. `cwd`: None: that of the control plane. `starts`: with it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    name: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$")]
    command: Annotated[tuple[_Text, ...], Field(min_length=1, max_length=1_000, repr=False)]
    environment: Annotated[Mapping[_Variable, _Text], Field(repr=False)] = {}
    cwd: Annotated[str, StringConstraints(pattern=r"^/[^\x00]*$")] | None = None
    health: str
    stop_after: Annotated[float, Field(ge=0, le=3600)] = 600
    starts: bool = False

    @field_validator("health")
    @classmethod
    def _url(cls, value: str) -> str:
        parts = urlsplit(value)
        # Raises ValueError for what is no port.
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.port == 0 or parts.username is not None:
            raise ValueError("must be a URL such as http://127.0.0.1:8001/health")
        return value

    @property
    def place(self) -> str:
        """Host and port of its health, as labels of backends have them."""
        return urlsplit(self.health).netloc

    @property
    def has_secrets(self) -> bool:
        return any(_SECRET.search(name) for name in self.environment)


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True)

    processes: Annotated[tuple[Command, ...], Field(max_length=100)]


def commands_of(text: str) -> tuple[Command, ...]:
    """The processes of a YAML text. Raises ProcessesError."""
    try:
        found = _File.model_validate(yaml.load(text, Loader=YamlLoader)).processes
    except (yaml.YAMLError, CatalogueError, RecursionError) as exc:
        # An error of the scanner has lines of the text, which may hold secrets.
        mark = getattr(exc, "problem_mark", None)
        where = "" if mark is None else f" in line {mark.line + 1}: {getattr(exc, 'problem', None) or 'syntax error'}"
        raise ProcessesError(str(exc) if isinstance(exc, CatalogueError) else f"it is not YAML{where}") from None
    except ValidationError as exc:
        raise ProcessesError("; ".join(_reasons(exc))) from None
    names = [one.name for one in found]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ProcessesError(f"two processes have the name {twice!r}: give each its own")
    return found


def _reasons(exc: ValidationError) -> list[str]:
    kinds = [one["type"] for one in exc.errors(include_url=False, include_context=False, include_input=False)]
    return [_reason(kind, *problem) for kind, problem in zip(kinds, problems_of(exc), strict=False)][:_SHOWN]


def _reason(kind: str, param: str, message: str) -> str:
    place, _, key = param.rpartition(".")
    match kind:
        case "extra_forbidden":
            near = suggestion(key, [*Command.model_fields, *_File.model_fields])
            return f"{place or 'file'}: unknown key {key[:64]!r}{f'; did you mean {near!r}?' if near else ''}"
        case "missing":
            return f"{param}: is missing"
        case "tuple_type" | "too_short" if key == "command":
            return f'{param}: must be a list, such as ["vllm", "serve", "gpt2"]: no shell reads it'
        case "tuple_type":
            return f"{param}: must be a list"
        case "model_type" | "mapping_type" | "dict_type":
            return f"{param or 'file'}: must be a mapping"
        case "string_type":
            return f"{param}: must be text; put quotes around it"
        case "string_pattern_mismatch" if key == "name":
            return f"{param}: must be letters, digits and . _ -, at most 63, the first a letter or digit"
        case "string_pattern_mismatch" if key == "cwd":
            return f"{param}: must be an absolute path"
    return f"{param}: {re.sub(r'^(input|string) should ', 'must ', message)}"


class Pace(NamedTuple):
    """Seconds, but for `failures`. `loading`, `ready`: between two checks of health, and `answers`: for its answer.

    `first`, `longest`: pauses before a process that has ended starts again, which double; after `steady` seconds of
    being ready the next pause is the first again. `failures`: checks in a row until what was ready is failing.
    `ending`: from SIGTERM to SIGKILL at most, when the control plane ends.
    """

    loading: float = 1.0
    ready: float = 5.0
    answers: float = 5.0
    first: float = 1.0
    longest: float = 60.0
    steady: float = 60.0
    failures: int = 3
    ending: float = 10.0


def next_pause(pace: Pace, last: float | None, ready_for: float) -> float:
    """Seconds until a process that has ended by itself starts again. `last`: the pause before this one."""
    if last is None or ready_for >= pace.steady:
        return pace.first
    return min(pace.longest, 2 * last)


def ended_because(code: int, signals: Mapping[int, str]) -> str:
    """A clause. `code`: that of the supervisor: 128 and the number of a signal. `signals`: their names."""
    if code > 128 and code - 128 in signals:
        return signals[code - 128]
    what = {126: ": the command is not executable", 127: ": the command was not found"}.get(code, "")
    return f"exit code {code}{what}"
