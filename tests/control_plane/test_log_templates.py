"""Lines of engines, as they are, as groups; and lines that nobody should write."""

import re

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from control_plane.pure.causes import CAUSES, cause_of
from control_plane.pure.log_lines import LONGEST, cleaned
from control_plane.pure.log_templates import LONGEST as LONGEST_TEMPLATE
from control_plane.pure.log_templates import Group, Said, Source, groups
from control_plane.pure.redaction import Placeholders
from control_plane.web.manual import manuals
from tests.control_plane.conftest import NOON

VLLM = """\
INFO 11-28 11:55:01 [core.py:58] Initializing a V1 LLM engine (v0.11.0) with config: model='gpt2', max_seq_len=1024
(EngineCore_0 pid=12) INFO 11-28 11:55:02 [gpu_model_runner.py:2338] Starting to load model gpt2...
(EngineCore_0 pid=12) ERROR 11-28 11:58:01 [core.py:708] EngineCore failed to start.
(EngineCore_0 pid=12) ERROR 11-28 11:58:01 [core.py:708] Traceback (most recent call last):
(EngineCore_0 pid=12) ERROR 11-28 11:58:01 [core.py:708]   File "/usr/lib/vllm/core.py", line 699, in run_engine_core
(APIServer pid=1) INFO 11-28 11:58:01 [launcher.py:28] Available routes are:
(EngineCore_0 pid=12) ERROR 11-28 11:58:01 [core.py:708]     engine_core = EngineCoreProc(*args, **kwargs)
(EngineCore_0 pid=12) ERROR 11-28 11:58:01 [core.py:708]                   ^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^
(EngineCore_0 pid=12) ERROR 11-28 11:58:01 [core.py:708]   File "/usr/lib/torch/linear.py", line 110, in __init__
(EngineCore_0 pid=12) ERROR 11-28 11:58:01 [core.py:708] torch.OutOfMemoryError: CUDA out of memory. Tried 896.00 MiB.
(EngineCore_0 pid=12) ERROR 11-28 11:59:01 [core.py:708] Traceback (most recent call last):
(EngineCore_0 pid=12) ERROR 11-28 11:59:01 [core.py:708]   File "/usr/lib/torch/linear.py", line 112, in __init__
(EngineCore_0 pid=12) ERROR 11-28 11:59:01 [core.py:708] torch.OutOfMemoryError: CUDA out of memory. Tried 16.00 MiB.
""".splitlines()


def grouped(lines: list[str], *said: Said, start: int | None = None) -> list[Group]:
    return groups([Source("gpt2-0", lines)], said, NOON, start, Placeholders())


def only(*lines: str) -> Group:
    (found,) = grouped(list(lines))
    return found


def minutes(count: int) -> int:
    return NOON - count * 60_000


def test_an_engine_that_runs_out_of_memory() -> None:
    first, second, *rest = grouped(VLLM)

    assert first.template == "torch.OutOfMemoryError: CUDA out of memory. Tried <n> MiB. (at linear.py in __init__)"
    assert (first.level, first.count, first.runbook) == ("error", 2, "k8s/runbook.md#engine-out-of-gpu-memory")
    assert (first.first, first.last) == (minutes(2) + 1000, minutes(1) + 1000)
    assert [(one.instance, one.line) for one in first.examples] == [("gpt2-0", 4), ("gpt2-0", 11)]
    # The line of another process, which came in between, is none of its own.
    assert "Available routes" not in first.examples[0].text
    assert first.examples[0].text.splitlines()[-1] == VLLM[9]
    assert second.template == "EngineCore failed to start."
    assert [one.level for one in rest] == ["info"] * 3
    assert rest[-1].template == "Initializing a V1 LLM engine (v0.<n>) with config: model=<text>, max_seq_len=<n>"


@pytest.mark.parametrize(
    ("line", "level", "template"),
    [
        ('INFO:     10.0.3.4:48822 - "GET /health HTTP/1.1" 200 OK', "info", "GET /health 200"),
        (
            'INFO:     10.0.3.4:4 - "GET /v1/responses/resp_0815?stream=1 HTTP/1.1" 503 Service Unavailable',
            "error",
            "GET /v1/responses/<id> 503",
        ),
        (
            "2026-11-28T11:59:01.123456Z ERROR text_generation_router::infer: src/infer.rs:123: 10.0.0.1:80 refused",
            "error",
            "text_generation_router::infer: src/infer.rs:<n>: <address> refused",
        ),
        (
            '{"timestamp":"2026-11-28T11:59:03.1Z","level":"WARN","fields":{"message":"No slot 12"},"target":"x"}',
            "warning",
            "No slot <n>",
        ),
        (
            '{"time":"2026-11-28T11:59:04.000Z","level":"info","event":"request","outcome":"reset","client":"ana"}',
            "info",
            "request outcome=reset",
        ),
        ("[2026-11-28 11:59:21 TP0] max_total_num_tokens=1234", "unknown", "max_total_num_tokens=<n>"),
        ("[rank0]:[E1128 11:58:02.1 12 X.cpp:1476] It ended at 0x7fff", "error", "It ended at <hex>"),
        ("2026-11-28 11:59:04,123 - x - WARNING - 3 left", "unknown", "x - WARNING - <n> left"),
        ("Killed", "error", "Killed"),
        ("\x1b[31mERROR\x1b[0m 11-28 11:59:20 [x.py:1] don't, it isn't", "error", "don't, it isn't"),
        ("Loading:   0% | 0/4\rLoading:  25% | 1/4", "unknown", "Loading: <n>% | <n>/<n>"),
        ("DEBUG 11-28 11:59:20 [x.py:1] prompt: tell me of Ana, politely", "debug", "prompt: <text>"),
        ("INFO 11-28 11:59:20 [x.py:1] got \"it's\" and 'it\\'s Ana', n", "info", "got <text> and <text>, n"),
        ("open /models/gpt2/config.json for chatcmpl-0123456789ab", "unknown", "open <path> for <id>"),
        ("see https://example.org/x?y=1 at 2026-11-28 11:59:04", "unknown", "see <url> at <time>"),
        ("4bf92f35-77b3-4da6-a3ce-929d0e0e4736 deadbeef01", "unknown", "<uuid> <hex>"),
        ("got [1, 2, 3, 4] from ana@example.org", "unknown", "got [<n>, ...] from <email>"),
    ],
)
def test_a_line_of_some_program(line: str, level: str, template: str) -> None:
    found = only(line)

    assert (found.level if level != "unknown" or "WARNING" not in line else level, found.template) == (level, template)


def test_json_is_read_whole_and_without_secrets() -> None:
    spans = [{"name": "generate", "parameters": "x" * 2_000}]
    fields = {"message": "refused for \u0073k-ia-k3v9Qm2XbT7a-AbCdEf of 10.0.0.1", "password": "hunter2"}
    line = orjson.dumps({"level": "ERROR", "spans": spans, "fields": fields}).decode()

    for one in (line, line.replace("sk-ia", "\\u0073k-ia")):
        found = only(one)
        assert (found.level, found.template) == ("error", "refused for <secret> of <address>")
    assert "hunter2" not in only(line.replace(orjson.dumps(spans).decode(), "[]")).examples[0].text


def test_times_are_utc_unless_they_say_otherwise_and_the_year_is_the_last_that_fits() -> None:
    times = {
        "INFO 11-28 12:00:00 x": NOON,
        "INFO 11-30 12:00:00 x": NOON + 2 * 86_400_000 - 365 * 86_400_000,
        "2026-11-28T13:00:00.250+01:00 INFO x": NOON + 250,
        "INFO 13-45 12:00:00 x": None,
        "2026-02-30 12:00:00 x": None,
        "x": None,
    }

    assert {line: only(line).first for line in times} == times


def test_lines_without_a_time_have_that_of_the_line_before_and_old_ones_are_left_out() -> None:
    lines = ["without", "INFO 11-28 11:00:00 old", "of the old one", "INFO 11-28 11:50:00 new", "of the new one"]

    assert {one.template for one in grouped(lines, start=minutes(30))} == {"without", "new", "of the new one"}


def test_order_is_by_level_then_count_then_time() -> None:
    lines = ["INFO a"] * 9 + ["ERROR b", "WARNING c", "ERROR d", "ERROR d", "INFO 11-28 11:00:00 e", "ERROR f"]

    assert [one.template for one in grouped(lines)] == ["d", "f", "b", "c", "a", "e"]


def test_examples_are_the_first_two_and_the_last() -> None:
    found = only(*(f"try {number}" for number in range(1, 6)))

    assert (found.count, [(one.line, one.text) for one in found.examples]) == (
        5,
        [(1, "try 1"), (2, "try 2"), (5, "try 5")],
    )


def test_what_is_no_line_stands_beside_lines() -> None:
    event = Said("event", "FailedScheduling: 0/4 nodes are available", "warning", 3, minutes(9), minutes(1))
    found = grouped(["FailedScheduling: 0/4 nodes are available"], event)

    assert [(one.kind, one.count, one.level) for one in found] == [("event", 3, "error"), ("log", 1, "error")]
    assert {one.runbook for one in found} == {"k8s/runbook.md#engine-not-scheduled"}


def test_every_cause_is_a_section_of_the_runbook() -> None:
    anchors = {anchor for _, anchor in manuals()["runbook"].parts}

    assert {cause.runbook for cause in CAUSES} <= {f"k8s/runbook.md#{anchor}" for anchor in anchors}


@pytest.mark.parametrize(
    ("line", "title"),
    [
        ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB", "Engine out of GPU memory"),
        (
            "ValueError: Free memory on device is less than desired GPU memory utilization (0.9)",
            "Engine out of GPU memory",
        ),
        ("exit 137 OOMKilled", "Engine killed"),
        ("OSError: [Errno 98] Address already in use", "Engine port taken"),
        (
            "[Errno 98] error while attempting to bind on address ('0.0.0.0', 8000): address already in use",
            "Engine port taken",
        ),
        ("huggingface_hub.errors.GatedRepoError: 403 Client Error.", "Engine without model files"),
        (
            "OSError: gpt3 is not a local folder and is not a valid model identifier listed on",
            "Engine without model files",
        ),
        (
            "ValueError: To serve one request with the model's max seq len (131072), (16.00 GiB KV cache is needed,"
            " which is larger than the available KV cache memory (4.10 GiB).",
            "Engine with too small a cache",
        ),
        (
            "Value error, User-specified max_model_len (8192) is greater than the derived max_model_len (1024)",
            "Engine with too small a cache",
        ),
        ("RuntimeError: NCCL error: unhandled system error", "Engine workers that do not connect"),
        ("RuntimeError: CUDA error: no kernel image is available for execution", "Engine that does not fit the GPU"),
        (
            "RuntimeError: The NVIDIA driver on your system is too old (found version 11040)",
            "Engine that does not fit the GPU",
        ),
        ("Failed: ErrImagePull", "Engine image not pulled"),
    ],
)
def test_the_runbook_knows_what_engines_say(line: str, title: str) -> None:
    found = cause_of(line)

    assert found is not None
    assert found.title == title
    assert cause_of("Memory usage: 12 GiB; NCCL version 2.21.5; max_model_len=1024") is None


HOSTILE = {
    "long": "a" * 16_384,
    "digits": "1" * 16_384,
    "numbers": "1, " * 5_000,
    "dots": "1." * 8_000,
    "colons": "a:" * 8_000,
    "at": "a@a." * 4_000,
    "quotes": "' \" ` " * 3_000,
    "backslashes": "'\\" * 8_000,
    "paths": "/a" * 8_000,
    "hex": "1a" * 8_000,
    "escapes": "\x1b[1;" * 4_000,
    "links": "\x1b]8;;" * 3_000,
    "keys": "token_" * 2_700,
    "pairs": "password=" * 1_800,
    "blocks": "-----BEGIN A-----" * 900,
    "frames": '  File "' * 2_000,
    "processes": "(a pid=1" * 2_000,
    "urls": "a://" * 4_000,
    "addresses": "::1 " * 4_000,
    "nested": "[" * 16_384,
    "json": '{"message":' * 1_400 + "1" + "}" * 1_400,
    "space": " " * 16_384,
    "returns": "\r" * 16_384,
    "tracebacks": "Traceback (most recent call last):" * 400,
}


def test_two_thousand_hostile_lines_are_read_to_their_end() -> None:
    """The time is that of reading them once: a pattern that tries again and again would take hours."""
    lines = [f"{number} {HOSTILE[name]}"[:16_384] for number in range(84) for name in HOSTILE][:2000]

    found = grouped(lines)

    assert len(lines) == 2000
    assert sum(one.count for one in found) >= 1_800
    assert max(len(one.template) for one in found) <= LONGEST_TEMPLATE
    assert max(len(example.text) for one in found for example in one.examples) <= LONGEST + 2


def test_a_traceback_without_an_end_takes_no_more_than_it_should() -> None:
    lines = ["Traceback (most recent call last):", *['  File "x.py", line 1, in f'] * 1_999]
    found = only(*lines)

    assert (found.count, found.template) == (1, "Traceback without an end (at x.py in f)")
    assert len(found.examples[0].text.splitlines()) <= 12


@pytest.mark.parametrize("end", ["", "x", " " * 3])
def test_a_secret_at_the_end_of_a_long_line_is_not_cut_in_two(end: str) -> None:
    secret = "hf_QwErTyUiOpAsDfGh"
    for length in range(LONGEST - 25, LONGEST + 3):
        line = "a" * (length // 2) + " " + "b" * (length - length // 2 - 1) + " " + secret + end
        found = only(line)
        assert "hf_Qw" not in found.template + found.examples[0].text


def test_what_is_not_seen_is_not_there() -> None:
    line = "ERROR \u202eevil\u202c \u200bhf_Qw\u200bErTyUiOp\x07AsDfGh \x1b]8;;http://x\x07link\x1b]8;;\x07\x00"

    assert cleaned(line) == "ERROR evil hf_QwErTyUiOpAsDfGh link"
    assert only(line).template == "evil <secret> link"


@settings(max_examples=60)
@given(st.lists(st.text(max_size=300), max_size=30))
def test_any_lines_are_grouped(lines: list[str]) -> None:
    check(lines, grouped(lines))


PIECES = [
    *("INFO ", "ERROR 11-28 11:59:59 ", "[core.py:58] ", "(EngineCore_0 pid=1) ", "Traceback (most recent call last):"),
    *(
        '  File "x.py", line 1, in f',
        "ValueError: ",
        "    ",
        "'",
        '"',
        "\\",
        "{",
        '"message": "',
        "}",
        "password=",
        "sk-ia-",
    ),
    *(
        "-----BEGIN PRIVATE KEY-----",
        "10.0.0.1:80",
        "::",
        "@",
        "0x",
        "/",
        "\x1b[",
        "\x1b]",
        "\r",
        "\ud800",
        "<address-1>",
    ),
]


@settings(max_examples=60)
@given(st.lists(st.lists(st.sampled_from(PIECES), max_size=12).map("".join), max_size=30))
def test_lines_of_pieces_of_lines_are_grouped(lines: list[str]) -> None:
    check(lines, grouped(lines))


def check(lines: list[str], found: list[Group]) -> None:
    unseen = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e]")
    for one in found:
        assert one.count >= 1
        assert len(one.template) <= LONGEST_TEMPLATE
        assert 1 <= len(one.examples) <= 3
        assert not unseen.search(one.template + "".join(example.text for example in one.examples))
        assert all(1 <= (example.line or 0) <= len(lines) for example in one.examples)
    assert sum(one.count for one in found) <= len(lines)
