"""Counting votes."""

from hypothesis import given
from hypothesis import strategies as st

from inference_api.features.voting.poll import Poll


def test_the_first_of_the_majority_is_chosen_whoever_came_first() -> None:
    poll = Poll(3, 2)

    assert poll.cast(2, "a") is None
    assert poll.cast(1, "b") is None
    assert poll.cast(0, "a") == 0
    assert (poll.votes_of(0), poll.votes_of(1), poll.first) == (2, 1, 0)


def test_nobody_is_first_before_a_vote() -> None:
    assert Poll(3, 2).first is None


def test_what_is_like_nothing_has_its_own_vote_only() -> None:
    poll = Poll(3, 2)

    assert [poll.cast(place, None) for place in (2, 1)] == [None, None]
    assert (poll.votes_of(1), poll.first) == (1, 1)


@given(st.permutations(range(5)), st.lists(st.sampled_from("ab"), min_size=5, max_size=5), st.integers(2, 5))
def test_the_first_quorum_decides(order: list[int], ballots: list[str], quorum: int) -> None:
    poll = Poll(5, quorum)
    cast: list[int] = []
    for place in order:
        cast.append(place)
        found = poll.cast(place, ballots[place])
        equal = [one for one in cast if ballots[one] == ballots[place]]
        if len(equal) == quorum:
            assert found == min(equal)
            return
        assert found is None
