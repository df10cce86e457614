"""The Catalogue: the set of models, as read from a file or from the registry, checked entry by entry."""

import json
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from inference_api.routing import references, wording
from inference_api.routing.entries import MAX_BACKENDS, BackendEntry, CatalogueEntry, Credentials, Hardware, Timeouts

# Larger documents are an attack or an accident; within these limits a catalogue takes below 100 MB.
_MAX_MODELS = 20_000
_MAX_BACKENDS_OF_ALL = 50_000
# Rounds of removing unknown keys from an entry
_MOST_IGNORED = 16
# More unknown keys do not come from a newer registry, and removing them takes long.
_MOST_UNKNOWN = 64
# Refused entries that messages name one by one.
_SHOWN_PROBLEMS = 100


class CatalogueError(ValueError):
    """The catalogue as a whole cannot be read: no such file, not YAML or JSON, or no `models` list."""


class Catalogue(dict[str, CatalogueEntry]):
    """name -> entry, in the order given; `problems` holds one sentence for each entry that was refused.

    `ignored`: unknown keys that were skipped; `warnings`: sentences about names that entries give in vain.
    """

    def __init__(
        self,
        entries: Iterable[CatalogueEntry] = (),
        problems: Iterable[str] = (),
        ignored: Iterable[str] = (),
        warnings: Iterable[str] = (),
    ) -> None:
        super().__init__((e.name, e) for e in entries)
        self.problems = list(problems)
        self.ignored = frozenset(ignored)
        self.warnings = list(warnings)


def dated(catalogue: Catalogue, created: Mapping[str, int]) -> Catalogue:
    """The catalogue with these times, Unix seconds by name, in the entries that have none."""
    entries = [
        entry if entry.created else entry.model_copy(update={"created": created[entry.name]})
        for entry in catalogue.values()
    ]
    return Catalogue(entries, catalogue.problems, catalogue.ignored, catalogue.warnings)


def parse_catalogue(
    document: Any, entry_type: type[CatalogueEntry] = CatalogueEntry, *, lenient: bool = False
) -> Catalogue:
    """Check a decoded catalogue, `{"models": [...]}`; a bad entry is refused alone.

    `entry_type`: the class of its entries, with the keys of features. `lenient`: ignore unknown keys, since a registry
    may be newer than this router.

    Raises CatalogueError if the list of models is missing or too long.
    """
    if not isinstance(document, dict) or not isinstance(document.get("models"), list):
        raise CatalogueError("a catalogue is a mapping with a list under `models`")
    if (unknown := set(document) - {"models"}) and not lenient:
        raise CatalogueError(f"unknown key {sorted(map(str, unknown))[0]!r} beside `models`")
    _check_size(document["models"])
    entries: list[CatalogueEntry] = []
    problems = _Problems()
    taken: set[str] = set()
    ignored: set[str] | None = set() if lenient else None
    for position, raw in enumerate(document["models"]):
        entry = _entry(raw, entry_type, taken, ignored)
        if isinstance(entry, CatalogueEntry):
            taken |= {entry.name, *entry.aliases}
            entries.append(entry)
            continue
        if problems.add():
            reason = describe(entry) if isinstance(entry, ValidationError) else entry
            problems.shown.append(f"{_title(raw, position)}: {reason}")
    found = references.check({entry.name: entry for entry in entries})
    for name, reason in found.refused.items():
        if problems.add():
            problems.shown.append(f"model {name!r}: {reason}")
    entries = [entry for entry in entries if entry.name not in found.refused]
    return Catalogue(entries, problems.all(), ignored or (), found.warnings[:_SHOWN_PROBLEMS])


class _Problems:
    """Why entries are refused: the first ones in words, the others counted."""

    def __init__(self) -> None:
        self.shown: list[str] = []
        self._count = 0

    def add(self) -> bool:
        """Count one; whether it is to be shown."""
        self._count += 1
        return self._count <= _SHOWN_PROBLEMS

    def all(self) -> list[str]:
        more = self._count - _SHOWN_PROBLEMS
        return [*self.shown, f"and {more} more"] if more > 0 else self.shown


def _check_size(models: list[Any]) -> None:
    """Check the size before parsing: a hostile registry must not fill the memory with valid entries."""
    if len(models) > _MAX_MODELS:
        raise CatalogueError(f"it lists {len(models)} models; the limit is {_MAX_MODELS}")
    lists = (raw.get("backends") for raw in models if isinstance(raw, dict))
    # An entry that is too long is refused alone.
    count = sum(len(one) for one in lists if isinstance(one, list) and len(one) <= MAX_BACKENDS)
    if count > _MAX_BACKENDS_OF_ALL:
        raise CatalogueError(f"it lists {count} backends; the limit is {_MAX_BACKENDS_OF_ALL}")


def _entry(
    raw: Any, entry_type: type[CatalogueEntry], taken: set[str], ignored: set[str] | None
) -> CatalogueEntry | ValidationError | str:
    """The entry, or the reason to refuse it. Unknown keys are removed and added to `ignored`, if that is given."""
    entry = _valid(raw, entry_type)
    for _ in range(_MOST_IGNORED):
        # Of a list only the first bad item is named.
        if ignored is None or isinstance(entry, CatalogueEntry) or entry.error_count() > _MOST_UNKNOWN:
            break
        if not (unknown := wording.unknown_keys(entry)):
            break
        ignored |= set(unknown.values())
        raw = wording.without(raw, unknown)
        entry = _valid(raw, entry_type)
    if isinstance(entry, CatalogueEntry) and (clash := sorted({entry.name, *entry.aliases} & taken)):
        return f"the name {clash[0]!r} is taken by an earlier entry"
    return entry


def _valid(raw: Any, entry_type: type[CatalogueEntry]) -> CatalogueEntry | ValidationError:
    try:
        return entry_type.model_validate(raw)
    except ValidationError as exc:
        return exc


def load_catalogue(
    path: Path,
    entry_type: type[CatalogueEntry] = CatalogueEntry,
    named_by: str = "INFERENCE_API_CATALOGUE or --catalogue",
) -> Catalogue:
    """Read a YAML or JSON catalogue file. Raises CatalogueError with the path and the fix: what `named_by` it."""
    document = read_document(path, named_by)
    try:
        return parse_catalogue(document, entry_type)
    except CatalogueError as exc:
        raise CatalogueError(f"catalogue {str(path)!r}: {exc}") from None


def read_document(path: Path, named_by: str = "INFERENCE_API_CATALOGUE or --catalogue") -> Any:
    """A catalogue file, decoded and not yet checked. Raises CatalogueError."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as exc:
        reason = exc.strerror if isinstance(exc, OSError) and exc.strerror else str(exc)
        fix = f"{named_by} must name a file that can"
        raise CatalogueError(f"catalogue {str(path)!r} cannot be read: {reason}; {fix}") from None
    try:
        return _document(path, text)
    except CatalogueError as exc:
        raise CatalogueError(f"catalogue {str(path)!r}: {exc}") from None


def _document(path: Path, text: str) -> Any:
    try:
        if path.suffix == ".json":
            return json.loads(text, object_pairs_hook=_once)
        return yaml.load(text, Loader=YamlLoader)
    except CatalogueError:
        raise
    except (ValueError, RecursionError, yaml.YAMLError) as exc:
        raise CatalogueError(f"it is not {_format(path)}: {' '.join(str(exc).split())}") from None


def describe(exc: ValidationError) -> str:
    """The errors of an entry as one sentence."""
    return wording.describe(exc, _KEYS)


def reasons(exc: ValidationError) -> list[str]:
    """The errors of an entry, a sentence for each key."""
    return wording.sentences(exc, _KEYS)


# The known keys of an entry, and of its parts
_KEYS: Mapping[str, Collection[str]] = {
    "": CatalogueEntry.model_fields,
    "backends": BackendEntry.model_fields,
    "hardware": Hardware.model_fields,
    "timeouts": Timeouts.model_fields,
    "credentials": Credentials.model_fields,
}


# The C loader is about 8 x faster; 10,000 models are read in seconds instead of a minute.
_SafeLoader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class YamlLoader(_SafeLoader):  # type: ignore[misc]
    """Rejects duplicate keys of a mapping, where YAML's own loader silently drops the first."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        lines: dict[str, int] = {}
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
                continue
            line = key.start_mark.line + 1
            if key.value in lines:
                twice = f"the key {key.value[:64]!r} is given twice"
                raise CatalogueError(f"{twice}, in lines {lines[key.value]} and {line}")
            lines[key.value] = line
        made: dict[Any, Any] = super().construct_mapping(node, deep)
        return made


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON without duplicate keys; the parser keeps no line numbers."""
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise CatalogueError(f"the key {twice[:64]!r} is given twice")
    return made


def _format(path: Path) -> str:
    return "JSON" if path.suffix == ".json" else "YAML"


def _title(raw: Any, position: int) -> str:
    name = raw.get("name") if isinstance(raw, dict) else None
    return f"model {name[:128]!r}" if isinstance(name, str) else f"model number {position + 1}"
