"""Whether an engine serves a model under the name that its requests have."""

from typing import Any

from inference_api.routing.entries import CatalogueEntry, Engine

# They accept any name, and answer with their only model.
IGNORES_NAMES: frozenset[Engine] = frozenset({"tgi", "llamacpp"})
_SHOWN = 3
_LONGEST = 256


def names_in(document: Any) -> list[str] | None:
    """The names in an answer to GET /v1/models; None if the answer is invalid."""
    cards = document.get("data") if isinstance(document, dict) else None
    if not isinstance(cards, list):
        return None
    return [card["id"] for card in cards if isinstance(card, dict) and isinstance(card.get("id"), str)]


def misnamed(entry: CatalogueEntry, names: list[str]) -> str | None:
    """The models that the engine serves instead of the entry's, and the fix; None if it serves that."""
    if (entry.served_model_name or entry.name) in names:
        return None
    if not names:
        return "serves no model"
    shown = [f'"{printable(name)}"' for name in names[:_SHOWN]]
    if len(names) > _SHOWN:
        shown.append(f"{len(names) - _SHOWN} more")
    fix = f"set served_model_name: {shown[0]}" if len(names) == 1 else "set served_model_name to one of them"
    return f"serves {', '.join(shown)}; {fix}"


def printable(name: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in name[:_LONGEST])
