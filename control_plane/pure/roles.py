"""Who may do what: roles on the platform and in organisations, and what each permission reaches.

A role that a permission does not name has none of it.
"""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Literal, NamedTuple, TypeAlias

PlatformRole = Literal["admin", "operator", "viewer"]
OrganisationRole = Literal["owner", "admin", "member", "viewer"]
PLATFORM_ROLES: tuple[PlatformRole, ...] = ("admin", "operator", "viewer")
# From the one that may do most
ORGANISATION_ROLES: tuple[OrganisationRole, ...] = ("owner", "admin", "member", "viewer")
# all: of every organisation and of none; organisation: of the own one; own: what the caller has made or is
Reach = Literal["all", "organisation", "own"]
Permission: TypeAlias = Literal[
    "models.see",
    "backends.see",
    "backends.operate",
    "catalogue.write",
    "prices.write",
    "settings.see",
    "settings.write",
    "organisations.see",
    "organisations.write",
    "organisations.rename",
    "members.see",
    "members.write",
    "limits.write",
    "keys.see",
    "keys.write",
    "usage.see",
    "requests.see",
    "prompts.see",
    "prompts.use",
    "prompts.draft",
    "prompts.write",
    "audit.see",
    "audit.export",
]
Grants = Mapping[str, Reach]


def _grants(platform: str, **organisation: Reach) -> Grants:
    """`platform`: initials of the roles there that have it all."""
    found: dict[str, Reach] = {f"platform:{role}": "all" for role in PLATFORM_ROLES if role[0] in platform}
    return MappingProxyType({**found, **organisation})


def _everyone(platform: str, reach: Reach = "organisation") -> Grants:
    return _grants(platform, owner=reach, admin=reach, member=reach, viewer=reach)


GRANTS: Mapping[Permission, Grants] = MappingProxyType(
    {
        # In an organisation: the models that it may use, and their state only.
        "models.see": _everyone("aov"),
        "backends.see": _grants("aov"),
        # Drain, take out, return, reset a circuit; later start, stop, scale, test, read logs.
        "backends.operate": _grants("ao"),
        "catalogue.write": _grants("ao"),
        "prices.write": _grants("a"),
        "settings.see": _grants("a"),
        # Service tokens, and limits and budgets of the platform, too.
        "settings.write": _grants("a"),
        "organisations.see": _everyone("av"),
        # Users and their roles on the platform, too.
        "organisations.write": _grants("a"),
        "organisations.rename": _grants("a", owner="organisation"),
        "members.see": _grants("av", owner="organisation", admin="organisation"),
        # An admin of an organisation changes no owner.
        "members.write": _grants("a", owner="organisation", admin="organisation"),
        "limits.write": _grants("a", owner="organisation", admin="organisation"),
        # A viewer of the platform sees ids only.
        "keys.see": _grants("av", owner="organisation", admin="organisation", member="own"),
        "keys.write": _grants("a", owner="organisation", admin="organisation", member="own"),
        "usage.see": _grants("aov", owner="organisation", admin="organisation", member="own", viewer="organisation"),
        "requests.see": _grants("aov", owner="organisation", admin="organisation", member="own"),
        "prompts.see": _everyone("aov"),
        "prompts.use": _grants("ao", owner="organisation", admin="organisation", member="organisation"),
        # New versions; labels say which of them are used.
        "prompts.draft": _grants("a", owner="organisation", admin="organisation", member="organisation"),
        "prompts.write": _grants("a", owner="organisation", admin="organisation"),
        "audit.see": _grants("aov", owner="organisation", admin="organisation", member="own"),
        "audit.export": _grants("a", owner="organisation", admin="organisation"),
    }
)


class Scope(NamedTuple):
    """What a permission reaches for one caller: everything, whole organisations, and in others the own objects."""

    everything: bool
    organisations: frozenset[str] = frozenset()
    own: frozenset[str] = frozenset()

    @property
    def empty(self) -> bool:
        return not (self.everything or self.organisations or self.own)

    def covers(self, organisation: str | None, owner: str | None = None, user: str | None = None) -> bool:
        """Whether it reaches an object of `organisation`, owned by `owner`, for the caller `user`."""
        if self.everything or organisation in self.organisations:
            return True
        return organisation in self.own and owner is not None and owner == user


class Principal(NamedTuple):
    """Who acts. `user`: name of the user, or of the maker of a token. `roles`: by organisation.

    `session`: id of the session. `scopes`: of a service token, which has no other rights.
    """

    kind: Literal["user", "token", "router", "system"]
    user: str | None = None
    platform_role: str | None = None
    roles: Mapping[str, str] = MappingProxyType({})
    session: str | None = None
    token: str | None = None
    scopes: frozenset[str] = frozenset()

    def scope(self, permission: Permission) -> Scope:
        grants = GRANTS[permission]
        if f"platform:{self.platform_role}" in grants:
            return Scope(True)
        reaches = {organisation: grants.get(role) for organisation, role in self.roles.items()}
        return Scope(
            False,
            frozenset(name for name, reach in reaches.items() if reach == "organisation"),
            frozenset(name for name, reach in reaches.items() if reach == "own"),
        )

    def may(self, permission: Permission, organisation: str | None = None, owner: str | None = None) -> bool:
        return self.scope(permission).covers(organisation, owner, self.user)


SYSTEM = Principal("system", platform_role="admin")


def is_within(rights: Principal, other: Principal) -> bool:
    """Whether all that `rights` allow is allowed to `other`, too."""
    role, own = rights.platform_role, other.platform_role
    if role is not None and (own is None or _rank(PLATFORM_ROLES, own) > _rank(PLATFORM_ROLES, role)):
        return False
    return own == "admin" or all(
        organisation in other.roles
        and _rank(ORGANISATION_ROLES, other.roles[organisation]) <= _rank(ORGANISATION_ROLES, role)
        for organisation, role in rights.roles.items()
    )


def lower(ranking: Sequence[str], *roles: str) -> str:
    """The one of them that may do least."""
    return max(roles, key=ranking.index)


def _rank(ranking: Sequence[str], role: str) -> int:
    return ranking.index(role)
