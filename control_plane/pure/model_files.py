"""Which files of a folder are one model: shards together, and those that are missing."""

import re
from collections.abc import Iterable
from typing import Final, Literal, NamedTuple

from control_plane.pure.reading import Unreadable

Format = Literal["safetensors", "gguf"]
INDEX: Final = ".safetensors.index.json"
_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.(safetensors|gguf)")
_KINDS: Final[tuple[Format, ...]] = ("safetensors", "gguf")
# What goes with a model: projectors, drafts, adapters; and the same weights for other software
_BESIDE = re.compile(
    r"(mmproj|mtp|adapter_model|consolidated|training_args|optimizer|scheduler)([-._].*)?", re.IGNORECASE
)
# Files of one model, and names of missing ones that are told, at most
MOST_FILES, _TOLD = 1000, 20


class Model(NamedTuple):
    """`name`: without number and ending. `files`: by their number. `listing`: the index file, which has their names."""

    format: Format
    name: str
    files: tuple[str, ...]
    missing: tuple[str, ...] = ()
    listing: str | None = None


def models_in(names: Iterable[str]) -> list[Model]:
    """The models of one folder, by name; what belongs to a model only is left out."""
    known = sorted(name for name in names if not _BESIDE.match(name))
    found, shards = [], dict[tuple[str, str, int], dict[int, str]]()
    indexed = {name.removesuffix(INDEX): name for name in known if name.endswith(INDEX)}
    for name in known:
        base, _, ending = name.rpartition(".")
        shard = _SHARD.fullmatch(name)
        if shard is not None:
            shards.setdefault((shard[4], shard[1], int(shard[3])), {})[int(shard[2])] = name
        elif base and ending in _KINDS and base not in indexed:
            found.append(Model("gguf" if ending == "gguf" else "safetensors", base, (name,)))
    for (ending, base, count), numbered in shards.items():
        if ending == "gguf" or base not in indexed:
            found.append(_sharded("gguf" if ending == "gguf" else "safetensors", base, count, numbered))
    found += [Model("safetensors", base, (), (), name) for base, name in indexed.items()]
    return sorted(found, key=lambda one: (one.name, one.format))


def of_file(name: str, names: Iterable[str]) -> Model | None:
    """The model that this file is, or is a part of."""
    if name.endswith(INDEX):
        return Model("safetensors", name.removesuffix(INDEX), (), (), name)
    base, _, ending = name.rpartition(".")
    if not base or ending not in _KINDS:
        return None
    shard = _SHARD.fullmatch(name)
    if shard is None:
        return Model("gguf" if ending == "gguf" else "safetensors", base, (name,))
    found = next((one for one in models_in(names) if name in one.files), None)
    return found or of_file(f"{shard[1]}{INDEX}", names)


def chosen(paths: Iterable[str], pick: str | None = None) -> tuple[str, Model]:
    """The model of a folder that is meant, and the folder within it that has it: empty, or `a/b/`. Raises Unreadable.

    `pick`: a file of it.
    """
    folders: dict[str, list[str]] = {}
    for path in paths:
        at, slash, name = path.rpartition("/")
        folders.setdefault(at + slash, []).append(name)
    if pick is not None:
        at, slash, name = pick.rpartition("/")
        found = of_file(name, folders.get(at + slash, ()))
        if name not in folders.get(at + slash, ()) or found is None:
            raise Unreadable(f"{pick[:200]!r}: no safetensors or GGUF file of this name is there")
        return at + slash, found
    every = [(at, model) for at, names in folders.items() for model in models_in(names)]
    # What is deeper goes with it, or is the same for other software.
    every = [pair for pair in every if pair[0] == ""] or every
    configured = [pair for pair in every if pair[1].format == "safetensors" and "config.json" in folders[pair[0]]]
    usual = [pair for pair in configured if pair[1].name == "model"]
    for those in (every, configured, usual):
        if len(those) == 1:
            return those[0]
    if not every:
        raise Unreadable("its files: none of them is a model (safetensors, GGUF)")
    names = told(sorted(at + (model.files[0] if model.files else model.name) for at, model in every))
    raise Unreadable(f"{len(every)} models are in it: name a file of one: {', '.join(names)}")


def _sharded(kind: Format, base: str, count: int, numbered: dict[int, str]) -> Model:
    if count > MOST_FILES:
        return Model(kind, base, (), (f"{count:,} files, at most {MOST_FILES:,} are read",))
    missing = [f"{base}-{one:05}-of-{count:05}.{kind}" for one in range(1, count + 1) if one not in numbered]
    return Model(kind, base, tuple(numbered[one] for one in sorted(numbered)), told(missing))


def told(missing: list[str]) -> tuple[str, ...]:
    more = len(missing) - _TOLD
    return tuple(missing if more <= 0 else [*missing[:_TOLD], f"and {more:,} more"])
