"""Policies for tests: keys whose secrets are known, and the files that list them."""

import asyncio
import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

from inference_api.policy.keys import NewKey, new_key
from tests.fakes import Line, Received, ScriptedServer, json_response

PEPPER = "0123456789abcdef0123456789abcdef"


class Example(NamedTuple):
    """The key of the contract, whose digests are fixed."""

    key: str = "sk-ia-k3v9Qm2XbT7a-AbCdEfGhIjKlMnOpQrStUvWxYz0123456789abcdefg01vVfr"
    id: str = "k3v9Qm2XbT7a"
    digest: str = "sha256:6f328c10ea289f25df518b331fb8b9e1ce7e11285b92e6b57d77009fe7c16a1d"
    peppered: str = "hmac-sha256:6b7014679b80a02ff94a6f1e3eea0fb7c4447190a186f62990db6176dd5023dc"


EXAMPLE = Example()


def entry(key: NewKey | Example = EXAMPLE, name: str = "batch", **more: Any) -> dict[str, Any]:
    """The policy's entry of a key."""
    return {"id": key.id, "name": name, "digest": key.digest, **more}


def policy_of(*entries: dict[str, Any], **sections: Any) -> dict[str, Any]:
    """A policy with these keys, and with the organisations that they name."""
    names = dict.fromkeys(one["organisation"] for one in entries if one.get("organisation"))
    return {"organisations": [{"name": name} for name in names], "keys": list(entries), **sections}


def write(path: Path, policy: Any) -> Path:
    """Write a policy as JSON, whole: a reader sees the old one or the new one."""
    new = path.with_suffix(".new")
    new.write_text(policy if isinstance(policy, str) else json.dumps(policy))
    new.replace(path)
    return path


def bearer(key: str = EXAMPLE.key) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


class FakeRegistry(ScriptedServer):
    """Gives a policy as the control plane does: ETag, 304, long polls. `models`: its list at /models,
    None: 503, as all else.

    `waits`: whether it waits for changes; `status`, `body`: an answer to /policy instead; `silent`: never answers it.
    `asked`: the requests for the policy; `answered`: the statuses that they got; `waiting`: how many wait now.
    """

    def __init__(self, policy: Any = None, waits: bool = True, models: list[Any] | None = None) -> None:
        super().__init__(self._answer)
        self.models = models
        self.waits = waits
        self.status: str | None = None
        self.body: bytes | None = None
        self.silent = False
        self.limit = 25.0
        self.answered: list[int] = []
        self.polls: list[Received] = []
        self.waiting = 0
        self._document = b""
        self._changed = asyncio.Event()
        self.give(policy_of() if policy is None else policy)

    def give(self, policy: Any) -> None:
        """The policy from now on; requests that wait get it."""
        self._document = policy if isinstance(policy, bytes) else json.dumps(policy).encode()
        self._changed.set()
        self._changed = asyncio.Event()

    @property
    def etag(self) -> str:
        return f'"{hashlib.sha256(self._document).hexdigest()[:16]}"'

    async def _answer(self, request: Received, line: Line) -> None:
        if request.target != "/policy":
            is_list = request.target == "/models" and self.models is not None
            status = "200 OK" if is_list else "503 Service Unavailable"
            await line.send(json_response({"models": self.models}, status))
            return
        self.polls.append(request)
        if self.silent:
            await line.gone()
        elif self.status is not None:
            await self._say(line, self.status, b"{}" if self.body is None else self.body)
        elif request.header("if-none-match") == self.etag:
            if self.waits and request.header("prefer") == "wait=25":
                await self._wait(line)
            await self._say_policy(request, line, request.header("if-none-match") == self.etag)
        else:
            await self._say_policy(request, line, False)

    async def _wait(self, line: Line) -> None:
        self.waiting += 1
        changed = asyncio.create_task(self._changed.wait())
        left = asyncio.create_task(line.gone())
        try:
            await asyncio.wait({changed, left}, timeout=self.limit, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self.waiting -= 1
            changed.cancel()
            left.cancel()

    async def _say_policy(self, request: Received, line: Line, is_known: bool) -> None:
        applied = b"preference-applied: wait=25\r\n" if self.waits and request.header("prefer") else b""
        head = b"etag: " + self.etag.encode() + b"\r\ncache-control: no-cache\r\n" + applied
        await self._say(line, "304 Not Modified" if is_known else "200 OK", b"" if is_known else self._document, head)

    async def _say(self, line: Line, status: str, body: bytes, headers: bytes = b"") -> None:
        self.answered.append(int(status[:3]))
        length = b"" if status.startswith("304") else b"content-length: %d\r\n" % len(body)
        head = f"HTTP/1.1 {status}\r\ncontent-type: application/json\r\n".encode() + length + headers
        await line.send(head + b"\r\n" + body)


__all__ = ["EXAMPLE", "PEPPER", "Example", "FakeRegistry", "NewKey", "bearer", "entry", "new_key", "policy_of", "write"]
