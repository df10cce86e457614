"""`control-plane users login-link NAME ...`: one-time URLs that log people in, by whoever has the database."""

import argparse
import asyncio
import sys

from control_plane.commands.running import act, ready
from control_plane.errors import NotFound
from control_plane.services import login_links


def add_to(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    link = commands.add_parser(
        "login-link",
        help="print a one-time URL that logs a user in",
        description="Print a URL for each user that logs in without a password or provider, once, for 15 minutes.",
    )
    link.add_argument("names", nargs="+", metavar="NAME", help="name of a user")
    link.set_defaults(run=_login_link)


def _login_link(arguments: argparse.Namespace) -> int:
    async def run() -> list[str]:
        async with ready() as plane:
            return [await login_links.make(plane, act(plane), name) for name in arguments.names]

    try:
        urls = asyncio.run(run())
    except NotFound:
        print(f"control-plane: no link: {', '.join(arguments.names)} must be users who may log in", file=sys.stderr)
        return 1
    print("\n".join(urls))
    return 0
