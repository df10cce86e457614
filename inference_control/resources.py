"""The resources of /api/v1 that the command line knows: paths, verbs and columns. Pure."""

from typing import Any, Literal, NamedTuple, get_args
from urllib.parse import quote

Verb = Literal["list", "get", "create", "set", "delete", "rotate"]
# How an object is changed: with a whole new one, or with what differs.
Change = Literal["put", "patch"]


class Resource(NamedTuple):
    """`key`: member that names an object. `columns`: members that a table has, in this order.

    `inside`: of which other resource its objects are a part; their names are then `OUTER/NAME`. `shown_only`: members
    that the API adds and does not take back. `create`: by a POST, or by a PUT of a new name. `slashes`: names may have
    some.
    """

    name: str
    columns: tuple[str, ...]
    verbs: tuple[Verb, ...]
    key: str = "name"
    change: Change = "patch"
    create: Literal["post", "put"] = "post"
    inside: str | None = None
    shown_only: frozenset[str] = frozenset()
    slashes: bool = False

    def path(self, name: str | None) -> str:
        """The path of an object, or (None; of what is inside of another, the name of that) of the list."""
        if self.inside is None:
            return f"/{self.name}" if name is None else f"/{self.name}/{quote(name, safe='/' if self.slashes else '')}"
        outer, _, inner = (name or "").partition("/")
        start = f"/{self.inside}/{quote(outer, safe='')}/{self.name}"
        return f"{start}/{quote(inner, safe='')}" if inner else start


def _resource(name: str, columns: str, verbs: str = "list get create set delete", **more: Any) -> Resource:
    known: tuple[Verb, ...] = get_args(Verb)
    return Resource(name, tuple(columns.split()), tuple(verb for verb in known if verb in verbs.split()), **more)


_ALL = "list get create set delete rotate"
_MEMBER = frozenset({"user", "title", "created_at"})
_LABEL = frozenset({"label", "moved_at", "moved_by"})
_BUDGET = frozenset({"id", "spent", "resets_at"})
_LIMIT = "id scope name requests tokens input_tokens output_tokens streams per"
_REQUEST = "at request_id model key_name outcome status attempts input_tokens output_tokens latency_ms"
_SEEN = frozenset(
    {
        *("last_activation_at", "was_ready_at", "state", "ready", "wanted", "reason", "since", "owner"),
        *("instances", "events"),
    }
)
_OVERRIDE = "id backend model action reason created_by expires_at ended_at acknowledged"

RESOURCES: dict[str, Resource] = {
    one.name: one
    for one in (
        _resource("models", "name aliases version owner backends", change="put", create="put", slashes=True),
        _resource("keys", "id name organisation user models state expires last_used_at", _ALL, key="id"),
        _resource("tokens", "id kind name scopes organisation role state expires", _ALL, key="id"),
        _resource("organisations", "name title models limits budget disabled"),
        _resource(
            "members", "user role title created_at", key="user", change="put", create="put", inside="organisations",
            shown_only=_MEMBER,
        ),
        _resource("users", "name email title platform_role disabled last_login_at"),
        _resource("limits", _LIMIT, key="id", change="put", shown_only=frozenset({"id"})),
        _resource(
            "budgets", "id scope name cost tokens requests per spent resets_at", key="id", change="put",
            shown_only=_BUDGET,
        ),
        _resource("prices", "model valid_from input cached_input output request", "list create", key="model"),
        _resource("prompts", "name organisation labels latest", "list get create delete"),
        _resource("versions", "version note created_at created_by", "list get create", key="version", inside="prompts"),
        _resource(
            "labels", "label version moved_at moved_by", "get create set delete", key="label", change="put",
            create="put", inside="prompts", shown_only=_LABEL,
        ),
        _resource("backends", "model backend state agree in_flight override", "list", key="backend"),
        _resource("routers", "instance version lost draining in_flight lag_ms", "list", key="instance"),
        _resource(
            "deployments", "model driver object state ready wanted reason", key="model", change="put", create="put",
            slashes=True, shown_only=_SEEN,
        ),
        _resource("model-actions", "", "create", key="model"),
        _resource("model-tests", "id model backend kind at by ok", "list", key="id"),
        _resource("pods", "model name state reason restarts", "list"),
        _resource("triage", "id model at by groups first", "list get create", key="id"),
        _resource("overrides", _OVERRIDE, "list get create delete", key="id"),
        _resource("metrics", "name title unit source parameters", "list get"),
        _resource("inspections", "id source ref at by", "list get create", key="id"),
        _resource("usage", "", "get"),
        _resource("requests", _REQUEST, "list get", key="id"),
        _resource("audit", "at actor action object organisation reason address", "list", key="id"),
        _resource(
            "settings", "key value source", "list get set delete", key="key", change="put",
            shown_only=frozenset({"key", "source"}),
        ),
        _resource("me", "", "get set"),
    )
}  # fmt: skip
