"""Reads a policy, item by item: text of JSON or YAML, or a decoded document, to the compiled Policy.

`read` is a generator that yields between items: the thread that drives it gives way to the event loop there. A parser
that takes the whole text would hold the interpreter for 150 ms with 100,000 keys.
"""

import itertools
from collections.abc import Generator, Iterable, Iterator
from typing import Any

from pydantic import BaseModel, ValidationError

from inference_api.policy.document import SECTIONS, USED, Anonymous, Key, Organisation, StoredPrompt, Version
from inference_api.policy.json_items import Walk
from inference_api.policy.snapshot import KeyRow, Policy, Rows, packed
from inference_api.policy.yaml_items import items_of_yaml
from inference_api.routing import wording
from inference_api.threads import at_once

MAX_BYTES = 64 * 1024 * 1024
MAX_KEYS = 200_000
# Items between two yields
_SLICE = 4
# Keys that are only looked at, between two yields
_LOOKED_AT = 2000
_SHARDS = 256
# Rounds of removing unknown keys from an item of a registry
_MOST_IGNORED = 16
_TRUSTING = ("system", "developer")
_numbers = itertools.count(1)

Items = Iterator[tuple[str, int, Any]]


class PolicyError(ValueError):
    """The policy is refused as a whole; the message begins with the path of the value."""


def read(
    document: "str | Iterable[str] | dict[str, Any]",
    *,
    peppered: bool,
    ignored: set[str] | None = None,
    is_yaml: bool = False,
    most_keys: int = MAX_KEYS,
) -> Generator[None, None, Policy]:
    """Read a document: text of JSON or YAML, also in pieces, or decoded. `peppered`: there is a KEY_PEPPER. `ignored`:
    collects unknown keys of a registry; without it they are refused. Raises PolicyError.
    """
    made = _Made(peppered, ignored, most_keys)
    if isinstance(document, dict):
        items = _items(document)
    else:
        items = _items_of_text([document] if isinstance(document, str) else document, is_yaml)
    try:
        for number, (section, index, raw) in enumerate(items):
            made.take(section, index, raw)
            if number % _SLICE == 0:
                yield
        yield from made.checked()
    except PolicyError:
        yield from made.free(everything=True)
        raise
    policy = made.policy()
    yield from made.free()
    return policy


def run(reading: Generator[None, None, Policy]) -> Policy:
    """Read at once."""
    return at_once(reading)


def _items(document: dict[str, Any]) -> Items:
    for section, value in document.items():
        if section in SECTIONS:
            if not isinstance(value, list):
                raise PolicyError(f"{section}: must be a list")
            yield from ((section, index, raw) for index, raw in enumerate(value))
        yield str(section), -1, value


def _items_of_text(pieces: Iterable[str], is_yaml: bool) -> Items:
    try:
        for section, index, value in items_of_yaml(pieces, SECTIONS) if is_yaml else Walk(pieces).items(SECTIONS):
            if index < 0 and section in SECTIONS and value != []:
                raise PolicyError(f"{section}: must be a list")
            yield section, index, value
    except PolicyError:
        raise
    except UnicodeDecodeError:
        raise PolicyError("it is not UTF-8") from None
    except ValueError as exc:
        raise PolicyError(f"it is not valid {'YAML' if is_yaml else 'JSON'}: {exc}") from None


class _Made:
    """The parts read so far."""

    def __init__(self, peppered: bool, ignored: set[str] | None, most_keys: int) -> None:
        self._peppered = peppered
        self._most_keys = most_keys
        self._ignored = ignored
        self._items: dict[str, list[Any]] = {section: [] for section in SECTIONS if section != "keys"}
        self._digests, self._previous = Rows(), Rows()
        self._kinds: set[str] = set()
        self._keys = 0
        # In shards, as Rows; of dictionaries, as the garbage collector looks into sets.
        self._ids: list[dict[str, None]] = [{} for _ in range(_SHARDS)]
        self._have_budgets = False
        self._anonymous = Anonymous()
        # Equal parts are kept once. Organisation -> path of its first use
        self._parts: list[Any] = [None]
        self._indices: dict[Any, int] = {}
        self._used: dict[str, str] = {}
        self._organisations: dict[str, Organisation] = {}

    def take(self, section: str, index: int, raw: Any) -> None:
        if index >= 0:
            path = f"{section}.{index}"
            item = self._valid(SECTIONS[section], raw, path)
            if isinstance(item, Key):
                self._take_key(item, path)
            else:
                self._items[section].append(item)
        elif section == "anonymous":
            self._anonymous = self._valid(Anonymous, raw, section)
        elif section not in SECTIONS:
            if self._ignored is None:
                raise PolicyError(f"{section[:64]}: there is no such key; use {', '.join((*SECTIONS, 'anonymous'))}")
            self._ignored.add(section)

    def _valid(self, kind: type[BaseModel], raw: Any, path: str) -> Any:
        for _ in range(_MOST_IGNORED):
            try:
                return kind.model_validate(raw)
            except ValidationError as exc:
                unknown = wording.unknown_keys(exc)
                if self._ignored is None or not unknown:
                    raise PolicyError(_reason(exc, path)) from None
                self._ignored |= set(unknown.values())
                raw = wording.without(raw, unknown)
        raise PolicyError(f"{path}: it has too many unknown keys")

    def _take_key(self, key: Key, path: str) -> None:
        self._keys += 1
        if self._keys > self._most_keys:
            raise PolicyError(f"{path}: there are more than {self._most_keys} keys")
        ids = self._ids[hash(key.id) % _SHARDS]
        if key.id in ids:
            raise PolicyError(f"{path}.id: {key.id!r} is given twice")
        ids[key.id] = None
        self._have_budgets = self._have_budgets or key.budget is not None
        previous = key.previous
        until = None if previous is None else previous.until
        fields = (
            key.id, key.name, key.organisation, key.user, self._part(key.models), self._part(key.limits or None),
            self._part(key.budget), key.priority, key.weight, key.expires, key.disabled, until,
        )  # fmt: skip
        row = packed(KeyRow(*fields))
        self._put(self._digests, key.digest, row, f"{path}.digest")
        if previous is not None:
            self._put(self._previous, previous.digest, row, f"{path}.previous.digest")
        if key.organisation is not None:
            self._used.setdefault(key.organisation, f"{path}.organisation")

    def _put(self, digests: Rows, digest: str, row: bytes, path: str) -> None:
        kind, _, text = digest.partition(":")
        if kind == "hmac-sha256" and not self._peppered:
            raise PolicyError(f"{path}: 'hmac-sha256' needs INFERENCE_API_KEY_PEPPER")
        raw = bytes.fromhex(text)
        if raw in self._digests or raw in self._previous:
            raise PolicyError(f"{path}: the digest is given twice")
        self._kinds.add(kind)
        digests.put(raw, row)

    def _part(self, value: Any) -> int:
        if value is None:
            return 0
        index = self._indices.setdefault(value, len(self._parts))
        if index == len(self._parts):
            self._parts.append(value)
        return index

    def checked(self) -> Iterator[None]:
        """Check what concerns several items. Raises PolicyError."""
        organisations = self._organisations = self._named()
        for name, path in self._used.items():
            if name not in organisations:
                raise PolicyError(f"{path}: {name!r} is not in organisations")
        self._check_names("limits", organisations)
        self._check_names("budgets", organisations)
        yield from self._check_budgets(organisations)
        self._check_prompts(organisations)

    def policy(self) -> Policy:
        items = self._items
        return Policy(
            next(_numbers),
            self._digests,
            self._previous,
            frozenset(self._kinds),
            self._parts,
            self._organisations,
            items["limits"],
            items["budgets"],
            self._anonymous,
            items["prompts"],
            self._have_budgets,
        )

    def free(self, everything: bool = False) -> Iterator[None]:
        """Free what is not needed any more, in slices: at once it would stop the event loop."""
        for ids in self._ids:
            ids.clear()
            yield
        if everything:
            yield from self._digests.clear()
            yield from self._previous.clear()

    def _named(self) -> dict[str, Organisation]:
        organisations: dict[str, Organisation] = {}
        for index, one in enumerate(self._items["organisations"]):
            if one.name in organisations:
                raise PolicyError(f"organisations.{index}.name: {one.name!r} is given twice")
            organisations[one.name] = one
        return organisations

    def _check_names(self, section: str, organisations: dict[str, Organisation]) -> None:
        for index, one in enumerate(self._items[section]):
            path = f"{section}.{index}.name"
            if one.scope == "organisation" and one.name is not None and one.name not in organisations:
                raise PolicyError(f"{path}: {one.name!r} is not in organisations")
            if one.scope == "key" and one.name is not None and one.name not in self._ids[hash(one.name) % _SHARDS]:
                raise PolicyError(f"{path}: {one.name!r} is not the id of one of keys")

    def _check_budgets(self, organisations: dict[str, Organisation]) -> Iterator[None]:
        own = {("organisation", one.name): one.budget for one in organisations.values() if one.budget}
        named = {one.name for one in self._items["budgets"] if one.scope == "key"}
        for number, row in enumerate(self._digests.values() if named else ()):
            if row[6] and row[0] in named:
                own["key", row[0]] = self._parts[row[6]]
            if number % _LOOKED_AT == 0:
                yield
        seen: set[tuple[Any, ...]] = {(*holder, budget.unit, budget.per) for holder, budget in own.items()}
        for index, one in enumerate(self._items["budgets"]):
            same = (one.scope, one.name, one.unit, one.per)
            if same in seen:
                holder = one.scope if one.name is None else f"{one.scope} {one.name!r}"
                raise PolicyError(f"budgets.{index}: a budget of {holder} in {one.unit} per {one.per} is given twice")
            seen.add(same)

    def _check_prompts(self, organisations: dict[str, Organisation]) -> None:
        names: set[str] = set()
        for index, prompt in enumerate(self._items["prompts"]):
            path = f"prompts.{index}"
            if prompt.name in names:
                raise PolicyError(f"{path}.name: {prompt.name!r} is given twice")
            names.add(prompt.name)
            if prompt.organisation is not None and prompt.organisation not in organisations:
                raise PolicyError(f"{path}.organisation: {prompt.organisation!r} is not in organisations")
            _check_prompt(prompt, path)


def _check_prompt(prompt: StoredPrompt, path: str) -> None:
    numbers: set[int] = set()
    for index, version in enumerate(prompt.versions):
        if version.version in numbers:
            raise PolicyError(f"{path}.versions.{index}.version: {version.version} is given twice")
        numbers.add(version.version)
        check_variables(version, f"{path}.versions.{index}")
    for label, number in prompt.labels.items():
        if number not in numbers:
            raise PolicyError(f"{path}.labels.{label}: there is no version {number}")


def check_variables(version: Version, path: str) -> None:
    """Raises PolicyError for a variable that is used and not declared, or not trusted where it stands."""
    places: list[tuple[str, str, Any]] = [(f"{path}.text", "", version.text)] if version.text is not None else []
    places += [(f"{path}.messages.{n}", one.role, one.model_dump()) for n, one in enumerate(version.messages or ())]
    for place, role, value in places:
        for name in _variables_in(value):
            variable = version.variables.get(name)
            if variable is None:
                raise PolicyError(f"{place}: the variable {name!r} is used and not declared")
            if role in _TRUSTING and not variable.trusted:
                raise PolicyError(f"{place}: the variable {name!r} is not trusted, and stands in a {role} message")


def _variables_in(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield from USED.findall(value)
    elif isinstance(value, dict):
        for one in value.values():
            yield from _variables_in(one)
    elif isinstance(value, list | tuple):
        for one in value:
            yield from _variables_in(one)


def _reason(exc: ValidationError, path: str) -> str:
    error = exc.errors(include_url=False, include_context=False, include_input=False)[0]
    where = ".".join([path, *map(str, error["loc"])])
    if error["type"] == "extra_forbidden":
        return f"{where}: there is no such key"
    if error["type"] == "missing":
        return f"{where}: is required"
    message = error["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
    return f"{where}: {message}"
