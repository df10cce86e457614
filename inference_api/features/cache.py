"""The answer cache, by the catalogue key `cache`: a request that was answered before gets the same bytes again.

Only whole answers are stored, in memory, for those who may share them: see `caching`.
"""

import re
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from functools import partial
from hashlib import sha256
from time import monotonic
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field

from inference_api.core import Core
from inference_api.errors import RouterError, UpstreamTimeout
from inference_api.feature import Feature, Switch
from inference_api.features.caching import keys
from inference_api.features.caching.answers import Answers, CachedAnswer
from inference_api.features.caching.fill import Fill
from inference_api.features.caching.flights import Flights, Leading
from inference_api.features.caching.keys import SMALL, Digest
from inference_api.features.cost import PRICE, cost_of
from inference_api.features.delivery.records import METERED, Metered
from inference_api.http.head import RequestHead
from inference_api.http.turns import Turns
from inference_api.models import NOTES, OK, RAN, Call, Extra, Outcome, Reply, Send, note
from inference_api.observe.exposition import Family
from inference_api.observe.families import counter, gauge
from inference_api.observe.series import Count, Series
from inference_api.relay.replay import Replay
from inference_api.relay.usage import Counts
from inference_api.routing.entries import CatalogueEntry, EntryKey
from inference_api.routing.fleet import Model
from inference_api.routing.references import members_of
from inference_api.settings import Group, Settings

if TYPE_CHECKING:
    from hashlib import _Hash as Hash

# Of notes at heads
_NAME = "cache"
# Places of fields of Call and RequestHead, for the hot path: reading one by name costs ten times as much.
_ROUTE: Final = 0
_FIELDS: Final = 8
_STATE: Final = 14
_HEADERS: Final = 15
_HEAD: Final = 17
_NOTES: Final = 10
_LABEL: Final = 1
_GENERATING = frozenset({"chat_completions", "completions", "responses"})
_ROUTES = _GENERATING | {"embeddings", "rerank", "score", "tokenize"}
_MISS, _BYPASS = b"x-inference-cache: miss\r\n", b"x-inference-cache: bypass\r\n"
_MAX_AGE = re.compile(r"max-age=\"?(\d{1,9})\"?")
_NO_NOTES: Mapping[str, Any] = {}
_FROM_CACHE: Metered = (0, 0, 0, 0, "cache")


class Options(Group):
    cache_bytes: Annotated[int, Field(ge=1 << 20)] = Field(
        default=64 << 20, description="memory of the answer cache, keys included; models with `cache` share it"
    )


class CacheEntry(BaseModel):
    """`ttl`: seconds; `scope`: who shares answers; `temperature`: the highest one whose answers are stored."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    ttl: Annotated[float, Field(strict=True, gt=0, allow_inf_nan=False)]
    scope: Literal["org", "key", "all"] = "org"
    temperature: Annotated[float, Field(strict=True, ge=0, le=2)] = 0.0


KEY: EntryKey[CacheEntry | None] = EntryKey("cache", CacheEntry | None, None)


def build(core: Core, settings: Settings) -> Feature:
    """Always built, and only on the way of models with the key."""
    answers = Answers(settings.of(Options).cache_bytes)
    cache = Cache(lambda: core.fleet.served, core.admission.turns, answers, core.prepare.deadline)
    return Feature(
        "cache",
        fields=("temperature",),
        send=cache.send,
        for_model=has_cache,
        collect=cache.collect,
    )


def has_cache(entry: CatalogueEntry) -> bool:
    return KEY.of(entry) is not None


class Wish(NamedTuple):
    """What the Cache-Control of a request says. `max_age`: seconds; None: of any age."""

    no_store: bool = False
    no_cache: bool = False
    max_age: int | None = None


_ANYTHING = Wish()


def wish_of(head: RequestHead) -> Wish:
    """Noted at the head, for the requests that repeat it."""
    wish: Wish | None = head.notes.get(_NAME)
    if wish is None:
        wish = head.notes[_NAME] = _wish(head)
    return wish


def _wish(head: RequestHead) -> Wish:
    values = [value for name, value in head.headers if name == b"cache-control"]
    if not values:
        return _ANYTHING
    text = b",".join(values).decode("latin-1").lower()
    words = {word.strip() for word in text.split(",")}
    ages = [int(found[1]) for word in words if (found := _MAX_AGE.fullmatch(word))]
    age = min(ages, default=None)
    # An answer of this moment is one that was asked anew.
    return Wish("no-store" in words, "no-cache" in words or age == 0, age)


class _Common(NamedTuple):
    """What the requests of a model have in common."""

    entry: CatalogueEntry
    key: CacheEntry
    hashed: "Hash"
    # Of a virtual model, the entries that it stands for, by name
    others: tuple[tuple[str, CatalogueEntry | None], ...]
    temperature: float
    # Of requests that pass by
    bypassed: Count


class _Asking(NamedTuple):
    """A request that may be answered from the cache."""

    call: Call
    model: Model
    common: _Common
    wish: Wish


class Cache:
    """`models`: by name; `turns` for large bodies; `deadline`: of a Call without one; `clock`: that of the answers."""

    def __init__(
        self,
        models: Callable[[], Mapping[str, Model]],
        turns: Turns,
        answers: Answers,
        deadline: Callable[[Call, Model], float],
        clock: Callable[[], float] = monotonic,
    ) -> None:
        self._models = models
        self._turns = turns
        self._deadline = deadline
        self._clock = clock
        self.answers = answers
        self.flights = Flights()
        self._common: dict[str, _Common] = {}
        self._requests: Series[tuple[str, str], Count] = self._series()
        self._tokens: Series[tuple[str, str], Count] = self._series()
        self._costs: Series[tuple[str], Count] = self._series()

    def send(self, send: Send) -> Send:
        """The layer."""
        known = self._common

        # No coroutine: most requests do not wait here.
        def cached(call: Call, model: Model) -> Awaitable[Reply]:
            head = call[_HEAD]
            wish: Wish = _ANYTHING if head is None else (head[_NOTES].get(_NAME) or wish_of(head))
            common = known.get(model.name)
            if common is None or common[0] is not model.entry or common[3]:
                common = self._common_of(model)
            if wish[0] or not _is_answered_alike(call, common[4]):
                common[5].count += 1
                state = call[_STATE]
                if NOTES in state:
                    note(state, "cache", "bypass")
                else:
                    state[NOTES] = {"cache": "bypass"}  # type: ignore[index]
                call[_HEADERS].append(_BYPASS)
                return send(call, model)
            asking: _Asking = tuple.__new__(_Asking, (call, model, common, wish))
            if len(call.body) > SMALL:
                return self._ask_large(send, asking)
            return self._ask(send, asking, keys.small(common.hashed, call, _shared_by(call, common)))

        return cached

    def collect(self) -> Iterator[Family]:
        if not self._requests:
            return
        answers = self.answers
        counts: tuple[Series[Any, Count], ...] = (self._requests, self._tokens, self._costs)
        tables = [{labels: cell.count for labels, cell in one.snapshot().items()} for one in counts]
        yield from families(tables, (answers.bytes, answers.entries), dict(answers.evicted))

    def _series(self) -> Series[Any, Count]:
        return Series(lambda labels: Count(), lambda labels: labels[0] in self._models())

    def _common_of(self, model: Model) -> _Common:
        found = self._common.get(model.name)
        if (
            found is None
            or found.entry is not model.entry
            or (found.others and self._others(model.entry) != found.others)
        ):
            key, others = KEY.of(model.entry), self._others(model.entry)
            assert key is not None
            content = repr((model.entry, others)).encode("utf-8", "surrogatepass")
            found = self._common[model.name] = _Common(
                *(model.entry, key, keys.beginning(content), others),
                key.temperature,
                self._requests[model.name, "bypass"],
            )
            for gone in self._common.keys() - self._models().keys():
                del self._common[gone]
        return found

    def _others(self, entry: CatalogueEntry) -> tuple[tuple[str, CatalogueEntry | None], ...]:
        models, names = self._models(), [*members_of(entry)]
        # They nest, without a cycle.
        for name in names:
            names += members_of(models[name].entry) if name in models else ()
        return tuple((name, models[name].entry if name in models else None) for name in names)

    async def _ask_large(self, send: Send, asking: _Asking) -> Reply:
        call, _, common, _ = asking
        key = await self._turns.run(keys.large(common.hashed, call, _shared_by(call, common)))
        return await self._ask(send, asking, key)

    async def _ask(self, send: Send, asking: _Asking, key: Digest) -> Reply:
        call, model, _, wish = asking
        if not wish.no_cache:
            found = self.answers.find(key)
            if found is not None and (wish.max_age is None or self._clock() - found.made <= wish.max_age):
                return self._hit(call, model, found)
        if call.stream:
            return await self._miss(send, asking, key, None)
        if self.flights.lead(key):
            return await self._lead(send, asking, key)
        if wish.no_cache:
            return await self._miss(send, asking, key, None)
        return await self._follow(send, asking, key)

    async def _follow(self, send: Send, asking: _Asking, key: Digest) -> Reply:
        call, model, common, wish = asking
        # For the Record of one that leaves while it waits
        note(call.state, "cache", "miss")
        until = call.deadline or self._deadline(call, model)
        # What comes after the wait has the time that is left.
        asking = _Asking(call._replace(deadline=until), model, common, wish)
        try:
            verdict = await self.flights.wait(key, until - monotonic())
        except TimeoutError:
            self._note(call, model, "miss", _MISS)
            raise UpstreamTimeout("The model did not finish its answer in time.", Outcome.TOTAL_TIMEOUT) from None
        if verdict is True:
            return await self._lead(send, asking, key)
        if verdict is False:
            return await self._miss(send, asking, key, None)
        return self._hit(call, model, verdict)

    async def _lead(self, send: Send, asking: _Asking, key: Digest) -> Reply:
        leading = Leading(self.flights, key)
        try:
            reply = await self._miss(send, asking, key, leading)
        except BaseException as exc:
            if isinstance(exc, RouterError) and exc.status == 503:
                # One after the other, each would wait for a place or a backend as long as this one has.
                leading.part()
            else:
                leading.pass_on()
            raise
        reply.on_end(partial(_ended, leading))
        return reply

    async def _miss(self, send: Send, asking: _Asking, key: Digest, leading: Leading | None) -> Reply:
        """Ask a backend, and store its answer."""
        call, model, _, _ = asking
        self._note(call, model, "miss", _MISS)
        reply = await send(call, model)
        if reply.status == 200 and not call.state.get(NOTES, _NO_NOTES).get("fallback"):
            taken = partial(self._store, asking, key, leading, reply.extra)
            fill = Fill(call.route.label, taken, _nothing if leading is None else leading.part)
            reply.taps += (fill,)
            if reply.filter is not None:
                reply.filter = fill.watched(reply.filter)
        return reply

    def _store(
        self,
        asking: _Asking,
        key: Digest,
        leading: Leading | None,
        extra: tuple[Extra, ...],
        replay: Replay,
        tokens: Counts,
    ) -> None:
        now, ran = self._clock(), asking.call.state.get(RAN)
        answer = CachedAnswer(replay, extra, now, now + asking.common.key.ttl, ran, tokens)
        answer.votes = asking.call.state.get(NOTES, _NO_NOTES).get("votes")
        # Part of the key, so that it is still the same at a hit.
        price = PRICE.of(asking.common.entry if ran is None else ran.entry)
        prompt, cached, completion, _ = tokens
        if price is not None and prompt is not None and completion is not None:
            answer.cost = cost_of(price, prompt, cached or 0, completion)
        self.answers.put(key, answer)
        if leading is not None:
            leading.land(answer)

    def _hit(self, call: Call, model: Model, answer: CachedAnswer) -> Reply:
        age = max(self._clock() - answer.made, 0.0)
        self._note(call, model, "hit", b"x-inference-cache: hit\r\nage: %d\r\n" % age)
        state: dict[str, Any] = call.state  # type: ignore[assignment]
        state[METERED] = _FROM_CACHE
        if answer.ran is not None:
            state[RAN] = answer.ran
        if answer.votes is not None:
            note(state, "votes", answer.votes)
        self._count_saved(model, answer)
        reply = Reply(200, answer.replay.headers, answer.replay, attempts=0)
        reply.extra = answer.extra
        return reply

    def _count_saved(self, model: Model, answer: CachedAnswer) -> None:
        prompt, _, completion, _ = answer.tokens
        if prompt:
            self._tokens[model.name, "input"].count += prompt
        if completion:
            self._tokens[model.name, "output"].count += completion
        if answer.cost:
            self._costs[model.name,].count += answer.cost

    def _note(self, call: Call, model: Model, result: str, header: bytes) -> None:
        self._requests[model.name, result].count += 1
        note(call.state, "cache", result)
        call.answer_headers.append(header)


def _is_answered_alike(call: Call, highest: float) -> bool:
    """Whether a second answer to this request may be the first one; `highest`: the temperature up to which."""
    label, fields = call[_ROUTE][_LABEL], call[_FIELDS]
    if label not in _GENERATING:
        return label in _ROUTES
    temperature = fields.get("temperature")
    if temperature is None:
        temperature = 1.0
    elif type(temperature) is not float and type(temperature) is not int:
        return False
    return 0 <= temperature <= highest and (label != "responses" or fields.get("store") is False)


def _shared_by(call: Call, common: _Common) -> bytes:
    """Who may get the answer, too. No two kinds are equal."""
    caller, scope = call.caller, common.key.scope
    shared = b"all"
    if scope != "all":
        organisation = None if scope == "key" else getattr(caller, "organisation", None)
        if organisation is not None:
            shared = b"org " + str(organisation).encode()
        else:
            shared = b"nobody" if caller is None else b"key " + caller.id.encode()
    if common.entry.credentials == "passthrough":
        # The provider decides who may ask: its answer is for these credentials.
        shared += b" " + sha256(call.authorization or b"").digest()
    return shared


def _ended(leading: Leading, reply: Reply, outcome: Outcome) -> None:
    """Without an answer that others may have: an engine's word on the request holds for all, a failure does not."""
    if outcome is OK or outcome is Outcome.UPSTREAM_4XX:
        leading.part()
    else:
        leading.pass_on()


def _nothing() -> None: ...


def families(
    tables: Sequence[Mapping[tuple[str, ...], int]], held: tuple[int, int], evicted: Mapping[str, int]
) -> Iterator[Family]:
    """`tables`: requests by result, saved tokens by type, saved cost; `held`: bytes and entries."""
    requests, tokens, costs = ([(labels, float(n)) for labels, n in table.items()] for table in tables)
    text = "Requests to models with a cache: answered from it, not found, or not looked for."
    yield counter("cache_requests", text, ("model_name", "result"), requests)
    yield gauge("cache_bytes", "Memory of the cached answers, keys included.", (), [((), float(held[0]))])
    yield gauge("cache_entries", "Cached answers.", (), [((), float(held[1]))])
    text = "Answers that left the cache: their time was over, or there was no room."
    yield counter("cache_evictions", text, ("reason",), [((reason,), float(n)) for reason, n in evicted.items()])
    text = "Tokens of answers that came from the cache."
    yield counter("saved_tokens", text, ("model_name", "type"), tokens)
    text = "What these tokens would have cost, in 10^-9 of CURRENCY."
    yield counter("saved_cost_nanos", text, ("model_name",), costs)


FEATURE = Switch(build, Options, keys=(KEY,))
