"""OpenID providers for tests: a real one in a process of its own, and one that lies as a test wants."""

import asyncio
import base64
import contextlib
import hashlib
import json
import secrets
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any
from urllib.parse import parse_qs, urlsplit

import httpx
import uvicorn
from joserfc import jwt
from joserfc.jwk import ECKey, OctKey, RSAKey
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.routing import Route

from inference_api.server.server import listen
from tests.fakes import in_background, until
from tests.ports import free_port

CLIENT_ID = "control-plane"


@contextlib.contextmanager
def real_provider(*users: dict[str, Any]) -> Iterator[str]:
    """The URL of `oidc-provider-mock`, which knows these claims."""
    port = free_port()
    claims = [option for user in users for option in ("--user-claims", json.dumps(user))]
    command = [sys.executable, "-m", "oidc_provider_mock", "--port", str(port), *claims]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 30
        while True:
            try:
                httpx.get(f"{url}/.well-known/openid-configuration", trust_env=False).raise_for_status()
                break
            except httpx.HTTPError:
                assert process.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.05)
        yield url
    finally:
        process.terminate()
        process.wait(10)


class LyingProvider:
    """Signs whatever `claims` say, over what is right; `described` is what it says of itself."""

    def __init__(self) -> None:
        self.url = ""
        self.key: Any = RSAKey.generate_key(2048, {"kid": "first"})
        self.published = [self.key.as_dict(private=False)]
        self.header: dict[str, Any] = {"alg": "RS256", "kid": "first"}
        self.claims: dict[str, Any] = {}
        self.described: dict[str, Any] = {}
        self.now = time.time
        self.asked: list[str] = []
        self._begun: dict[str, dict[str, str]] = {}

    def serve(self) -> Starlette:
        routes = [
            Route("/.well-known/openid-configuration", self._describe),
            Route("/authorize", self._authorize),
            Route("/token", self._token, methods=["POST"]),
            Route("/keys", self._keys),
        ]
        return Starlette(routes=routes)

    async def _describe(self, request: Request) -> Response:
        self.asked.append("description")
        endpoints = {"authorization_endpoint": "authorize", "token_endpoint": "token", "jwks_uri": "keys"}
        found = {name: f"{self.url}/{path}" for name, path in endpoints.items()}
        return JSONResponse({"issuer": self.url, **found, **self.described})

    async def _authorize(self, request: Request) -> Response:
        code, query = secrets.token_urlsafe(16), dict(request.query_params)
        assert query["code_challenge_method"] == "S256"
        self._begun[code] = query
        return RedirectResponse(f"{query['redirect_uri']}?code={code}&state={query['state']}", 303)

    async def _token(self, request: Request) -> Response:
        self.asked.append("token")
        form = {name: values[0] for name, values in parse_qs((await request.body()).decode()).items()}
        begun = self._begun.pop(form["code"], None)
        digest = hashlib.sha256(form["code_verifier"].encode()).digest()
        challenge = base64.urlsafe_b64encode(digest).rstrip(b"=").decode()
        if begun is None or begun["code_challenge"] != challenge or begun["redirect_uri"] != form["redirect_uri"]:
            return JSONResponse({"error": "invalid_grant"}, 400)
        now = int(self.now())
        right = {"iss": self.url, "sub": "s-1", "aud": CLIENT_ID, "exp": now + 300, "iat": now, "nonce": begun["nonce"]}
        claims = {name: value for name, value in {**right, **self.claims}.items() if value is not None}
        return JSONResponse({"access_token": "x", "token_type": "Bearer", "id_token": self.sign(claims)})

    def sign(self, claims: dict[str, Any]) -> str:
        if self.header["alg"] == "none":
            parts = [json.dumps(part).encode() for part in (self.header, claims)]
            return ".".join([*(base64.urlsafe_b64encode(part).rstrip(b"=").decode() for part in parts), ""])
        return jwt.encode(self.header, claims, self.key, algorithms=[self.header["alg"]])

    async def _keys(self, request: Request) -> Response:
        self.asked.append("keys")
        return JSONResponse({"keys": self.published})

    def use_another_key(self) -> None:
        self.key = ECKey.generate_key("P-256", {"kid": "second"})
        self.header = {"alg": "ES256", "kid": "second"}

    def sign_by_what_is_public(self) -> None:
        """HS256 with the text of the public key as the secret: an old trick."""
        self.key = OctKey.import_key(str(self.published[0]["n"]), {"kid": "first"})
        self.header = {"alg": "HS256", "kid": "first"}


@contextlib.asynccontextmanager
async def lying_provider() -> AsyncIterator[LyingProvider]:
    provider = LyingProvider()
    listener = listen("127.0.0.1", 0, "PORT")
    provider.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    server = uvicorn.Server(uvicorn.Config(provider.serve(), log_config=None, lifespan="off"))
    async with in_background(server.serve(sockets=[listener])):
        await until(lambda: server.started)
        try:
            yield provider
        finally:
            server.should_exit = True
    listener.close()
    await asyncio.sleep(0)


def path_of(url: str) -> str:
    parts = urlsplit(url)
    return f"{parts.path}?{parts.query}"
