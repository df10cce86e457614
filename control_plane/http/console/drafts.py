"""A version of a prompt as a form: rows of messages and variables, a text, or JSON; and as text, for what differs."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from control_plane.errors import Invalid, Problem
from control_plane.http.console.forms import Form
from control_plane.pure.chat import Turn
from control_plane.pure.diff import pretty

ROLES = ("system", "developer", "user", "assistant")
TYPES = ("string", "number", "enum")
# Fields of a row of a variable
_FIELDS = ("name", "type", "required", "trusted", "default", "values", "max_length")
_EMPTY: Mapping[str, str] = {**dict.fromkeys(_FIELDS, ""), "type": "string"}


@dataclass(frozen=True)
class Draft:
    """What a form has. `shape`: messages, text or json. `variables`: rows of texts by field."""

    shape: str = "messages"
    turns: tuple[Turn, ...] = (Turn("system", ""),)
    text: str = ""
    variables: tuple[Mapping[str, str], ...] = field(default_factory=tuple)
    document: str = ""
    note: str = ""

    def longer(self, what: str) -> "Draft":
        """With room for one more message or variable."""
        if what == "message":
            return replace(self, turns=(*self.turns, Turn("user", "")))
        return replace(self, variables=(*self.variables, _EMPTY))

    def fields(self) -> dict[str, Any]:
        """As POST /prompts/{name}/versions takes them. Raises Invalid."""
        note = self.note.strip() or None
        if self.shape == "json":
            return {**_document(self.document), "note": note}
        variables = {one["name"]: _variable(one) for one in self.variables if one.get("name")}
        if len(variables) < sum(bool(one.get("name")) for one in self.variables):
            raise Invalid(Problem("variables", "two have the same name"))
        if self.shape == "text":
            return {"text": self.text, "variables": variables, "note": note}
        messages = [turn._asdict() for turn in self.turns if turn.content.strip()]
        if not messages:
            raise Invalid(Problem("messages", "write one"))
        return {"messages": messages, "variables": variables, "note": note}


def of(version: Mapping[str, Any] | None, as_json: bool) -> Draft:
    """To begin with: this version; none: an empty one. JSON where rows do not have all of it."""
    if version is None:
        return Draft("json", document=_written({"messages": []})) if as_json else Draft()
    variables = version.get("variables", {})
    document = _written({name: version[name] for name in ("messages", "text", "variables") if name in version})
    if as_json or not _is_plain(version):
        return Draft("json", document=document)
    rows = tuple({"name": name, **_row(one)} for name, one in variables.items())
    if "text" in version:
        return Draft("text", text=version["text"], variables=rows)
    return Draft(turns=tuple(Turn(one["role"], one["content"]) for one in version["messages"]), variables=rows)


def typed(form: Form) -> Draft:
    contents = [text.replace("\r\n", "\n") for text in form.several("content")]
    turns = tuple(Turn(role, text) for role, text in zip(form.several("role"), contents, strict=False))
    columns = [form.several(f"variable_{name}") for name in _FIELDS]
    rows = tuple(
        {name: value.replace("\r\n", "\n").strip() for name, value in zip(_FIELDS, row, strict=True)}
        for row in zip(*columns, strict=False)
    )
    return Draft(form.text("shape"), turns, form.raw("text"), rows, form.raw("document"), form.raw("note"))


def as_text(version: Mapping[str, Any]) -> str:
    """Line by line: each message under its role, then the variables."""
    parts = [version["text"]] if "text" in version else []
    for one in version.get("messages", ()):
        content = one["content"] if isinstance(one["content"], str) else pretty(one["content"])
        more = {name: value for name, value in one.items() if name not in ("role", "content")}
        parts.append(f"{one['role']}:\n{content}{f'{chr(10)}{pretty(more)}' if more else ''}")
    if variables := version.get("variables"):
        parts.append(f"variables:\n{pretty(variables)}")
    return "\n\n".join(parts)


def _is_plain(version: Mapping[str, Any]) -> bool:
    """Whether rows can show all of it."""
    return all(
        one.keys() == {"role", "content"} and isinstance(one["content"], str) and one["role"] in ROLES
        for one in version.get("messages", ())
    ) and all("\n" not in value for one in version.get("variables", {}).values() for value in one.get("values") or ())


def _row(variable: Mapping[str, Any]) -> dict[str, str]:
    found = {
        "type": variable.get("type", "string"),
        "required": "1" if variable.get("required") else "",
        "trusted": "1" if variable.get("trusted") else "",
        "default": "" if variable.get("default") is None else str(variable["default"]),
        "values": "\n".join(variable.get("values") or ()),
    }
    return {**found, "max_length": str(variable["max_length"]) if "max_length" in variable else ""}


def _variable(row: Mapping[str, str]) -> dict[str, Any]:
    """Only what was given: nothing that is a default is frozen in a version. Raises Invalid."""
    found: dict[str, Any] = {} if row["type"] == "string" else {"type": row["type"]}
    found |= {name: True for name in ("required", "trusted") if row.get(name)}
    if default := row.get("default"):
        found["default"] = _numeric(row, "default") if row["type"] == "number" else default
    if values := row.get("values"):
        found["values"] = [line.strip() for line in values.split("\n") if line.strip()]
    if row.get("max_length"):
        found["max_length"] = _numeric(row, "max_length")
    return found


def _numeric(row: Mapping[str, str], name: str) -> int | float:
    """Raises Invalid."""
    text = row[name]
    try:
        return int(text) if text.lstrip("-").isdecimal() else float(text)
    except ValueError:
        raise Invalid(Problem(f"variables.{row['name']}.{name}", f"must be a number, not {text[:40]!r}")) from None


def _document(text: str) -> dict[str, Any]:
    """Raises Invalid."""
    try:
        found = json.loads(text)
    except ValueError as exc:
        raise Invalid(Problem("document", f"is not JSON: {exc}")) from None
    if not isinstance(found, dict) or not found.keys() <= {"messages", "text", "variables"}:
        raise Invalid(Problem("document", "must be an object of messages or text, and variables"))
    return found


def _written(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False)
