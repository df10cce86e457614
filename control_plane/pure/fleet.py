"""What state models and routers are in, by the last reports of the routers. Pure.

What nobody reports is unknown: it is never fine because nothing bad is known of it.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from control_plane.pure.reports import MergedBackend, Reported, model_states

ModelStatus = Literal["failing", "degraded", "unknown", "ok"]
# From the worst
MODEL_STATUSES: tuple[ModelStatus, ...] = ("failing", "degraded", "unknown", "ok")
RouterStatus = Literal["lost", "behind", "draining", "in_step", "ended"]
ROUTER_STATUSES: tuple[RouterStatus, ...] = ("lost", "behind", "draining", "in_step", "ended")
# Virtual models that stand for each other, which the catalogue refuses
_DEEPEST = 8
_WORDS = {
    "out": "is out of use",
    "draining": "is draining: it gets no new requests",
    "open": "has an open circuit",
    "half_open": "has a half-open circuit: the next request tries it",
    "unhealthy": "is unhealthy",
    "stuck": "has requests, and sends no byte",
    "asleep": "sleeps",
    "resting": "has asked for a pause",
    "recovering": "is back, and gets few requests yet",
}


class Described(NamedTuple):
    """What the catalogue says of a model. `configured`: backends of its entry. `members`: of a virtual one, of which
    `needed` have to work. `fallbacks`: models that answer in its place."""

    name: str
    configured: int
    members: tuple[str, ...] = ()
    needed: int = 1
    fallbacks: tuple[str, ...] = ()
    kind: str | None = None


class Load(NamedTuple):
    """Of a model, at all routers together."""

    in_flight: int = 0
    queued: int = 0


class Ordered(NamedTuple):
    """An override that holds. Times: Unix milliseconds. `until` None: until somebody ends it."""

    id: str
    action: str
    by: str
    reason: str
    created_at: int
    until: int | None


class LastFailure(NamedTuple):
    outcome: str
    request_id: str | None
    at: int


class Trouble(NamedTuple):
    """A backend that is not ready. `agree`: "2/3" of the routers that know it see it so. Times: Unix milliseconds."""

    backend: str
    state: str
    agree: str
    reason: str | None
    since: int | None
    retry_at: int | None
    last_error: LastFailure | None
    override: Ordered | None
    sentence: str


class ModelStanding(NamedTuple):
    """`since`: Unix milliseconds: failing since its last usable backend went away, degraded since the first bad one.

    `ready` of `total` backends (of a virtual model: members). `kind`: what makes it a virtual model (`split`), or None.
    `covered_by`: a fallback that works, while it is failing. Who sees states only has None for the numbers of requests.
    """

    name: str
    state: ModelStatus
    ready: int
    total: int
    since: int | None
    sentence: str
    why: tuple[Trouble, ...]
    in_flight: int | None
    queued: int | None
    kind: str | None = None
    members: tuple[tuple[str, ModelStatus], ...] = ()
    covered_by: str | None = None


class RouterStanding(NamedTuple):
    """`behind`: documents of which it has another version. `at`: when its last report came; `age`: milliseconds since.

    `ended`: it was draining in its last report, and sends none any more. Who sees states only has None elsewhere.
    """

    instance: str
    state: RouterStatus
    lost: bool
    draining: bool
    behind: tuple[str, ...]
    at: int | None
    age: int | None
    version: str | None = None
    started_at: int | None = None
    in_flight: int | None = None
    lag_ms: float | None = None
    queued: int | None = None
    dropped: int | None = None


class RoutersStanding(NamedTuple):
    """`total`: without those that have ended. `oldest`: milliseconds since the oldest report of those not lost."""

    total: int
    in_step: int
    behind: int
    lost: int
    draining: int
    dropped: int | None
    oldest: int | None
    each: tuple[RouterStanding, ...]


Orders = Callable[[str, str], Ordered | None]


def loads(reports: Iterable[Reported]) -> dict[str, Load]:
    """By model, of those that the routers have."""
    found: dict[str, Load] = {}
    for reported in reports:
        for row in reported.report["models"]:
            known = found.get(row["name"], Load())
            found[row["name"]] = Load(known.in_flight + row["in_flight"], known.queued + row["queued"])
    return found


def standings(
    models: Iterable[Described],
    owners: Mapping[str, str],
    backends: Sequence[MergedBackend],
    reported: Mapping[str, Load],
    order_of: Orders,
) -> dict[str, ModelStanding]:
    """By name. `owners`: names, aliases and adapters with the model that has them. `reported`: as of `loads`."""
    described = {one.name: one for one in models}
    by_model: dict[str, list[MergedBackend]] = {}
    for backend in backends:
        by_model.setdefault(backend.model, []).append(backend)
    states = model_states(backends)
    found = {
        name: _of_backends(one, by_model.get(name, ()), states.get(name), reported.get(name), order_of)
        for name, one in described.items()
        if not one.members
    }
    for name, one in described.items():
        if one.members:
            found[name] = _of_members(one, described, owners, found, reported.get(name, Load()), _DEEPEST)
    return {name: _covered(described[name], found[name], owners, found) for name in described}


def worst_first(models: Iterable[ModelStanding]) -> list[ModelStanding]:
    """Within a state what has changed last comes first."""
    return sorted(models, key=lambda one: (MODEL_STATUSES.index(one.state), -(one.since or 0), one.name))


def _of_backends(
    one: Described,
    backends: Sequence[MergedBackend],
    state: str | None,
    load: Load | None,
    order_of: Orders,
) -> ModelStanding:
    if load is None and not backends:
        text = "No router reports it: nobody knows whether it works."
        return ModelStanding(one.name, "unknown", 0, one.configured, None, text, (), 0, 0)
    in_flight, queued = load or Load()
    if state is None:
        text = "Its entry has no backends." if not one.configured else "Routers know no address of its backends."
        return ModelStanding(one.name, "failing", 0, one.configured, None, text, (), in_flight, queued)
    why = tuple(_trouble(backend, order_of) for backend in backends if backend.state != "ready")
    ready, total = len(backends) - len(why), len(backends)
    since = _since([trouble.since for trouble in why], max if state == "failing" else min)
    return ModelStanding(
        one.name, _status(state), ready, total, since, _sentence(state, ready, total), why, in_flight, queued
    )


def _status(state: str) -> ModelStatus:
    return "failing" if state == "failing" else "degraded" if state == "degraded" else "ok"


def _since(moments: Sequence[int | None], choose: Callable[[list[int]], int]) -> int | None:
    known = [at for at in moments if at is not None]
    return choose(known) if known else None


def _sentence(state: str, ready: int, total: int) -> str:
    if state == "ok":
        return "Its backend is ready." if total == 1 else f"All {total} backends are ready."
    if state == "failing":
        return "Its only backend takes no requests." if total == 1 else f"None of its {total} backends takes requests."
    return "Its only backend is not quite ready." if total == 1 else f"{ready} of {total} backends are ready."


def _trouble(one: MergedBackend, order_of: Orders) -> Trouble:
    rows = [row for row in one.by_router.values() if row["state"] == one.state]
    first = min(rows, key=lambda row: row.get("since") or 0)
    errors = [row["last_error"] for row in rows if row.get("last_error")]
    error = max(errors, key=lambda each: each["at"], default=None)
    order = order_of(one.model, one.backend) if one.state in ("out", "draining") else None
    reason = next((row["reason"] for row in rows if row.get("reason")), None)
    return Trouble(
        one.backend,
        one.state,
        one.agree,
        reason,
        first.get("since"),
        min((row["retry_at"] for row in rows if row.get("retry_at")), default=None),
        None if error is None else LastFailure(error["outcome"], error.get("request_id"), error["at"]),
        order,
        _said(one, reason, order),
    )


def _said(one: MergedBackend, reason: str | None, order: Ordered | None) -> str:
    seen, of = one.agree.split("/")
    where = "" if of == "1" or seen == of else f", at {seen} of {of} routers"
    if order is not None:
        done = "has taken it out of use" if one.state == "out" else "drains it"
        return f"{order.by} {done}: {order.reason}{where}."
    words = _WORDS.get(one.state, f"is {one.state}")
    cause = "" if reason is None or one.state in ("stuck", "asleep", "resting", "recovering") else f" ({reason})"
    return f"{one.backend} {words}{cause}{where}."


def _of_members(
    one: Described,
    described: Mapping[str, Described],
    owners: Mapping[str, str],
    found: Mapping[str, ModelStanding],
    load: Load,
    deepest: int,
) -> ModelStanding:
    standing: list[ModelStanding | None] = []
    for member in one.members:
        owner = owners.get(member, member)
        inner = described.get(owner)
        if inner is not None and inner.members and deepest:
            standing.append(_of_members(inner, described, owners, found, Load(), deepest - 1))
        else:
            standing.append(found.get(owner))
    states: list[ModelStatus] = ["unknown" if each is None else each.state for each in standing]
    state = _together(states, one.needed)
    members = tuple(zip(one.members, states, strict=True))
    bad = [each.since for each in standing if each is not None and each.state in ("failing", "degraded")]
    since = None if state in ("ok", "unknown") else _since(bad, max if state == "failing" else min)
    ok = states.count("ok")
    text = "All members are ok." if state == "ok" else _of_bad_members(members)
    return ModelStanding(
        one.name, state, ok, len(members), since, text, (), load.in_flight, load.queued, one.kind, members
    )


def _together(states: Sequence[ModelStatus], needed: int) -> ModelStatus:
    """Of a virtual model, of whose members `needed` have to work."""
    sure = sum(state in ("ok", "degraded") for state in states)
    if sure + states.count("unknown") < needed:
        return "failing"
    if sure < needed:
        return "unknown"
    if "failing" in states or "degraded" in states:
        return "degraded"
    return "unknown" if "unknown" in states else "ok"


def _of_bad_members(members: Iterable[tuple[str, ModelStatus]]) -> str:
    parts = [f"{name} is {state}" for name, state in members if state != "ok"]
    return f"{', '.join(parts[:3])}{f', and {len(parts) - 3} more' if len(parts) > 3 else ''}."


def _covered(
    one: Described, standing: ModelStanding, owners: Mapping[str, str], found: Mapping[str, ModelStanding]
) -> ModelStanding:
    if standing.state != "failing":
        return standing
    for name in one.fallbacks:
        other = found.get(owners.get(name, name))
        if other is not None and other.state in ("ok", "degraded"):
            return standing._replace(covered_by=name)
    return standing


def routers_standing(
    reports: Iterable[Reported], etags: Mapping[str, str | None], now: int, whole: bool = True
) -> RoutersStanding:
    """`etags`: of the documents as they are now. Without `whole`: states only."""
    each = sorted(
        (_router(one, etags, now) for one in reports), key=lambda one: (ROUTER_STATUSES.index(one.state), one.instance)
    )
    states = [one.state for one in each]
    present = [one for one in each if not one.lost]
    return RoutersStanding(
        len(each) - states.count("ended"),
        sum(not one.lost and not one.behind for one in each),
        sum(not one.lost and bool(one.behind) for one in each),
        states.count("lost"),
        states.count("draining"),
        sum(one.dropped or 0 for one in present) if whole else None,
        max((one.age or 0 for one in present), default=None),
        tuple(each if whole else (_states_only(one) for one in each)),
    )


def _router(one: Reported, etags: Mapping[str, str | None], now: int) -> RouterStanding:
    report: Mapping[str, Any] = one.report
    lost, draining = one.lost(now), report["draining"]
    held = report["etags"]
    # Without a policy, a router polls none.
    behind = tuple(
        name
        for name, etag in etags.items()
        if held.get(name) != etag and not (name == "policy" and held.get(name) is None)
    )
    state: RouterStatus = "ended" if lost and draining else "lost" if lost else "draining" if draining else "in_step"
    if state == "in_step" and behind:
        state = "behind"
    usage = report["usage"]
    return RouterStanding(
        one.instance,
        state,
        lost,
        draining,
        behind,
        one.at,
        max(0, now - one.at),
        report["version"],
        report["started_at"],
        report["in_flight"],
        report["lag_ms"],
        usage["queued"] + usage["spooled"],
        usage["dropped"],
    )


def _states_only(one: RouterStanding) -> RouterStanding:
    return RouterStanding(one.instance, one.state, one.lost, one.draining, (), None, None)
