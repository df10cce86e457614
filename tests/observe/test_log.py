"""The log: one valid line per event, whatever is in it; access lines together and soon, everything else at once."""

import asyncio
import io
import json
import logging
import re
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from inference_api.observe.console import render_console
from inference_api.observe.log import LogHandler, configure_logging, render_json
from tests.fakes import CHAT, STREAM, Line, event, post, raw_client, sse, until

pytestmark = pytest.mark.anyio
Start = Callable[..., Any]

NOW = 1_700_000_000.0426
TOUCHED = ("", "uvicorn.error", "httpx", "httpcore", "asyncio")


class Output(io.StringIO):
    """What a stream was given, and in how many writes."""

    def __init__(self, tty: bool = False) -> None:
        super().__init__()
        self.writes = 0
        self._tty = tty

    def write(self, text: str) -> int:
        self.writes += 1
        return super().write(text)

    def isatty(self) -> bool:
        return self._tty

    def getvalue(self) -> str:
        """What is there once the writers that are configured have written what they have."""
        for handler in logging.getLogger().handlers:
            handler.flush()
        return super().getvalue()

    @property
    def lines(self) -> list[str]:
        return self.getvalue().splitlines()

    @property
    def events(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.getvalue().removesuffix("\n").split("\n")]


@pytest.fixture
def output() -> Iterator[Output]:
    """A stream to log to; afterwards the logging module is as it was."""
    loggers = [logging.getLogger(name) for name in TOUCHED]
    before = [(logger, logger.level, logger.handlers[:], logger.filters[:]) for logger in loggers]
    yield Output()
    for handler in logging.getLogger().handlers:
        if isinstance(handler, LogHandler):
            handler.close()
    for logger, level, handlers, filters in before:
        logger.setLevel(level)
        logger.handlers[:], logger.filters[:] = handlers, filters


# Lines


def test_an_access_line_is_one_json_object_with_utc_time_first() -> None:
    line = render_json(NOW, "info", "request", {"request_id": "x", "ttft_ms": None, "stream": True, "latency_ms": 1.5})

    assert line == (
        '{"time":"2023-11-14T22:13:20.042Z","level":"info","event":"request",'
        '"request_id":"x","ttft_ms":null,"stream":true,"latency_ms":1.5}'
    )


def test_a_console_line_is_text_without_what_is_not_known() -> None:
    line = render_console(
        NOW, "warning", "a backend", {"model": "m", "backend": None, "cause": "no route", "logger": "x"}
    )

    assert line == '22:13:20.042 warning a backend model=m cause="no route" (x)'
    assert render_console(NOW, "info", "started", {}) == "22:13:20.042 info    started"


REQUEST = {
    "request_id": "4bf9", "route": "chat_completions", "model": "llama-3-8b", "backend": "10.0.0.11:8000",
    "client": "::1", "status": 200, "outcome": "ok", "attempts": 1, "stream": False, "latency_ms": 12.34,
    "ttft_ms": None, "prompt_tokens": 3,
}  # fmt: skip


def test_a_request_at_a_terminal_has_columns_and_its_id_last() -> None:
    lines = [
        render_console(NOW, "info", "request", REQUEST),
        render_console(NOW, "warning", "request", REQUEST | {"status": 503, "latency_ms": 1500, "backend": None}),
    ]

    assert lines == [
        "22:13:20.042 info    200   12.3ms llama-3-8b       10.0.0.11:8000        chat_completions client=::1 "
        "prompt_tokens=3 4bf9",
        "22:13:20.042 warning 503    1.50s llama-3-8b       -                     chat_completions client=::1 "
        "prompt_tokens=3 4bf9",
    ]


@pytest.mark.parametrize(
    ("tty", "colours", "coloured"), [(True, True, True), (True, False, False), (False, True, False)]
)
async def test_colours_are_for_terminals_that_take_them(
    output: Output, tty: bool, colours: bool, coloured: bool
) -> None:
    output._tty = tty
    log = configure_logging("info", "console", output, colours)
    assert log is not None
    log(REQUEST)
    logging.getLogger("x").warning("odd")

    assert ("\x1b[32m200\x1b[0m" in output.lines[0], "\x1b[33mwarning" in output.lines[1]) == (coloured, coloured)
    assert (output.lines[0].count("\x1b[") > 0) == coloured


async def test_a_request_that_the_router_could_not_serve_is_a_warning(output: Output) -> None:
    log = configure_logging("info", "json", output)
    assert log is not None
    for status in (200, 404, 503):
        log(REQUEST | {"status": status})

    assert [line["level"] for line in output.events] == ["info", "info", "warning"]


@given(st.lists(st.floats(0, 4e9), max_size=5))
@example([1.9999, 1.0, 2.0, 1.001, 0.0])
def test_times_are_right_in_any_order(times: list[float]) -> None:
    for now in times:
        shown = json.loads(render_json(now, "info", "x", {}))["time"]
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", shown)
        # Cut, not rounded; and floats of today's size are exact to a fraction of a microsecond only.
        assert -0.00001 < now - datetime.fromisoformat(shown).replace(tzinfo=UTC).timestamp() < 0.00101


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)


@given(texts, st.dictionaries(st.sampled_from(["model", "request_id", "exception"]), texts))
@example("a\nb", {"model": 'x\r\n\x1b[31m"}\u2028'})
def test_a_json_line_is_one_line_and_says_what_was_said(event: str, fields: dict[str, str]) -> None:
    line = render_json(NOW, "info", event, fields)

    assert "\n" not in line
    assert "\r" not in line
    assert "\x1b" not in line
    assert json.loads(line).items() >= ({"event": event} | fields).items()


@given(texts, texts)
@example("a\n22:13:20.042 info    forged", "\x1b[31m\x9b\x7f")
@example("a exception=Traceback \n22:13:20.042 info    forged", "")
def test_a_console_line_has_no_control_characters(event: str, value: str) -> None:
    line = render_console(NOW, "info", event, {"model": value})

    assert all(c.isprintable() for c in line)


def test_a_value_of_any_type_has_a_line() -> None:
    line = json.loads(render_json(NOW, "info", "x", {"path": Exception("a"), "names": ["a"], "big": 2**70}))

    assert (line["path"], line["names"], line["big"]) == ("a", ["a"], 2**70)


# Writing


async def test_other_lines_are_written_at_once_after_those_that_came_before(output: Output) -> None:
    log = configure_logging("info", "json", output)
    assert log is not None
    log({"number": 1})
    logging.getLogger("x").warning("now")
    log({"number": 2})
    logging.getLogger("x").error("and now")

    assert [event["event"] for event in output.events] == ["request", "now", "request", "and now"]
    await asyncio.sleep(0.07)
    assert len(output.events) == 4


def test_the_default_is_standard_output(output: Output, capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging("info", None)
    logging.getLogger("x").info("here")
    logging.getLogger().handlers[0].flush()

    assert json.loads(capsys.readouterr().out)["event"] == "here"


# The logging module


def test_a_record_becomes_a_line_with_its_logger_and_its_fields(output: Output) -> None:
    configure_logging("info", "json", output)
    logging.getLogger("inference_api.x").info("took %d", 5, extra={"fields": {"models": 2}})

    [event] = output.events
    time = event.pop("time")
    assert event == {"level": "info", "event": "took 5", "logger": "inference_api.x", "models": 2}
    assert abs(datetime.fromisoformat(time).timestamp() - datetime.now(UTC).timestamp()) < 10


@pytest.mark.parametrize("log_format", ["json", "console"])
def test_an_exception_is_told_with_its_traceback(output: Output, log_format: str) -> None:
    configure_logging("info", log_format, output)
    try:
        raise ValueError("first\nsecond \x1b[31m")
    except ValueError:
        logging.getLogger("x").exception("failed")

    assert output.getvalue().count("Traceback") == 1
    assert "ValueError: first" in output.getvalue()
    assert "\x1b" not in output.getvalue()
    if log_format == "json":
        [event] = output.events
        assert (event["level"], event["event"]) == ("error", "failed")
        assert event["exception"].endswith("ValueError: first\nsecond \x1b[31m")


def test_a_record_that_claims_an_exception_without_one_is_a_line(output: Output) -> None:
    configure_logging("info", "json", output)
    logging.getLogger("x").error("none", exc_info=True)

    [event] = output.events
    assert "exception" not in event


@pytest.mark.parametrize("text", ["\udcff", "a\x00b"])
def test_a_record_with_undecodable_text_is_a_line(output: Output, text: str) -> None:
    """As in the name of a file that is not UTF-8."""
    configure_logging("info", "json", output)
    logging.getLogger("x").warning("cannot read %s", text)

    assert output.events[0]["event"].startswith("cannot read ")


def test_a_record_that_cannot_be_rendered_does_no_harm(output: Output, capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging("info", "json", output)
    logging.getLogger("x").warning("%d", "no number")
    logging.getLogger("x").warning("next")

    told, following = output.events
    assert ("%d" in told["event"], "TypeError" in told["exception"], following["event"]) == (True, True, "next")
    # Whoever reads stderr may be as slow as whoever reads the log.
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("level", "seen"),
    [
        ("debug", ["debug", "info", "warning", "error"]),
        ("info", ["info", "warning", "error"]),
        ("warning", ["warning", "error"]),
        ("error", ["error"]),
    ],
)
def test_the_level_holds_for_records_and_for_the_access_log(output: Output, level: str, seen: list[str]) -> None:
    log = configure_logging(level, "json", output)
    for number in (logging.DEBUG, logging.INFO, logging.WARNING, logging.ERROR):
        logging.getLogger("inference_api").log(number, "x")

    assert [event["level"] for event in output.events] == seen
    assert (log is not None) == ("warning" in seen)


def test_what_libraries_say_of_urls_and_headers_is_not_logged(output: Output) -> None:
    configure_logging("debug", "json", output)
    for name in ("httpx", "httpcore", "httpcore.http11", "asyncio", "uvicorn.error"):
        logging.getLogger(name).info("GET http://internal/?key=secret")
        logging.getLogger(name).debug("authorization: Bearer secret")
        logging.getLogger(name).warning("trouble")

    assert [event["event"] for event in output.events] == ["trouble"] * 5


def test_what_the_server_complains_of_is_logged(output: Output) -> None:
    configure_logging("info", "json", output)
    logging.getLogger("uvicorn.error").info("Started server process")
    logging.getLogger("uvicorn.error").error("ASGI callable returned without starting response.")

    assert [event["event"] for event in output.events] == ["ASGI callable returned without starting response."]


async def test_a_stream_that_is_cut_on_purpose_is_nothing_to_complain_of(
    start_engine: Start, start_router: Start, caplog: pytest.LogCaptureFixture
) -> None:
    served = await start_router(await start_engine(sse(event(), then=Line.reset)))
    async with raw_client(served.port) as client:
        await client.send(post("/v1/chat/completions", STREAM))
        assert b"event: error" in await client.reader.read(-1)
    await until(lambda: served.lines)

    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


@pytest.mark.parametrize(
    ("tty", "log_format", "is_json"),
    [(False, None, True), (True, None, False), (True, "json", True), (False, "console", False)],
)
def test_a_terminal_gets_text_and_everything_else_json(
    output: Output, tty: bool, log_format: str | None, is_json: bool
) -> None:
    stream = Output(tty)
    configure_logging("info", log_format, stream)
    logging.getLogger("x").info("here")

    assert stream.getvalue().startswith("{") == is_json


def test_configured_twice_a_record_is_one_line(output: Output) -> None:
    configure_logging("info", "json", Output())
    configure_logging("info", "json", output)
    logging.getLogger("x").info("here")

    assert len(output.events) == 1


# Request ids

EVIL = [
    b"a b",
    b"a\x1b[31mred",
    b"a\tb",
    b'a"}',
    b"x" * 129,
    b"x" * 10_000,
    b"\xc3\xa9",
    b"\xff",
    b"",
    b"../../x",
    b"a,b",
    b"{}",
]


async def test_a_request_id_cannot_forge_a_line(start_engine: Start, start_router: Start, output: Output) -> None:
    served = await start_router(await start_engine())
    headers = [b"x-request-id: %s\r\n" % evil for evil in EVIL]
    headers += [b"x-correlation-id: %s\r\n" % evil for evil in EVIL]
    headers += [b"x-request-id: bad id\r\nx-request-id: good\r\n", b"x-request-id: a\r\n\tb\r\n"]
    for header in headers:
        async with raw_client(served.port) as client:
            await client.send(post("/v1/chat/completions", CHAT, header + b"connection: close\r\n"))
            received = await client.reader.read(-1)
            # Some of them are no header at all.
            assert received.startswith((b"HTTP/1.1 200 ", b"HTTP/1.1 400 ")), header
    await until(lambda: len(served.lines) == len(headers))

    log = configure_logging("info", "json", output)
    assert log is not None
    for line in served.lines:
        assert re.fullmatch(r"[A-Za-z0-9._-]{1,128}", line["request_id"]), line
        log(line)
    assert [event["request_id"] for event in output.events] == [line["request_id"] for line in served.lines]
    assert not {evil.decode("latin-1") for evil in EVIL} & {line["request_id"] for line in served.lines}


async def test_a_request_id_is_the_same_in_the_line_and_in_the_answer(start_engine: Start, start_router: Start) -> None:
    served = await start_router(await start_engine())
    given: list[dict[str, str]] = [
        {},
        {"x-request-id": "Mine_1.2-3"},
        {"x-request-id": "not mine", "x-correlation-id": "theirs"},
    ]
    answers = [await served.client.post("/v1/chat/completions", json=CHAT, headers=headers) for headers in given]
    await until(lambda: len(served.lines) == 3)

    ids = [answer.headers["x-request-id"] for answer in answers]
    assert [line["request_id"] for line in served.lines] == ids
    assert ids[1:] == ["Mine_1.2-3", "theirs"]
