"""The differences between two catalogues, for the log."""

from collections.abc import Iterable, Mapping

from inference_api.routing.entries import CatalogueEntry

_SHOWN = 10


def changes(before: Mapping[str, CatalogueEntry], after: Mapping[str, CatalogueEntry]) -> dict[str, list[str]]:
    """Names of models under `added`, `removed` and `changed`, at most ten each, without empty keys."""
    found = {
        "added": [name for name in after if name not in before],
        "removed": [name for name in before if name not in after],
        "changed": [name for name, entry in after.items() if name in before and before[name] != entry],
    }
    return {what: _shown(names) for what, names in found.items() if names}


def _shown(names: Iterable[str]) -> list[str]:
    names = list(names)
    return names if len(names) <= _SHOWN else [*names[:_SHOWN], f"and {len(names) - _SHOWN} more"]
