"""/console/playground: a question to one model or two, by a key of the playground; streamed by a script, or whole.

What people type is in no URL, no log and no table. The URL says whom they ask: organisation, models, prompt.
"""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from starlette.responses import JSONResponse, Response

from control_plane.clients.router import Router
from control_plane.errors import Invalid, NotFound, Problem, Refused
from control_plane.http.console.forms import Form
from control_plane.http.console.relay import Relay
from control_plane.http.console.shell import USE, Page, Visit
from control_plane.plane import Act
from control_plane.pure import figures
from control_plane.pure.chat import Question, Turn, request_body
from control_plane.pure.samples import ROUTER, codes
from control_plane.services import models, organisations, playground, prompts
from control_plane.services.visibility import usable_models
from inference_api.routing.references import virtual_key

# Organisations, prompts and versions that are offered; models beyond which they are typed, with suggestions
_MOST, _LISTED = 200, 100
_VARIABLE = "var."
# Of parameters: least and most, and whether it is a whole number
_BOUNDS: Mapping[str, tuple[float | None, float | None, bool]] = {
    "temperature": (0, 2, False),
    "max_tokens": (1, None, True),
    "top_p": (0, 1, False),
    "seed": (None, None, True),
}
_STOPS = 4


@dataclass(frozen=True)
class Choice:
    """Whom to ask, as the URL says it. `organisation`: "" for none. `version`: of the prompt, with what it says."""

    organisations: list[tuple[str, str]]
    organisation: str
    models: list[tuple[str, str]]
    model: str
    other: str
    prompts: list[str]
    prompt: str
    versions: list[tuple[str, str]]
    version: str
    content: Mapping[str, Any] | None

    @property
    def asked(self) -> list[str]:
        return [one for one in (self.model, self.other) if one]

    @property
    def variables(self) -> Mapping[str, Mapping[str, Any]]:
        return {} if self.content is None else self.content.get("variables", {})

    @property
    def is_text(self) -> bool:
        """Whether the version is no chat."""
        return self.content is not None and "messages" not in self.content


class Given(NamedTuple):
    """What was typed, as text. `turns`: without the system message."""

    system: str = ""
    turns: tuple[Turn, ...] = (Turn("user", ""),)
    variables: Mapping[str, str] = {}
    parameters: Mapping[str, str] = {}


async def page(visit: Visit) -> Response:
    scripted = "application/json" in visit.request.headers.get("accept", "")
    if "answer" in visit.query and scripted and not visit.posting:
        return await _cost(visit)
    choice = await _choice(visit)
    if not visit.posting:
        return _shown(visit, choice, Given())
    form = await visit.form()
    given, do = _given(form), form.text("do")
    if do == "turn":
        return _shown(visit, choice, _continued(given, form))
    try:
        question = _question(choice, given)
    except Invalid as exc:
        if scripted:
            raise
        return _shown(visit, choice, given, problem=exc)
    router = visit.plane.connections.router
    organisation = choice.organisation or None
    if scripted:
        return Relay(visit.plane, visit.act, router, organisation, request_body(question, choice.model))
    if do == "code":
        public = visit.plane.settings.router_public_url
        return _shown(visit, choice, given, codes=codes(question, choice.model, public))
    # Each has an id of its own, which is the router's, too.
    acts = [visit.act._replace(request_id=f"{visit.act.request_id}{end}") for end in ("", "-2")]
    answers = await asyncio.gather(
        *(_whole(visit, act, router, choice, model, question) for act, model in zip(acts, choice.asked, strict=False))
    )
    return _shown(visit, choice, given, answers=answers)


async def _whole(
    visit: Visit, act: Act, router: Router | None, choice: Choice, model: str, question: Question
) -> dict[str, Any]:
    body = request_body(question, model)
    found = await playground.whole(visit.plane, act, router, choice.organisation or None, model, body)
    return {"request_id": act.request_id, "answer": found}


async def _cost(visit: Visit) -> Response:
    """What an answer cost: for the script, which knows its tokens."""
    tokens = [_tokens(visit, name) for name in ("input", "cached", "output")]
    asked, by = visit.query.get("model", ""), visit.query.get("by")
    found = await playground.cost(visit.plane, visit.act, visit.query["answer"], asked, by, *tokens)
    text = figures.money(found.nanos, visit.plane.settings.currency)
    counts = {"input": found.input_tokens, "output": found.output_tokens}
    return JSONResponse({"cost": text, "recorded": found.recorded, **counts})


def _tokens(visit: Visit, name: str) -> int | None:
    given = visit.query.get(name, "")
    return int(given) if given.isdecimal() and len(given) < 10 else None


async def _choice(visit: Visit) -> Choice:
    """Raises NotFound."""
    query = visit.query
    teams = await _teams(visit)
    team = query.get("organisation", teams[0][0] if teams else "")
    if team not in dict(teams):
        raise NotFound("organisation", team)
    catalogue = models.catalogue(visit.plane).stored
    names = await usable_models(visit.plane, team or None)
    usable = [(name, f"{name} (virtual)" if virtual_key(catalogue[name].entry) else name) for name in names]
    plain = [name for name in names if virtual_key(catalogue[name].entry) is None]
    model, other = query.get("model", next(iter([*plain, *names]), "")), query.get("model2", "")
    # Of a URL: the router says why it is not usable.
    usable += [(one, f"{one} (unknown)") for one in {model: 1, other: 1} if one and one not in names]
    listed = await prompts.listed(visit.plane, visit.act, _MOST, None)
    offered = [one["name"] for one in listed if one["organisation"] in (None, team or None)]
    versions, version, content = await _version(visit, query.get("prompt"))
    prompt = query.get("prompt", "")
    if prompt and prompt not in offered:
        offered.append(prompt)
    return Choice(teams, team, usable, model, other, offered, prompt, versions, version, content)


async def _teams(visit: Visit) -> list[tuple[str, str]]:
    """Organisations whose keys the caller may be lent."""
    scope = visit.act.principal.scope("prompts.use")
    if not scope.everything:
        return [(name, name) for name in sorted(scope.organisations)]
    found = await organisations.page_of(visit.plane, scope, _MOST, None)
    return [("", "none (the platform)"), *((one["name"], one["name"]) for one in found)]


async def _version(visit: Visit, name: str | None) -> tuple[list[tuple[str, str]], str, Mapping[str, Any] | None]:
    """What may be chosen of a prompt, what is, and its content. Raises NotFound."""
    if name is None:
        return [], "", None
    found = await prompts.found(visit.plane, visit.act, name)
    labels: Mapping[str, int] = found["labels"]
    numbers = [one["version"] for one in await prompts.versions(visit.plane, visit.act, name, _MOST, None)]
    offered = [(label, f"{label} (v{number})") for label, number in sorted(labels.items(), key=_production_first)]
    offered += [(str(number), f"version {number}") for number in numbers]
    chosen = visit.query.get("version", offered[0][0] if offered else "")
    if not chosen:
        return offered, "", None
    number = labels.get(chosen) or (int(chosen) if chosen.isdecimal() and len(chosen) < 10 else None)
    if number is None:
        raise NotFound("version", f"{name}@{chosen}")
    if chosen not in dict(offered):
        offered.append((chosen, f"version {chosen}"))
    return offered, chosen, await prompts.version(visit.plane, visit.act, name, number)


def _production_first(label: tuple[str, int]) -> tuple[bool, str]:
    return label[0] != "production", label[0]


def _given(form: Form) -> Given:
    contents = [text.replace("\r\n", "\n") for text in form.several("content")]
    turns = tuple(Turn(role, text) for role, text in zip(form.several("role"), contents, strict=False))
    variables = {name.removeprefix(_VARIABLE): form.raw(name) for name in form.values if name.startswith(_VARIABLE)}
    parameters = {name: form.text(name) for name in _BOUNDS} | {"stop": form.raw("stop")}
    return Given(form.raw("system"), turns or Given().turns, variables, parameters)


def _continued(given: Given, form: Form) -> Given:
    """With room for the next message, and the answer before it."""
    turns = [turn for turn in given.turns if turn.content]
    if answer := form.raw("answer"):
        turns.append(Turn("assistant", answer))
    return given._replace(turns=(*turns, Turn("user", "")))


def _question(choice: Choice, given: Given) -> Question:
    """Raises Invalid."""
    turns = [Turn("system", given.system)] if given.system.strip() else []
    for turn in given.turns:
        if turn.role not in ("user", "assistant"):
            raise Invalid(Problem("role", "must be user or assistant"))
        if turn.content.strip():
            turns.append(turn)
    if not choice.model:
        raise Invalid(Problem("model", "choose one"))
    if choice.is_text:
        message = "this version is a text, for /v1/completions; choose one with messages"
        raise Invalid(Problem("version", message))
    prompt = None
    if choice.prompt:
        version = int(choice.version) if choice.version.isdecimal() else choice.version
        prompt = {
            "id": choice.prompt,
            **({"version": version} if version else {}),
            "variables": _variables(choice, given),
        }
    elif not turns:
        raise Invalid(Problem("content", "write a message"))
    return Question(tuple(turns), prompt, _parameters(given))


def _variables(choice: Choice, given: Given) -> dict[str, Any]:
    """Those that were filled in; the router refuses what is missing. Raises Invalid."""
    found: dict[str, Any] = {}
    for name, declared in choice.variables.items():
        text = given.variables.get(name, "")
        if text:
            is_number = declared.get("type") == "number"
            found[name] = _number(_VARIABLE + name, text, None, None, False) if is_number else text
    return found


def _parameters(given: Given) -> dict[str, Any]:
    """Raises Invalid."""
    found: dict[str, Any] = {}
    for name, bounds in _BOUNDS.items():
        if text := given.parameters.get(name, ""):
            found[name] = _number(name, text, *bounds)
    stops = [line for line in given.parameters.get("stop", "").split("\n") if line]
    if len(stops) > _STOPS:
        raise Invalid(Problem("stop", f"must be at most {_STOPS} lines"))
    return {**found, "stop": stops} if stops else found


def _number(name: str, text: str, least: float | None, most: float | None, whole: bool) -> float | int:
    """Raises Invalid."""
    try:
        value = int(text) if whole or text.lstrip("-").isdecimal() else float(text)
    except ValueError:
        raise Invalid(Problem(name, f"must be a {'whole ' if whole else ''}number, not {text[:40]!r}")) from None
    if not abs(value) < 2**63 or (least is not None and value < least) or (most is not None and value > most):
        raise Invalid(Problem(name, f"must be {_range(least, most)}, not {text[:40]!r}"))
    return value


def _range(least: float | None, most: float | None) -> str:
    if most is not None:
        return f"from {least} to {most}"
    return "a smaller number" if least is None else f"at least {least}"


def _shown(visit: Visit, choice: Choice, given: Given, problem: Refused | None = None, **context: Any) -> Response:
    return visit.render(
        "playground.html",
        status=problem.status if problem else 200,
        choice=choice,
        given=given,
        problem=problem,
        routed=visit.plane.connections.router is not None,
        suggested=len(choice.models) > _LISTED,
        unknown_router=None if visit.plane.settings.router_public_url else ROUTER,
        **{"answers": [], "codes": (), **context},
    )


PAGE = Page("/console/playground", "Playground", page, "prompts.use", USE, posts="prompts.use")
