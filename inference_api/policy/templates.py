"""Stored prompts, compiled: a version becomes JSON text with holes, and rendering fills them. Pure.

`{{name}}` in string values is all the syntax there is. Holes are within JSON strings, and what fills them is escaped as
a part of one: it cannot end its string, and is not looked at again.
"""

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import orjson

from inference_api.errors import (
    PromptNotFound,
    PromptVariableInvalid,
    PromptVariableMissing,
    PromptVariableUnknown,
)
from inference_api.policy.document import USED, StoredPrompt, Variable, Version

DEFAULT = "production"
# Routes by label, and the member of a body that holds the prompt there
MEMBERS = {"chat_completions": "messages", "responses": "input", "completions": "prompt"}


class Hole(NamedTuple):
    """The place of a variable, within a JSON string."""

    variable: str


class Template:
    """A version of a prompt. `name`: as in logs, `support@2`."""

    __slots__ = ("_parts", "_prompt", "_variables", "is_text", "name", "version")

    def __init__(self, prompt: str, version: Version) -> None:
        self.name = f"{prompt}@{version.version}"
        self.version = version
        self.is_text = version.text is not None
        self._prompt = prompt
        self._variables = version.variables
        self._parts = _joined(_parts_of_text(version.text) if version.text is not None else _parts_of(version))

    def render(self, given: Mapping[str, Any]) -> bytes:
        """JSON: a string, or objects with commas between them. Raises RouterError if a variable is not as declared."""
        texts = self._texts(given)
        return b"".join([part if type(part) is bytes else texts[part.variable] for part in self._parts])  # type: ignore[union-attr]

    def _texts(self, given: Mapping[str, Any]) -> dict[str, bytes]:
        """The variables as parts of JSON strings."""
        for name in given:
            if name not in self._variables:
                raise PromptVariableUnknown(self._prompt, name)
        texts = {}
        for name, variable in self._variables.items():
            if name in given:
                value = given[name]
                problem = _problem(variable, value)
                if problem is not None:
                    raise PromptVariableInvalid(self._prompt, name, problem)
            elif variable.required:
                raise PromptVariableMissing(self._prompt, name)
            else:
                value = "" if variable.default is None else variable.default
            texts[name] = _escaped(_shown(value))
        return texts


class Prompts:
    """The prompts of a policy by name; a version is compiled when it is first asked for."""

    def __init__(self, prompts: Iterable[StoredPrompt]) -> None:
        self._prompts = {prompt.name: prompt for prompt in prompts}
        self._templates: dict[tuple[str, int], Template] = {}

    def of(self, name: str, organisation: str | None) -> StoredPrompt | None:
        """The prompt of this name, if callers of this organisation may use it."""
        prompt = self._prompts.get(name)
        return prompt if prompt is not None and prompt.organisation in (None, organisation) else None

    def any(self, name: str) -> StoredPrompt | None:
        """The same for everybody."""
        return self._prompts.get(name)

    def template(self, prompt: StoredPrompt, version: int | str | None) -> Template:
        """`version`: a number, also as text, or a label; None: the default label. Raises PromptNotFound."""
        wanted = DEFAULT if version is None else version
        number = wanted if isinstance(wanted, int) else prompt.labels.get(wanted)
        if number is None and isinstance(wanted, str) and wanted.isascii() and wanted.isdigit() and len(wanted) < 16:
            number = int(wanted)
        found = self._templates.get((prompt.name, number)) if number is not None else None
        if found is None:
            one = next((one for one in prompt.versions if one.version == number), None)
            if one is None:
                raise PromptNotFound(prompt.name, version=str(wanted))
            found = self._templates[prompt.name, one.version] = Template(prompt.name, one)
        return found


def check_route(template: Template, label: str) -> None:
    """Raises PromptNotFound if the version has nothing for this route."""
    if template.is_text != (label == "completions"):
        kind, routes = ("a text", "completions") if template.is_text else ("messages", "chat completions and responses")
        prompt, _, version = template.name.rpartition("@")
        raise PromptNotFound(prompt, version=version, why=f"is {kind}, for {routes} only")


def _problem(variable: Variable, value: Any) -> str | None:
    """Why a value is not as declared."""
    if variable.type == "number":
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            return "must be a number"
    elif not isinstance(value, str):
        return "must be a string"
    elif variable.values is not None and value not in variable.values:
        return f"must be one of {', '.join(variable.values)}"
    if len(_shown(value)) > variable.max_length:
        return f"must have at most {variable.max_length} characters"
    return None


def _shown(value: str | int | float) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _escaped(text: str) -> bytes:
    """As a part of a JSON string."""
    try:
        return orjson.dumps(text)[1:-1]
    except orjson.JSONEncodeError:
        # A lone surrogate: JSON can spell it, UTF-8 cannot.
        return json.dumps(text).encode()[1:-1]


_Parts = Iterator[bytes | Hole]


def _parts_of(version: Version) -> _Parts:
    for number, message in enumerate(version.messages or ()):
        yield b'{"role":"%b"' % _escaped(message.role) if not number else b',{"role":"%b"' % _escaped(message.role)
        for name, value in message.model_dump().items():
            # No variable in a role: a caller could make a system message of it.
            if name != "role":
                yield b',"%b":' % _escaped(name)
                yield from _parts_of_value(value)
        yield b"}"


def _parts_of_value(value: Any) -> _Parts:
    if isinstance(value, str):
        yield from _parts_of_text(value)
    elif isinstance(value, dict):
        yield b"{"
        for number, (name, one) in enumerate(value.items()):
            yield b'%b"%b":' % (b"," if number else b"", _escaped(str(name)))
            yield from _parts_of_value(one)
        yield b"}"
    elif isinstance(value, list | tuple):
        yield b"["
        for number, one in enumerate(value):
            if number:
                yield b","
            yield from _parts_of_value(one)
        yield b"]"
    else:
        yield json.dumps(value).encode()


def _parts_of_text(text: str) -> _Parts:
    yield b'"'
    for number, part in enumerate(USED.split(text)):
        # Every second one is the name of a variable.
        yield Hole(part) if number % 2 else _escaped(part)
    yield b'"'


def _joined(parts: _Parts) -> tuple[bytes | Hole, ...]:
    """With as few parts as there can be."""
    joined: list[bytes | Hole] = []
    for part in parts:
        if joined and type(part) is bytes and type(joined[-1]) is bytes:
            joined[-1] += part
        else:
            joined.append(part)
    return tuple(joined)
