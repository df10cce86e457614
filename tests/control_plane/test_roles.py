"""Who may do what: each role at each URL, over HTTP.

A new route needs a row in `access.ROUTES` and one in `TABLE`; the last tests say so.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest
from fastapi.routing import APIRoute
from sqlalchemy import insert, update

from control_plane.app import RESOURCES
from control_plane.clients.folders import Roots
from control_plane.data.tables import keys, organisations
from control_plane.http.api.access import ROUTES
from inference_api.policy.keys import new_key
from tests.control_plane.conftest import NOON, Running
from tests.control_plane.drivers import Scripted
from tests.control_plane.model_writers import GGUF_SHAPES, LLAMA_GGUF, gguf
from tests.control_plane.people import acting_as, error, make_organisation, make_user

pytestmark = pytest.mark.anyio
# Of the platform: admin, operator, viewer. Of team-a: owner, admin, member, viewer. Nobody: a user without a role.
# Other: owner of team-b.
PEOPLE = ("admin", "operator", "viewer", "team-owner", "team-admin", "team-member", "team-viewer", "nobody", "other")
# y: allowed; n: 403; 0: 404, as what is not there
LETTERS = {403: "n", 404: "0"}
TEAM, LABEL = "/organisations/team-a", "/prompts/support/labels/production"
ADMIN_ONLY, OPERATORS, EVERYONE, ALL = "ynn nnnn nn", "yyn nnnn nn", "yyy yyyy ny", "yyy yyyy yy"
MATCH = {"if-match": "*"}


class Row(NamedTuple):
    """One request, and who may make it, in the order of PEOPLE. `route`: where it is not the path."""

    method: str
    path: str
    allowed: str
    body: Any = None
    headers: dict[str, str] | None = None
    route: str | None = None


def entry(name: str) -> dict[str, Any]:
    return {"name": name, "backends": [{"url": "http://10.0.0.1:8000"}]}


DEPLOYMENT = {"driver": "processes", "object": "engine"}
DRAIN = {"backend": "10.0.0.1:8000", "action": "drain", "reason": "driver", "force": True}
PRICE = {"model": "llama", "valid_from": "2026-12-01T00:00:00Z", "input": 1, "output": 2}
SERVICE = {"name": "x", "kind": "service", "scopes": ["ingest"]}
VERSION = {"messages": [{"role": "system", "content": "You help."}]}
# The rows of control-plane.md 9.10, each with its URLs. What is changed for some is changed back, or never looked at
# again. The id of somebody else's is OTHERS, and of the own one OWN.
TABLE = (
    # Models, backends, routers: see
    Row("GET", "/models", EVERYONE),
    Row("GET", "/models/llama", "yyy yyyy n0", route="/models/{name:path}"),
    Row("GET", "/models/secret", "yyy 0000 ny", route="/models/{name:path}"),
    Row("GET", "/backends", EVERYONE),
    Row("GET", "/routers", EVERYONE),
    Row("GET", "/overrides", "yyy nnnn nn"),
    Row("GET", "/overrides/OVERRIDE", "yyy nnnn nn", route="/overrides/{id}"),
    Row("GET", "/model-tests", "yyy nnnn nn"),
    # Drain, circuits
    Row("POST", "/overrides", OPERATORS, DRAIN),
    Row("DELETE", "/overrides/OVERRIDE", OPERATORS, headers=MATCH, route="/overrides/{id}"),
    # Engines: see, start, stop, scale, logs
    Row("GET", "/deployments", "yyy nnnn nn"),
    Row("GET", "/deployments/llama", "yyy nnnn nn", route="/deployments/{model:path}"),
    Row("PUT", "/deployments/llama", OPERATORS, DEPLOYMENT, MATCH, "/deployments/{model:path}"),
    Row("POST", "/model-actions", OPERATORS, {"model": "llama", "action": "start"}),
    Row("GET", "/pods", "yyy nnnn nn"),
    Row("GET", "/logs?pod=engine-0", OPERATORS, route="/logs"),
    Row("GET", "/triage", OPERATORS),
    Row("POST", "/triage", OPERATORS, {"model": "llama"}),
    Row("GET", "/triage/TRIAGE", OPERATORS, route="/triage/{id}"),
    Row("DELETE", "/deployments/llama", OPERATORS, headers=MATCH, route="/deployments/{model:path}"),
    # Catalogue, prices, settings, service tokens
    Row("PUT", "/models/new", OPERATORS, entry("new"), {"if-none-match": "*"}, "/models/{name:path}"),
    Row("DELETE", "/models/new", OPERATORS, headers=MATCH, route="/models/{name:path}"),
    Row("GET", "/inspections", OPERATORS),
    Row("POST", "/inspections", OPERATORS, {"source": "file", "ref": "MODEL-FILE"}),
    Row("GET", "/inspections/INSPECTION", OPERATORS, route="/inspections/{id}"),
    Row("GET", "/prices", ADMIN_ONLY),
    Row("POST", "/prices", ADMIN_ONLY, PRICE),
    Row("GET", "/settings", ADMIN_ONLY),
    Row("GET", "/settings/SETTING", ADMIN_ONLY, route="/settings/{key}"),
    Row("PUT", "/settings/SETTING", ADMIN_ONLY, {"value": []}, MATCH, "/settings/{key}"),
    Row("DELETE", "/settings/SETTING", ADMIN_ONLY, headers=MATCH, route="/settings/{key}"),
    Row("POST", "/tokens", ADMIN_ONLY, SERVICE),
    Row("GET", "/limits", ADMIN_ONLY),
    Row("POST", "/limits", ADMIN_ONLY, {"scope": "user", "requests": 9, "per": 60}),
    Row("GET", "/limits/LIMIT", ADMIN_ONLY, route="/limits/{id}"),
    Row("PUT", "/limits/LIMIT", ADMIN_ONLY, {"scope": "all", "requests": 9, "per": 60}, MATCH, "/limits/{id}"),
    Row("DELETE", "/limits/LIMIT", ADMIN_ONLY, headers=MATCH, route="/limits/{id}"),
    Row("GET", "/budgets", ADMIN_ONLY),
    Row("POST", "/budgets", ADMIN_ONLY, {"scope": "user", "requests": 9, "per": "day"}),
    Row("GET", "/budgets/BUDGET", ADMIN_ONLY, route="/budgets/{id}"),
    Row("PUT", "/budgets/BUDGET", ADMIN_ONLY, {"scope": "all", "tokens": 9, "per": "day"}, MATCH, "/budgets/{id}"),
    Row("DELETE", "/budgets/BUDGET", ADMIN_ONLY, headers=MATCH, route="/budgets/{id}"),
    # Organisations, roles on the platform
    Row("GET", "/organisations", "yny yyyy ny"),
    Row("GET", TEAM, "yny yyyy n0", route="/organisations/{name}"),
    Row("POST", "/organisations", ADMIN_ONLY, {"name": "team-c"}),
    Row("PATCH", TEAM, "ynn ynnn n0", {"title": "New"}, MATCH, "/organisations/{name}"),
    Row("PATCH", TEAM, "ynn nnnn n0", {"models": ["llama", "x"]}, MATCH, "/organisations/{name}"),
    Row("PATCH", TEAM, "ynn nnnn n0", {"disabled": True}, MATCH, "/organisations/{name}"),
    Row("DELETE", "/organisations/team-d", ADMIN_ONLY, headers=MATCH, route="/organisations/{name}"),
    Row("GET", "/users", ADMIN_ONLY),
    Row("POST", "/users", ADMIN_ONLY, {"name": "new", "email": "new@example.org"}),
    Row("GET", "/users/bob", ADMIN_ONLY, route="/users/{name}"),
    Row("PATCH", "/users/bob", ADMIN_ONLY, {"platform_role": "viewer"}, MATCH, "/users/{name}"),
    Row("POST", "/users/bob/setup", ADMIN_ONLY, route="/users/{name}/setup"),
    Row("DELETE", "/users/bob/sessions", ADMIN_ONLY, route="/users/{name}/sessions"),
    Row("DELETE", "/users/bob", ADMIN_ONLY, headers=MATCH, route="/users/{name}"),
    # Members, limits of organisations
    Row("PATCH", TEAM, "ynn yynn n0", {"limits": [{"requests": 1, "per": 60}]}, MATCH, "/organisations/{name}"),
    Row("PATCH", TEAM, "ynn yynn n0", {"budget": {"cost": 1, "per": "day"}}, MATCH, "/organisations/{name}"),
    Row("GET", f"{TEAM}/members", "yny yynn n0", route="/organisations/{name}/members"),
    Row("GET", f"{TEAM}/members/olga", "yny yynn n0", route="/organisations/{name}/members/{user}"),
    Row("PUT", f"{TEAM}/members/mia", "ynn yynn n0", {"role": "viewer"}, MATCH, "/organisations/{name}/members/{user}"),
    Row("PUT", f"{TEAM}/members/mia", "ynn ynnn n0", {"role": "owner"}, MATCH, "/organisations/{name}/members/{user}"),
    Row("PUT", f"{TEAM}/members/olga", "ynn ynnn n0", {"role": "owner"}, MATCH, "/organisations/{name}/members/{user}"),
    Row("DELETE", f"{TEAM}/members/vic", "ynn yynn n0", None, MATCH, "/organisations/{name}/members/{user}"),
    # Keys
    Row("GET", "/keys", "yny yyyn ny"),
    Row("GET", "/keys/OTHERS", "yny yy0n n0", route="/keys/{id}"),
    Row("GET", "/keys/OWN", "yny yyyn n0", route="/keys/{id}"),
    Row("POST", "/keys", "ynn yyyn n0", {"name": "x", "organisation": "team-a"}),
    Row("PATCH", "/keys/OTHERS", "ynn yy0n n0", {"name": "y"}, MATCH, "/keys/{id}"),
    Row("PATCH", "/keys/OWN", "ynn yyyn n0", {"name": "y"}, MATCH, "/keys/{id}"),
    Row("POST", "/keys/OTHERS/rotate", "ynn yy0n n0", route="/keys/{id}/rotate"),
    Row("DELETE", "/keys/OTHERS", "ynn yy0n n0", headers=MATCH, route="/keys/{id}"),
    # Usage, requests
    Row("GET", "/usage?start=2026-11-27T00:00:00Z&end=2026-11-28T00:00:00Z&bucket=1d", EVERYONE, route="/usage"),
    # With a Prometheus, or without: it says so to those who may ask.
    Row("GET", "/metrics", "yyy nnnn nn"),
    Row("GET", "/metrics/nothing", "000 nnnn nn", route="/metrics/{query}"),
    Row("GET", "/requests", "yyy yyyn ny"),
    Row("GET", "/requests/nothing", "000 000n n0", route="/requests/{id}"),
    # Prompts
    Row("GET", "/prompts", EVERYONE),
    Row("GET", "/prompts/support", "yyy yyyy n0", route="/prompts/{name}"),
    Row("GET", "/prompts/support/versions", "yyy yyyy n0", route="/prompts/{name}/versions"),
    Row("GET", "/prompts/support/versions/1", "yyy yyyy n0", route="/prompts/{name}/versions/{n}"),
    Row("POST", "/prompts", "ynn yyyn n0", {"name": "new", "organisation": "team-a"}),
    Row("POST", "/prompts/support/versions", "ynn yyyn n0", VERSION, route="/prompts/{name}/versions"),
    Row(
        "PUT",
        "/prompts/support/labels/production",
        "ynn yynn n0",
        {"version": 1},
        MATCH,
        "/prompts/{name}/labels/{label}",
    ),
    Row("GET", LABEL, "yyy yyyy n0", route="/prompts/{name}/labels/{label}"),
    Row("DELETE", LABEL, "ynn yynn n0", None, MATCH, "/prompts/{name}/labels/{label}"),
    Row("DELETE", "/prompts/support", "ynn yynn n0", headers=MATCH, route="/prompts/{name}"),
    # Audit
    Row("GET", "/audit", "yyy yyyn ny"),
    Row("GET", "/audit", "ynn yynn ny", headers={"accept": "application/x-ndjson"}),
    # Oneself
    Row("GET", "/me", ALL),
    Row("PATCH", "/me", ALL, {"title": "Me"}, MATCH),
    Row("GET", "/me/sessions", ALL),
    Row("DELETE", "/me/sessions", ALL),
    Row("GET", "/me/sessions/none", "000 0000 00", route="/me/sessions/{id}"),
    Row("DELETE", "/me/sessions/none", "000 0000 00", headers=MATCH, route="/me/sessions/{id}"),
    Row("GET", "/tokens", ALL),
    Row("POST", "/tokens", ALL, {"name": "mine"}),
    Row("GET", "/tokens/TOKEN", "ynn nnnn nn".replace("n", "0"), route="/tokens/{id}"),
    Row("PATCH", "/tokens/TOKEN", "ynn nnnn nn".replace("n", "0"), {"name": "y"}, MATCH, "/tokens/{id}"),
    Row("POST", "/tokens/TOKEN/rotate", "ynn nnnn nn".replace("n", "0"), route="/tokens/{id}/rotate"),
    Row("DELETE", "/tokens/TOKEN", "ynn nnnn nn".replace("n", "0"), headers=MATCH, route="/tokens/{id}"),
    Row("DELETE", "/session", ALL),
)
OPEN = {("POST", "/session")}


def of_api() -> set[tuple[str, str]]:
    """Method and path of each route of the API."""
    routes = [route for router in RESOURCES for route in router.routes]
    assert all(isinstance(route, APIRoute) for route in routes)
    return {(method, route.path) for route in routes if isinstance(route, APIRoute) for method in route.methods or ()}


async def fill(running: Running, folder: Path) -> dict[str, str]:
    """People in team-a and team-b, and an object of each kind; returns their ids."""
    for name in ("olga", "adam", "mia", "vic", "nobody", "xena", "bob"):
        await make_user(running, name, password=None)
    await make_organisation(running, "team-a", olga="owner", adam="admin", mia="member", vic="viewer")
    await make_organisation(running, "team-b", xena="owner")
    await make_organisation(running, "team-d")
    async with running.plane.change("policy") as connection:
        for name, pattern in (("team-a", "llama"), ("team-b", "secret")):
            await connection.execute(update(organisations).where(organisations.c.name == name).values(models=[pattern]))
        ids: dict[str, str] = {}
        for name, user in (("OTHERS", "olga"), ("OWN", "mia")):
            made = new_key()
            ids[name] = made.id
            values: dict[str, Any] = {
                "id": made.id,
                "name": name,
                "digest": made.digest,
                "organisation": "team-a",
                "user": user,
            }
            values |= {"limits": [], "disabled": False, "created_at": NOON}
            await connection.execute(insert(keys).values(**values))

    async def make(path: str, body: Any, name: str = "id") -> str:
        answer = await running.admin.post(f"/api/v1{path}", json=body)
        assert answer.status_code == 201, answer.text
        return str(answer.json()[name])

    for model in ("llama", "secret"):
        await running.admin.put(f"/models/{model}", json=entry(model))
    await make("/prompts", {"name": "support", "organisation": "team-a"}, "name")
    await make("/prompts/support/versions", VERSION, "version")
    label: dict[str, Any] = {"json": {"version": 1}, "headers": {"if-none-match": "*"}}
    await running.admin.put(f"/api/v1{LABEL}", **label)
    await running.admin.put("/api/v1/deployments/llama", json=DEPLOYMENT, headers={"if-none-match": "*"})
    await running.admin.post("/api/v1/model-actions", json={"model": "llama", "action": "start"})
    ids["TRIAGE"] = await make("/triage", {"model": "llama"})
    ids["MODEL-FILE"] = str(folder / "tiny.gguf")
    ids["INSPECTION"] = await make("/inspections", {"source": "file", "ref": ids["MODEL-FILE"]})
    ids["OVERRIDE"] = await make("/overrides", DRAIN)
    ids["LIMIT"] = await make("/limits", {"scope": "all", "requests": 9, "per": 60})
    ids["BUDGET"] = await make("/budgets", {"scope": "all", "tokens": 9, "per": "day"})
    ids["TOKEN"] = await make("/tokens", SERVICE)
    ids["SETTING"] = (await running.admin.get("/api/v1/settings")).json()["data"][0]["key"]
    return ids


WHO = dict(zip(PEOPLE, ("ana", "oscar", "vera", "olga", "adam", "mia", "vic", "nobody", "xena"), strict=True))
PLATFORM = {"oscar": "operator", "vera": "viewer"}


@pytest.mark.parametrize("person", PEOPLE)
async def test_a_role_may_do_what_the_table_says(start_sqlite: Callable[..., Any], tmp_path: Path, person: str) -> None:
    sqlite_plane = await start_sqlite(outside=replace(Scripted().connections(), roots=Roots([tmp_path])))
    (tmp_path / "tiny.gguf").write_bytes(gguf(LLAMA_GGUF, GGUF_SHAPES))
    ids = await fill(sqlite_plane, tmp_path)
    place, name = PEOPLE.index(person), WHO[person]
    found, expected = {}, {}
    async with acting_as(sqlite_plane, name, PLATFORM.get(name)) as client:
        for number, row in enumerate(TABLE):
            cell = f"{number} {row.method} {row.path} {row.body or ''}"
            expected[cell] = row.allowed.replace(" ", "")[place]
            found[cell] = LETTERS.get(await ask(client, row, ids), "y")

    assert found == expected


async def ask(client: httpx.AsyncClient, row: Row, ids: dict[str, str]) -> int:
    path, body = row.path, row.body
    for name, id in ids.items():
        path = path.replace(name, id)
    if isinstance(body, dict):
        body = {name: ids.get(value, value) if isinstance(value, str) else value for name, value in body.items()}
    answer = await client.request(row.method, f"/api/v1{path}", json=body, headers=row.headers)
    assert answer.is_success or answer.status_code in LETTERS, answer.text
    assert answer.status_code != 404 or error(answer)[1] == "not_found"
    return answer.status_code


async def test_without_a_login_nothing_is_open_but_the_login(sqlite_plane: Running) -> None:
    statuses = {}
    for method, path in sorted(of_api() - OPEN):
        answer = await sqlite_plane.client.request(
            method, f"/api/v1{path}".replace("{", "").replace("}", ""), json={} if method in ("POST", "PUT") else None
        )
        statuses[method, path] = (answer.status_code, answer.json()["error"]["code"])

    assert set(statuses.values()) == {(401, "not_authenticated")}, statuses


def test_every_route_has_a_row() -> None:
    assert of_api() == ROUTES.keys()
    assert {(row.method, row.route or row.path) for row in TABLE} | OPEN == ROUTES.keys()


def test_the_table_has_a_cell_for_each() -> None:
    assert {len(row.allowed.replace(" ", "")) for row in TABLE} == {len(PEOPLE)}
