"""The command line: serve, check, status, models, keys, prompts, demo."""

import argparse
import os
import sys
from typing import NoReturn, TypeAlias

from inference_api import __version__
from inference_api.app import GROUPS
from inference_api.commands import check, keys, models, prompts, serve, status
from inference_api.routing.catalogue import CatalogueError
from inference_api.routing.wording import suggestion
from inference_api.settings import PREFIX, SettingsError, fields_of

_ABOUT = """\
A thin OpenAI-compatible inference router: a client names a model, the router finds it in a registry or in a
static catalogue, chooses a backend, and relays the answer byte for byte.
"""

_EXAMPLE = """\
try it without a GPU:
  inference-api demo

serve your own engines (catalogue.yaml lists models and their URLs, see the README):
  inference-api serve --backend llama-3-8b=http://10.0.0.11:8000
  INFERENCE_API_CATALOGUE=catalogue.yaml inference-api serve
  curl http://127.0.0.1:8000/v1/models
"""
_INSTEAD = "An option stands for the variable of the same name."


def main(argv: list[str] | None = None) -> int:
    """Run a command. Returns its exit code: 0 on success, 2 for an invalid configuration, others per command."""
    arguments, unknown = _parser().parse_known_args(argv)
    if unknown:
        _refuse(arguments.parser, unknown)
    try:
        code: int = arguments.run(arguments)
    except (SettingsError, CatalogueError) as exc:
        for line in str(exc).splitlines():
            print(f"inference-api: {line}", file=sys.stderr)
        return 2
    return code


def demo(arguments: argparse.Namespace) -> int:
    from inference_api.demo.run import run_demo

    given = arguments
    return run_demo(given.host, given.port, given.tokens_per_second, keys=given.keys, plain=given.plain)


def _refuse(parser: argparse.ArgumentParser, unknown: list[str]) -> NoReturn:
    """Fail with the usage of the command; argparse would show that of the program."""
    known = [option for action in parser._actions for option in action.option_strings]
    near = [suggestion(one.partition("=")[0], known) for one in unknown if one.startswith("--")]
    hint = f"; did you mean {near[0]}?" if near and near[0] else ""
    parser.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("inference-api", description=_ABOUT, epilog=_EXAMPLE, formatter_class=raw)
    parser.add_argument("--version", action="version", version=f"inference-api {__version__}")
    commands = parser.add_subparsers(required=True, metavar="command")
    _add_serve(commands)
    _add_check(commands)
    _add_status(commands)
    _add_models(commands)
    _add_keys(commands)
    _add_prompts(commands)
    _add_demo(commands)
    return parser


_Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def _add_serve(commands: _Commands) -> None:
    text = "serve requests until SIGTERM; SIGHUP reads catalogue and credentials again"
    command = _configured(commands, "serve", text)
    command.set_defaults(run=serve.run)
    command.add_argument("--host", help="listen address")
    command.add_argument("--port", help="listen port")
    command.add_argument("--registry-url", metavar="URL", help="base URL of the model registry")
    command.add_argument(
        "--backend",
        metavar="NAME=URL",
        action="append",
        help="a model and its backend, instead of a catalogue; repeatable, several of one NAME are its backends",
    )


def _add_check(commands: _Commands) -> None:
    text = "validate settings and catalogue without starting; exit 2 if they are not valid"
    command = _configured(commands, "check", text)
    command.set_defaults(run=check.run)
    command.add_argument(
        "--connect", action="store_true", help="request each backend's /v1/models; exit 1 if one lacks its model"
    )


def _add_status(commands: _Commands) -> None:
    text = "show the backends of a running router; exit 1 if one is not ready, 3 if the router does not answer"
    command = _added(commands, "status", text, f"{text[0].upper()}{text[1:]}.")
    command.set_defaults(run=status.run)
    command.add_argument(
        "--url", default="http://127.0.0.1:8000", help="the router, or its OPS_PORT if set (default: %(default)s)"
    )
    command.add_argument("--json", action="store_true", help="print the router's answer to GET /backends")


def _add_models(commands: _Commands) -> None:
    command = _configured(commands, "models", "list the models of the catalogue, or of a running router")
    command.set_defaults(run=models.run)
    command.add_argument("--url", help="list the models of this router; exit 3 if it does not answer")


def _add_keys(commands: _Commands) -> None:
    text = "make an API key, or say whether one is valid"
    group = _added(commands, "keys", text, f"{text[0].upper()}{text[1:]}.")
    ways = group.add_subparsers(required=True, metavar="command")
    text = "print a new key once, and its entry for a policy; INFERENCE_API_KEY_PEPPER makes an HMAC of its digest"
    made = _added(ways, "new", text, f"{text[0].upper()}{text[1:]}.")
    made.set_defaults(run=keys.new)
    made.add_argument("--name", required=True, help="name of the key, for people")
    made.add_argument("--organisation", help="the organisation that it is of")
    made.add_argument("--user", help="the user whose key it is")
    made.add_argument("--models", metavar="PATTERN", action="append", help="a model that it may use; repeatable")
    made.add_argument("--expires", metavar="TIME", help="when it ends, such as 2027-01-31T00:00:00Z")
    made.add_argument("--json", action="store_true", help="print key and entry as JSON")
    text = "read one key from stdin; exit 0 if it is valid, 1 if it is not"
    verified = _added(ways, "verify", text, f"{text[0].upper()}{text[1:]}.")
    verified.set_defaults(run=keys.verify)
    verified.add_argument("--policy", metavar="FILE", help="the policy (default: INFERENCE_API_POLICY)")
    # Anything else would be a key that others see; it is refused without being shown.
    verified.add_argument("source", nargs="?", metavar="-", help="stdin")


def _add_prompts(commands: _Commands) -> None:
    text = "show what a stored prompt puts into a request"
    group = _added(commands, "prompts", text, f"{text[0].upper()}{text[1:]}.")
    ways = group.add_subparsers(required=True, metavar="command")
    text = "print the members of a body that a prompt of INFERENCE_API_POLICY makes; exit 1 if it cannot be rendered"
    command = _added(ways, "render", text, f"{text[0].upper()}{text[1:]}.")
    command.set_defaults(run=prompts.render)
    command.add_argument("name", metavar="NAME", help="name of the prompt")
    command.add_argument("--version", metavar="V", help="number or label (default: production)")
    command.add_argument("--var", metavar="K=V", action="append", help="a variable and its value; repeatable")
    command.add_argument(
        "--route",
        metavar="R",
        choices=("chat_completions", "responses", "completions"),
        help="chat_completions, responses or completions (default: by the version)",
    )


def _add_demo(commands: _Commands) -> None:
    text = "start demo engines, two routers and the control plane with its console, on this machine"
    command = _added(commands, "demo", text, f"{text[0].upper()}{text[1:]}. Ctrl-C stops all of them.")
    command.set_defaults(run=demo)
    command.add_argument("--host", default="127.0.0.1", help="address of the routers")
    command.add_argument("--port", type=int, default=8000, help="port of the first router")
    command.add_argument("--tokens-per-second", type=float, default=40, help="speed of an engine, per request")
    plain = "one router, engines and a registry, and no traffic; without the extra `control-plane` it is always so"
    command.add_argument("--plain", action="store_true", help=plain)
    keys = "with --plain: ask for API keys, with limits, prices and usage records; else they are always asked for"
    command.add_argument("--keys", action="store_true", help=keys)


def _configured(commands: _Commands, name: str, text: str) -> argparse.ArgumentParser:
    """Add a command that reads settings and a catalogue."""
    command = _added(commands, name, text, f"{text[0].upper()}{text[1:]}. {_INSTEAD}")
    command.epilog = "environment variables:\n" + "\n".join(
        f"  {PREFIX + name.upper():<36} {field.description} (default: {_shown(field.default)})"
        for name, field in fields_of(GROUPS).items()
    )
    command.add_argument("--catalogue", metavar="FILE", help="the static catalogue, YAML or JSON")
    return command


def _added(commands: _Commands, name: str, text: str, description: str) -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    command = commands.add_parser(name, help=text, description=description, formatter_class=raw)
    command.set_defaults(parser=command)
    return command


def _shown(default: object) -> str:
    if default is None:
        return "unset"
    if isinstance(default, frozenset):
        return ",".join(map(str, sorted(default))) or "none"
    return f"packaged {os.path.basename(default)}" if isinstance(default, os.PathLike) else str(default)
