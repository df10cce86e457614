"""Shared by the commands: settings and catalogue of a command line, and tables."""

import argparse
import os
from collections.abc import Mapping, Sequence

from pydantic import ValidationError

from inference_api.app import GROUPS, entry_of
from inference_api.routing.catalogue import Catalogue, CatalogueError, describe, load_catalogue
from inference_api.routing.entries import CatalogueEntry
from inference_api.settings import DEFAULT_CATALOGUE, PREFIX, Settings, SettingsError, load_settings

# Options of `serve` that stand for a variable.
_OPTIONS = ("host", "port", "catalogue", "registry_url")
PACKAGED = (
    "no catalogue is named, so the packaged one is used, with its names of Services; set INFERENCE_API_CATALOGUE, or "
    "use `serve --backend NAME=URL`"
)


def environment() -> Mapping[str, str]:
    """The variables of the process."""
    return os.environ


def takes_colours() -> bool:
    """Whether a terminal gets colours, see no-color.org."""
    return not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def settings_of(arguments: argparse.Namespace) -> Settings:
    """Settings from the environment and options; options take precedence. Raises SettingsError."""
    environ: dict[str, str] = dict(environment())
    options: Mapping[str, object] = vars(arguments)
    for name in _OPTIONS:
        value = options.get(name)
        if value is not None:
            environ[PREFIX + name.upper()] = str(value)
    if options.get("backend") and (named := _names_catalogue(options)):
        raise SettingsError(f"--backend stands for a catalogue, and {named} names one: use either of them")
    return load_settings(environ, GROUPS)


def _names_catalogue(options: Mapping[str, object]) -> str | None:
    if options.get("catalogue") is not None:
        return "--catalogue"
    return next((name for name in environment() if name.upper() == f"{PREFIX}CATALOGUE"), None)


def catalogue_of(backends: Sequence[str]) -> Catalogue:
    """The catalogue of `--backend NAME=URL` options. Raises CatalogueError naming the option."""
    urls: dict[str, list[str]] = {}
    for option in backends:
        name, equals, url = option.partition("=")
        if not (name and equals and url):
            example = "--backend llama-3-8b=http://10.0.0.11:8000"
            raise CatalogueError(f"--backend {_without_password(option)!r}: must be NAME=URL, as in {example}")
        urls.setdefault(name, []).append(url)
    entries = []
    for name, found in urls.items():
        try:
            entries.append(CatalogueEntry.model_validate({"name": name, "backends": found}))
        except ValidationError as exc:
            raise CatalogueError(f"--backend {name[:64]}=...: {describe(exc)}") from None
    return Catalogue(entries)


def _without_password(option: str) -> str:
    return "***" if "@" in option else option[:80]


def read_catalogue(settings: Settings) -> Catalogue:
    """The static catalogue, without invalid entries. Raises CatalogueError with a line per invalid entry."""
    path = settings.catalogue
    catalogue = load_catalogue(path, entry_of(settings))
    if catalogue.problems:
        raise CatalogueError("\n".join(f"{path}: {problem}" for problem in catalogue.problems))
    return catalogue


def size_of(catalogue: Catalogue) -> str:
    """Its size: `1 model, 3 backends`."""
    return f"{counted(len(catalogue), 'model')}, {counted(backends_of(catalogue), 'backend')}"


def backends_of(catalogue: Catalogue) -> int:
    return sum(len(entry.backends) for entry in catalogue.values())


def counted(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def is_packaged(settings: Settings) -> bool:
    """Whether neither a catalogue nor a registry is set."""
    return settings.catalogue == DEFAULT_CATALOGUE


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows as aligned columns; the last one is not padded."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]) - 1)]
    padded = ([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[-1]] for row in rows)
    return "\n".join("  ".join(cells).rstrip() for cells in padded)
