"""POLICY=registry: the policy of the control plane, while it answers, waits, fails and is away."""

import asyncio
import json
import logging
import os
import stat
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from inference_api.policy.remote import PolicyRegistry
from inference_api.policy.source import Policies
from inference_api.routing.registry import RegistryError
from inference_api.routing.snapshots import Snapshot
from inference_api.settings import SettingsError
from tests.conftest import Served
from tests.fakes import Line, Received, until
from tests.policies import EXAMPLE, FakeRegistry, bearer, entry, new_key, policy_of

pytestmark = pytest.mark.anyio
Start = Callable[..., Any]
PHRASES = ("the policy cannot be refreshed", "the registry gives the policy again", "no keys", "the policy has changed")


@pytest.fixture(autouse=True)
def _all_levels(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "inference_api")


@pytest.fixture
async def registry() -> AsyncIterator[FakeRegistry]:
    async with AsyncExitStack() as stack:
        yield await stack.enter_async_context(FakeRegistry(policy_of(entry())))


def policies(served: Served) -> Policies:
    found = served.router.core.provided(Policies)
    assert found is not None
    return found


def keys_of(served: Served) -> list[str] | None:
    policy = policies(served).current
    return None if policy is None else [row.name for row in policy.rows()]


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [line.message for line in caplog.records if any(phrase in line.message for phrase in PHRASES)]


def on(registry: FakeRegistry, **more: Any) -> dict[str, Any]:
    return {"policy": "registry", "registry_url": registry.url, "registry_refresh": 0.05, **more}


async def test_the_first_policy_is_there_before_the_first_request(
    registry: FakeRegistry, start_engine: Start, start_router: Start
) -> None:
    served: Served = await start_router(await start_engine(), **on(registry, auth="keys"))

    assert keys_of(served) == ["batch"]
    assert (await served.client.get("/v1/models", headers=bearer())).status_code == 200
    assert registry.polls[0].header("if-none-match") is registry.polls[0].header("prefer") is None
    # A few KB could expand to more than the memory.
    assert registry.polls[0].header("accept-encoding") == "identity"


async def test_the_token_is_sent(registry: FakeRegistry, start_router: Start) -> None:
    await start_router(**on(registry, registry_token="s3cret"))

    assert registry.polls[0].header("authorization") == "Bearer s3cret"


async def test_a_change_arrives_at_once_from_a_registry_that_waits(registry: FakeRegistry, start_router: Start) -> None:
    served: Served = await start_router(**on(registry, registry_refresh=600))
    await until(lambda: registry.waiting)
    assert registry.polls[-1].header("prefer") == "wait=25"
    assert registry.polls[-1].header("if-none-match") == registry.etag

    for name in ("two", "three"):
        registry.give(policy_of(entry(name=name)))
        await until(lambda name=name: keys_of(served) == [name], seconds=10)  # type: ignore[misc]
        await until(lambda: registry.waiting)

    assert registry.answered == [200, 200, 200]


async def test_a_long_poll_holds_up_nothing_else(registry: FakeRegistry, start_router: Start) -> None:
    registry.models = [{"name": "m"}]
    await start_router(**on(registry))
    await until(lambda: registry.waiting)

    # The list of models is polled on.
    before = sum(request.target == "/models" for request in registry.requests)
    await until(lambda: sum(request.target == "/models" for request in registry.requests) > before + 2)

    assert registry.waiting == 1
    assert len(registry.polls) == 2


async def test_a_registry_that_does_not_wait_is_asked_every_refresh(start_router: Start) -> None:
    async with FakeRegistry(policy_of(entry()), waits=False) as registry:
        served: Served = await start_router(**on(registry))
        first = policies(served).current
        await until(lambda: len(registry.answered) > 4)

        # A poll that changed nothing costs a 304.
        assert registry.answered[:5] == [200, 304, 304, 304, 304]
        assert policies(served).current is first
        registry.give(policy_of())
        await until(lambda: keys_of(served) == [])


async def test_a_registry_that_says_304_at_once_is_not_asked_in_a_loop(
    registry: FakeRegistry, start_router: Start
) -> None:
    registry.limit = 0.0

    await start_router(**on(registry))
    await until(lambda: len(registry.answered) >= 2)
    await asyncio.sleep(0.5)

    assert len(registry.answered) <= 3


async def test_the_same_content_without_an_etag_changes_nothing(start_router: Start) -> None:
    async with FakeRegistry() as registry:
        registry.status, registry.body = "200 OK", json.dumps(policy_of(entry())).encode()
        served: Served = await start_router(**on(registry))
        first = policies(served).current

        await until(lambda: len(registry.answered) > 4)

        assert policies(served).current is first
        assert not any("if-none-match" in request.names for request in registry.polls)


FAILURES: dict[str, tuple[str, bytes, str, str]] = {
    "500": ("500 Oops", b"{}", "status", "it answered with the status 500"),
    "401": ("401 Unauthorized", b"{}", "status", "it answered with the status 401"),
    "redirected": ("302 Found", b"{}", "status", "it answered with the status 302"),
    "not JSON": ("200 OK", b"<html>", "garbage", "policy of the registry: it is not valid JSON: '{' is expected"),
    "cut": ("200 OK", b'{"keys": [', "garbage", "policy of the registry: it is not valid JSON: a value is expected"),
    "not UTF-8": ("200 OK", b'{"keys": "\xff"}', "garbage", "policy of the registry: it is not UTF-8"),
    "not valid": ("200 OK", b'{"keys": [{}]}', "garbage", "policy of the registry: keys.0.id: is required"),
    "a list": ("200 OK", b"[]", "garbage", "policy of the registry: it is not valid JSON: '{' is expected"),
    "without pepper": (
        "200 OK",
        json.dumps(policy_of({**entry(), "digest": EXAMPLE.peppered})).encode(),
        "garbage",
        "policy of the registry: keys.0.digest: 'hmac-sha256' needs INFERENCE_API_KEY_PEPPER",
    ),
}


@pytest.mark.parametrize("case", FAILURES)
async def test_what_cannot_be_used_changes_nothing(
    case: str, registry: FakeRegistry, start_router: Start, caplog: pytest.LogCaptureFixture
) -> None:
    status, body, reason, why = FAILURES[case]
    served: Served = await start_router(**on(registry))
    first, before = policies(served).current, len(registry.answered)
    caplog.clear()

    registry.status, registry.body = status, body
    registry.give(policy_of(entry(name="another")))
    await until(lambda: len(registry.answered) >= before + 4)

    assert policies(served).current is first
    assert await served.metric("inference_api_policy_refresh_failures_total", reason=reason) >= 2
    # Said once
    assert [line.partition(why)[1] for line in told(caplog)] == [why]
    registry.status = None
    registry.give(policy_of(entry(name="other")))
    await until(lambda: keys_of(served) == ["other"])
    assert "the registry gives the policy again" in told(caplog)


async def test_a_registry_that_goes_away_changes_nothing(
    registry: FakeRegistry, start_router: Start, caplog: pytest.LogCaptureFixture
) -> None:
    served: Served = await start_router(**on(registry))
    await until(lambda: registry.waiting)

    await registry.stop()
    await until(lambda: policies(served).failures["connect"] >= 2)

    assert keys_of(served) == ["batch"]
    assert len([line for line in told(caplog) if "cannot be refreshed" in line]) == 1
    registry.give(policy_of(entry(name="other")))
    async with registry:
        await until(lambda: keys_of(served) == ["other"])


async def test_a_compressed_answer_is_garbage(start_router: Start) -> None:
    async def zipped(request: Any, line: Any) -> None:
        await line.send(b"HTTP/1.1 200 OK\r\ncontent-encoding: gzip\r\ncontent-length: 3\r\n\r\nabc")

    async with FakeRegistry() as registry:
        registry.script = zipped
        served: Served = await start_router(**on(registry))
        # It asks again and again.
        assert policies(served).failures["garbage"] >= 1


async def test_an_answer_without_keys_is_believed_at_the_second_look(
    registry: FakeRegistry, start_router: Start, caplog: pytest.LogCaptureFixture
) -> None:
    served: Served = await start_router(**on(registry))
    await until(lambda: registry.waiting)

    registry.give(policy_of())
    await until(lambda: keys_of(served) == [])

    assert registry.answered == [200, 200, 200]
    assert any("has no keys" in line for line in told(caplog))
    # Whoever has none may go on having none.
    registry.give(policy_of(limits=[{"scope": "all", "requests": 1, "per": 60}]))
    await until(lambda: registry.answered[:4] == [200] * 4)


async def test_a_304_is_no_second_look(start_router: Start) -> None:
    async with FakeRegistry(policy_of(entry()), waits=False) as registry:
        served: Served = await start_router(**on(registry))
        document, none = policy_of(entry()), policy_of()
        for policy in (none, document, none, document):
            seen = len(registry.answered)
            # One look at the policy without keys, then one at the old one, which is a 304.
            registry.give(policy)
            await until(lambda seen=seen: len(registry.answered) > seen)  # type: ignore[misc]

        assert keys_of(served) == ["batch"]


async def test_unknown_keys_are_ignored_with_one_warning(
    registry: FakeRegistry, start_router: Start, caplog: pytest.LogCaptureFixture
) -> None:
    served: Served = await start_router(**on(registry))
    for number in range(3):
        newer = {**policy_of(entry(name=f"key-{number}", colour="red")), "webhooks": []}
        registry.give(newer)
        await until(lambda number=number: keys_of(served) == [f"key-{number}"])  # type: ignore[misc]

    warnings = [line.message for line in caplog.records if "unknown keys" in line.message]
    assert warnings == ["unknown keys in the registry's policy are ignored: colour, webhooks"]


async def test_bounds_of_an_answer() -> None:
    async with FakeRegistry(policy_of(entry())) as registry:
        found = Policies("registry")
        async with httpx.AsyncClient(base_url=registry.url) as client:
            remote = PolicyRegistry(found, client, 0.05, peppered=False, max_bytes=20)
            await remote.start()

        assert found.current is None
        assert found.failures["garbage"] == 1


@pytest.mark.parametrize("silent", [b"", b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\n{"])
async def test_an_answer_that_does_not_come_or_does_not_end_is_a_timeout(silent: bytes, start: Start) -> None:
    async def slow(request: Received, line: Line) -> None:
        if silent:
            await line.send(silent)
        await line.gone()

    class Nothing:
        reason = ""

        async def take(self, content: Sequence[bytes]) -> bool:
            return True

        def confirm(self) -> None: ...

        def failed(self, error: RegistryError) -> None:
            self.reason = error.reason

    registry, nothing = await start(slow), Nothing()
    async with httpx.AsyncClient(base_url=registry.url) as client:
        for late, timeout in ((0.1, 10.0), (10.0, 0.1)):
            nothing.reason = ""
            await Snapshot(client, "/policy", nothing, 1.0, 1000, late=late, timeout=timeout).start(5.0)
            assert nothing.reason == "timeout"


async def test_a_flood_of_unknown_keys_asks_nobody(registry: FakeRegistry, start_router: Start) -> None:
    served: Served = await start_router(**on(registry, auth="keys"))
    await until(lambda: registry.waiting)
    before = len(registry.polls)

    for _ in range(100):
        assert (await served.client.get("/v1/models", headers=bearer(new_key().key))).status_code == 401

    assert len(registry.polls) == before


# Starts without a registry


async def test_without_a_policy_nobody_is_let_in(start_engine: Start, start_router: Start) -> None:
    async with FakeRegistry() as registry:
        registry.status = "500 Oops"
        served: Served = await start_router(await start_engine(), **on(registry, auth="keys"))

        for answer in (await served.chat(), await served.client.get("/v1/models", headers=bearer())):
            assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")
            assert answer.json()["error"]["code"] == "auth_unavailable"
            assert answer.json()["error"]["type"] == "server_error"
        ready = await served.client.get("/readyz")
        assert (ready.status_code, ready.json()["status"]) == (503, "auth_unavailable")
        assert (await served.client.get("/healthz")).status_code == 200
        assert await served.metric("inference_api_auth_total", result="unavailable") == 2
        assert "\ninference_api_policy_age_seconds " not in (await served.client.get("/metrics")).text

        registry.status = None
        registry.give(policy_of(entry()))
        await until(lambda: keys_of(served) == ["batch"])
        assert (await served.client.get("/readyz")).status_code == 200
        assert (await served.client.get("/v1/models", headers=bearer())).status_code == 200


async def test_without_keys_the_router_serves_without_a_policy(start_engine: Start, start_router: Start) -> None:
    async with FakeRegistry() as registry:
        registry.status = "500 Oops"
        served: Served = await start_router(await start_engine(), **on(registry))

        assert (await served.chat()).status_code == 200
        assert (await served.client.get("/readyz")).status_code == 200


@asynccontextmanager
async def starting(registry: FakeRegistry, cache: Path, patience: float) -> AsyncIterator[Policies]:
    """The policies of a router that starts."""
    found = Policies("registry")
    async with httpx.AsyncClient(base_url=registry.url) as client:
        remote = PolicyRegistry(found, client, 0.05, peppered=False, cache=cache, patience=patience)
        await remote.start()
        task = asyncio.create_task(remote.run())
        try:
            yield found
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


async def test_the_cache_is_private_and_replaced_whole(
    registry: FakeRegistry, tmp_path: Path, start_router: Start
) -> None:
    cache = tmp_path / "policy.cache"

    await start_router(**on(registry, policy_cache=cache))
    await until(cache.exists)
    first = cache.stat()
    registry.give(policy_of(entry(name="other")))
    await until(lambda: cache.stat().st_ino != first.st_ino)

    assert stat.S_IMODE(cache.stat().st_mode) == 0o600
    assert b'"other"' in cache.read_bytes()
    assert [name for name in os.listdir(tmp_path) if "cache" in name] == ["policy.cache"]


async def test_the_cache_serves_a_start_without_a_registry(registry: FakeRegistry, tmp_path: Path) -> None:
    cache = tmp_path / "policy.cache"
    async with starting(registry, cache, 5.0):
        await until(cache.exists)
    old = cache.stat().st_mtime - 3600
    os.utime(cache, (old, old))

    registry.silent = True
    began = asyncio.get_running_loop().time()
    async with starting(registry, cache, 0.3) as found:
        # The start waits for the registry, and not for longer.
        assert 0.3 <= asyncio.get_running_loop().time() - began < 5
        await until(lambda: found.current is not None)
        assert found.current is not None
        assert [row.name for row in found.current.rows()] == ["batch"]
        # From the time of the file
        assert 3590 < found.age < 3700


async def test_an_answer_replaces_the_policy_of_the_cache(registry: FakeRegistry, tmp_path: Path) -> None:
    cache = tmp_path / "policy.cache"
    async with starting(registry, cache, 5.0):
        await until(cache.exists)

    registry.status = "500 Oops"
    async with starting(registry, cache, 0.01) as found:
        await until(lambda: found.current is not None)
        same = found.current
        old = cache.stat().st_mtime - 3600
        os.utime(cache, (old, old))
        registry.status = None
        # The same content: nothing is replaced, but it is the newest again, and so is the file.
        await until(lambda: cache.stat().st_mtime > old + 3000)
        assert found.current is same
        assert found.age < 100


async def test_a_cache_that_cannot_be_used_is_said_and_changes_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache = tmp_path / "policy.cache"
    async with FakeRegistry(policy_of(entry())) as registry:
        registry.status = "500 Oops"
        for content in ("", "{}", '{"policy": 100}\n{}', '{"policy": 2}\n{}x', '{"policy": "x"}\n', "no\n", None):
            if content is None:
                cache.unlink()
            else:
                cache.write_text(content)
            caplog.clear()
            async with starting(registry, cache, 0.01) as found:
                await until(lambda: "INFERENCE_API_POLICY_CACHE cannot be used" in caplog.text)
                assert found.current is None


async def test_a_cache_that_cannot_be_written_is_said_once(
    registry: FakeRegistry, tmp_path: Path, start_router: Start, caplog: pytest.LogCaptureFixture
) -> None:
    cache = tmp_path / "none" / "policy.cache"
    served: Served = await start_router(**on(registry, policy_cache=cache))
    await until(lambda: "cannot be written" in caplog.text)
    registry.give(policy_of(entry(name="other")))
    await until(lambda: keys_of(served) == ["other"])

    cache.parent.mkdir()
    # At the next confirmation.
    registry.limit = 0.1
    registry.give(policy_of(entry(name="third")))
    await until(cache.exists)
    assert caplog.text.count("cannot be written") == 1


async def test_an_old_age_is_shown(registry: FakeRegistry, start_router: Start) -> None:
    served: Served = await start_router(**on(registry))
    now = policies(served).clock()
    policies(served).clock = lambda: now + 1000

    assert 999 < await served.metric("inference_api_policy_age_seconds") < 1060


async def test_the_sources_are_refused_together(registry: FakeRegistry, start_router: Start, tmp_path: Path) -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        (
            {"auth": "keys"},
            "INFERENCE_API_AUTH='keys': needs INFERENCE_API_POLICY; set it to a policy file, or to registry",
        ),
        (
            {"policy": "registry"},
            "INFERENCE_API_POLICY='registry': needs INFERENCE_API_REGISTRY_URL; set it to the base URL of the registry",
        ),
        (
            {"policy_cache": tmp_path / "c"},
            f"INFERENCE_API_POLICY_CACHE='{tmp_path}/c': is used with INFERENCE_API_POLICY=registry only; set that, or "
            "unset it",
        ),
    ]
    for settings, message in cases:
        with pytest.raises(SettingsError) as caught:
            await start_router(**settings)
        assert str(caught.value) == message
