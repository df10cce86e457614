"""A hub on a real socket, as huggingface.co answers: descriptions, redirects to where files are, parts of them."""

import asyncio
import re
from collections.abc import Mapping
from typing import Any

import orjson

from tests.fakes import Line, Received

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class FakeHub:
    """The script of a FakeEngine's `page`. `files`: contents by path, of the one repository `org/model`.

    `status`: of what paths with this part get, with headers. `elsewhere`: the URL of another host that has the files.
    `ranges`: whether it has parts. `cut`: bytes after which it breaks off. `gate`: what answers wait for.
    """

    def __init__(self, files: Mapping[str, bytes], **described: Any) -> None:
        self.files = dict(files)
        self.described = described
        self.refusals: dict[str, tuple[int, dict[str, str]]] = {}
        self.elsewhere: str | None = None
        self.ranges = True
        self.cut: int | None = None
        self.gate: asyncio.Event | None = None
        self.received: list[Received] = []
        self.sent = 0

    async def __call__(self, received: Received, line: Line) -> None:
        self.received.append(received)
        path = received.target.partition("?")[0]
        if self.gate is not None:
            await self.gate.wait()
        for part, (status, headers) in self.refusals.items():
            if part in path:
                await line.send(_head(status, 0, headers))
                return
        if path.startswith("/api/models/org/model/revision/"):
            await self._answer(line, 200, self._description())
        elif path.startswith("/api/models/old/"):
            await line.send(_head(307, 0, {"location": received.target.replace("old/name", "org/model")}))
        elif (name := path.removeprefix(f"/org/model/resolve/{COMMIT}/")) != path and name in self.files:
            if self.elsewhere is not None:
                await line.send(_head(302, 0, {"location": f"{self.elsewhere}/cdn/{name}?signature=x"}))
            else:
                await self._part(received, line, self.files[name])
        elif (name := path.removeprefix("/cdn/")) in self.files:
            await self._part(received, line, self.files[name])
        else:
            await line.send(_head(404, 0, {"x-error-code": "RepoNotFound"}))

    def _description(self) -> bytes:
        siblings = [{"rfilename": name, "size": len(content)} for name, content in self.files.items()]
        return orjson.dumps({"id": "org/model", "sha": COMMIT, "siblings": siblings, **self.described})

    async def _part(self, received: Received, line: Line, content: bytes) -> None:
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", received.header("range") or "")
        if wanted is None or not self.ranges:
            await self._answer(line, 200, content)
            return
        begin, end = int(wanted[1]), int(wanted[2]) + 1
        headers = {"content-range": f"bytes {begin}-{end - 1}/{len(content)}"}
        await self._answer(line, 206, content[begin:end], headers)

    async def _answer(self, line: Line, status: int, content: bytes, headers: Mapping[str, str] | None = None) -> None:
        await line.send(_head(status, len(content), headers or {}))
        for at in range(0, len(content if self.cut is None else content[: self.cut]), 65536):
            part = content[at : at + 65536] if self.cut is None else content[at : min(at + 65536, self.cut)]
            self.sent += len(part)
            await line.send(part)
        if self.cut is not None:
            line.close()


def _head(status: int, length: int, headers: Mapping[str, str]) -> bytes:
    lines = [f"HTTP/1.1 {status} X", f"content-length: {length}", *(f"{name}: {one}" for name, one in headers.items())]
    return "\r\n".join([*lines, "", ""]).encode()
