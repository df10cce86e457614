"""Virtual models by the catalogue key `consensus`: several members answer, and the answer of the majority is returned.

It is one member's own answer, byte for byte. The vote ends when a quorum agrees; members that are still at work are
cancelled.
"""

from collections.abc import Awaitable, Iterator, Mapping
from typing import Literal, Self

import httpx
from pydantic import BaseModel, ConfigDict, Field, model_validator

from inference_api.core import Core
from inference_api.errors import InvalidRequest, NoConsensus, UpstreamProtocolError
from inference_api.feature import Feature, Switch
from inference_api.features.parallel.members import MemberRuns, present
from inference_api.features.parallel.runs import Run
from inference_api.features.voting.ballots import Compare, read_vote
from inference_api.features.voting.poll import Poll
from inference_api.models import OK, Call, Outcome, Reply, Send, note, of_status
from inference_api.observe.exposition import Family
from inference_api.observe.families import counter
from inference_api.observe.series import Count, Series
from inference_api.relay.answers import hold
from inference_api.routing.entries import CatalogueEntry, EntryKey, ModelName
from inference_api.routing.fleet import Model
from inference_api.routing.references import Refers
from inference_api.settings import Settings

_ROUTES = frozenset({"chat_completions", "completions"})
_HEADER = b"x-inference-votes"
# Larger answers do not vote: comparing them would hold up other requests.
_LARGEST = 256 * 1024


class Voting(BaseModel):
    """How the members vote."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    members: tuple[ModelName, ...] = Field(min_length=2, max_length=8)
    quorum: int | None = Field(default=None, ge=2, strict=True)
    compare: Compare = "text"
    on_split: Literal["primary", "error"] = "primary"

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if len(set(self.members)) != len(self.members):
            raise ValueError("the same member is listed twice")
        if self.quorum is not None and self.quorum > len(self.members):
            raise ValueError(f"a quorum of {self.quorum} is more than the {len(self.members)} members")
        return self

    @property
    def needed(self) -> int:
        """Equal votes that decide; by default more than half of the members."""
        return len(self.members) // 2 + 1 if self.quorum is None else self.quorum


_REFERS = Refers(lambda voting: voting.members, "consensus.members", True, True, frozenset({"cache"}))
CONSENSUS: EntryKey[Voting | None] = EntryKey("consensus", Voting | None, None, _REFERS)


def build(core: Core, settings: Settings) -> Feature:
    """Always built: the key turns it on for its model."""
    votes = Consensus(core)
    return Feature(
        "consensus", fields=("n",), send=votes.layer, member=votes.layer, for_model=votes_on, collect=votes.collect
    )


def votes_on(entry: CatalogueEntry) -> bool:
    return CONSENSUS.of(entry) is not None


class Consensus:
    """Lets members vote, and counts the results. `largest`: bytes of an answer that may vote."""

    def __init__(self, core: Core, largest: int = _LARGEST) -> None:
        self._core = core
        self._largest = largest
        self._results: Series[tuple[str, str], Count] = Series(
            lambda key: Count(), lambda key: key[0] in core.fleet.models
        )

    def layer(self, send: Send) -> Send:
        """In place of `send`: a vote has no backends of its own. Raises InvalidRequest, NoConsensus."""

        def voting(call: Call, model: Model) -> Awaitable[Reply]:
            check(call, model)
            return self._vote(call, model)

        return voting

    async def _vote(self, call: Call, model: Model) -> Reply:
        voting = CONSENSUS.of(model.entry)
        assert voting is not None
        poll, ballots = Poll(len(voting.members), voting.needed), _Reader(self._core, voting.compare, self._largest)
        async with MemberRuns(self._core, "vote", Outcome.VOTE_LOST, call, model, ballots) as runs:
            for member in present(self._core, voting.members, model):
                runs.start_member(member)
            while runs.are_open:
                for run in await runs.next():
                    if run.answered and (place := poll.cast(run.place, ballots.read[run])) is not None:
                        return await self._returned(runs, poll, place, "quorum")
            if poll.first is None:
                self._count(model, "none")
                return await runs.keep(runs.all[0])
            if voting.on_split == "error":
                self._count(model, "none")
                raise NoConsensus(model.name)
            return await self._returned(runs, poll, poll.first, "primary")

    async def _returned(self, runs: MemberRuns, poll: Poll, place: int, result: str) -> Reply:
        """The answer of the member at this place."""
        self._count(runs.model, result)
        reply = await runs.keep(runs.all[place])
        votes = f"{poll.votes_of(place)}/{poll.members}"
        note(runs.call.state, "votes", votes)
        reply.extra += ((_HEADER, votes.encode()),)
        return reply

    def _count(self, model: Model, result: str) -> None:
        self._results[model.name, result].count += 1

    def collect(self) -> Iterator[Family]:
        if self._results:
            yield from families({labels: cell.count for labels, cell in self._results.snapshot().items()})


def families(results: Mapping[tuple[str, str], int]) -> Iterator[Family]:
    """`results`: by virtual model and result."""
    text = "Votes by result: a quorum agreed, the first member's answer was taken without one, or none was returned."
    series = [(labels, float(count)) for labels, count in results.items()]
    yield counter("consensus", text, ("model_name", "result"), series)


class _Reader:
    """Takes whole answers, in the tasks of their runs. `read`: the ballots of those that can be returned."""

    def __init__(self, core: Core, compare: Compare, largest: int) -> None:
        self._turns = core.admission.turns
        self._compare = compare
        self._largest = largest
        self.read: dict[Run, object] = {}

    async def __call__(self, run: Run, reply: Reply) -> bool:
        body, rest = await hold(reply.stream, self._largest)
        if rest is not None:
            text = f"The answer of the model {run.model.name!r} is too large to vote: more than {self._largest} bytes."
            raise UpstreamProtocolError(text, Outcome.VOTE_LOST, final=True)
        outcome = of_status(reply.status)
        vote = await self._turns.run(read_vote(body, self._compare)) if outcome is OK else None
        if vote is None and outcome is OK:
            outcome = Outcome.PROTOCOL_ERROR
        elif vote is not None:
            run.tokens = vote.tokens
            outcome = OK if vote.is_whole else Outcome.ABORTED
        # The exchange is over, and the backend has room for another one.
        await reply.aclose(outcome)
        run.outcome = outcome
        run.reply = _again(reply, body)
        if vote is None or not vote.is_whole:
            return False
        self.read[run] = vote.ballot
        return True


def _again(reply: Reply, body: bytes) -> Reply:
    """The same answer, from memory."""
    again = Reply(reply.status, reply.headers, httpx.ByteStream(body), reply.backend, None, reply.attempts)
    # A member that is a vote, too, has votes of its own.
    again.extra = tuple(extra for extra in reply.extra if extra[0] != _HEADER)
    return again


def check(call: Call, model: Model) -> None:
    """Raises InvalidRequest for what members cannot vote on."""
    if call.route.label not in _ROUTES:
        text = f"The model {model.name!r} is a vote of its members, on /v1/chat/completions and /v1/completions only."
        raise InvalidRequest(text, param="model")
    if call.stream:
        text = f"The model {model.name!r} does not stream: its members vote on whole answers."
        raise InvalidRequest(text, param="stream")
    if call.fields.get("n") not in (None, 1):
        text = f"The model {model.name!r} gives one answer: its members vote on one each. Leave `n` out."
        raise InvalidRequest(text, param="n")


FEATURE = Switch(build, keys=(CONSENSUS,))
