"""A router with the limits of a policy, for tests: callers by the name of their key, and a clock that stands."""

from collections.abc import Callable
from hashlib import sha256
from typing import Any

from inference_api.feature import Feature
from inference_api.features.limiting.amounts import Estimates
from inference_api.features.limiting.windows import Store
from inference_api.features.limits import Limiter
from inference_api.features.stores.memory import MemoryStore
from inference_api.features.stores.redis import RedisStore
from inference_api.http.head import RequestHead
from inference_api.models import Caller
from inference_api.policy.reading import read, run
from inference_api.policy.snapshot import Policy
from inference_api.policy.source import Policies

# 15 s into a minute
NOW = 1_795_862_415_000


def key(name: str, **more: Any) -> dict[str, Any]:
    """A key whose secret is its name."""
    return {"id": name.ljust(12, "0"), "name": name, "digest": f"sha256:{sha256(name.encode()).hexdigest()}", **more}


def policy_of(**document: Any) -> Policy:
    return run(read(document, peppered=False))


class Limited:
    """The parts of a router with limits; `now` is what its clock shows, unless it has another or counts in `shared`."""

    def __init__(
        self,
        routers: int = 1,
        shared: RedisStore | None = None,
        on_failure: Any = "share",
        clock: Callable[[], int] | None = None,
        **document: Any,
    ) -> None:
        self.now = NOW
        self.policies = Policies("a test")
        self.policies.replace(policy_of(**document))
        self.store: Store = MemoryStore(clock=clock or (lambda: self.now)) if shared is None else shared
        self.limiter = Limiter(self.policies, self.store, Estimates(), routers, shared, on_failure)
        limits = self.limiter.feature()
        if shared is not None:
            shared.on_change(self.limiter.forget)
            limits = limits._replace(tasks=(shared.run,))
        self.features = [Feature("names", identify=self._identify), limits]

    def _identify(self, head: RequestHead) -> Caller | None:
        if head.authorization is None:
            return None
        assert self.policies.current is not None
        found = self.policies.current.find(sha256(head.authorization.removeprefix(b"Bearer ")).digest())
        assert found is not None
        return found[0]

    def used(self, name: str, per: int = 60) -> int:
        """What the counter of this name has counted."""
        return self.store.window(name, per * 1000).used(self.store.now())
