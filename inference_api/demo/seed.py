"""What the control plane of the demo has: made through its API, as people and programs would."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import httpx

from inference_api.demo.history import IssuedKey
from inference_api.demo.policy import PRICES
from inference_api.demo.processes import DemoError

ADMIN, OWNER, VIEWER = "ana", "uwe", "vera"
ADMIN_EMAIL = "ana@example.org"
# Usage records of one request
_BATCH = 1000
# What the slow engine adds before the first token, in seconds; the share of requests that fail, and how.
SLOW, FAILING, BROKEN = 1.5, (0.25, 503), (0.15, 500)


class DemoEngine(NamedTuple):
    """One engine: a backend of a model, `role` says what is special about it."""

    model: str
    role: str
    options: Sequence[str] = ()


# A model whose engine the control plane starts for a request, and stops after so many seconds without one
SLEEPER, IDLE = "phi-3-mini", 60
ENGINES = (
    DemoEngine("llama-3-8b", "quick"),
    DemoEngine("llama-3-8b", "slow", ("--delay", str(SLOW))),
    DemoEngine("mistral-7b", "steady"),
    DemoEngine("mistral-7b", "failing", ("--fail-rate", str(FAILING[0]), "--fail-status", str(FAILING[1]))),
    DemoEngine("gpt2", "alone", ("--fail-rate", str(BROKEN[0]), "--fail-status", str(BROKEN[1]))),
)

_USERS: Sequence[Mapping[str, Any]] = (
    {"name": OWNER, "email": "uwe@example.org", "title": "Uwe Brückner"},
    {"name": "mei", "email": "mei@example.org", "title": "陈美"},
    {"name": VIEWER, "email": "vera@example.org", "title": "Vera Lindqvist", "platform_role": "viewer"},
)
_ORGANISATIONS: Sequence[Mapping[str, Any]] = (
    {
        "name": "sued",
        "title": "Übersetzung Süd",
        "limits": [{"requests": 300, "per": 60}, {"streams": 20}],
        "budget": {"cost": 2, "per": "day", "soft": 0.8},
    },
    {
        "name": "support-cn",
        "title": "客服团队",
        "models": ["llama-*", "mistral-*", "chat"],
        "limits": [{"tokens": 100_000, "per": 60}],
        "budget": {"tokens": 50_000_000, "per": "month"},
    },
    {"name": "research", "title": "Research", "budget": {"cost": 50, "per": "month"}},
)
_MEMBERS = (("sued", OWNER, "owner"), ("sued", "mei", "member"), ("support-cn", "mei", "admin"))
_KEYS: Mapping[str, Mapping[str, Any]] = {
    "translate": {"organisation": "sued", "user": OWNER},
    # Few enough to be refused now and then.
    "nightly": {"organisation": "sued", "limits": [{"requests": 8, "per": 60}]},
    "chatbot": {
        "organisation": "support-cn",
        "user": "mei",
        "budget": {"tokens": 2_000_000, "per": "day", "soft": 0.5},
    },
    "notebook": {"organisation": "research", "models": ["gpt2", "llama-*", "mistral-*", "chat"]},
    "yours": {"organisation": "sued", "user": OWNER},
}
_DEPLOYMENT = {"driver": "processes", "object": SLEEPER, "scale_to_zero": True, "idle_seconds": IDLE}
PROMPT = "translator"
# What stands in a system message must be trusted: of a list, not of the caller.
_LANGUAGE = {"type": "enum", "values": ["German", "English", "Chinese"], "default": "German", "trusted": True}
_TONE = {"type": "enum", "values": ["formal", "informal"], "default": "formal", "trusted": True}
_VERSIONS: Sequence[Mapping[str, Any]] = (
    {
        "messages": [{"role": "system", "content": "Translate into {{language}}."}],
        "variables": {"language": _LANGUAGE},
        "note": "the first one",
    },
    {
        "messages": [{"role": "system", "content": "Translate into {{language}}, {{tone}}. Add no word of your own."}],
        "variables": {"language": _LANGUAGE, "tone": _TONE},
        "note": "says how formal it should be",
    },
)


def catalogue(ports: Sequence[int], sleeper: int) -> list[dict[str, Any]]:
    """The entries of all models; `ports`: of ENGINES, `sleeper`: of that engine."""
    backends: dict[str, list[dict[str, str]]] = {}
    for engine, port in zip(ENGINES, ports, strict=True):
        backends.setdefault(engine.model, []).append({"url": f"http://127.0.0.1:{port}"})
    more: dict[str, dict[str, Any]] = {
        "llama-3-8b": {"aliases": ["llama3"]},
        "mistral-7b": {"fallbacks": ["llama-3-8b"]},
        SLEEPER: {"hold": 60},
    }
    backends[SLEEPER] = [{"url": f"http://127.0.0.1:{sleeper}"}]
    models = [
        {"name": name, "owner": "demo", "backends": found, "price": PRICES[name], **more.get(name, {})}
        for name, found in backends.items()
    ]
    split = {"variants": {"llama-3-8b": 80, "mistral-7b": 20}, "sticky": "none"}
    return [*models, {"name": "chat", "owner": "demo", "split": split}]


def seed(console: str, password: str, models: Sequence[Mapping[str, Any]]) -> dict[str, IssuedKey]:
    """Fill an empty control plane; the keys by name. Raises DemoError."""
    with httpx.Client(base_url=console, trust_env=False, timeout=30) as client:
        try:
            _log_in(client, password)
            _people(client)
            for model in models:
                _send(client, "PUT", f"/models/{model['name']}", model)
            _send(client, "PUT", f"/deployments/{SLEEPER}", _DEPLOYMENT)
            keys = {name: _key(client, name, fields) for name, fields in _KEYS.items()}
            _ended_key(client)
            _prompt(client)
        except httpx.HTTPError as exc:
            raise DemoError(f"the control plane at {console} does not answer: {exc!r}") from None
    return keys


def _log_in(client: httpx.Client, password: str) -> None:
    """As an admin would: log in, and make a token for a program."""
    same_origin = {"sec-fetch-site": "same-origin"}
    _send(client, "POST", "/session", {"email": ADMIN_EMAIL, "password": password}, same_origin)
    version = client.get("/api/v1/me").headers["etag"]
    _send(client, "PATCH", "/me", {"title": "Ana Castro"}, {**same_origin, "if-match": version})
    token = _send(client, "POST", "/tokens", {"name": "demo"}, same_origin)["token"]
    _send(client, "DELETE", "/session", None, same_origin)
    client.cookies.clear()
    client.headers["authorization"] = f"Bearer {token}"


def _people(client: httpx.Client) -> None:
    for organisation in _ORGANISATIONS:
        _send(client, "POST", "/organisations", organisation)
    for user in _USERS:
        _send(client, "POST", "/users", user)
    for organisation_name, user_name, role in _MEMBERS:
        _send(client, "PUT", f"/organisations/{organisation_name}/members/{user_name}", {"role": role})


def remember(console: str, token: str, records: Sequence[Mapping[str, Any]]) -> None:
    """Send usage records as a router does. Raises DemoError."""
    with httpx.Client(base_url=console, trust_env=False, timeout=30) as client:
        for first in range(0, len(records), _BATCH):
            batch = records[first : first + _BATCH]
            answer = client.post("/usage", json={"records": batch}, headers={"authorization": f"Bearer {token}"})
            if answer.is_error or answer.json()["accepted"] != len(batch):
                raise DemoError(f"the control plane refused usage records: {answer.text[:500]}")


def _key(client: httpx.Client, name: str, fields: Mapping[str, Any]) -> IssuedKey:
    made = _send(client, "POST", "/keys", {"name": name, **fields})
    return IssuedKey(made["key"], made["id"], made["organisation"], made["user"])


def _ended_key(client: httpx.Client) -> None:
    fields = {"name": "crawler of last year", "organisation": "research"}
    made = client.post("/api/v1/keys", json=fields)
    client.delete(f"/api/v1/keys/{made.json()['id']}", headers={"if-match": made.headers["etag"]}).raise_for_status()


def _prompt(client: httpx.Client) -> None:
    _send(client, "POST", "/prompts", {"name": PROMPT, "organisation": "sued"})
    for version in _VERSIONS:
        _send(client, "POST", f"/prompts/{PROMPT}/versions", version)
    for label, number in (("production", 1), ("next", 2)):
        _send(client, "PUT", f"/prompts/{PROMPT}/labels/{label}", {"version": number})


def _send(
    client: httpx.Client,
    method: str,
    path: str,
    body: Mapping[str, Any] | None,
    headers: Mapping[str, str] | None = None,
) -> Any:
    """The answer; what is PUT is made. Raises DemoError, httpx.HTTPError."""
    given = {**({"if-none-match": "*"} if method == "PUT" else {}), **(headers or {})}
    answer = client.request(method, f"/api/v1{path}", json=body, headers=given)
    if answer.is_error:
        raise DemoError(f"the control plane refused {method} {path} with {answer.status_code}: {answer.text[:500]}")
    return answer.json() if answer.content else None
