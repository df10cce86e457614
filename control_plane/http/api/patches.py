"""PATCH bodies: JSON merge patches (RFC 7396) of an object's fields."""

from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

from fastapi import Body
from pydantic import BaseModel, ValidationError

from control_plane.errors import Invalid, problems_of
from control_plane.http.api.documents import MERGE_PATCH
from control_plane.pure.patch import merged

T = TypeVar("T", bound=BaseModel)
Patch = Annotated[dict[str, Any], Body(description=MERGE_PATCH)]


def patched(kind: type[T], fields: Mapping[str, Any], patch: Mapping[str, Any]) -> T:
    """The fields with the changes of a patch. Raises Invalid."""
    try:
        return kind.model_validate(merged(dict(fields), dict(patch)))
    except ValidationError as exc:
        raise Invalid(*problems_of(exc)) from None
