"""The budget of second attempts."""

from hypothesis import given
from hypothesis import strategies as st

from inference_api.features.hedging.allowance import Allowance


@given(st.sampled_from([0.01, 0.05, 0.1, 1 / 3, 0.5]), st.lists(st.booleans(), max_size=400))
def test_it_is_never_more_than_the_share(share: float, wanted: list[bool]) -> None:
    allowance, spent = Allowance(), 0
    for number, wants in enumerate(wanted, 1):
        allowance.earn(share)
        spent += wants and allowance.spend()
        assert spent <= max(1, share * number + 1e-6)


def test_all_of_the_share_can_be_had() -> None:
    allowance, spent = Allowance(), 0
    for _ in range(1000):
        allowance.earn(0.1)
        spent += allowance.spend()

    assert spent in (99, 100)


def test_what_is_saved_is_a_burst_at_most() -> None:
    allowance = Allowance(most=10.0)
    for _ in range(100_000):
        allowance.earn(0.5)

    assert sum(allowance.spend() for _ in range(100)) == 10
