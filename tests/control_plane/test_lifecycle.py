"""The state of an object, by its instances."""

from typing import Any

import pytest

from control_plane.pure.lifecycle import Event, Instance, Observed, State, standing

WARNING = Event(1, True, "FailedScheduling", "0/4 nodes have nvidia.com/gpu", "Pod a")


def of(*states: State) -> tuple[Instance, ...]:
    return tuple(
        Instance(f"{state}-{number}", state, f"is {state}", 10 + number) for number, state in enumerate(states)
    )


@pytest.mark.parametrize(
    ("observed", "expected"),
    [
        (Observed(None), ("unknown", 0, 0)),
        (Observed(0), ("stopped", 0, 0)),
        (Observed(0, of("stopped")), ("stopped", 0, 0)),
        (Observed(0, of("stopping")), ("stopping", 0, 0)),
        # A moment after the order
        (Observed(0, of("ready", "ready")), ("stopping", 2, 0)),
        (Observed(2, of("ready", "failing")), ("ready", 1, 2)),
        (Observed(2, of("loading", "failing")), ("failing", 0, 2)),
        (Observed(3, of("waiting", "pulling", "loading")), ("loading", 0, 3)),
        (Observed(1, of("unknown")), ("unknown", 0, 1)),
        (Observed(1, of("stopping")), ("waiting", 0, 1)),
        (Observed(1), ("waiting", 0, 1)),
    ],
)
def test_a_state_follows_from_the_instances(observed: Observed, expected: Any) -> None:
    assert standing(observed)[:3] == expected


def test_a_state_has_its_reason() -> None:
    failing = standing(Observed(1, of("failing"), (WARNING,)))
    beside = standing(Observed(2, of("ready", "failing")))
    alone = standing(Observed(1, (), (WARNING,)))
    refused = standing(Observed(1, (), (WARNING,), problem="FailedCreate: exceeded quota"))

    assert (failing.reason, failing.since) == ("failing-0: is failing", 10)
    assert (beside.reason, beside.since) == ("failing-1: is failing", 10)
    assert alone.reason == "FailedScheduling: 0/4 nodes have nvidia.com/gpu"
    assert refused.reason == "FailedCreate: exceeded quota"
