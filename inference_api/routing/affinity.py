"""The key that sends requests with the same beginning of a prompt to the same backend. Pure."""

from collections.abc import Mapping
from hashlib import blake2b
from typing import Any

from inference_api.models import Prompt

# Characters of a prompt that make its key: enough to distinguish conversations, and few enough to cost microseconds.
_MAX_CHARS, _MAX_TOKENS, _MAX_MESSAGES, _MAX_PARTS = 1024, 256, 32, 8


def affinity_key(model: str, fields: Prompt, session_id: str | None) -> str:
    """Equal for requests that share a prefix: by session, else by the opening of the prompt; "" when there is none.

    The opening of a conversation ends with the first user message, so every turn has the same key. A digest, because
    keys may be logged and prompts may not.
    """
    if session_id:
        return _digest("session", model, session_id)
    for name in ("messages", "prompt", "input"):
        opening = _opening(fields.get(name))
        if opening:
            return _digest("prompt", model, *opening)
    return ""


def _opening(value: Any) -> list[str]:
    if isinstance(value, list) and value and isinstance(value[0], str | list):
        value = value[0]
    if isinstance(value, str):
        return [value[:_MAX_CHARS]] if value else []
    if not isinstance(value, list) or not value:
        return []
    if isinstance(value[0], int):
        # Not str(): it rejects integers of more than 4300 digits.
        return [",".join(hex(token) for token in value[:_MAX_TOKENS] if isinstance(token, int))]
    return _first_exchange(value)


def _first_exchange(messages: list[Any]) -> list[str]:
    said: list[str] = []
    for message in messages[:_MAX_MESSAGES]:
        if not isinstance(message, Mapping):
            continue
        role, text = message.get("role"), _text(message.get("content"))
        if text:
            said += (role if isinstance(role, str) else "", text)
        if role == "user":
            break
    return said


def _text(content: Any) -> str:
    if isinstance(content, str):
        return content[:_MAX_CHARS]
    if not isinstance(content, list):
        return ""
    return "".join(map(_part_text, content[:_MAX_PARTS]))


def _part_text(part: Any) -> str:
    """The text of one content part; for an image the beginning of its URL, which may hold its data."""
    if isinstance(part, Mapping):
        image = part.get("image_url")
        part = part.get("text") or (image.get("url") if isinstance(image, Mapping) else image)
    return part[:_MAX_CHARS] if isinstance(part, str) else ""


def _digest(*parts: str) -> str:
    text = "".join(f"{len(part)}:{part}" for part in parts)
    return blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()
