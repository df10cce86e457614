"""Forms of the console, as a browser without scripts sends them."""

import html
import re
from typing import Any

import httpx

from tests.control_plane.conftest import Running
from tests.control_plane.people import SAME_ORIGIN, begin_session, make_user


async def as_user(running: Running, name: str, role: str | None = None) -> None:
    """The client is logged in as somebody else."""
    if role is not None:
        await make_user(running, name, role, password=None)
    await begin_session(running, name)


async def opened(running: Running, path: str) -> str:
    answer = await running.client.get(path)
    assert answer.status_code == 200, answer.text
    return answer.text


def hidden(page: str, name: str) -> str:
    """A field of the dialog."""
    found = re.findall(rf'<input type="hidden" name="{name}" value="([^"]*)"', page.partition("<dialog")[2])
    assert found, name
    return html.unescape(found[0])


async def sent(running: Running, path: str, **fields: Any) -> httpx.Response:
    return await running.client.post(path, data=fields, headers=SAME_ORIGIN)
