"""Organisations and their people, as rows, and clients that act for them."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
from sqlalchemy import insert, update

from control_plane.data.tables import memberships, organisations
from tests.control_plane.conftest import NOON, Running, management_token


async def organisation(running: Running, name: str, **fields: Any) -> None:
    """An organisation that is there, with what else its row has."""
    async with running.plane.change("policy") as connection:
        await connection.execute(
            insert(organisations).values(
                **{"name": name, "disabled": False, "limits": [], "created_at": NOON, **fields}
            )
        )


async def changed(running: Running, name: str, **fields: Any) -> None:
    async with running.plane.change("policy") as connection:
        await connection.execute(update(organisations).where(organisations.c.name == name).values(**fields))


@asynccontextmanager
async def somebody(
    running: Running, name: str, platform_role: str | None = None, **roles: str
) -> AsyncIterator[httpx.AsyncClient]:
    """A client with a management token of a user with these roles, by organisation (`team_a`: in `team-a`)."""
    token = await management_token(running.plane.database, name, platform_role)
    async with running.plane.database.main.write() as connection:
        for where, role in roles.items():
            await connection.execute(
                insert(memberships).values(organisation=where.replace("_", "-"), user=name, role=role, created_at=NOON)
            )
    headers = {"authorization": f"Bearer {token}"}
    async with httpx.AsyncClient(
        verify=False, base_url=running.url, timeout=60, trust_env=False, headers=headers
    ) as client:
        yield client
