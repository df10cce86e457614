"""Prompts: versions that never change, and labels that say which of them is used."""

from collections.abc import Callable, Collection, Mapping
from typing import Annotated, Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from sqlalchemy import ColumnElement, Row, delete, func, insert, or_, select, true, update
from sqlalchemy.ext.asyncio import AsyncConnection

from control_plane.data.tables import organisations, prompt_labels, prompt_versions, prompts
from control_plane.errors import Forbidden, Invalid, NotFound, Problem, Refused, problems_of
from control_plane.plane import Act, Plane
from control_plane.pure.roles import Permission, Principal
from control_plane.pure.times import shown
from control_plane.services import audit, policy
from inference_api.policy.document import Label, Message, Name, Variable, VariableName, Version
from inference_api.policy.reading import PolicyError, check_variables

# Versions of one prompt: routers get all of them.
MOST_VERSIONS = 1000
Check = Callable[[Mapping[str, Any] | None], None]
_LABEL: TypeAdapter[str] = TypeAdapter(Label)


class PromptBody(BaseModel):
    model_config = ConfigDict(frozen=True)

    name: Name = Field(examples=["support"])
    organisation: Name | None = Field(default=None, description="only its callers may use it; null: everyone")


class VersionBody(BaseModel):
    """Either `messages` or `text`. `{{name}}` stands for a variable, which must be declared."""

    model_config = ConfigDict(
        frozen=True,
        json_schema_extra={
            "examples": [
                {
                    "messages": [{"role": "user", "content": "Explain {{topic}} in one sentence."}],
                    "variables": {"topic": {"required": True}},
                    "note": "shorter",
                }
            ]
        },
    )

    messages: Annotated[tuple[Message, ...], Field(min_length=1)] | None = None
    text: str | None = None
    variables: dict[VariableName, Variable] = {}
    note: Annotated[str, Field(max_length=2000)] | None = None


async def listed(plane: Plane, act: Act, limit: int, after: str | None) -> list[dict[str, Any]]:
    """By name: those that the caller may see, and have not ended; one more than `limit`."""
    query = select(prompts).where(prompts.c.ended_at.is_(None), _visible(act.principal))
    if after is not None:
        query = query.where(prompts.c.name > after)
    async with plane.database.main.read() as connection:
        rows = (await connection.execute(query.order_by(prompts.c.name).limit(limit + 1))).all()
        return await _shown(connection, rows)


async def found(plane: Plane, act: Act, name: str) -> dict[str, Any]:
    """Raises NotFound."""
    async with plane.database.main.read() as connection:
        return (await _shown(connection, [await _find(connection, act, name)]))[0]


async def create(plane: Plane, act: Act, body: PromptBody) -> dict[str, Any]:
    """Raises Refused."""
    async with plane.change(policy.DOCUMENT) as connection:
        await _refuse_organisation(connection, act.principal, body.organisation)
        known = (await connection.execute(select(prompts.c.name).where(prompts.c.name == body.name))).first()
        if known is not None:
            message = f"The name {body.name!r} is taken by a prompt, or was once. Choose another one."
            raise Refused(409, "name_taken", message, param="name")
        values = {**body.model_dump(), "created_at": act.at, "created_by": act.principal.user}
        await connection.execute(insert(prompts).values(revision=await policy.revision_of(connection), **values))
        what = audit.Object("prompt", body.name, body.organisation)
        await audit.record(connection, act, "prompt.create", what, None, body.model_dump())
        return (await _shown(connection, [await _find(connection, act, body.name)]))[0]


async def end(plane: Plane, act: Act, name: str, check: Check) -> None:
    """Take a prompt out of the policy, for ever. Raises Refused."""
    async with plane.change(policy.DOCUMENT) as connection:
        row = await _writable(connection, act, name, "prompts.write")
        check((await _shown(connection, [row]))[0])
        await _touch(connection, name, ended_at=act.at)
        await audit.record(connection, act, "prompt.end", audit.Object("prompt", name, row.organisation))


async def versions(plane: Plane, act: Act, name: str, limit: int, after: int | None) -> list[dict[str, Any]]:
    """The newest first; one more than `limit`. Raises NotFound."""
    query = select(prompt_versions).where(prompt_versions.c.prompt == name)
    if after is not None:
        query = query.where(prompt_versions.c.version < after)
    async with plane.database.main.read() as connection:
        await _find(connection, act, name)
        rows = await connection.execute(query.order_by(prompt_versions.c.version.desc()).limit(limit + 1))
        return [_version(row) for row in rows]


async def version(plane: Plane, act: Act, name: str, number: int) -> dict[str, Any]:
    """Raises NotFound."""
    query = select(prompt_versions).where(prompt_versions.c.prompt == name, prompt_versions.c.version == number)
    async with plane.database.main.read() as connection:
        await _find(connection, act, name)
        row = (await connection.execute(query)).one_or_none()
    if row is None:
        raise NotFound("version", f"{name}@{number}")
    return _version(row)


async def add_version(plane: Plane, act: Act, name: str, body: VersionBody) -> dict[str, Any]:
    """The next version. Raises Refused."""
    content = _content(body)
    async with plane.change(policy.DOCUMENT) as connection:
        row = await _writable(connection, act, name, "prompts.draft")
        query = select(func.max(prompt_versions.c.version)).where(prompt_versions.c.prompt == name)
        number = ((await connection.execute(query)).scalar_one() or 0) + 1
        if number > MOST_VERSIONS:
            raise Invalid(Problem("version", f"a prompt has at most {MOST_VERSIONS} versions; make a new prompt"))
        policy.refuse_without_room(plane, len(str(content)))
        values = {"body": content, "note": body.note, "created_at": act.at, "created_by": act.principal.user}
        await connection.execute(insert(prompt_versions).values(prompt=name, version=number, **values))
        await _touch(connection, name)
        # Not the text: prompts are not for the audit log.
        what = audit.Object("prompt", name, row.organisation)
        await audit.record(connection, act, "prompt.update", what, None, {"version": number, "note": body.note})
    return {
        "version": number,
        **content,
        "note": body.note,
        "created_at": shown(act.at),
        "created_by": values["created_by"],
    }


async def label(plane: Plane, act: Act, name: str, label: str) -> dict[str, Any]:
    """Raises NotFound."""
    async with plane.database.main.read() as connection:
        await _find(connection, act, name)
        found = await _label(connection, name, label)
    if found is None:
        raise NotFound("label", label)
    return found


async def labels(plane: Plane, act: Act, name: str) -> list[dict[str, Any]]:
    """By name. Raises NotFound."""
    query = select(prompt_labels).where(prompt_labels.c.prompt == name).order_by(prompt_labels.c.label)
    async with plane.database.main.read() as connection:
        await _find(connection, act, name)
        return [_moved(row) for row in await connection.execute(query)]


class Change(NamedTuple):
    """`at`: Unix milliseconds. `by`: a user, if it was one."""

    at: int
    by: str | None


async def latest_changes(plane: Plane, names: Collection[str]) -> dict[str, Change]:
    """By prompt: when its newest version was added or a label was moved, whichever was last."""
    found: dict[str, Change] = {}
    async with plane.database.main.read() as connection:
        for table, at, by in (
            (prompt_versions, prompt_versions.c.created_at, prompt_versions.c.created_by),
            (prompt_labels, prompt_labels.c.moved_at, prompt_labels.c.moved_by),
        ):
            last = select(table.c.prompt, func.max(at).label("at")).where(table.c.prompt.in_(names))
            newest = last.group_by(table.c.prompt).subquery()
            same = (table.c.prompt == newest.c.prompt) & (at == newest.c.at)
            for prompt, when, who in await connection.execute(select(table.c.prompt, at, by).join(newest, same)):
                if prompt not in found or when > found[prompt].at:
                    found[prompt] = Change(when, who)
    return found


async def put_label(
    plane: Plane, act: Act, name: str, label: str, number: int, check: Check
) -> tuple[dict[str, Any], bool]:
    """Point a label at a version; returns it, and whether it is new. Raises Refused."""
    try:
        _LABEL.validate_python(label)
    except ValidationError as exc:
        raise Invalid(Problem("label", problems_of(exc)[0].message)) from None
    async with plane.change(policy.DOCUMENT) as connection:
        row = await _writable(connection, act, name, "prompts.write")
        old = await _label(connection, name, label)
        check(old)
        query = select(prompt_versions.c.version).where(
            prompt_versions.c.prompt == name, prompt_versions.c.version == number
        )
        if (await connection.execute(query)).first() is None:
            raise Invalid(Problem("version", f"there is no version {number}"))
        values = {"version": number, "moved_at": act.at, "moved_by": act.principal.user}
        if old is None:
            await connection.execute(insert(prompt_labels).values(prompt=name, label=label, **values))
        else:
            await connection.execute(update(prompt_labels).where(_is(name, label)).values(**values))
        await _touch(connection, name)
        before = None if old is None else {"label": label, "version": old["version"]}
        what = audit.Object("prompt", name, row.organisation)
        await audit.record(connection, act, "prompt.update", what, before, {"label": label, "version": number})
        new = await _label(connection, name, label)
    assert new is not None
    return new, old is None


async def delete_label(plane: Plane, act: Act, name: str, label: str, check: Check) -> None:
    """Raises Refused."""
    async with plane.change(policy.DOCUMENT) as connection:
        row = await _writable(connection, act, name, "prompts.write")
        old = await _label(connection, name, label)
        if old is None:
            raise NotFound("label", label)
        check(old)
        await connection.execute(delete(prompt_labels).where(_is(name, label)))
        await _touch(connection, name)
        before = {"label": label, "version": old["version"]}
        await audit.record(connection, act, "prompt.update", audit.Object("prompt", name, row.organisation), before)


def _content(body: VersionBody) -> dict[str, Any]:
    """What routers get of a version. Raises Invalid."""
    content = body.model_dump(mode="json", exclude_unset=True, exclude={"note"}, exclude_none=False)
    content = {name: value for name, value in content.items() if value is not None}
    try:
        check_variables(Version.model_validate({"version": 1, **content}), "")
    except ValidationError as exc:
        raise Invalid(*(one._replace(param=one.param or "messages") for one in problems_of(exc))) from None
    except PolicyError as exc:
        place, _, reason = str(exc).partition(": ")
        raise Invalid(Problem(place.lstrip("."), reason)) from None
    return content


def _visible(principal: Principal) -> ColumnElement[bool]:
    """A prompt of no organisation is everyone's."""
    scope = principal.scope("prompts.see")
    if scope.everything:
        return true()
    return or_(prompts.c.organisation.is_(None), prompts.c.organisation.in_(scope.organisations))


async def _find(connection: AsyncConnection, act: Act, name: str) -> Row[Any]:
    query = select(prompts).where(prompts.c.name == name, prompts.c.ended_at.is_(None), _visible(act.principal))
    row = (await connection.execute(query)).one_or_none()
    if row is None:
        raise NotFound("prompt", name)
    return row


async def _writable(connection: AsyncConnection, act: Act, name: str, permission: Permission) -> Row[Any]:
    row = await _find(connection, act, name)
    if not act.principal.may(permission, row.organisation):
        raise Forbidden(f"Changing the prompt {name!r} so needs the permission {permission} there.")
    return row


async def _refuse_organisation(connection: AsyncConnection, principal: Principal, name: str | None) -> None:
    if name is not None:
        query = select(organisations.c.name).where(organisations.c.name == name, organisations.c.ended_at.is_(None))
        known = (await connection.execute(query)).first() is not None
        if not known or not principal.may("prompts.see", name):
            raise NotFound("organisation", name)
    if not principal.may("prompts.draft", name):
        raise Forbidden("Prompts are made by members of their organisation; those of none by admins of the platform.")


async def _touch(connection: AsyncConnection, name: str, **values: Any) -> None:
    """Note that the prompt differs in this revision of the policy."""
    revision = await policy.revision_of(connection)
    await connection.execute(update(prompts).where(prompts.c.name == name).values(revision=revision, **values))


async def _shown(connection: AsyncConnection, rows: Any) -> list[dict[str, Any]]:
    names = [row.name for row in rows]
    query = select(prompt_labels).where(prompt_labels.c.prompt.in_(names)).order_by(prompt_labels.c.label)
    labels: dict[str, dict[str, int]] = {}
    for one in await connection.execute(query):
        labels.setdefault(one.prompt, {})[one.label] = one.version
    newest = (
        select(prompt_versions.c.prompt, func.max(prompt_versions.c.version))
        .where(prompt_versions.c.prompt.in_(names))
        .group_by(prompt_versions.c.prompt)
    )
    latest = {name: number for name, number in await connection.execute(newest)}
    return [
        {
            "name": row.name,
            "organisation": row.organisation,
            "labels": labels.get(row.name, {}),
            "latest": latest.get(row.name),
            "created_at": shown(row.created_at),
            "created_by": row.created_by,
        }
        for row in rows
    ]


def _version(row: Row[Any]) -> dict[str, Any]:
    made = {"created_at": shown(row.created_at), "created_by": row.created_by}
    return {"version": row.version, **row.body, "note": row.note, **made}


def _is(name: str, label: str) -> ColumnElement[bool]:
    return (prompt_labels.c.prompt == name) & (prompt_labels.c.label == label)


async def _label(connection: AsyncConnection, name: str, label: str) -> dict[str, Any] | None:
    row = (await connection.execute(select(prompt_labels).where(_is(name, label)))).one_or_none()
    return None if row is None else _moved(row)


def _moved(row: Row[Any]) -> dict[str, Any]:
    return {"label": row.label, "version": row.version, "moved_at": shown(row.moved_at), "moved_by": row.moved_by}
