"""GET /policy: whatever was stored, routers accept it; made from what has changed, it is the same as made anew."""

import gzip
import json
import random
from collections.abc import Awaitable, Callable
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from control_plane.documents import Documents
from control_plane.pure.policy import Item, changed, document
from control_plane.services import policy
from tests.control_plane import teams
from tests.control_plane.conftest import SERVICE_TOKEN, Running
from tests.control_plane.test_keys import compiled, made

pytestmark = pytest.mark.anyio
TEAMS = ("team-a", "team-b")
LIMITS: list[Any] = [
    {"requests": 1, "per": 1},
    {"streams": 5},
    {"tokens": 2**53 - 1, "per": 3600, "precise": True, "models": ["a*"]},
    {"requests": 2**53, "per": 60},
    {"requests": 1},
]
BUDGETS: list[Any] = [
    {"cost": 1e-9, "per": "day"},
    {"cost": 1e300, "per": "month"},
    {"cost": 9e18, "per": "month"},
    {"tokens": 7, "per": "week", "soft": 0.5},
    {"cost": 1e-10, "per": "day"},
]
TIMES = ["2027-01-31T00:00:00Z", "0001-01-01T00:00:00.5Z", "9999-12-31T23:59:59Z", "9999-12-31T23:59:59.9999Z", None]
CONTENTS: list[Any] = [
    "{{x}}",
    "{{y}}",
    1e300,
    [{"deep": [["{{x}}", 9e18, -(2**63), 5e-324, None]]}],
    {"{{x}}": 1},
    "\u2028\x7f",
]


class Caller:
    """Calls the API at random, with what is right and what is wrong."""

    def __init__(self, plane: Running, seed: int) -> None:
        self._plane = plane
        self._random = random.Random(seed)
        self._keys: list[str] = []
        self.succeeded = 0
        self._calls: list[Callable[[], Awaitable[Any]]] = [
            self._key, self._key, self._change_key, self._change_key, self._rotate, self._end, self._scoped,
            self._scoped, self._remove, self._prompt, self._version, self._label, self._setting, self._team,
        ]  # fmt: skip

    async def call(self) -> None:
        answer = await self._random.choice(self._calls)()
        if isinstance(answer, httpx.Response):
            assert answer.status_code < 500, answer.text
            self.succeeded += answer.is_success

    def _one(self, values: Any) -> Any:
        return self._random.choice(list(values))

    def _fields(self) -> dict[str, Any]:
        fields = {
            "name": self._one(["x", "\n", "ü" * 128, ""]),
            "organisation": self._one([None, *TEAMS, "nowhere"]),
            "user": self._one([None, "ana"]),
            "models": self._one([None, [], ["*"], ["a b"]]),
            "limits": self._random.sample(LIMITS, 2),
            "budget": self._one([None, *BUDGETS]),
            "priority": self._one([-100, 0, 100, 101]),
            "weight": self._one([0.01, 1, 100, 0]),
            "expires": self._one(TIMES),
        }
        return dict(self._random.sample(list(fields.items()), self._random.randrange(len(fields))))

    async def _with(self, method: str, url: str, body: Any = None) -> httpx.Response:
        read = await self._plane.admin.get(url)
        headers = {"if-match": read.headers["etag"]} if "etag" in read.headers else {"if-none-match": "*"}
        return await self._plane.admin.request(method, url, json=body, headers=headers)

    async def _key(self) -> httpx.Response:
        answer = await self._plane.admin.post("/api/v1/keys", json={"name": "batch", **self._fields()})
        if answer.is_success:
            self._keys.append(answer.json()["id"])
        return answer

    async def _change_key(self) -> httpx.Response | None:
        fields = {**self._fields(), "disabled": self._one([True, False])}
        return await self._with("PATCH", f"/api/v1/keys/{self._one(self._keys)}", fields) if self._keys else None

    async def _rotate(self) -> httpx.Response | None:
        body = {"overlap": self._one([0, 60, 604_800])}
        url = f"/api/v1/keys/{self._one(self._keys or ['x'])}/rotate"
        return await self._plane.admin.post(url, json=body)

    async def _end(self) -> httpx.Response | None:
        return await self._with("DELETE", f"/api/v1/keys/{self._one(self._keys or ['x'])}")

    async def _scoped(self) -> httpx.Response:
        kind = self._one(["limits", "budgets"])
        item = {**self._one(LIMITS if kind == "limits" else BUDGETS)}
        item["scope"] = self._one(["all", "organisation", "user", "key", "model"])
        name = self._one([None, None, *TEAMS, *self._keys[-3:], "x"])
        return await self._plane.admin.post(f"/api/v1/{kind}", json=item if name is None else {**item, "name": name})

    async def _remove(self) -> httpx.Response | None:
        path = f"/api/v1/{self._one(['limits', 'budgets'])}"
        ids = [one["id"] for one in (await self._plane.admin.get(path)).json()["data"]]
        return await self._with("DELETE", f"{path}/{self._one(ids)}") if ids else None

    async def _prompt(self) -> httpx.Response:
        body = {"name": self._one("abcdef"), "organisation": self._one([None, *TEAMS])}
        return await self._plane.admin.post("/api/v1/prompts", json=body)

    async def _version(self) -> httpx.Response:
        message = {"role": self._one(["user", "system"]), "content": self._one(CONTENTS), "more": self._one(CONTENTS)}
        variable = {"trusted": self._one([True, False]), "default": self._one([None, 1.5, "x"])}
        body = {"messages": [message], "variables": {"x": variable}}
        return await self._plane.admin.post(f"/api/v1/prompts/{self._one('abcdef')}/versions", json=body)

    async def _label(self) -> httpx.Response:
        url = f"/api/v1/prompts/{self._one('abcdef')}/labels/{self._one(['production', 'beta'])}"
        return await self._with("PUT", url, {"version": self._one([1, 2, 3])})

    async def _setting(self) -> httpx.Response:
        body = {"value": self._random.sample(LIMITS, 1)}
        return await self._with("PUT", "/api/v1/settings/anonymous.limits", body)

    async def _team(self) -> None:
        name = self._one(TEAMS)
        values = self._one([{"disabled": True}, {"disabled": False}, {"ended_at": None}, {"ended_at": 1}])
        await teams.changed(self._plane, name, **values)


@pytest.mark.parametrize("seed", range(2))
async def test_whatever_was_stored_routers_accept_it(plane: Running, seed: int) -> None:
    for name in TEAMS:
        await teams.organisation(plane, name, budget={"cost": 1, "per": "month"})
    caller = Caller(plane, seed)
    for _ in range(150):
        await caller.call()
        compiled((await plane.router.get("/policy")).json())

    assert caller.succeeded > 40
    # Made from the beginning it is the same.
    documents = Documents(plane.plane.database.main, {policy.DOCUMENT: policy.build}, plane.clock)
    anew = await documents.refresh(policy.DOCUMENT)
    assert anew.etag == plane.plane.documents.get(policy.DOCUMENT).etag
    assert gzip.decompress(anew.compressed) == anew.body


async def test_the_policy_is_compressed_for_those_who_take_it(sqlite_plane: Running) -> None:
    await made(sqlite_plane.admin)
    headers = {"authorization": f"Bearer {SERVICE_TOKEN}"}
    async with httpx.AsyncClient(base_url=sqlite_plane.url, trust_env=False, headers=headers) as client:
        plain = await client.get("/policy", headers={"accept-encoding": "identity"})
        packed = await client.get("/policy", headers={"accept-encoding": "gzip"})

    assert "content-encoding" not in plain.headers
    assert packed.headers["content-encoding"] == "gzip"
    assert packed.content == plain.content
    assert packed.headers["etag"] == plain.headers["etag"]


async def test_only_routers_get_the_policy(sqlite_plane: Running) -> None:
    for client, status in ((sqlite_plane.client, 401), (sqlite_plane.admin, 401), (sqlite_plane.router, 200)):
        assert (await client.get("/policy")).status_code == status


async def test_a_replica_learns_of_a_key(start_plane: Callable[..., Any]) -> None:
    one, other = await start_plane(), await start_plane()
    etag = (await other.router.get("/policy")).headers["etag"]
    key = await made(one.admin)
    answer = await other.router.get("/policy", headers={"if-none-match": etag, "prefer": "wait=25"})

    assert [item["id"] for item in answer.json()["keys"]] == [key["id"]]
    assert answer.headers["etag"] == (await one.router.get("/policy")).headers["etag"]


KEY_IDS = st.text("0AZz", min_size=1, max_size=3)


@given(st.lists(st.dictionaries(KEY_IDS, st.sampled_from(["x", "y", None]), max_size=6), max_size=6))
def test_the_parts_make_the_whole(steps: list[dict[str, str | None]]) -> None:
    shards: Any = {}
    known: dict[str, str] = {}
    for step in steps:
        items = {
            id: None if team is None else Item(team, json.dumps({"id": id, "t": team}).encode())
            for id, team in step.items()
        }
        shards = changed(shards, items, frozenset())
        known = {id: team for id, team in {**known, **step}.items() if team is not None}
    shards = changed(shards, {}, frozenset({"y"}))
    body, compressed, _ = document({"a": [1]}, shards, {"z": []})

    wanted = [{"id": id, "t": team} for id, team in sorted(known.items()) if team != "y"]
    assert json.loads(body) == {"a": [1], "keys": wanted, "z": []}
    assert gzip.decompress(compressed) == body
