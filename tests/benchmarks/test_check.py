"""The check of instructions: what it counts is a request that is answered, and what it calls a regression is one."""

import json

import pytest

from benchmarks import check, wire
from benchmarks.inprocess import running
from benchmarks.setup import Setup

BASELINE: dict[str, float] = json.loads(check.BASELINE.read_text())["instructions"]


def test_the_router_in_process_answers_each_case_as_the_engine_did() -> None:
    with running(Setup(backends=2, streams=3)) as (loop, (client,)):
        loop.run_until_complete(client.hold(3))
        for case in check.CASES:
            loop.run_until_complete(client.run(case.request, 3, case.end))
            assert case.check(client.answer).exact, case.name


def test_a_model_beside_the_usual_one_is_served_if_it_is_to_be_asked() -> None:
    setup = Setup(models=3, asked=2)
    (name,) = setup.asked_names()
    with running(setup) as (loop, (client,)):
        loop.run_until_complete(client.run(wire.request(0, model=name), 1, wire.JSON_END))
        assert wire.check(client.answer, 0).exact


def test_the_baseline_is_met_by_itself() -> None:
    lines, missed = check.verdicts(BASELINE, BASELINE)

    assert missed == 0
    assert len(lines) == len(check.CASES) + len(check.GROWN)


@pytest.mark.parametrize("case", check.CASES, ids=lambda case: case.name)
def test_eleven_per_cent_more_are_too_many(case: check.Case) -> None:
    lines, missed = check.verdicts({**BASELINE, case.name: BASELINE[case.name] * 1.11}, BASELINE)

    assert missed
    assert any(line.startswith(case.name) and line.endswith("MISSED") for line in lines)


def test_an_interpreter_that_needs_more_for_everything_is_no_regression() -> None:
    dearer = {name: count * 1.3 for name, count in BASELINE.items()}

    assert check.verdicts(dearer, BASELINE)[1] == 0


def test_a_cost_that_grows_with_a_number_is_one_even_if_the_baseline_has_it() -> None:
    name = check.GROWN[0].name
    grown = {**BASELINE, name: BASELINE[check.PLAIN.name] * 1.06}

    lines, missed = check.verdicts(grown, grown)

    assert missed == 1
    assert next(line for line in lines if line.endswith("MISSED")).startswith(name)


def test_without_valgrind_it_is_skipped_with_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", "")

    assert check.main() == 0

    out = capsys.readouterr().out
    assert out.startswith("skipped: ")
    assert out.count("\n") == 1
