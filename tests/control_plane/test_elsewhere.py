"""Links to logs and traces that are kept elsewhere: they lead to the host of the setting, whatever a record has."""

import re
from html import unescape
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

from control_plane.pure import elsewhere
from control_plane.settings import SettingsError, load_settings
from tests.control_plane.conftest import Running
from tests.control_plane.pages import page
from tests.control_plane.people import log_in, make_user
from tests.control_plane.usage import record, taken

LOGS = "https://logs.example.com/q?pod={backend}&from={start_ms}&to={end}#{request_id}"


@pytest.mark.parametrize(
    "template",
    [
        "javascript:alert('{request_id}')",
        "java\tscript:alert(1)",
        " javascript:alert(1)",
        "data:text/html,{backend}",
        "//logs.example.com/{backend}",
        "/{backend}",
        "{backend}",
        "http://{backend}/",
        "https://logs.{model}.example.com/",
        "https://ana:secret@logs.example.com/",
        "https:///{backend}",
        "https://logs.example.com/{key}",
        "https://logs.example.com/{backend.__class__}",
        "https://logs.example.com/?q={",
        "https://logs.example.com/?q=%7B}",
        "https://logs.example.com/a b",
        "https://logs.example.com/\x00",
    ],
)
@pytest.mark.parametrize("name", ["LOG_URL", "TRACE_URL"])
def test_a_template_that_may_lead_anywhere_is_refused(name: str, template: str) -> None:
    with pytest.raises(SettingsError, match=f"CONTROL_PLANE_{name}=") as refused:
        load_settings({f"CONTROL_PLANE_{name}": template})

    assert "must" in str(refused.value) or "may have {backend}" in str(refused.value)


def test_a_value_stays_where_it_stands() -> None:
    values = dict.fromkeys(elsewhere.NAMES, "x\"'<>&?#/../@evil.example.com:80 {start}%0a\n☃")

    found = urlsplit(elsewhere.filled(elsewhere.checked(LOGS), values))

    assert (found.scheme, found.netloc, found.path) == ("https", "logs.example.com", "/q")
    assert parse_qs(found.query) == {"pod": [values["backend"]], "from": [values["start"]], "to": [values["end"]]}
    assert not set("\"'<> {}\n") & set(found.geturl())


@pytest.mark.anyio
async def test_an_operator_gets_links_to_log_and_trace(start_sqlite: Any) -> None:
    running: Running = await start_sqlite(log_url=LOGS, trace_url="https://traces.example.com/{request_id}/{model}")
    tried = [
        {"backend": "b:1/<i>", "outcome": "reset", "status": 0, "start_ms": 2_000, "duration_ms": 500.5},
        {"backend": "b:2", "outcome": "ok", "status": 200, "start_ms": 2_600, "duration_ms": 9.0},
    ]
    await taken(running, one := record(model="a/b&c", attempts=2, attempt_details=tried))

    seen = {}
    for role in ("operator", "viewer"):
        await make_user(running, role, role)
        await log_in(running, role)
        seen[role] = await page(running, f"/console/requests/{one['id']}")

    links = [unescape(link) for link in re.findall(r'href="(https?:[^"]+)"', seen["operator"])]
    first, second, trace = (next(link for link in links if part in link) for part in ("b%3A1", "b%3A2", "traces."))
    assert len(links) == 3
    assert parse_qs(urlsplit(first).query) == {
        "pod": ["b:1/<i>"],
        "from": [str(one["at"] + 2_000 - 10_000)],
        "to": ["2026-11-28T11:59:12.501Z"],
    }
    assert urlsplit(second).fragment == one["request_id"]
    assert trace == f"https://traces.example.com/{one['request_id']}/a%2Fb%26c"
    # Engine logs are the operators'.
    assert not re.findall(r"https?://(?:logs|traces)", seen["viewer"])


@pytest.mark.anyio
async def test_without_settings_the_page_has_what_is_needed_to_look(sqlite_plane: Running) -> None:
    await taken(sqlite_plane, one := record())
    await make_user(sqlite_plane, "boss", "admin")
    await log_in(sqlite_plane, "boss")

    html = await page(sqlite_plane, f"/console/requests/{one['id']}")

    logs = html[html.index('id="logs"') :]
    assert "10.0.0.12:8000" in logs
    assert "2026-11-28 11:58:50" in logs
    assert "CONTROL_PLANE_LOG_URL" in logs
