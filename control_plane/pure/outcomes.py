"""How requests and attempts ended, in words for an operator: what happened, what to do, where to look.

`explain` takes a usage record as the API shows it. Its sentence is made of the record alone: no look-up, no clock.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from control_plane.pure import figures
from control_plane.pure.charts import Bar, State
from control_plane.pure.records import FINE

Verdict = Literal["ok", "failed", "refused", "left"]
# What an operator opens next: pages of the console, or logs elsewhere
Look = Literal["backend", "model", "key", "limits", "prompt", "engine_log", "router_log", "client", "routers"]
UsageFields = Mapping[str, Any]

RUNBOOK, HELP = "k8s/runbook.md", "docs/troubleshooting.md"
_NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_PLACES = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth")


class Explanation(NamedTuple):
    """A request in words. `verdict`: `failed` is exactly what counts as an error in usage; `left`: nobody's fault, for
    the client left, or another answer was taken. `headline`: some words; `sentence`: what happened, one or two
    sentences; `advice`: what to do, empty if nothing; `runbook`: file and anchor in the project's documents.
    """

    verdict: Verdict
    headline: str
    sentence: str
    advice: str
    runbook: str | None
    look: tuple[Look, ...]


class _Kind(NamedTuple):
    """What is known of an outcome, or of the code of an error. `sentence`: if no backend was tried."""

    headline: str
    advice: str = ""
    runbook: str | None = None
    look: tuple[Look, ...] = ()
    sentence: str = ""


class _Did(NamedTuple):
    """What a backend did. `alone`: after its name; `together`: after `both`, or `neither` if `negated`; `{took}`,
    `{status}`. `short`: for a row of a waterfall.
    """

    short: str
    alone: str
    together: str
    negated: bool = False


_BACKEND: tuple[Look, ...] = ("backend", "engine_log")

OUTCOMES: Mapping[str, _Kind] = {
    "ok": _Kind("Answered"),
    "client_gone": _Kind(
        "The client left",
        "If clients leave after a round number of seconds, a timeout of theirs or of a proxy in front is too short.",
        f"{HELP}#a-stream-breaks",
        ("client",),
    ),
    "upstream_4xx": _Kind(
        "The engine refused it",
        "The answer has the engine's reason, which the client got unchanged: its request has to change.",
        "docs/http.md#errors",
        ("engine_log", "model"),
    ),
    "upstream_5xx": _Kind(
        "The engine failed",
        "Look at the engine's log at this time. If only one backend answers so, drain it or delete its pod.",
        f"{RUNBOOK}#inferencerouterupstreamerrors",
        _BACKEND,
    ),
    "auth_failed": _Kind(
        "The backend refused the router's credentials",
        "Put a valid token into the credentials of the model's entry. Retries do not help.",
        f"{RUNBOOK}#inferencerouterupstreamauthfailed",
        ("model", "backend"),
    ),
    "connect_failed": _Kind(
        "No backend could be connected to",
        "See whether the engine runs and is ready, and whether the router can reach its address.",
        f"{RUNBOOK}#inferencerouterbackenddown",
        _BACKEND,
    ),
    "reset": _Kind(
        "The backend closed the connection",
        "The engine crashed, was restarted, or ran out of memory: its log, or that of the pod before, has the cause.",
        f"{HELP}#502",
        _BACKEND,
    ),
    "stale": _Kind(
        "The backend had closed its connection",
        "Nothing, if it is rare. Else the engine closes idle connections sooner than the router does.",
        f"{HELP}#502",
        _BACKEND,
    ),
    "protocol_error": _Kind(
        "The backend's answer was not valid",
        "See that the address is an engine's, and speaks HTTP: with TLS its URL begins with https://.",
        f"{HELP}#502",
        ("model", "backend", "engine_log"),
    ),
    "first_byte_timeout": _Kind(
        "No backend sent a first byte in time",
        "The engine hangs, or its queue is too long. A long prompt without a stream needs a longer timeout.",
        f"{HELP}#504",
        ("backend", "engine_log", "model"),
    ),
    "idle_timeout": _Kind(
        "The backend fell silent",
        "The engine hangs: its log has the cause. Pings do not count as an answer.",
        f"{HELP}#a-stream-breaks",
        _BACKEND,
    ),
    "total_timeout": _Kind(
        "It took longer than is allowed",
        "See whether the engine is slow, or the answer long; the model's timeouts can be raised.",
        f"{HELP}#504",
        ("model", "backend", "engine_log"),
    ),
    "drain_timeout": _Kind(
        "The router stopped first",
        "A router that stops waits for DRAIN_TIMEOUT. The pod's grace period must be longer than that.",
        "docs/operations.md#start-and-stop",
        ("routers",),
    ),
    "truncated": _Kind(
        "The stream ended before its last event",
        "The engine died or was stopped in the middle of the answer. Its log, or that of the pod before, says why.",
        f"{HELP}#a-stream-breaks",
        _BACKEND,
    ),
    "error_event": _Kind(
        "The engine reported an error within the stream",
        "The engine's log has the cause.",
        f"{HELP}#a-stream-breaks",
        _BACKEND,
    ),
    "aborted": _Kind(
        "The engine ended the generation early",
        "Engines do so when they are paused or put to sleep. If nobody did that, look at the engine's log.",
        f"{HELP}#a-stream-breaks",
        _BACKEND,
    ),
    "shed": _Kind(
        "The router was at a limit",
        "If no requests wait in the engines, raise the limit or add routers; else add engines.",
        f"{RUNBOOK}#inferencerouterrejecting",
        ("model", "routers"),
        "The router rejected the request, since it was at a limit.",
    ),
    "no_backend": _Kind(
        "No backend was available",
        "See what state the model's backends are in: down, circuit open, drained or asleep.",
        f"{RUNBOOK}#inferenceroutermodelhasnobackend",
        ("model", "backend"),
        "No backend of {model} could take the request.",
    ),
    "refused": _Kind(
        "The request was refused",
        "The client got the reason: its request has to change.",
        "docs/http.md#errors",
        ("client",),
        "The router rejected the request with {status}.",
    ),
    "internal_error": _Kind(
        "A fault of the router",
        "The router's log has a traceback with this request id; please report it.",
        "docs/http.md#errors",
        ("router_log",),
        "The router failed to handle the request.",
    ),
    "hedge_lost": _Kind("Another answer was taken", look=("backend",)),
    "race_lost": _Kind("Another answer was taken", look=("backend",)),
    "vote_lost": _Kind(
        "No answer had enough votes",
        "The members of the model answered differently. See its policy of votes, and what each of them answered.",
        "docs/http.md#errors",
        ("model",),
        "The members of {asked_model} did not agree on an answer.",
    ),
}

_KEY: tuple[Look, ...] = ("key",)
_KEYS = f"{HELP}#401-or-403-of-the-router"
_BODY = f"{HELP}#415-or-422"
_PROMPTS = "docs/prompts.md"

# Errors of the router that say more than their outcome does
CODES: Mapping[str, _Kind] = {
    "invalid_json": _Kind(
        "The body was no JSON",
        "The client has to send valid JSON.",
        "docs/http.md#bodies",
        ("client",),
        "The body of the request is not valid JSON.",
    ),
    "bad_request": _Kind(
        "Not valid HTTP",
        "The client has to send valid HTTP.",
        f"{HELP}#not-valid-http",
        ("client",),
        "The request is not valid HTTP.",
    ),
    "invalid_api_key": _Kind(
        "No valid key", "Look the key up by its id, or make a new one.", _KEYS, _KEY, "The API key is not known."
    ),
    "api_key_expired": _Kind(
        "The key has expired", "Rotate the key, or set a later end.", _KEYS, _KEY, "The API key has expired."
    ),
    "api_key_disabled": _Kind(
        "The key is disabled",
        "Enable the key or its organisation, if that is wanted.",
        _KEYS,
        _KEY,
        "The API key, or its organisation, is disabled.",
    ),
    "model_not_found": _Kind(
        "No such model for this key",
        "Compare the name with the models, and with those that the key and its organisation may use.",
        f"{HELP}#404",
        ("model", "key"),
        "The model that was asked for does not exist, or is not for this key.",
    ),
    "model_not_priced": _Kind(
        "The model has no price",
        "Add a price for the model: a budget in money holds only where there is one.",
        _KEYS,
        ("model", "limits"),
        "A budget in money holds, and {asked_model} has no price.",
    ),
    "unknown_url": _Kind(
        "No such address",
        "Compare the client's base URL: for OpenAI's clients it ends in a single /v1.",
        f"{HELP}#404",
        ("client", "model"),
        "The path is not known, or not served by this model.",
    ),
    "response_not_found": _Kind(
        "No such stored response",
        "The response is too old, or was stored by another router.",
        "docs/http.md#errors",
        ("client",),
        "The stored response does not exist, or its backend is not known.",
    ),
    "prompt_not_found": _Kind(
        "No such prompt",
        "Compare name, version and label.",
        _PROMPTS,
        ("prompt",),
        "The stored prompt, or this version of it, does not exist.",
    ),
    "prompt_variable_missing": _Kind(
        "A variable of the prompt is missing",
        "The client has to send all variables.",
        _PROMPTS,
        ("prompt",),
        "The stored prompt has a variable that the request did not give.",
    ),
    "prompt_variable_unknown": _Kind(
        "A variable that the prompt does not have",
        "Compare the names of the variables.",
        _PROMPTS,
        ("prompt",),
        "The request gave a variable that the stored prompt does not have.",
    ),
    "prompt_variable_invalid": _Kind(
        "A variable of the prompt is not valid",
        "Compare its type with the prompt's.",
        _PROMPTS,
        ("prompt",),
        "A variable of the stored prompt has a value that is not allowed.",
    ),
    "method_not_allowed": _Kind(
        "Wrong method",
        "The client has to use POST.",
        "docs/http.md#errors",
        ("client",),
        "The path is not served with this method.",
    ),
    "request_timeout": _Kind(
        "The request did not arrive in time",
        "See whether the client, or a proxy in front, sends slowly or stops.",
        "docs/http.md#errors",
        ("client",),
        "The client did not send all of its request in time.",
    ),
    "request_too_large": _Kind(
        "The body was too large",
        "Send less, or raise MAX_BODY_BYTES.",
        "docs/http.md#errors",
        ("client",),
        "The body of the request is larger than is allowed.",
    ),
    "uri_too_long": _Kind(
        "The address was too long",
        "The client has to send a shorter one.",
        "docs/http.md#errors",
        ("client",),
        "Path and query are longer than is allowed.",
    ),
    "headers_too_large": _Kind(
        "The headers were too large",
        "The client has to send fewer.",
        "docs/http.md#errors",
        ("client",),
        "The headers of the request are larger than is allowed.",
    ),
    "unsupported_media_type": _Kind(
        "Wrong content type",
        "The client has to send application/json, not compressed.",
        _BODY,
        ("client",),
        "The content type of the request is not one that the route takes.",
    ),
    "validation_error": _Kind(
        "A field was not valid",
        "The client got the name of the field.",
        _BODY,
        ("client",),
        "A field of the body is missing, of the wrong type, or reserved for operators.",
    ),
    "upgrade_required": _Kind(
        "No WebSocket was offered",
        "The client has to open a WebSocket.",
        "docs/realtime.md",
        ("client",),
        "A realtime session needs a WebSocket, and the request offered none.",
    ),
    "rate_limit_exceeded": _Kind(
        "A rate limit was reached",
        "Nothing, if it is meant so. Else raise the limit of the key, its user or its organisation.",
        f"{HELP}#429",
        ("limits", "key"),
        "The key, its user or its organisation had used its limit of requests or tokens.",
    ),
    "insufficient_quota": _Kind(
        "A budget was used up",
        "Raise the budget, or wait until its next period begins.",
        f"{HELP}#429",
        ("limits", "key"),
        "A budget that holds for this key was used up.",
    ),
    "no_backend_available": OUTCOMES["no_backend"],
    "model_loading": _Kind(
        "The model was not there in time",
        "See whether its engine is being started, and whether `hold` is as long as that takes.",
        f"{HELP}#503",
        ("model", "engine_log"),
        "{model} has no backend, and none came while the request was held.",
    ),
    "registry_unavailable": _Kind(
        "The registry had not answered yet",
        "Restore the registry; routers reconnect within 30 s.",
        f"{HELP}#the-registry-is-down",
        ("routers", "router_log"),
        "The router does not know this name, and its registry has not answered since the router started.",
    ),
    "auth_unavailable": _Kind(
        "The router had no keys yet",
        "See why the router cannot read its policy; its log has the reason.",
        f"{RUNBOOK}#inferencerouterpolicystale",
        ("routers", "router_log"),
        "The router has not read a policy since it started, so that nobody is known.",
    ),
    "limits_unavailable": _Kind(
        "The limits could not be checked",
        "Restore Redis, or choose another LIMITS_ON_FAILURE.",
        f"{RUNBOOK}#inferencerouterlimitsdegraded",
        ("limits", "routers"),
        "Redis did not answer, and LIMITS_ON_FAILURE=closed.",
    ),
    "overloaded": OUTCOMES["shed"]._replace(runbook=f"{HELP}#503"),
    "shutting_down": _Kind(
        "The router was stopping",
        "Nothing, if it is rare: clients that try again reach another router.",
        "docs/operations.md#start-and-stop",
        ("routers",),
        "The router was about to stop, and took no more requests.",
    ),
    "no_consensus": OUTCOMES["vote_lost"],
}

ATTEMPTS: Mapping[str, _Did] = {
    "ok": _Did("answered", "answered", "answered"),
    "client_gone": _Did("the client left", "was stopped, as the client left", "were stopped, as the client left"),
    "upstream_4xx": _Did("answered {status}", "answered {status}", "answered {status}"),
    "upstream_5xx": _Did("answered {status}", "answered {status}", "answered {status}"),
    "auth_failed": _Did(
        "refused the credentials", "refused the router's credentials", "refused the router's credentials"
    ),
    "connect_failed": _Did("no connection", "did not accept a connection", "accepted a connection", True),
    "stale": _Did("idle connection closed", "had closed the idle connection", "had closed the idle connection"),
    "reset": _Did("connection closed", "closed the connection after {took}", "closed the connection"),
    "protocol_error": _Did("not a valid answer", "sent no valid answer", "sent a valid answer", True),
    "first_byte_timeout": _Did(
        "no first byte in {took}", "sent no first byte in {took}", "sent a first byte in {took}", True
    ),
    "idle_timeout": _Did("fell silent", "fell silent in the middle of its answer", "fell silent"),
    "total_timeout": _Did("not done in {took}", "was not done after {took}", "was done after {took}", True),
    "drain_timeout": _Did("the router stopped", "was cut off, as the router stopped", "were cut off"),
    "truncated": _Did(
        "stream broke off", "ended the stream before its last event", "ended the stream before its last event"
    ),
    "error_event": _Did("error in the stream", "sent an error within the stream", "sent an error within the stream"),
    "aborted": _Did("ended early", "ended the generation early", "ended the generation early"),
    "shed": _Did(
        "no connection left",
        "was not asked, as the router had no connection left",
        "was asked, as the router had no connection left",
        True,
    ),
    "no_backend": _Did("taken out", "was taken out of use", "were taken out of use"),
    "refused": _Did("refused", "was not asked", "were not asked"),
    "internal_error": _Did("a fault of the router", "was cut off by a fault of the router", "were cut off"),
    "hedge_lost": _Did("another answer was taken", "was stopped, as another answer was taken", "were stopped"),
    "race_lost": _Did("another answer was taken", "was stopped, as another answer was taken", "were stopped"),
    "vote_lost": _Did("another answer was taken", "was stopped, as the vote was decided", "were stopped"),
}
# Answers of engines that say more than their class: by status
STATUSES: Mapping[int, _Kind] = {
    **dict.fromkeys(
        (401, 403),
        OUTCOMES["upstream_4xx"]._replace(
            headline="The engine refused the client's key",
            advice="With `credentials` in the model's entry, engines get a token of the router's.",
            runbook=f"{HELP}#401-or-403-of-the-engine-and-502-upstream_auth_failed",
            look=("model", "backend"),
        ),
    ),
    404: OUTCOMES["upstream_4xx"]._replace(
        headline="The engine does not know it",
        advice="If the engine knows the model by another name, set `served_model_name` in the model's entry.",
        runbook=f"{HELP}#404",
        look=("model", "backend"),
    ),
    429: OUTCOMES["upstream_4xx"]._replace(
        headline="The engine was at a limit of its own",
        advice="Add 429 to RETRY_ON_STATUS, so that the router tries another backend.",
        runbook=f"{HELP}#429",
        look=("backend", "engine_log"),
    ),
}
_LOST = ("hedge_lost", "race_lost", "vote_lost")
_STATES: Mapping[str, State] = {
    "ok": "ok",
    "client_gone": "left",
    "upstream_4xx": "refused",
    "refused": "refused",
    "hedge_lost": "lost",
    "race_lost": "lost",
    "vote_lost": "lost",
}
_LEGS: Mapping[str, str] = {
    "race": "A run of a race, beside the request itself.",
    "vote": "A run of a vote, beside the request itself.",
    "hedge": "A second run of a slow request, which was not billed.",
    "shadow": "A copy of a request for comparison, which no client waited for and which was not billed.",
}


def explain(record: UsageFields) -> Explanation:
    """What became of a request. An outcome that is not known, as of a later router, is named as it is."""
    known = _kind_of(record) or _Kind(f"Ended with {record['outcome']}")
    parts = [_LEGS.get(record["kind"], ""), _sentence(record, known), *_beside(record)]
    sentence = " ".join(part for part in parts if part)
    headline = _good(record) if record["outcome"] == "ok" else known.headline
    return Explanation(verdict_of(record), headline, sentence, known.advice, known.runbook, known.look)


def _good(record: UsageFields) -> str:
    if record["cache"] == "hit":
        return "Answered from the cache"
    if record["fallback"]:
        return "Answered by a fallback"
    return "Answered after a retry" if len(record.get("attempt_details") or ()) > 1 else OUTCOMES["ok"].headline


def verdict_of(record: UsageFields) -> Verdict:
    """`failed` for what usage counts as an error."""
    outcome, status = record["outcome"], record["status"]
    if record["kind"] != "request" and outcome in _LOST:
        return "left"
    if outcome not in FINE or status >= 500:
        return "failed"
    if outcome == "client_gone":
        return "left"
    return "ok" if outcome == "ok" else "refused"


def state_of(outcome: str) -> State:
    """Of an attempt, for its bar and its sign."""
    return _STATES.get(outcome, "failed")


def attempt_words(outcome: str, status: int = 0, duration_ms: float | None = None) -> str:
    """How an attempt ended, in a few words: `no first byte in 2 min`."""
    did = ATTEMPTS.get(outcome)
    if did is None:
        return outcome.replace("_", " ")
    return _filled(did.short, status, figures.ms(duration_ms))


def _filled(text: str, status: int, took: str) -> str:
    return text.format(status=status or "an error", took=took)


def attempts_of(record: UsageFields) -> list[Mapping[str, Any]]:
    """The attempts of a record, the first one first; that of a record without details is made of the record itself."""
    details = record.get("attempt_details")
    if details:
        return list(details)
    if not record["attempts"] or record["backend"] is None:
        return []
    start = min(record["queued_ms"], record["latency_ms"])
    took = record["latency_ms"] - start
    names = ("backend", "outcome", "status")
    return [{**{name: record[name] for name in names}, "start_ms": start, "duration_ms": took}]


def bars(record: UsageFields) -> tuple[Bar, ...]:
    """The rows of `charts.waterfall`: the wait, then each attempt; the last one has the mark of the first token."""
    attempts = attempts_of(record)
    found = []
    if record["queued_ms"] > 0:
        end = attempts[0]["start_ms"] if attempts else record["latency_ms"]
        start = max(end - record["queued_ms"], 0)
        found.append(Bar("waited", "for its turn", "waited", start, end - start))
    for place, one in enumerate(attempts):
        words = attempt_words(one["outcome"], one["status"], one["duration_ms"])
        first = record["ttft_ms"] if place == len(attempts) - 1 else None
        bar = Bar(one["backend"], words, state_of(one["outcome"]), one["start_ms"], one["duration_ms"], first)
        found.append(bar)
    return tuple(found)


def _kind_of(record: UsageFields) -> _Kind | None:
    outcome, code, attempts = record["outcome"], record["code"], attempts_of(record)
    if record["kind"] != "request" and outcome in _LOST:
        return OUTCOMES["race_lost"]
    if outcome == "upstream_4xx" and record["status"] in STATUSES:
        return STATUSES[record["status"]]
    # What became of the attempts says more than that nothing was left to try.
    if outcome == "no_backend" and attempts:
        return OUTCOMES.get(attempts[-1]["outcome"])
    if code in CODES and (not attempts or outcome in ("refused", "shed")):
        return CODES[code]
    return OUTCOMES.get(outcome)


def _sentence(record: UsageFields, known: _Kind) -> str:
    outcome = record["outcome"]
    if record["cache"] == "hit" and outcome == "ok":
        return f"The router answered from its cache in {figures.ms(record['latency_ms'])}; no backend was asked."
    attempts = attempts_of(record)
    if outcome == "client_gone":
        return _left(record, attempts)
    if outcome == "ok":
        return _answered(record, attempts)
    if outcome == "refused" and record["status"] < 400:
        return "The router ended the session, since a message of the client was larger than is allowed."
    if not attempts or outcome in ("refused", "internal_error", "vote_lost"):
        text = known.sentence.format(**record)
        return text or f"It ended with {outcome}, before a backend was tried."
    text = _tried(attempts, record["attempts"])
    if outcome == "total_timeout" and attempts[-1]["outcome"] != outcome:
        text += f" After {figures.ms(record['latency_ms'])} there was no time left for another try."
    return text


def _answered(record: UsageFields, attempts: Sequence[Mapping[str, Any]]) -> str:
    took, first = figures.ms(record["latency_ms"]), record["ttft_ms"]
    since = f", with the first token after {figures.ms(first)}" if first is not None else ""
    if not attempts:
        return f"Answered in {took}{since}."
    if len(attempts) < 2:
        return f"{attempts[0]['backend']} answered in {took}{since}."
    place = _place(max(record["attempts"], len(attempts)))
    before = "; before, ".join(["", _each(attempts[:-1])])
    return f"{attempts[-1]['backend']} answered at the {place} try, in {took} altogether{since}{before}."


def _left(record: UsageFields, attempts: Sequence[Mapping[str, Any]]) -> str:
    took, size = figures.ms(record["latency_ms"]), record["bytes"]
    of = f" of {attempts[-1]['backend']}" if attempts else ""
    if size:
        return f"The client left after {took}, in the middle of the answer{of}: {figures.bytes(size)} had gone out."
    if not attempts:
        return f"The client left after {took}, before a backend was tried."
    text = f"The client left after {took}, before {attempts[-1]['backend']} had begun to answer."
    earlier = [one for one in attempts if one["outcome"] != "client_gone"]
    return f"{text} Before, {_each(earlier)}." if earlier else text


def _tried(attempts: Sequence[Mapping[str, Any]], number: int) -> str:
    """`Two backends were tried; neither sent a first byte in 120 s.`"""
    number = max(number, len(attempts))
    if number == 1:
        return f"{_one(attempts[0])}."
    backends = {one["backend"] for one in attempts}
    several = len(backends) > 1 or number > len(attempts)
    subject = f"{_number(number)} backends were" if len(backends) == number else f"{_number(number)} attempts were"
    verb = "tried" if len(backends) == number else "made"
    began = f"{subject.capitalize()} {verb}{'' if several else ' on ' + attempts[0]['backend']}"
    if len({(one["outcome"], one["status"]) for one in attempts}) == 1 and attempts[0]["outcome"] in ATTEMPTS:
        return f"{began}; {_together(attempts, number)}."
    return f"{began}: {_each(attempts)}."


def _together(attempts: Sequence[Mapping[str, Any]], number: int) -> str:
    did = ATTEMPTS[attempts[0]["outcome"]]
    who = ("neither", "none of them") if did.negated else ("both", "all of them")
    times = [one["duration_ms"] for one in attempts]
    short, long = figures.ms(min(times)), figures.ms(max(times))
    took = long if max(times) <= min(times) * 1.05 else f"{short} to {long}"
    return f"{who[number > 2]} {_filled(did.together, attempts[0]['status'], took)}"


def _each(attempts: Sequence[Mapping[str, Any]]) -> str:
    return ", then ".join(_one(one) for one in attempts)


def _one(attempt: Mapping[str, Any]) -> str:
    did = ATTEMPTS.get(attempt["outcome"])
    if did is None:
        return f"{attempt['backend']} ended with {attempt['outcome']}"
    return f"{attempt['backend']} {_filled(did.alone, attempt['status'], figures.ms(attempt['duration_ms']))}"


def _beside(record: UsageFields) -> list[str]:
    """What else an operator would want to know."""
    found = []
    if record["fallback"]:
        answered = "answered" if record["outcome"] == "ok" else "was asked"
        found.append(f"The fallback {record['model']} {answered} in place of {record['asked_model']}.")
    if record["queued_ms"] >= 1:
        found.append(f"It had waited {figures.ms(record['queued_ms'])} for its turn.")
    if record["votes"]:
        agreed, _, of = record["votes"].partition("/")
        found.append(f"{agreed} of {of} members agreed.")
    if verdict_of(record) == "failed" and record["status"] in (200, 101):
        found.append(f"The client had got the status {record['status']} before, and a part of the answer.")
    return found


def _number(number: int) -> str:
    return _NUMBERS[number] if number < len(_NUMBERS) else f"{number:,}"


def _place(number: int) -> str:
    return _PLACES[number - 1] if number <= len(_PLACES) else f"{number:,}th"
