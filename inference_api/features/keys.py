"""AUTH=keys: who asks is known by an API key of the policy; without a valid one a request is refused."""

from collections.abc import Callable, Iterator, Sequence
from time import time
from typing import Any, Literal

from pydantic import Field

from inference_api.core import Core
from inference_api.errors import AuthUnavailable, ModelForbidden, ModelNotFound, RouterError, Unauthorized
from inference_api.feature import Feature, Switch
from inference_api.http.head import RequestHead
from inference_api.http.pipeline import Resolve
from inference_api.models import Caller, RawHeaders
from inference_api.observe.account import Record
from inference_api.observe.exposition import Family
from inference_api.observe.families import counter
from inference_api.policy.document import shown_time
from inference_api.policy.keys import digests, is_well_formed
from inference_api.policy.options import Options as PolicyOptions
from inference_api.policy.snapshot import KeyCaller, Policy
from inference_api.policy.source import Policies
from inference_api.routing.entries import CatalogueEntry
from inference_api.routing.fleet import Model, may_use
from inference_api.settings import PREFIX, Group, Settings, SettingsError

# One text for all: it must not tell whether a key exists.
_NOT_VALID = "The API key is missing or not valid. Send it as 'Authorization: Bearer <key>'."
_RESULTS = ("ok", "invalid", "expired", "disabled", "forbidden", "unavailable")
_CREDENTIALS = (b"authorization", b"x-api-key")
# Begins the subprotocol of a WebSocket that holds a key
_PROTOCOL = b"openai-insecure-api-key."
# Under which a head has what was found for it: number of the policy, caller, whether the secret has been replaced, and
# whether nothing of it depends on the time
_NAME = "keys"
_Known = tuple[int, KeyCaller, bool, bool]


class Options(Group):
    auth: Literal["off", "keys"] = Field(
        default="off", description="keys: each request needs an API key of the policy; off: keys are not read"
    )


def build(core: Core, settings: Settings) -> Feature | None:
    """Off with AUTH=off. Raises SettingsError without a policy."""
    if settings.of(Options).auth == "off":
        return None
    policies = core.provided(Policies)
    if policies is None:
        raise SettingsError(f"{PREFIX}AUTH='keys': needs {PREFIX}POLICY; set it to a policy file, or to registry")
    if "x-api-key" in settings.forward_headers:
        why = f"{PREFIX}AUTH=keys reads keys from x-api-key, and backends must not get them; remove it"
        raise SettingsError(f"{PREFIX}FORWARD_HEADERS={','.join(sorted(settings.forward_headers))!r}: {why}")
    core.callers_have_keys = True
    keys = Keys(policies, [pepper.encode() for pepper in settings.of(PolicyOptions).peppers])
    return Feature(
        "keys",
        identify=keys.identify,
        resolve=keys.resolve,
        annotate=keys.annotate,
        collect=keys.collect,
        ready=keys.ready,
    )


class Keys:
    """Identifies callers by their keys. `clock` gives Unix seconds."""

    def __init__(self, policies: Policies, peppers: Sequence[bytes] = (), clock: Callable[[], float] = time) -> None:
        self._policies = policies
        self._peppers = tuple(peppers)
        self._clock = clock
        self._results = dict.fromkeys(_RESULTS, 0)
        self.ok = 0

    def identify(self, head: RequestHead) -> Caller:
        policy = self._policies.current
        known: _Known | None = head.notes.get(_NAME)
        # A head that is repeated has the same key; with another policy it is looked up again.
        if known is None or policy is None or known[0] != policy.number:
            known = self._look_up(policy, head)
        _, caller, is_replaced, is_plain = known
        if not is_plain:
            self._check(caller, is_replaced)
        return caller

    def _look_up(self, policy: Policy | None, head: RequestHead) -> "_Known":
        if policy is None:
            self._results["unavailable"] += 1
            raise AuthUnavailable
        found = next(
            (found for one in self._digests(policy, head.headers) if (found := policy.find(one)) is not None), None
        )
        if found is None:
            raise self._refused("invalid", _NOT_VALID)
        caller, is_replaced = found
        is_plain = not (is_replaced or caller.is_disabled) and caller.expires is None
        known = head.notes[_NAME] = policy.number, caller, is_replaced, is_plain
        return known

    def _digests(self, policy: Policy, headers: RawHeaders) -> Iterator[bytes]:
        """Those of the key in the head."""
        key = key_of(headers)
        return iter(()) if key is None or not is_well_formed(key) else digests(key, policy.kinds, self._peppers)

    def _check(self, caller: KeyCaller, is_replaced: bool) -> None:
        end = caller.end(self._clock(), is_replaced)
        if end is None:
            return
        shown, at = f"{caller.name!r} ({caller.id})", shown_time(end.at)
        if end.kind == "expired":
            raise self._refused("expired", f"The API key {shown} expired at {at}.", "api_key_expired")
        if end.kind == "replaced":
            message = f"This secret of the API key {shown} was replaced; it was valid until {at}."
            raise self._refused("expired", message, "api_key_expired")
        raise self._refused("disabled", f"The API key {shown} is disabled.", "api_key_disabled")

    def _refused(self, result: str, message: str, code: str = Unauthorized.code) -> RouterError:
        self._results[result] += 1
        return Unauthorized(message, code)

    def resolve(self, resolve: Resolve) -> Resolve:
        def resolved(name: str, caller: Caller | None) -> Model:
            if not isinstance(caller, KeyCaller) or caller.allows_all:
                return resolve(name, caller)
            try:
                model = resolve(name, caller)
            except ModelNotFound:
                raise ModelForbidden(name) from None
            if not caller.may_use(model.name) or (model.members and not may_use(caller, model)):
                raise ModelForbidden(name)
            return model

        return resolved

    def annotate(self, record: Record, extra: dict[str, Any]) -> None:
        # By their places: reading a field by name costs ten times as much.
        status, caller = record[5], record[16]
        if not isinstance(caller, KeyCaller):
            return
        if status == 403 and record.code == ModelForbidden.code:
            self._results["forbidden"] += 1
        else:
            self.ok += 1
        extra.update(caller.fields)

    def collect(self) -> Iterator[Family]:
        series = [((result,), count) for result, count in {**self._results, "ok": self.ok}.items()]
        yield counter("auth", "Requests that need a key, by what became of it.", ("result",), series)

    def ready(self) -> str | None:
        return "auth_unavailable" if self._policies.current is None else None


def key_of(headers: RawHeaders) -> bytes | None:
    """The key of a request: that of `Authorization: Bearer`, else of x-api-key, else of a WebSocket's subprotocol.

    None: none, or a header given twice.
    """
    given = [pair for pair in headers if pair[0] in _CREDENTIALS]
    values = dict(given)
    if len(values) < len(given):
        return None
    scheme, _, key = values.get(b"authorization", b"").partition(b" ")
    if scheme.lower() == b"bearer":
        return key.strip()
    return values.get(b"x-api-key") or _of_protocols(headers)


def _of_protocols(headers: RawHeaders) -> bytes | None:
    """The key of a WebSocket's client that cannot set headers, as a browser's."""
    offered = b",".join(value for name, value in headers if name == b"sec-websocket-protocol").split(b",")
    keys = [one.strip().removeprefix(_PROTOCOL) for one in offered if one.strip().startswith(_PROTOCOL)]
    return keys[0] if len(keys) == 1 else None


def refuse(settings: Settings) -> Callable[[CatalogueEntry], str | None] | None:
    return _passes_keys_on if settings.of(Options).auth == "keys" else None


def _passes_keys_on(entry: CatalogueEntry) -> str | None:
    if entry.credentials != "passthrough":
        return None
    return f"credentials: passthrough would send the callers' keys to its backends; {PREFIX}AUTH=keys refuses that"


FEATURE = Switch(build, Options, refuse=refuse)
