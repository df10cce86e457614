"""Entries of the catalogue as people type them: JSON, or a form; what is wrong with them, and what would change."""

import json
from typing import Any, NamedTuple

from pydantic import ValidationError

from control_plane.errors import Invalid, Problem, Refused
from control_plane.http.console.forms import Form
from control_plane.pure import diff
from control_plane.pure.diff import Diff
from control_plane.services import models
from inference_api.app import ENTRY
from inference_api.routing.catalogue import reasons
from inference_api.routing.entries import CatalogueEntry
from registry_stub.store import Stored

# Fields of a new model's form that are texts of the entry
_TEXTS = ("name", "owner", "engine", "served_model_name")
# Keys of `hardware`
HARDWARE = ("gpu", "gpu_count", "gpu_memory_gib")
_PRICES = ("input", "cached_input", "output", "request")


class Draft(NamedTuple):
    """An entry that can be stored. `diff`: to what is stored now."""

    entry: CatalogueEntry
    diff: Diff


def read(text: str, name: str | None = None) -> CatalogueEntry:
    """The entry of this JSON; `name`: which it must have. Raises Invalid, with a sentence for each key."""
    value = _parsed(text)
    if not isinstance(value, dict):
        raise Invalid(Problem("entry", 'must be an object, such as {"name": "llama-3-8b", "backends": [...]}'))
    return checked(value, name)


def checked(value: dict[str, Any], name: str | None = None, param: str = "entry") -> CatalogueEntry:
    """The entry of this value. Raises Invalid."""
    try:
        # From JSON: the messages have its words, not those of Python.
        entry = ENTRY.model_validate_json(json.dumps(value))
    except ValidationError as exc:
        raise Invalid(*(Problem(param, sentence) for sentence in reasons(exc))) from None
    if name is not None and entry.name != name:
        message = f"name: this is the page of {name!r}. A model keeps its name; make a new one for {entry.name!r}."
        raise Invalid(Problem(param, message))
    return entry


def draft(entry: CatalogueEntry, stored: Stored | None) -> Draft:
    before = None if stored is None else json.loads(stored.body)
    return Draft(entry, diff.of_values(before, models.preview(stored, entry)))


def pretty(body: bytes | str) -> str:
    """JSON over lines, in the order that it has; as it is, if it cannot be read."""
    try:
        return json.dumps(json.loads(body), indent=2, ensure_ascii=False)
    except ValueError:
        return body if isinstance(body, str) else body.decode()


def same(etag: str) -> models.Check:
    """Refuses the change of a model that is no longer the one with this ETag; "": that there was none."""

    def check(stored: Stored | None) -> None:
        if (stored.etag if stored else "") == etag:
            return
        gone = stored is None
        message = "Somebody has deleted this model meanwhile." if gone else "Somebody has changed this model meanwhile."
        raise Refused(412, "precondition_failed", message)

    return check


def unused(stored: Stored | None) -> None:
    """Refuses to replace a model by a new one."""
    if stored is not None:
        message = (
            f"The model {stored.entry.name!r} exists already. Choose another name, or change that one on its page."
        )
        raise Refused(409, "name_taken", message, param="name", errors=[Problem("name", message)])


def of_form(form: Form) -> dict[str, Any]:
    """What was filled in of a new model's form. Raises Invalid."""
    found: dict[str, Any] = {name: form.text(name) for name in _TEXTS if form.text(name)}
    found["name"] = form.text("name")
    if aliases := form.words("aliases"):
        found["aliases"] = aliases
    found["backends"] = [{"url": url} for url in form.words("backends")]
    if not found["backends"]:
        raise Invalid(Problem("backends", "give the URL of one at least: of an engine, with its port"))
    if (length := form.number("max_model_len")) is not None:
        found["max_model_len"] = length
    gpu, count, memory = form.optional("gpu"), form.number("gpu_count"), form.decimal("gpu_memory_gib")
    hardware = dict(zip(HARDWARE, (gpu, count, memory), strict=True))
    if given := {name: value for name, value in hardware.items() if value is not None}:
        found["hardware"] = given
    price = {name: value for name in _PRICES if (value := form.decimal(name)) is not None}
    if price:
        missing = [name for name in ("input", "output") if name not in price]
        if missing:
            raise Invalid(*(Problem(name, "a price has this, too; 0 is possible") for name in missing))
        found["price"] = price
    return found


def _parsed(text: str) -> Any:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) < len(pairs):
            names = [name for name, _ in pairs]
            raise Invalid(
                Problem("entry", f"the key {next(one for one in names if names.count(one) > 1)!r} is given twice")
            )
        return made

    def constant(name: str) -> None:
        raise Invalid(Problem("entry", f"{name} is no number of JSON"))

    try:
        return json.loads(text, object_pairs_hook=once, parse_constant=constant)
    except json.JSONDecodeError as exc:
        raise Invalid(Problem("entry", f"is not JSON: {exc.msg}, in line {exc.lineno}, column {exc.colno}")) from None
    except (ValueError, RecursionError):
        raise Invalid(Problem("entry", "has numbers or nesting beyond what can be read")) from None
