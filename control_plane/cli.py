"""The command line: the parser, and what is short. The other commands are in `commands`."""

import argparse
import asyncio
import sys
from collections.abc import Mapping
from pathlib import Path

from control_plane.commands import copy, users
from control_plane.data import schema
from control_plane.data.database import DatabaseError
from control_plane.plane import offline
from control_plane.settings import PREFIX, Settings, SettingsError, load_settings
from inference_api import __version__

_ABOUT = """\
The control plane of the inference routers: the registry for teams, with keys, organisations, limits, budgets, usage,
an API and a console. Every setting is an environment variable; `serve` has an option for each.
"""
_EXAMPLES = """\
examples:
  control-plane serve
      on http://127.0.0.1:8081, in SQLite files in this folder; the log has a one-time URL for the first admin

  CONTROL_PLANE_DATABASE_URL=postgresql://control@db/control control-plane migrate
      makes or upgrades the schema; then any number of `control-plane serve` run on it

The routers find it by INFERENCE_API_REGISTRY_URL=http://HOST:PORT and INFERENCE_API_REGISTRY_TOKEN.
"""


def main(argv: list[str] | None = None) -> int:
    """Run a command. Returns its exit code: 0 on success, 2 for an invalid configuration, others per command."""
    arguments = _parser().parse_args(argv)
    try:
        code: int = arguments.run(arguments)
    except (SettingsError, DatabaseError) as exc:
        for line in str(exc).splitlines():
            print(f"control-plane: {line}", file=sys.stderr)
        return 2
    return code


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("control-plane", description=_ABOUT, epilog=_EXAMPLES, formatter_class=raw)
    parser.add_argument("--version", action="version", version=f"control-plane {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    serve = commands.add_parser("serve", help="serve routers, /api/v1 and the console until SIGTERM")
    for name, field in Settings.model_fields.items():
        serve.add_argument(
            f"--{name.replace('_', '-')}",
            dest=name,
            metavar="VALUE",
            help=f"{field.description} ({PREFIX}{name.upper()})",
        )
    serve.set_defaults(run=_serve)
    migrate = commands.add_parser("migrate", help="upgrade the schema under a lock")
    migrate.add_argument(
        "--check", action="store_true", help="only say whether it is that of this release: exit 1 if not"
    )
    migrate.set_defaults(run=_migrate)
    bootstrap = commands.add_parser("bootstrap", help="make a platform admin, or give one another password")
    bootstrap.add_argument("--email", required=True, metavar="E", help="e-mail address for the login")
    bootstrap.add_argument("--name", metavar="N", help="name of the user; without it, as in the e-mail address")
    bootstrap.add_argument(
        "--password-file", type=Path, metavar="F", help="the password is its first line; without it, a one-time URL"
    )
    bootstrap.add_argument("--reset", action="store_true", help="another password for an admin who is there")
    bootstrap.set_defaults(run=_bootstrap)
    copy.add_to(commands.add_parser("copy", help="copy all but reports and sessions into an empty migrated database"))
    users.add_to(commands.add_parser("users", help="let people in whose password or provider does not"))
    _add_data_commands(commands)
    return parser


def _add_data_commands(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    taken = commands.add_parser("import", help="take over a catalogue or policy; what it does not name stays")
    taken.add_argument("file", type=Path, metavar="FILE", help="YAML or JSON, or the database of a registry-stub")
    taken.add_argument("--dry-run", action="store_true", help="only print what would change")
    taken.set_defaults(run=_import)
    export = commands.add_parser("export", help="write YAML that `import` and the router read")
    export.add_argument("what", choices=("models", "policy"))
    export.add_argument("--output", type=Path, metavar="FILE", help="without it, on stdout")
    export.set_defaults(run=_export)


def _serve(arguments: argparse.Namespace) -> int:
    settings = load_settings(options=_options(arguments))
    # Here: the other commands, and a setting that is wrong, need no web server.
    from control_plane import serving

    return serving.serve(settings)


def _migrate(arguments: argparse.Namespace) -> int:
    url = load_settings().url
    found = asyncio.run(schema.standings(url) if arguments.check else schema.migrate(url))
    for standing in found:
        state = (
            "is up to date"
            if standing.found == standing.wanted
            else "is later, and fits"
            if standing.later
            else f"{standing.found or 'empty'} -> {standing.wanted}"
        )
        print(f"{standing.part}: {state}")
    return 0 if not arguments.check or all(standing.fits for standing in found) else 1


def _bootstrap(arguments: argparse.Namespace) -> int:
    from control_plane.services import bootstrap

    settings = load_settings()

    async def run() -> str | None:
        if settings.upgrades:
            await schema.migrate(settings.url)
        schema.check(await schema.standings(settings.url))
        given = arguments.password_file
        password = None if given is None else bootstrap.read_password(given)
        async with offline(settings) as plane:
            return await bootstrap.make_admin(plane, arguments.email, arguments.name, password, arguments.reset)

    try:
        url = asyncio.run(run())
    except bootstrap.BootstrapError as exc:
        print(f"control-plane: {exc}", file=sys.stderr)
        return 1
    print(url or f"{arguments.email} is a platform admin and can log in")
    return 0


def _import(arguments: argparse.Namespace) -> int:
    from control_plane.commands import imports

    return imports.run(arguments)


def _export(arguments: argparse.Namespace) -> int:
    from control_plane.commands import exports

    return exports.run(arguments)


def _options(arguments: argparse.Namespace) -> Mapping[str, str]:
    given = {name: getattr(arguments, name) for name in Settings.model_fields}
    return {name: value for name, value in given.items() if value is not None}
