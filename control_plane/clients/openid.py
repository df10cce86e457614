"""An OpenID provider: where to send a browser, what its code is worth, and whom an ID token names.

Only the host of the configured issuer is asked, whatever the provider's own description names: no redirect is followed.
"""

import logging
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple
from urllib.parse import urlencode, urlsplit

import httpx
import orjson
from joserfc import jwt
from joserfc.errors import InvalidKeyIdError, JoseError
from joserfc.jwk import KeySet

from control_plane.clients.http import http_client

log = logging.getLogger(__name__)

# Signatures by a key that only the provider has: neither `none` nor a shared secret
_ALGORITHMS = ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA", "Ed25519")
_KEY_TYPES = ("RSA", "EC", "OKP")
_SCOPES = "openid profile email"
# Seconds: of one request; that clocks may differ; that descriptions and keys are kept; between two looks for a new key
_TIMEOUT, _LEEWAY, _KEPT, _AGAIN = 10.0, 60, 3600.0, 10.0
_LARGEST = 1024 * 1024
# OpenID Connect Core, 2
_LONGEST_SUBJECT = 255


class OpenIdError(Exception):
    """A login that does not come about. `reason`: one word, for the audit log; the log has more."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class ProviderAway(Exception):
    """The provider does not answer, or says nothing of use."""


class _Described(NamedTuple):
    """What the provider says of itself. `at`: monotonic seconds."""

    authorization: str
    token: str
    jwks: str
    at: float


class Provider:
    """`clock`: Unix milliseconds."""

    def __init__(self, issuer: str, client_id: str, client_secret: str | None, clock: Callable[[], int]) -> None:
        self.issuer = issuer
        self._client_id = client_id
        self._client_secret = client_secret
        self._clock = clock
        # Logins are rare, and a code is good once: none is sent on an idle connection that is being closed.
        self._client = http_client(_TIMEOUT, {"connection": "close"})
        self._described: _Described | None = None
        self._keys: tuple[KeySet, float] | None = None

    async def close(self) -> None:
        await self._client.aclose()

    async def login_url(self, state: str, nonce: str, challenge: str, redirect: str) -> str:
        """Where a browser goes to log in. Raises ProviderAway."""
        query = {
            "response_type": "code",
            "client_id": self._client_id,
            "redirect_uri": redirect,
            "scope": _SCOPES,
            "state": state,
            "nonce": nonce,
            "code_challenge": challenge,
            "code_challenge_method": "S256",
        }
        url = (await self._description()).authorization
        return f"{url}{'&' if urlsplit(url).query else '?'}{urlencode(query)}"

    async def claims(self, code: str, verifier: str, redirect: str) -> Mapping[str, Any]:
        """Whom the code is for: the claims of an ID token that holds, but for its nonce.

        Raises OpenIdError, ProviderAway.
        """
        form = {
            "grant_type": "authorization_code",
            "code": code,
            "redirect_uri": redirect,
            "code_verifier": verifier,
            "client_id": self._client_id,
        }
        secret = self._client_secret
        auth = httpx.USE_CLIENT_DEFAULT if secret is None else httpx.BasicAuth(self._client_id, secret)
        status, found = await self._ask("POST", (await self._description()).token, data=form, auth=auth)
        if status != 200:
            # An error by RFC 6749, 5.2: one of a few words.
            log.warning("the OpenID provider refuses a code: %s", str(found.get("error"))[:64])
            raise OpenIdError("code")
        token = found.get("id_token")
        if not isinstance(token, str):
            raise OpenIdError("id_token")
        return await self._checked(token)

    async def _checked(self, token: str) -> Mapping[str, Any]:
        decoded = None
        for fresh in (False, True):
            try:
                decoded = jwt.decode(token, await self._key_set(fresh), algorithms=_ALGORITHMS)
                break
            except InvalidKeyIdError:
                # The provider may have changed its key.
                continue
            except (JoseError, ValueError) as exc:
                log.warning("an ID token is not valid: %s", type(exc).__name__)
                raise OpenIdError("signature") from None
        if decoded is None:
            raise OpenIdError("key")
        claims: Mapping[str, Any] = decoded.claims
        registry = jwt.JWTClaimsRegistry(
            now=self._clock() // 1000,
            leeway=_LEEWAY,
            iss={"essential": True, "value": self.issuer},
            sub={"essential": True},
            aud={"essential": True, "value": self._client_id},
            exp={"essential": True},
            iat={"essential": True},
        )
        try:
            registry.validate(dict(claims))
        except JoseError as exc:
            log.warning("an ID token does not hold: %s", exc.description or type(exc).__name__)
            raise OpenIdError("claims") from None
        if not 0 < len(claims["sub"]) <= _LONGEST_SUBJECT or "\0" in claims["sub"]:
            raise OpenIdError("claims")
        audience = claims["aud"]
        if isinstance(audience, list) and len(audience) > 1 and claims.get("azp") != self._client_id:
            raise OpenIdError("claims")
        return claims

    async def _description(self) -> _Described:
        known = self._described
        if known is not None and time.monotonic() - known.at < _KEPT:
            return known
        status, found = await self._ask("GET", f"{self.issuer.rstrip('/')}/.well-known/openid-configuration")
        names = ("authorization_endpoint", "token_endpoint", "jwks_uri")
        urls = [found.get(name) for name in names]
        # Of a provider whose issuer ends with a slash, the setting has lost it.
        issuer = str(found.get("issuer"))
        same = issuer.rstrip("/") == self.issuer.rstrip("/")
        if status != 200 or not same or not all(isinstance(url, str) for url in urls):
            log.error("the OpenID provider's description is not one of the issuer %s", self.issuer)
            raise ProviderAway
        self.issuer = issuer
        authorization, token, jwks = map(str, urls)
        self._described = _Described(authorization, token, jwks, time.monotonic())
        return self._described

    async def _key_set(self, fresh: bool) -> KeySet:
        known, now = self._keys, time.monotonic()
        if known is not None and now - known[1] < (_AGAIN if fresh else _KEPT):
            return known[0]
        status, found = await self._ask("GET", (await self._description()).jwks)
        keys = found.get("keys")
        if status != 200 or not isinstance(keys, list):
            raise ProviderAway
        usable = [key for key in keys if isinstance(key, dict) and key.get("kty") in _KEY_TYPES]
        try:
            key_set = KeySet.import_key_set({"keys": [key for key in usable if key.get("use", "sig") == "sig"]})
        except (JoseError, ValueError):
            raise ProviderAway from None
        self._keys = key_set, now
        return key_set

    async def _ask(self, method: str, url: str, **options: Any) -> tuple[int, Mapping[str, Any]]:
        """Status and JSON object of an answer. Raises ProviderAway."""
        if not self._is_own(url):
            log.error("the OpenID provider names a URL of another host than its issuer's: it is not asked")
            raise ProviderAway
        try:
            async with self._client.stream(method, url, headers={"accept": "application/json"}, **options) as answer:
                status, body = answer.status_code, bytearray()
                async for chunk in answer.aiter_bytes():
                    body += chunk
                    if len(body) > _LARGEST:
                        raise ProviderAway
            found = orjson.loads(bytes(body))
        except (httpx.HTTPError, httpx.InvalidURL) as exc:
            log.warning("the OpenID provider does not answer: %s", type(exc).__name__)
            raise ProviderAway from None
        except orjson.JSONDecodeError:
            log.warning("the OpenID provider answers with something else than JSON")
            raise ProviderAway from None
        return status, found if isinstance(found, dict) else {}

    def _is_own(self, url: str) -> bool:
        try:
            own, other = httpx.URL(self.issuer), httpx.URL(url)
        except httpx.InvalidURL:
            return False
        return (own.scheme, own.host, own.port) == (other.scheme, other.host, other.port) and not other.userinfo
