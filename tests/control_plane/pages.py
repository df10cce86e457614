"""Pages of the console as people read them: without tags, and part by part."""

import re
from html import unescape

import httpx

from tests.control_plane.conftest import Running


async def page(running: Running, path: str, status: int = 200) -> str:
    answer = await running.client.get(path)
    assert answer.status_code == status, answer.text[:3000]
    return answer.text


def text_of(html: str) -> str:
    return " ".join(unescape(re.sub(r"<[^>]+>", " ", html)).split())


def part(html: str, id: str) -> str:
    """The element with this id, its tags and all."""
    found = re.search(rf'<(\w+)[^>]* id="{re.escape(id)}"', html) or re.search(rf'<(\w+) id="{re.escape(id)}"', html)
    assert found is not None, f"no #{id}"
    name, depth = found[1], 0
    for tag in re.finditer(rf"<(/?){name}\b[^>]*>", html[found.start() :]):
        depth += -1 if tag[1] else 1
        if not depth:
            return html[found.start() : found.start() + tag.end()]
    raise AssertionError(f"#{id} does not end")


def figures_of(html: str) -> dict[str, str]:
    """The large figures by their labels."""
    found = re.findall(r'<div class="figure[^"]*"><dt>(.*?)</dt><dd>(.*?)</dd></div>', html, re.DOTALL)
    return {text_of(label): text_of(value) for label, value in found}


def rows_of(html: str) -> list[list[str]]:
    """The rows of a table, cell by cell."""
    body = html.partition("<tbody>")[2].partition("</tbody>")[0]
    rows = re.findall(r"<tr.*?</tr>", body, re.DOTALL)
    return [[text_of(cell) for cell in re.findall(r"<t[hd].*?</t[hd]>", row, re.DOTALL)] for row in rows]


def states_of(html: str) -> list[tuple[str, str]]:
    """States as kind and word."""
    return [(kind, unescape(word)) for kind, word in re.findall(r'<span class="state (\w+)">(.*?)</span>', html)]


def links_of(html: str) -> list[str]:
    return [unescape(one) for one in re.findall(r'href="([^"]+)"', html)]


def hidden(answer: httpx.Response | str, name: str) -> str:
    """The value of a hidden field."""
    text = answer if isinstance(answer, str) else answer.text
    found = re.search(rf'<input type="hidden" name="{re.escape(name)}" value="([^"]*)"', text)
    assert found is not None, f"no field {name}"
    return unescape(found[1])
