"""Counts the votes of one request. Pure."""

from collections.abc import Hashable


class Poll:
    """`members`: how many may vote, each by its place in the list; `quorum`: equal votes that decide."""

    def __init__(self, members: int, quorum: int) -> None:
        self.members = members
        self._quorum = quorum
        self._ballots: dict[int, Hashable | None] = {}

    def cast(self, place: int, ballot: Hashable | None) -> int | None:
        """Count a vote. If it decides: the first place of its majority."""
        self._ballots[place] = ballot
        return self._first(ballot) if self.votes_of(place) >= self._quorum else None

    def votes_of(self, place: int) -> int:
        """How many vote as the member at this place, itself included."""
        ballot = self._ballots[place]
        return 1 if ballot is None else sum(1 for other in self._ballots.values() if other == ballot)

    @property
    def first(self) -> int | None:
        """The first place that voted at all."""
        return min(self._ballots, default=None)

    def _first(self, ballot: Hashable | None) -> int:
        return min(place for place, other in self._ballots.items() if other == ballot)
