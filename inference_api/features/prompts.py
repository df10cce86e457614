"""Stored prompts of the policy: `prompt: {id, version, variables}` in a body becomes messages, or a text."""

from collections.abc import Awaitable, Callable, Iterator, Mapping
from typing import Any, Final, NamedTuple

from inference_api.core import Core
from inference_api.errors import InvalidRequest, PromptNotFound, RouterError
from inference_api.feature import Feature, Switch
from inference_api.features.delivery.records import SENT_SIZE
from inference_api.features.prompting.edits import edits, moved
from inference_api.http.bodies import STORED_PROMPT
from inference_api.http.turns import Turns
from inference_api.models import Call, Edit, Reply, Send, note
from inference_api.observe.exposition import Family
from inference_api.observe.families import counter
from inference_api.policy.snapshot import Policy
from inference_api.policy.source import Policies
from inference_api.policy.templates import MEMBERS, Prompts, check_route
from inference_api.routing.affinity import affinity_key
from inference_api.routing.fleet import Model
from inference_api.routing.references import members_of
from inference_api.settings import Settings
from inference_api.upstream.json_text import judge
from inference_api.upstream.places import MemberPlace, find_places
from inference_api.upstream.rewrite import edited

_NAME = "prompt"
_HEADER = b"x-inference-prompt"
# By its place: reading a field by name costs ten times as much.
_FIELDS: Final = 8
# Bytes, and commas, of the longest object that is read at once
_LONGEST, _MOST = 4 << 20, 10_000
_OK, _NOT_FOUND, _VARIABLE = "ok", "not_found", "variable"


class PromptRequest(NamedTuple):
    """What a body asks for. `version`: a number, a label, or None."""

    id: str
    version: int | str | None
    variables: Mapping[str, Any]


class StoredPrompts:
    """`models` gives those of the catalogue in use, by name: virtual ones stand for others."""

    def __init__(self, policies: Policies, turns: Turns, models: Callable[[], Mapping[str, Model]]) -> None:
        self._policies = policies
        self._turns = turns
        self._models = models
        self._prompts = Prompts(())
        self.results = dict.fromkeys((_OK, _NOT_FOUND, _VARIABLE), 0)
        policies.on_change(self._applied)
        if policies.current is not None:
            self._applied(policies.current)

    def _applied(self, policy: Policy) -> None:
        self._prompts = Prompts(policy.prompts)

    def send(self, send: Send) -> Send:
        """The layer. Raises PromptNotFound, and the errors of its variables."""

        # No coroutine: nearly all requests go on at once.
        def prompting(call: Call, model: Model) -> Awaitable[Reply]:
            fields = call[_FIELDS]
            if _NAME not in fields and STORED_PROMPT not in fields:
                return send(call, model)
            if call.route.label not in MEMBERS or not isinstance(fields.get(_NAME, fields), dict):
                # Not this prompt: engines have ignored such a field before.
                return send(call, model)
            return self._prompted(send, call, model)

        return prompting

    async def _prompted(self, send: Send, call: Call, model: Model) -> Reply:
        member = MEMBERS[call.route.label]
        places = await self._turns.run(find_places(call.body, {_NAME, member}))
        asked = read(call.body, places)
        prompt = self._prompts.of(asked.id, getattr(call.caller, "organisation", None))
        if prompt is None and self._passes(call, model):
            return await send(call, model)
        try:
            if prompt is None:
                raise PromptNotFound(asked.id)
            template = self._prompts.template(prompt, asked.version)
            check_route(template, call.route.label)
            rendered = template.render(asked.variables)
        except RouterError as exc:
            self.results[_NOT_FOUND if isinstance(exc, PromptNotFound) else _VARIABLE] += 1
            raise
        self.results[_OK] += 1
        note(call.state, _NAME, template.name)
        call.answer_headers.append((_HEADER, template.name.encode()))
        return await send(_filled(call, model, edits(call.route.label, call.body, places, member, rendered)), model)

    def _passes(self, call: Call, model: Model) -> bool:
        """Whether an unknown prompt is one of the provider's own."""
        if call.route.label != "responses":
            return False
        models = self._models()
        members = [models[name].entry for name in members_of(model.entry) if name in models]
        return all(entry.engine == "openai" for entry in members or [model.entry])

    def collect(self) -> Iterator[Family]:
        if any(self.results.values()):
            yield from families(self.results)


def build(core: Core, settings: Settings) -> Feature | None:
    """Off without a policy."""
    policies = core.provided(Policies)
    if policies is None:
        return None
    prompts = StoredPrompts(policies, core.admission.turns, lambda: core.fleet.models)
    return Feature("prompts", fields=(_NAME,), send=prompts.send, collect=prompts.collect)


def read(body: bytes, places: list[MemberPlace]) -> PromptRequest:
    """Raises InvalidRequest."""
    last = [place for place in places if place.name == _NAME][-1]
    start, end = last.start, last.end
    if end - start > _LONGEST or body.count(b",", start, end) > _MOST:
        raise InvalidRequest("The field 'prompt' is too large.", param=_NAME)
    try:
        given = judge(body[start:end])
    except RecursionError:
        raise InvalidRequest("The field 'prompt' is nested too deep.", param=_NAME) from None
    id, version, variables = given.get("id"), given.get("version"), given.get("variables")
    if not isinstance(id, str) or not id:
        raise InvalidRequest("The field 'prompt.id' must be the name of a prompt.", param="prompt.id")
    if not (version is None or (isinstance(version, int | str) and not isinstance(version, bool))):
        raise InvalidRequest("The field 'prompt.version' must be a number or a label.", param="prompt.version")
    if not isinstance(variables, dict | None):
        raise InvalidRequest("The field 'prompt.variables' must be an object.", param="prompt.variables")
    return PromptRequest(id, version, variables or {})


def _filled(call: Call, model: Model, changes: list[Edit]) -> Call:
    """The Call with the prompt in its body: all that follows sees the request as the backend gets it."""
    content = edited(call.body, changes)
    body = content if isinstance(content, bytes) else b"".join(content)
    model_at = call.model_at
    if model_at is not None:
        model_at = moved(model_at[0], changes), moved(model_at[1], changes)
    prefix = call.prefix
    if not prefix and model.entry.balancing == "prefix_affinity":
        # Without a message of the client's own, the prompt is all that its prefix can be.
        prefix = affinity_key(model.name, {"prompt": b"".join(value for _, value in changes).decode("latin-1")}, None)
    for name in (_NAME, STORED_PROMPT):
        call.fields.pop(name, None)  # type: ignore[attr-defined]
    # For whoever counts tokens by bytes, as the Record has the client's body.
    call.state[SENT_SIZE] = len(body)  # type: ignore[index]
    return call._replace(body=body, model_at=model_at, prefix=prefix)


def families(results: Mapping[str, int]) -> Iterator[Family]:
    text = "Requests for stored prompts, by what became of the prompt."
    yield counter("prompt_requests", text, ("result",), [((result,), float(n)) for result, n in dict(results).items()])


FEATURE = Switch(build)
