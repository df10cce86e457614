"""`inference-api prompts`: shows what a stored prompt puts into a request."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import httpx

from inference_api.commands.configuration import settings_of
from inference_api.errors import PromptNotFound, RouterError
from inference_api.policy.document import Version
from inference_api.policy.options import REGISTRY, Options
from inference_api.policy.reading import MAX_BYTES, PolicyError, read, run
from inference_api.policy.snapshot import Policy
from inference_api.policy.source import read_file
from inference_api.policy.templates import MEMBERS, Prompts, check_route
from inference_api.settings import PREFIX, Settings, SettingsError

# Seconds
_TIMEOUT = 10.0


def render(arguments: argparse.Namespace) -> int:
    """Print the members of a body. 1: there is no such prompt, or a variable is wrong. Raises SettingsError."""
    variables = dict(_variable(text) for text in arguments.var or ())
    prompts = Prompts(_policy(settings_of(arguments)).prompts)
    try:
        prompt = prompts.any(arguments.name)
        if prompt is None:
            raise PromptNotFound(arguments.name)
        template = prompts.template(prompt, arguments.version)
        route = arguments.route or ("completions" if template.is_text else "chat_completions")
        check_route(template, route)
        rendered = template.render(_typed(template.version, variables))
    except RouterError as exc:
        print(f"inference-api: {exc.message}", file=sys.stderr)
        return 1
    value = json.loads(rendered if template.is_text else b"[%b]" % rendered)
    print(json.dumps({MEMBERS[route]: value}, indent=2, ensure_ascii=False))
    return 0


def _variable(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise SettingsError(f"--var {text[:80]}: must be NAME=VALUE")
    return name, value


def _typed(version: Version, given: dict[str, str]) -> dict[str, Any]:
    """Values of the command line are text; a number is written as in JSON."""
    typed: dict[str, Any] = {**given}
    for name, text in given.items():
        if name in version.variables and version.variables[name].type == "number":
            try:
                typed[name] = json.loads(text)
            except ValueError:
                # Refused as what it is.
                continue
    return typed


def _policy(settings: Settings) -> Policy:
    options = settings.of(Options)
    if options.policy is None:
        raise SettingsError(f"{PREFIX}POLICY: is not set; set it to the file with the prompts, or to {REGISTRY}")
    try:
        if options.policy == REGISTRY:
            return run(read(_of_registry(settings), peppered=bool(options.peppers), ignored=set()))
        return read_file(Path(options.policy), peppered=bool(options.peppers))
    except PolicyError as exc:
        raise SettingsError(str(exc)) from None


def _of_registry(settings: Settings) -> str:
    url, token = settings.registry_url, settings.registry_token
    if url is None:
        raise SettingsError(f"{PREFIX}POLICY='registry': needs {PREFIX}REGISTRY_URL; set it to the URL of the registry")
    headers = {"authorization": f"Bearer {token.get_secret_value()}"} if token else {}
    try:
        answer = httpx.get(f"{url}/policy", headers=headers, timeout=_TIMEOUT, trust_env=False)
        answer.raise_for_status()
    except httpx.HTTPError as exc:
        raise PolicyError(f"the registry does not give the policy: {exc or type(exc).__name__}") from None
    if len(answer.content) > MAX_BYTES:
        raise PolicyError(f"the policy of the registry is larger than {MAX_BYTES} bytes")
    return answer.text
