"""Names of users and organisations, and e-mail addresses."""

import re
from typing import Annotated

from pydantic import AfterValidator, StringConstraints

from inference_api.policy.document import Name as Name

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,127}")
# The provider of a mailbox knows what is valid; this finds typos.
_EMAIL = re.compile(r"[^@\s\x00-\x1f]{1,64}@[^@\s\x00-\x1f]{1,255}")


def problem_of_name(text: str) -> str | None:
    if _NAME.fullmatch(text):
        return None
    return "must be 1 to 128 letters, digits, '.', '_', '@' or '-', with a letter or digit first"


def problem_of_email(text: str) -> str | None:
    return None if _EMAIL.fullmatch(text) else "must be an e-mail address"


def _email(text: str) -> str:
    found = text.strip().lower()
    if (problem := problem_of_email(found)) is not None:
        raise ValueError(problem)
    return found


Email = Annotated[str, StringConstraints(max_length=320), AfterValidator(_email)]


def name_from(text: str, fallback: str) -> str:
    """A name out of what another program calls somebody: `ana` from `ana@example.org`."""
    found = re.sub(r"[^A-Za-z0-9._-]+", "-", text.partition("@")[0]).strip("-._")[:100]
    return found or fallback
